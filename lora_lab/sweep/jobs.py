"""The runs of a sweep, and which of them can train on one base as one cohort."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.config.compose import leaves
from lora_lab.config.run import RunConfig
from lora_lab.errors import LoraLabError, RunError
from lora_lab.run import run_dir
from lora_lab.run.run_dir import RunDir
from lora_lab.run.trained import read, without_uploads
from lora_lab.runtime import console, reading, storage

# what decides the base, the rows and the passes over them; everything else is a member's own
_SHARED = ("model", "quant", "data", "task", "hardware", "speed", "tracker", "sweep")
_TRACKERS_OF_MANY = ("auto", "none", "tensorboard")  # others follow one run of a process
_FAILED = "failed.json"
_SHARED_OF_TRAIN = ("packing", "gradient_checkpointing", "recompute_every", "offload_activations")
_SEED = re.compile(r"_seed\d+")  # ends the names of folders that `repeats` makes


@dataclasses.dataclass
class Job:
    """One point of a sweep: its configuration, and what came of it."""

    config: RunConfig
    values: dict[str, Any]  # what sets it apart from the other points, by key
    error: Exception | None = None
    stopped: str = ""  # why it did not reach its end, without an error
    stopped_at: int | None = None  # the step after which it stopped
    stopped_score: float | None = None  # what it was worth there; lower is better
    repeats: str | None = None  # name of the job whose values it has, with another seed
    from_folder: bool = False  # its configuration is what its own folder says

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.config.run_dir))

    @property
    def result(self) -> dict[str, Any] | None:
        """What its `result.json` says, once it is finished. With a file that says nothing of use, the run is not finished."""
        return run_dir.read_result(self.run)[0]

    @property
    def damage(self) -> str:
        """Why its `result.json` is of no use; empty if it is whole, or not there yet."""
        return run_dir.read_result(self.run)[1]

    def write_failure(self) -> None:
        """Leave the error in the run's folder, for whoever asked for the run from elsewhere; none is left if there is none."""
        file = self.run.path / _FAILED
        if self.error is None:
            file.unlink(missing_ok=True)
        elif self.run.config.exists():
            code = self.error.exit_code if isinstance(self.error, LoraLabError) else 1
            where = traceback.format_exception(self.error)
            storage.write_text(
                file, storage.dump_json({"error": str(self.error), "exit_code": code, "traceback": where})
            )
            self.error.__traceback__ = None  # it holds the model

    def failure(self) -> LoraLabError | None:
        """The error that was left there."""
        file = self.run.path / _FAILED
        if not os.path.lexists(file):
            return None
        try:
            left = reading.read_json(file, RunError)
        except RunError as unreadable:
            return unreadable
        error, code = LoraLabError(str(left.get("error"))), left.get("exit_code")
        error.exit_code = code if isinstance(code, int) and 0 < code < 256 else 1
        return error

    @property
    def title(self) -> str:
        """Such as '3 (adapter.r=8 optim.lr=0.001)'."""
        return f"{self.run.path.name} ({' '.join(f'{key}={_shown(value)}' for key, value in self.values.items())})"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run was worth to a sweeper."""

    score: float | None  # lower is better; None: failed
    stopped_at: int | None = None  # the step after which it was stopped early


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Where cohorts are trained."""

    executor: str  # of `engines.ENGINES`
    workers: int | None  # at the same time; None: one for each card, or two on the CPU
    parameters: dict[str, Any]  # the engine's own, such as slurm_partition, timeout_min, num_gpus


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def jobs_of(configs: list[RunConfig], known: Sequence[Job] = ()) -> list[Job]:
    """A job for each configuration that no earlier one equals; the others are named and left out.

    Args:
        known: jobs of some of these configurations, whose outcome is kept.
    """
    outcomes = {job.config.run_dir: job for job in known}
    flat = [_values(config) for config in configs]
    found: list[Job] = []
    seen: dict[str, str] = {}
    said = {key: [one[key] for one in flat if key in one] for key in dict.fromkeys(itertools.chain(*flat))}
    differing = [key for key, those in said.items() if any(value != those[0] for value in those)]
    for config, values in zip(configs, flat, strict=True):
        text = json.dumps(values, sort_keys=True)
        if text in seen:
            console.say("sweep", f"{config.run_dir} would repeat {seen[text]}: left out")
            continue
        seen[text] = config.run_dir
        job = outcomes.get(config.run_dir) or Job(config, {})
        found.append(dataclasses.replace(job, values={key: values[key] for key in differing if key in values}))
    return found


def repeats(best: Sequence[Job], jobs: Sequence[Job]) -> list[Job]:
    """The best jobs again, with further seeds (`sweep.seeds`) that none of them has had."""
    found = []
    for job in best:
        taken = {other.config.seed for other in jobs if _but_seed(other) == _but_seed(job)}
        free = (seed for seed in itertools.count(job.config.seed + 1) if seed not in taken)
        for seed in itertools.islice(free, job.config.sweep.seeds):
            folder = f"{job.config.run_dir}_seed{seed}"
            config = dataclasses.replace(job.config, seed=seed, run_dir=folder)
            found.append(Job(config, {**job.values, "seed": seed}, repeats=job.run.path.name))
    return found


def _but_seed(job: Job) -> str:
    return json.dumps({key: value for key, value in _values(job.config).items() if key != "seed"}, sort_keys=True)


def _values(config: RunConfig) -> dict[str, Any]:
    """Every value by key, but for the run's own name and folder."""
    return {key: value for key, value in leaves(dataclasses.asdict(config)) if key not in ("name", "run_dir")}


def groups(jobs: list[Job]) -> list[list[Job]]:
    """The jobs that can share a base, together, in order."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(json.dumps(_shared(job.config), sort_keys=True), []).append(job)
    return list(found.values())


def _shared(config: RunConfig) -> dict[str, Any]:
    tree = dataclasses.asdict(config)
    shared = {key: value for name in _SHARED for key, value in leaves(tree[name], f"{name}.")}
    shared |= {f"train.{name}": tree["train"][name] for name in _SHARED_OF_TRAIN}
    shared["adapter.modules_to_save"] = config.adapter.modules_to_save  # the base is loaded with them unquantized
    if config.task.load().head != "none":
        shared["seed"] = config.seed  # a new head is drawn with it while the base is loaded
    if config.tracker.name not in _TRACKERS_OF_MANY:
        shared[f"run, because tracker.name={config.tracker.name} follows one at a time"] = config.run_dir
    return shared


def by_method(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs of a group whose adapters can lie on the same modules, together, in order."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(json.dumps(job.config.adapter.on_same_modules(), sort_keys=True), []).append(job)
    return list(found.values())


def why_apart(one: Job, other: Job) -> str:
    """The keys by which two jobs cannot share a base."""
    first, second = _shared(one.config), _shared(other.config)
    return ", ".join(key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key))


def in_folder(folder: Path, names: Sequence[str] | None = None) -> tuple[list[Job], list[tuple[str, LoraLabError]]]:
    """The jobs of a sweep folder, as they were when it began; folder and error of each run that cannot be used.

    Args:
        names: of their run folders; None: all but those that only repeat others with another seed.

    Raises:
        RunError: there is no sweep in it, or no such run.
    """
    there = run_folders(folder)
    chosen = (
        [path for path in there if not _SEED.search(path.name)] if names is None else [folder / name for name in names]
    )
    missing = [path for path in chosen if path not in there]
    if missing or not chosen:
        raise RunError(
            f"sweep={folder}: no {missing[0].name if missing else 'sweep'} there. Name a folder that lora-lab train -m made."
        )
    configs, left_out = [], []
    for path in chosen:
        try:
            configs.append(_config_in(path))
        except LoraLabError as error:
            left_out.append((str(path), error))
    return [dataclasses.replace(job, from_folder=True) for job in jobs_of(configs)], left_out


def run_folders(folder: Path) -> list[Path]:
    """What lies in a sweep's folder where its runs do: folders with a `config.yaml`, and whatever is named as Hydra names runs.
    Hidden names are not runs.

    Raises:
        RunError: there is no such folder.
    """
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise RunError(
            f"sweep={folder}: cannot be read ({error.strerror}). Name a folder that lora-lab train -m made."
        ) from error
    runs = [path for path in found if path.name.isdecimal() or os.path.lexists(path / "config.yaml")]
    return sorted(runs, key=lambda path: (len(path.name), path.name))


def _config_in(path: Path) -> RunConfig:
    """The configuration of a run in a sweep's folder.

    Raises:
        LoraLabError: it cannot be resumed.
    """
    file = path / "config.yaml"
    if path.is_symlink() or file.is_symlink():
        raise RunError("a link, and a sweep's runs are in its own folder. Left out; put a copy there instead.")
    if not path.is_dir():
        raise RunError("a file where a run's folder should be. Left out; remove it.")
    if not file.exists():
        raise RunError("no config.yaml, so the run never began. Left out; the sweep's first command makes it again.")
    with reading.reading(file, RunError, "The run is left out."):
        return dataclasses.replace(without_uploads(read(RunDir(path))), run_dir=str(path))
