"""What `metrics.jsonl` of runs says over the steps: as values, and as drawings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lab.errors import RunError
from lora_lab.report import pictures
from lora_lab.report.pictures import Line, Picture
from lora_lab.runtime import tracking

_HELD_OUT = "eval_"  # before the metrics of held-out rows
_RUNS = len(pictures.COLOURS)  # that are drawn together
_METRICS = 3  # of several runs


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run's losses by step, of each of its seeds."""

    name: str
    title: str
    train: list[dict[int, float]]
    held_out: list[dict[int, float]]
    notes: list[str] = dataclasses.field(default_factory=list)  # what of its files could not be read


def read_curve(name: str, title: str, folders: Sequence[Path]) -> Curve:
    """The losses in the metrics of a run and of its repeats."""
    notes: list[str] = []
    found = [read_lines(folder, notes) for folder in folders]
    return Curve(
        name,
        title,
        [by_step(lines, "loss") for lines in found],
        [by_step(lines, f"{_HELD_OUT}loss") for lines in found],
        notes,
    )


def read_lines(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics; what is not whole is left out, and told in the notes."""
    file = folder / "metrics.jsonl"
    try:
        found, damaged = tracking.read_lines(file)
    except RunError as error:
        notes.append(f"{error} The run has no curve.")
        return []
    if damaged:
        notes.append(
            f"{file}: {len(damaged)} of {len(found) + len(damaged)} lines are damaged and left out of its curve."
        )
    return found


def by_step(lines: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """The finite values of one name."""
    return {line["step"]: line[key] for line in lines if _is_number(line.get(key))}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def smoothed(losses: Mapping[int, float], weight: float = 0.8) -> dict[int, float]:
    """The exponential mean of the values so far."""
    found, mean = {}, None
    for step, loss in losses.items():
        mean = loss if mean is None else weight * mean + (1 - weight) * loss
        found[step] = mean
    return found


# -- drawings ---------------------------------------------------------------------------------------------------------


def of_run(lines: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Loss, held-out metrics, learning rate and gradient norm of one run, as far as there are two values of each."""
    train, held_out = by_step(lines, "loss"), by_step(lines, f"{_HELD_OUT}loss")
    mean = smoothed(train)
    drawn = [Line("training, smoothed", train, faint=True), Line("training, smoothed", mean)]
    drawn += [Line("held-out", held_out, dots=True)] if held_out else []
    pictures_of = [
        pictures.lines("Loss", "loss", drawn, _in_words(mean, held_out)),
        *_held_out(lines),
        pictures.lines("Learning rate", "", [Line("lr", by_step(lines, "lr"))]),
        pictures.lines("Gradient norm", "", [Line("norm", by_step(lines, "grad_norm"))]),
    ]
    return [one for one in pictures_of if one is not None]


def _held_out(lines: Sequence[Mapping[str, Any]]) -> Iterator[Picture | None]:
    """The metrics: shares in one picture, each other in its own."""
    values = {name: by_step(lines, f"{_HELD_OUT}{name}") for name in _metrics([lines])}
    shares = [name for name, found in values.items() if all(0 <= value <= 1 for value in found.values())]
    some = shares[: len(pictures.COLOURS)]
    yield pictures.lines("Held-out metrics", "share", [Line(name, values[name], dots=True) for name in some])
    for name in (name for name in values if name not in shares):
        yield pictures.lines(f"Held-out {name}", name, [Line(name, values[name], dots=True)])


def of_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Picture]:
    """The same of several runs together: smoothed training loss, held-out loss and metrics.

    Args:
        runs: the lines of each by its name; the first of very many are drawn.
    """
    shown = dict(list(runs.items())[:_RUNS])
    more = f"The first {_RUNS} of {len(runs)} runs." if len(runs) > _RUNS else ""
    found = [
        pictures.lines(
            "Training loss, smoothed",
            "loss",
            [Line(name, smoothed(by_step(lines, "loss"))) for name, lines in shown.items()],
            more,
        )
    ]
    for metric in ("loss", *_metrics(list(shown.values()))[:_METRICS]):
        drawn = [Line(name, by_step(lines, f"{_HELD_OUT}{metric}"), dots=True) for name, lines in shown.items()]
        found.append(pictures.lines(f"Held-out {metric}", metric, drawn, more))
    return [one for one in found if one is not None]


def _metrics(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Metrics of held-out rows beside the loss."""
    names = dict.fromkeys(key for lines in runs for line in lines for key in line if key.startswith(_HELD_OUT))
    return [name.removeprefix(_HELD_OUT) for name in names if name != f"{_HELD_OUT}loss"]


def _in_words(train: Mapping[int, float], held_out: Mapping[int, float]) -> str:
    said = []
    if train:
        first, last = train[min(train)], train[max(train)]
        said.append(f"Training {first:.4g} at first, {last:.4g} at step {max(train)}.")
    if held_out:
        lowest = min(held_out, key=lambda step: held_out[step])
        said.append(f"Held-out lowest at step {lowest}: {held_out[lowest]:.4g}.")
    return " ".join(said)
