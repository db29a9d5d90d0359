"""Which run of a sweep is best, and whether that can be told from chance."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from lora_lab.config.run import RunConfig
from lora_lab.errors import ConfigError, LoraLabError, RunError, nearest
from lora_lab.report import sweep_report
from lora_lab.report.curves import read_curve
from lora_lab.run.run_dir import finite_number
from lora_lab.runtime import console, reading, storage
from lora_lab.sweep.jobs import Job, Outcome
from lora_lab.tasks.metrics import as_cost, lower_is_better
from lora_lab.tasks.section import TaskSection

_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Place:
    """A run's place in the ranking."""

    name: str
    values: dict[str, Any]
    metric: float | None  # of its own seed
    metrics: list[float]  # of all its seeds
    parameters: float | None  # of its adapter
    memory: float | None  # MiB of its adapter, gradients and optimizer
    seconds: float | None
    steps: float | None
    note: str  # why it has no metric, or did not reach its end

    @property
    def mean(self) -> float:
        return statistics.fmean(self.metrics) if self.metrics else math.inf


def check(config: RunConfig) -> None:
    """Refuse what a sweep could not rank its runs by; needs no model.

    Raises:
        ConfigError: the task does not report `sweep.metric`, or runs are to be compared without held-out rows.
    """
    sweep = config.sweep
    _check_reported(config)
    if config.data.eval is not None or config.data.eval_ratio:
        return
    needs = {
        "sweep=halving: compares held-out losses": sweep.strategy == "halving",
        f"sweep.metric={sweep.metric}: is measured on held-out rows": sweep.metric != "loss",
        f"sweep.seeds={sweep.seeds}: repeats what is best on held-out rows": sweep.seeds > 0,
    }
    problems = [f"{what}. Set data.eval=FILE or data.eval_ratio=0.1." for what, holds in needs.items() if holds]
    if problems:
        raise ConfigError(*problems)


def _check_reported(config: RunConfig) -> None:
    sweep, known = config.sweep, config.task.load().reported(config.task)
    if sweep.metric not in known:
        raise ConfigError(
            f"sweep.metric={sweep.metric}: task={config.task.name} does not report it."
            f"{_option_for(sweep.metric, config.task) or nearest(sweep.metric, known)} There are: {', '.join(known)}."
        )


def _option_for(name: str, task: TaskSection) -> str:
    """The way to a metric that the task reports with another option."""
    for option in task.measured_rows:
        told: dict[str, Any] = {option: 1}
        if name in task.load().reported(dataclasses.replace(task, **told)):
            return f" Set task.{option}=100."
    return ""


def metric(job: Job) -> float | None:
    """The held-out metric of a finished run; None if it has none or it is not finite."""
    tuned = (job.result or {}).get("tuned") or {}
    return finite_number(tuned.get(job.config.sweep.metric))


def score(job: Job) -> float | None:
    """The metric such that lower is better."""
    value = metric(job)
    return None if value is None else as_cost(job.config.sweep.metric, value)


def outcome(job: Job) -> Outcome:
    """What the job was worth to a sweeper; one that was stopped early, what it was worth there."""
    if job.stopped_at is None:
        return Outcome(score(job))
    return Outcome(job.stopped_score, job.stopped_at)


def best(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that are worth further seeds: the best of those that have a metric."""
    scored = [(value, job) for job in jobs if (value := score(job)) is not None]
    return [job for _, job in sorted(scored, key=lambda one: one[0])][: jobs[0].config.sweep.top]


def rank(
    folder: Path, jobs: Sequence[Job], again: Sequence[Job], left_out: Sequence[tuple[str, LoraLabError]] = ()
) -> dict[str, Any]:
    """Rank, say in words what is known, and write `ranking.json`, `ranking.csv` and `report.html`.

    Args:
        left_out: folder and error of runs that could not be used at all; they have the last places.
    """
    _check_reported(jobs[0].config)
    sweep = jobs[0].config.sweep
    sign = 1 if lower_is_better(sweep.metric) else -1
    places = sorted((_place(job, again) for job in jobs), key=lambda place: (place.metric is None, sign * place.mean))
    places += [_no_place(Path(path).name, f"failed: {error}") for path, error in left_out]
    words, take = judge(places, sweep.metric, sign)
    result = {
        "folder": str(folder),
        "metric": sweep.metric,
        "lower_is_better": sign == 1,
        "take": take,
        "judgement": words,
        "ranking": [dataclasses.asdict(one) for one in places],
    }
    storage.write_text(folder / "ranking.json", storage.dump_json(result))
    storage.write_text(folder / "ranking.csv", _csv(places, sweep.metric))
    _show(places, sweep.metric)
    console.say("ranking", words)
    folders = {
        job.run.path.name: [job.run.path, *(o.run.path for o in again if o.repeats == job.run.path.name)]
        for job in jobs
    }
    curves = [read_curve(place.name, _title(place), folders[place.name]) for place in places if place.name in folders]
    sweep_report.write(folder / "report.html", result, curves)
    console.say("report", folder / "report.html")
    return result


def _place(job: Job, again: Sequence[Job]) -> Place:
    result = job.result or {}
    own = metric(job)
    others = [metric(other) for other in again if other.repeats == job.run.path.name]
    note = (
        f"failed: {job.error}"
        if job.error is not None
        else job.stopped or (job.damage and f"not finished: {job.damage}")
    )
    return Place(
        job.run.path.name,
        job.values,
        own,
        [value for value in (own, *others) if value is not None],
        finite_number(result.get("coverage", {}).get("trainable_parameters")),
        finite_number(result.get("own_memory_mib")),
        finite_number(result.get("train_seconds")),
        finite_number(result.get("steps")),
        note,
    )


def _no_place(name: str, note: str) -> Place:
    return Place(name, {}, None, [], None, None, None, None, note)


def judge(places: Sequence[Place], name: str, sign: int) -> tuple[str, str | None]:
    """What can be said, and the run to take: of those that cannot be told from the best, the one with the smallest adapter."""
    finished = [place for place in places if place.metric is not None]
    if not finished:
        return f"no run has a held-out {name}, so none is best", None
    first = finished[0]
    if len(finished) == 1:
        return f"{_title(first)} is the only run with a held-out {name}", first.name
    if len(first.metrics) < 2:
        second = finished[1]
        return (
            f"{_title(first)} has the best {name} ({first.metric:.4f}, then {second.metric:.4f}), with one seed each, so the noise "
            "between seeds is unknown. sweep.seeds=3 repeats the best.",
            first.name,
        )
    alike = [place for place in finished[1:] if len(place.metrics) > 1 and not _differ(first, place)]
    apart = [place for place in finished[1:] if len(place.metrics) > 1 and place not in alike]
    words = [f"{_title(first)} is better than {_title(place)} ({_interval(first, place, sign)})" for place in apart]
    take = min([first, *alike], key=lambda place: place.parameters or math.inf)
    if alike:
        names = " and ".join(_title(place) for place in (first, *alike))
        words.insert(
            0,
            f"{names} cannot be told apart here ({_interval(first, alike[0], sign)}); take {_title(take)}, the smaller adapter",
        )
    return "; ".join(words), take.name


def _differ(one: Place, other: Place) -> bool:
    low, high = _difference(one, other)
    return not low <= 0 <= high


def _difference(one: Place, other: Place) -> tuple[float, float]:
    """Welch's interval for the difference of the means over seeds."""
    found = stats.ttest_ind(other.metrics, one.metrics, equal_var=False)
    if not math.isfinite(found.statistic):  # no spread at all
        gap = other.mean - one.mean
        return gap, gap
    interval = found.confidence_interval(_CONFIDENCE)
    return float(interval.low), float(interval.high)


def _interval(one: Place, other: Place, sign: int) -> str:
    low, high = sorted(sign * bound for bound in _difference(one, other))
    return f"difference {low:+.4f} to {high:+.4f}, {_CONFIDENCE:.0%} interval over {len(one.metrics)} and {len(other.metrics)} seeds"


def _title(place: Place) -> str:
    values = " ".join(
        f"{key.rpartition('.')[2]}={value:g}" if isinstance(value, float) else f"{key.rpartition('.')[2]}={value}"
        for key, value in place.values.items()
    )
    return values or f"run {place.name}"


def _show(places: Sequence[Place], name: str) -> None:
    keys = list(dict.fromkeys(key for place in places for key in place.values))
    seeds = any(len(place.metrics) > 1 for place in places)
    notes = any(place.note for place in places)
    header = [
        "run",
        *(key.rpartition(".")[2] for key in keys),
        name,
        *(["seeds: mean", "spread"] if seeds else []),
        "parameters",
        *([""] if notes else []),
    ]
    rows = [
        [
            place.name,
            *(place.values.get(key) for key in keys),
            place.metric,
            *([place.mean if len(place.metrics) > 1 else None, _spread(place)] if seeds else []),
            f"{place.parameters:,}" if place.parameters else None,
            *([place.note.partition(". ")[0]] if notes else []),
        ]
        for place in places
    ]
    console.show_table("ranking, the best first", header, rows)


def _spread(place: Place) -> float | None:
    return statistics.stdev(place.metrics) if len(place.metrics) > 1 else None


def _csv(places: Sequence[Place], name: str) -> str:
    keys = list(dict.fromkeys(key for place in places for key in place.values))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["rank", "run", *keys, name, "mean", "seeds", "parameters", "own_memory_mib", "train_seconds", "steps", "note"]
    )
    for rank, place in enumerate(places, 1):
        mean = place.mean if place.metrics else None
        row = [
            rank, place.name, *(place.values.get(key) for key in keys), place.metric, mean, len(place.metrics), place.parameters,
            place.memory, place.seconds, place.steps, place.note,
        ]  # fmt: skip
        table.writerow([_cell(value) for value in row])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """A value as a spreadsheet shows it: a text that it would take for a formula is marked as text."""
    if not isinstance(value, str):
        return value
    safe = console.shown(value)
    return f"'{safe}" if safe.startswith(("=", "+", "-", "@", "\t")) else safe


def read(folder: Path) -> dict[str, Any]:
    """The ranking that was written into a sweep's folder.

    Raises:
        RunError: there is none, or it is damaged.
    """
    file = folder / "ranking.json"
    again = f"Make it again: lora-lab resume sweep={folder}"
    if not file.is_file():
        raise RunError(
            f"sweep={folder}: no ranking.json there. Name a sweep's folder, or finish it: lora-lab resume sweep={folder}"
        )
    try:
        found = reading.read_json(file, RunError)
    except RunError as error:
        raise RunError(f"{error} {again}") from error
    if "take" not in found or not isinstance(found["take"], str | None):
        raise RunError(f"{file}: take is missing or no name of a run. {again}")
    return found
