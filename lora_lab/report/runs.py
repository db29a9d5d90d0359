"""The runs below a folder side by side: how far they are, what they reached, and in what two of them differ. Loads no torch."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lab.config import compose
from lora_lab.config.compose import leaves
from lora_lab.config.run import RunConfig, all_keys
from lora_lab.errors import ConfigError, LoraLabError, RunError, nearest
from lora_lab.run import run_dir
from lora_lab.run.run_dir import RunDir
from lora_lab.runtime import console, reading, tracking
from lora_lab.schema.groups import GROUPS
from lora_lab.tasks import TASKS, metrics

_DEEP = 4  # folders below the one that is looked through: runs/NAME/TIME/MEMBER
_PLACE_KEYS = ("run_dir", "name")  # every run has its own


@dataclasses.dataclass(frozen=True)
class Listed:
    """A run as its folder says."""

    path: str
    begun: float  # seconds since 1970
    config: dict[str, Any]  # keys with dots, and their values
    state: str
    steps: int
    seconds: float | None  # of training
    parameters: int | None
    base: dict[str, float]
    tuned: dict[str, float]
    place: int | None  # in its sweep's ranking


def find(folder: str, told: Sequence[str] = ()) -> tuple[list[Listed], list[str]]:
    """The runs below a folder, the oldest first, and a sentence for each that cannot be read.

    Args:
        told: `key=value`, or `group=choice`: only runs with these values.

    Raises:
        ConfigError: an unknown key, or no `key=value`.
    """
    fits = matching(told)
    found, unread = [], []
    for path in folders(Path(folder)):
        try:
            one = read(path)
        except LoraLabError as error:
            unread.append(f"{path}: {error}")
            continue
        if fits(one.config):
            found.append(one)
    return sorted(found, key=lambda one: (one.begun, one.path)), unread


def open_one(folder: str) -> Listed:
    """One run, none of whose links leaves it.

    Raises:
        LoraLabError: there is none, or it cannot be read.
    """
    return read(run_dir.open_existing(folder).path)


def read(folder: Path) -> Listed:
    """The run in a folder.

    Raises:
        LoraLabError: it cannot be read.
    """
    return _listed(RunDir(folder), compose.load(folder / "config.yaml"))


def folders(folder: Path, deep: int = _DEEP) -> Iterator[Path]:
    """Folders with a `config.yaml` in and below a folder, in order; what lies in a run is no run, and links are not followed."""
    if (folder / "config.yaml").is_file():
        yield folder
        if not (folder / "ranking.json").is_file():
            return
    try:
        below = sorted(one for one in folder.iterdir() if one.is_dir() and not one.is_symlink() and one.name[0] != ".")
    except OSError:
        return
    for one in below if deep else ():
        yield from folders(one, deep - 1)


def _listed(run: RunDir, config: RunConfig) -> Listed:
    result, damage = run_dir.read_result(run)
    steps = 0 if result is None else int(result.get("steps") or 0)
    if result is None:
        lines, _ = tracking.read_lines(run.path / "metrics.jsonl")
        steps = max((line["step"] for line in lines), default=0)
    state = "damaged" if damage else "done" if result is not None else "begun" if not steps else "stopped or running"
    if result is not None and result.get("unmade"):
        state = f"done, without {', '.join(result['unmade'])}"
    found = result or {}
    return Listed(
        path=str(run.path),
        begun=run.config.stat().st_mtime,
        config=dict(leaves(dataclasses.asdict(config))),
        state=state,
        steps=steps,
        seconds=run_dir.finite_number(found.get("train_seconds")),
        parameters=(found.get("coverage") or {}).get("trainable_parameters"),
        base=_numbers(found.get("base")),
        tuned=_numbers(found.get("tuned")),
        place=_place(run.path),
    )


def _numbers(values: Any) -> dict[str, float]:
    found = {name: run_dir.finite_number(value) for name, value in (values or {}).items()}
    return {name: value for name, value in found.items() if value is not None}


def _place(path: Path) -> int | None:
    """The run's place in the ranking of the sweep whose folder it lies in."""
    try:
        ranking = reading.read_json(path.parent / "ranking.json", RunError).get("ranking")
        names = [one["name"] for one in ranking]
    except (RunError, TypeError, KeyError):
        return None
    return names.index(path.name) + 1 if path.name in names else None


def matching(told: Sequence[str]) -> Callable[[dict[str, Any]], bool]:
    """Whether a run's values are those that were told, as far as they were.

    Raises:
        ConfigError: no `key=value`; the answer raises it for an unknown key.
    """
    wanted: dict[str, Any] = {}
    for text in told:
        override = compose.parse_override(text)
        key = override.key_or_group
        wanted |= dict(leaves(compose.chosen(override), f"{key}.")) if key in GROUPS else {key: override.value()}

    def fits(config: dict[str, Any]) -> bool:
        for key in wanted:
            if key not in config and key not in all_keys():
                raise ConfigError(f"{key}: unknown key.{nearest(key, all_keys())} lora-lab config --keys lists them.")
        return all(key in config and config[key] == value for key, value in wanted.items())

    return fits


# -- what is shown ----------------------------------------------------------------------------------------------------


def metric_of(runs: Sequence[Listed]) -> str | None:
    """The metric that most runs have beside the loss, of those the first that tasks report."""
    counts: dict[str, int] = {}
    for run in runs:
        for name in run.tuned:
            counts[name] = counts.get(name, 0) + (name != "loss")
    return max(counts, key=lambda name: counts[name], default=None)


def ranked(runs: Sequence[Listed], metric: str) -> list[Listed]:
    """The best first; runs without the metric last.

    Raises:
        ConfigError: no run has it, or it is unknown which way it is better.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.tuned))
    if metric not in known:
        raise ConfigError(
            f"sort={metric}: no run has this metric.{nearest(metric, known)} There are: {', '.join(known)}."
        )
    if not metrics.is_declared(metric):
        for name in {run.config["task.name"] for run in runs}:
            TASKS[name](name=name).load()  # its own metrics are declared beside its code
    if not metrics.is_declared(metric):
        raise ConfigError(f"sort={metric}: no task reports it, so it is unknown which way it is better.")
    return sorted(
        runs,
        key=lambda run: (
            metric not in run.tuned,
            metrics.as_cost(metric, run.tuned[metric]) if metric in run.tuned else 0.0,
        ),
    )


def show(runs: Sequence[Listed], folder: str, metric: str | None) -> None:
    """A table, a run in a line."""
    metric = metric or metric_of(runs)
    names = ["loss", *([metric] if metric not in (None, "loss") else [])]
    header = ["run", "state", "task", "base", "adapter", "steps", *names, "parameters", "minutes"]
    rows = [
        [
            os.path.relpath(run.path, folder) + (f" (place {run.place})" if run.place else ""),
            run.state,
            run.config["task.name"],
            base_of(run.config),
            adapter_of(run.config),
            run.steps,
            *(_change(run, str(name)) for name in names),
            "" if run.parameters is None else f"{run.parameters:,}",
            minutes_of(run),
        ]
        for run in runs
    ]
    title = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} in {folder}"
    spare = ("minutes", "parameters", "base", "task", "steps", "state")  # --json has all
    console.show_table(title, header, rows, slice(5, None), spare)


def minutes_of(run: Listed) -> str:
    """Of training; two digits of those below one."""
    if run.seconds is None:
        return ""
    return f"{run.seconds / 60:.1f}" if run.seconds >= 60 else f"{run.seconds / 60:.2g}"


def base_of(config: dict[str, Any]) -> str:
    """The base's name without where it comes from."""
    kind, _, package = str(config["model.path"]).partition("package:")
    return package.partition("/")[0] if not kind else kind.rstrip("/").rpartition("/")[2]


def adapter_of(config: dict[str, Any]) -> str:
    """The method and its rank."""
    rank = config.get("adapter.r")
    return f"{config['adapter.method']}{'' if rank is None else f' r={rank}'}"


def _change(run: Listed, name: str) -> str:
    if name not in run.tuned:
        return ""
    before = f"{run.base[name]:.4g} -> " if name in run.base else ""
    return f"{before}{run.tuned[name]:.4g}"


def differing(runs: Sequence[Listed]) -> list[str]:
    """Keys whose values are not the same in all of these runs."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    first = runs[0].config
    return [
        key for key in keys if key not in _PLACE_KEYS and any(run.config.get(key) != first.get(key) for run in runs[1:])
    ]


def show_difference(one: Listed, other: Listed) -> None:
    """Keys whose values differ, then the metrics of both."""
    keys = differing((one, other))
    values = [[key, *(json.dumps(run.config.get(key), ensure_ascii=False) for run in (one, other))] for key in keys]
    names = dict.fromkeys((*one.tuned, *other.tuned))
    figures = [[name, *(run.tuned.get(name) for run in (one, other))] for name in names]
    console.show_table(
        "what differs" if keys else "all values are the same", ["", one.path, other.path], values, slice(0, 0)
    )
    console.show_table("tuned", ["", one.path, other.path], figures)


def as_json(runs: Sequence[Listed]) -> str:
    """For other programs: a list of objects."""
    return json.dumps([dataclasses.asdict(run) for run in runs], ensure_ascii=False, indent=1, default=str)
