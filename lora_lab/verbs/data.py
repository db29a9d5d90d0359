"""`lora-lab data`: the rows as the model sees them, and whether they can be trained on."""

from __future__ import annotations

from pathlib import Path

from lora_lab.config.run import RunConfig
from lora_lab.data import build, check
from lora_lab.data.dataset import Stream
from lora_lab.report import data_report
from lora_lab.run.prepared import find_base, say_template
from lora_lab.runtime import console

_HTML_ROWS = 50


def data(config: RunConfig, rows: int, html: str | None) -> bool:
    """Show `rows` rows of each data set in the terminal and more in a page; True if no check found an error."""
    found = find_base(config)
    say_template(found.encoder)
    built = build.build(config.data, found.encoder, refuse=False)
    if isinstance(built.train, Stream):
        console.say("train", built.train)
        built = build.Data(built.train.sample(), built.held_out)
        console.say("sample", f"{built.train.rows_read} lines, evenly spread, are looked at")
    parts = [part for part in (built.train, built.held_out) if part is not None]
    findings = check.check(built, config.data, found.encoder)
    overviews = [data_report.overview(part, found.encoder, _HTML_ROWS) for part in parts]
    data_report.show(overviews, findings, config.data, rows)
    page = Path(html) if html else Path(config.run_dir).parent / "data.html"
    data_report.write_html(page, overviews, findings, config.data, config.name)
    console.say("page", page)
    errors = sum(finding.level == "error" for finding in findings)
    console.say("data", f"{errors} {'error' if errors == 1 else 'errors'}: see above" if errors else "no errors")
    return not errors
