"""`lora-lab data`: the rows as the model sees them, and whether they can be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.errors import ConfigError
from lora_lab.verbs.base import Option, Told, Verb, Word, before_libraries

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig

_ROWS, _HTML_ROWS = 3, 50

_EXAMPLES = """\
  lora-lab data recipe=demo                       rows as the model sees them, lengths, labels, checks; and as a page
  lora-lab data recipe=demo data.train=my.jsonl   the same for your rows
  lora-lab data recipe=demo --rows 10 --html look.html
  lora-lab data recipe=sentiment check=labels     labels of training rows that are likely to be wrong, by cross-validation

Trained-on text is green (between brackets when piped). Exit code 1 if a check finds an error: rows that cannot be used,
answers that do not end, prompts that differ between training and inference. lora-lab train makes the same checks first
(data.check=error, warn or off).
"""


def _run(told: Told) -> int:
    from lora_lab.config import compose

    check = told.word("check")
    if check not in (None, "labels"):
        raise ConfigError(f"check={check}: there is check=labels. Without it everything else is checked.")
    config = compose.compose(told.overrides, told.options.config_dir)
    before_libraries()
    rows, html = told.options.rows, told.options.html
    if check:
        if rows is not None or html is not None:
            raise ConfigError("check=labels: writes rows of its own. Drop --rows and --html.")
        _check_labels(config)
        return 0
    return 0 if _look(config, _ROWS if rows is None else rows, html) else 1


def _check_labels(config: RunConfig) -> None:
    from lora_lab.run import labelling

    place = Path(config.run_dir).parent / "suspicious_labels.jsonl"
    place.parent.mkdir(parents=True, exist_ok=True)
    labelling.check_labels(config, place)


def _look(config: RunConfig, rows: int, html: str | None) -> bool:
    """Show `rows` rows of each data set in the terminal and more in a page; True if no check found an error."""
    from lora_lab.data import build, check
    from lora_lab.data.dataset import Dataset, Stream
    from lora_lab.report import data_report
    from lora_lab.run.prepared import find_base, say_template
    from lora_lab.runtime import console

    found = find_base(config)
    say_template(found.encoder)
    built = build.build(config.data, found.encoder, refuse=False)
    if isinstance(built.train, Stream):
        console.say("train", built.train)
        sample = built.train.sample()
        built = build.Data(sample, built.held_out)
        console.say("sample", f"{sample.rows_read} lines, evenly spread, are looked at")
    parts = [part for part in (built.train, built.held_out) if isinstance(part, Dataset)]
    findings = check.check(built, config.data, found.encoder) + check.personal_data(config.data, found.encoder)
    overviews = [data_report.overview(part, found.encoder, _HTML_ROWS) for part in parts]
    data_report.show(overviews, findings, config.data, rows)
    page = Path(html) if html else Path(config.run_dir).parent / "data.html"
    data_report.write_html(page, overviews, findings, config.data, config.name)
    console.say("page", page)
    errors = sum(finding.level == "error" for finding in findings)
    console.say("data", f"{errors} {'error' if errors == 1 else 'errors'}: see above" if errors else "no errors")
    return not errors


VERB = Verb(
    summary="show rows as the model sees them, and check them",
    examples=_EXAMPLES,
    run=_run,
    arguments=(
        Word("check"),
        Option("--rows", type=int, metavar="N", help="rows to print of each data set (default: 3)"),
        Option("--html", metavar="FILE", help="where the page goes (default: data.html beside the runs)"),
    ),
    output_is_all=True,
    exit_1="found errors",
    others=("preview",),
)
