"""What a model says of held-out rows as one page: metrics, confusion matrix, calibration, errors by length, and the rows that are off."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lab.report import pages, pictures
from lora_lab.runtime import storage

ROWS, PAGE = "predictions.jsonl", "evaluation.html"  # in a run's folder
PREFIX = "predicted_"  # of the columns that are added to a row
_SHOWN = 50  # rows
_CHARS = 400  # of a text in the table


@dataclasses.dataclass(frozen=True)
class Said:
    """A held-out row with what a model said of it."""

    origin: str
    values: dict[str, Any]  # the row as its file has it
    expected: str
    said: dict[str, Any]
    off: float | None  # how far from what was expected; 0: it is right, None: that cannot be told
    score: float | None  # the probability of what was said
    length: int


def as_row(one: Said) -> dict[str, Any]:
    """The row of its file with what was said beside it."""
    said = {**one.said, "expected": one.expected, "off": one.off, "of": one.origin}
    return one.values | {f"{PREFIX}{name}": value for name, value in said.items() if value is not None}


def of_row(row: Mapping[str, Any]) -> Said:
    """What `as_row` made a row of; lengths are not kept."""
    said = {name.removeprefix(PREFIX): value for name, value in row.items() if name.startswith(PREFIX)}
    origin, expected, off = (said.pop(name, None) for name in ("of", "expected", "off"))
    values = {name: value for name, value in row.items() if not name.startswith(PREFIX)}
    score = said.get("score")
    return Said(
        str(origin or ""),
        values,
        expected if isinstance(expected, str) else _text(expected),
        said,
        off if isinstance(off, int | float) else None,
        score if isinstance(score, int | float) else None,
        0,
    )


def write(
    file: Path,
    run: str,
    metrics: Mapping[str, Mapping[str, float]],
    said: Sequence[Said],
    confusion: Mapping[str, Any] | None,
    unit: str,
    suite: Sequence[Any] = (),
) -> None:
    """Write the page; pictures that cannot be drawn of these rows are left out.

    Args:
        metrics: of each model that was measured.
        said: the worst first.
        unit: of their lengths.
        suite: what lm-eval's tasks gave, see `suites.harness.Compared`.
        confusion: `labels`, and `rows` with how often each class was taken for which.
    """
    names = list(dict.fromkeys(name for one in metrics.values() for name in one))
    page = pages.render(
        "evaluation.html.jinja",
        run=run,
        metrics={name: [one.get(name) for one in metrics.values()] for name in names},
        models=list(metrics),
        pictures=_pictures(said, confusion, unit),
        rows=[shown(one) for one in said[:_SHOWN]],
        count=len(said),
        wrong=sum(1 for one in said if one.off),
        suite=suite,
    )
    storage.write_text(file, page)


def _pictures(said: Sequence[Said], confusion: Mapping[str, Any] | None, unit: str) -> list[pictures.Picture]:
    judged = [one for one in said if one.off is not None]
    drawn = [
        pictures.calibration([(one.score, not one.off) for one in judged if one.score is not None]),
        pictures.by_length([(one.length, float(one.off or 0.0)) for one in judged], unit),
        None if confusion is None else pictures.confusion(confusion["labels"], confusion["rows"]),
    ]
    return [one for one in drawn if one is not None]


def shown(one: Said) -> dict[str, Any]:
    """A row as texts for the table."""
    return {
        "origin": one.origin,
        "given": [
            _text(value) for value in one.values.values() if isinstance(value, str | list) and value != one.expected
        ][:3],
        "expected": _text(one.expected),
        "said": _text(_said(one.said)),
        "score": "" if one.score is None else f"{one.score:.2f}",
        "off": "" if one.off is None else f"{one.off:.3g}",
    }


def _said(said: Mapping[str, Any]) -> str:
    """What was said, in one line: words with their tags, else the values without their probabilities."""
    if "words" in said and "tags" in said:
        tagged = [f"{word}/{tag}" for word, tag in zip(said["words"], said["tags"], strict=True) if tag != "O"]
        return " ".join(tagged) or "no tag but O"
    return "; ".join(_text(value) for name, value in said.items() if name not in ("score", "scores"))


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _CHARS else f"{text[:_CHARS]} …"
