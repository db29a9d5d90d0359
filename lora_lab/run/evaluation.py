"""What a trained model said of each held-out row, the errors first, in the run's folder: as rows and as a page with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lora_lab.data import sources
from lora_lab.data.dataset import Dataset
from lora_lab.report import evaluation_report
from lora_lab.report.evaluation_report import PAGE, ROWS, Said
from lora_lab.run import predictions
from lora_lab.run.answering import predicted
from lora_lab.run.run_dir import RunDir
from lora_lab.run.setup import Live, Setup
from lora_lab.runtime import console
from lora_lab.runtime.memory import first_line, is_out_of_memory
from lora_lab.suites.harness import Compared
from lora_lab.tasks.base import EvalResult


def write(run: RunDir, live: Live, found: dict[str, EvalResult], suite: Sequence[Compared] = ()) -> None:
    """Say each held-out row once more with the active adapter, and write what was said; a lack of memory keeps nobody from the rest.

    Args:
        found: what was measured on held-out rows, of the base first and of the adapter last; empty: there are none.
        suite: what was measured of lm-eval's tasks.
    """
    said = _kept(run, live, [*found.values()][-1]) if found else []
    page = run.path / PAGE
    if said or suite:
        unit = "tokens of the row" if live.setup.config.task.predicts else "characters of the question"
        metrics = {name: one.metrics for name, one in found.items()}
        confusion = [*found.values()][-1].details.get("confusion_matrix") if found else None
        evaluation_report.write(page, str(run.path), metrics, said, confusion, unit, suite)
    if said:
        wrong = sum(1 for one in said if one.off)
        console.say(
            "rows",
            f"{run.path / ROWS}: {len(said):,} held-out rows, {wrong:,} of them off, which come first; pictures: {page}",
        )
    elif suite:
        console.say("page", page)


def _kept(run: RunDir, live: Live, tuned: EvalResult) -> list[Said]:
    """What was said of each row, the worst first, written into the run's folder."""
    try:
        said = _said(live, tuned)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        console.say("rows", f"{run.path}: what was said of each row is not kept ({first_line(error)})")
        return []
    said.sort(key=lambda one: (-(one.off or 0.0), -(one.score or 0.0)))
    if said:
        predictions.write_rows(run.path / ROWS, map(evaluation_report.as_row, said))
    return said


def _said(live: Live, tuned: EvalResult) -> list[Said]:
    setup = live.setup
    if setup.config.task.predicts and not setup.config.task.compares_rows:
        return _of_rows(live)
    return [
        Said(
            f"answer {number}", {"question": one.question}, one.reference, {"answer": one.text},
            float(one.text.strip() != one.reference.strip()), None, len(one.question)
        )
        for number, one in enumerate(tuned.answers, start=1)
    ]  # fmt: skip


def _of_rows(live: Live) -> list[Said]:
    setup, data = live.setup, live.setup.held_out_rows()
    examples = {example.origin: example for example in data}  # of a row in several windows any: all have its label
    with live.autocast():
        found = predicted(setup, live.model.eval(), list(data))
    tokens: dict[str, int] = {}
    for example in data:
        tokens[example.origin] = tokens.get(example.origin, 0) + example.num_tokens
    values = dict(_values(setup, data, set(found)))
    return [
        Said(
            origin,
            values.get(origin, {}),
            setup.encoder.shown(examples[origin]),
            setup.task.of_row(said, values.get(origin, {})),
            setup.task.off(said, examples[origin]),
            said.get("score"),
            tokens[origin],
        )
        for origin, said in found.items()
    ]


def _values(setup: Setup, data: Dataset, wanted: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The held-out rows as their files have them."""
    config = setup.config.data
    names: Any = config.train if config.eval is None else config.eval
    for file in sources.find(data.key, names, config.sample_by, config.field):
        for row in file.rows():
            origin = f"{file.name} row {row.number}"
            if origin in wanted:
                yield origin, row.values
