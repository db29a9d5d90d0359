"""The folder of a run: what lies where, how it is made, and who may work in it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab import __version__
from lora_lab.config import compose
from lora_lab.config.run import RunConfig
from lora_lab.errors import RunError
from lora_lab.runtime import children, console, storage
from lora_lab.runtime.reading import read_json
from lora_lab.schema.sections import renamed

if TYPE_CHECKING:
    from lora_lab.base.load import BaseFiles

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "hydra-core", "safetensors")
_EXTRAS = ("torchao", "liger_kernel")  # these compute in a run as well, where they are installed


@dataclasses.dataclass(frozen=True)
class RunDir:
    """Paths inside one run folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def merge_report(self) -> Path:
        return self.path / "merge_report.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time works in a run folder; what it says goes into `log.txt` as well. What a process that died in it
        left is tidied up first.

        Raises:
            RunError: another process works in it, or it holds links that leave it.
        """
        refuse_links(self.path)
        with storage.locked(self.path):
            restored = [line for folder in self._written_into for line in storage.recover(folder)]
            with console.logged_to(self.path / "log.txt"):
                for line in restored:
                    console.say("restored", line)
                yield

    @property
    def _written_into(self) -> list[Path]:
        return [self.path, self.checkpoints, self.path / "export"]


def _how_far(run: RunDir) -> str:
    """How much of a run is done, as far as its folder's names say."""
    if run.result.is_file():
        return " (it is finished)"
    steps = [int(name) for folder in run.checkpoints.glob("step-*") if (name := folder.name[5:]).isdecimal()]
    return f" (step {max(steps)} is saved)" if steps else ""


def check_free(config: RunConfig) -> RunDir:
    """The run folder that the configuration names, still to be made; called before any long work.

    Raises:
        RunError: it holds something already, is a file, cannot be named so, or its parent cannot be written.
    """
    try:
        run = RunDir(Path(config.run_dir).expanduser())
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            run.path.lstat()
        if run.path.is_dir() and not _is_free(run.path):
            raise RunError(
                f"run_dir={run.path}: exists and is not empty; nothing in it was touched. Choose another run_dir, or resume "
                f"it{_how_far(run)}: lora-lab resume run={run.path}"
            )
        if os.path.lexists(run.path) and not run.path.is_dir():
            raise RunError(f"run_dir={run.path}: a file of that name exists. Choose another run_dir.")
        parent = next(folder for folder in [run.path.absolute(), *run.path.absolute().parents] if folder.exists())
    except (OSError, ValueError, RuntimeError) as error:  # too long, not ours to look at; NUL; ~nobody
        raise _unusable(config.run_dir, error) from error
    if not parent.is_dir():
        raise RunError(f"run_dir={run.path}: {parent} is a file, not a folder. Choose another run_dir.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(f"run_dir={run.path}: {parent} is read-only. Choose another run_dir.")
    return run


def _is_free(folder: Path) -> bool:
    """Whether there is nothing in a folder but what a start leaves that died before it had written `config.yaml`."""
    return all(entry.name == storage.LOCK or storage.is_temporary(entry.name) for entry in folder.iterdir())


def _unusable(path: str, error: Exception) -> RunError:
    reason = getattr(error, "strerror", None) or error
    return RunError(f"run_dir={path}: cannot be made ({reason}). Choose another run_dir.")


@contextlib.contextmanager
def created(config: RunConfig) -> Iterator[RunDir]:
    """Make the run folder, save the resolved configuration in it, and hold its lock from the first moment on: of two that start on one
    folder, one is refused.

    Raises:
        RunError: as `check_free`, another process was quicker, or the system refuses to make it.
    """
    run = check_free(config)
    try:
        storage.make_folders(run.path)
    except OSError as error:
        raise _unusable(config.run_dir, error) from error
    with storage.locked(run.path):
        check_free(config)
        storage.write_text(run.config, compose.to_yaml(config))
        with console.logged_to(run.path / "log.txt"):
            yield run


def create(config: RunConfig) -> RunDir:
    """Make the run folder and save the resolved configuration in it, for later.

    Raises:
        RunError: as `created`.
    """
    with created(config) as run:
        return run


def open_existing(path: str) -> RunDir:
    """The run folder that `run=DIR` names. It may itself be a link; links inside it must stay inside it.

    Raises:
        RunError: there is no run in it, or it holds links that leave it.
    """
    try:
        run = RunDir(Path(path).expanduser())
        there = run.config.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, not ours to look at; NUL; ~nobody
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"run={path}: cannot be read ({reason}). Name a folder that lora-lab train made.") from error
    if not there:
        member = run.path / "0"
        if (member / "config.yaml").is_file():
            raise RunError(f"run={path}: a sweep. Name one of its runs: run={member}")
        raise RunError(f"run={path}: no run there (no config.yaml). Name a folder that lora-lab train made.")
    refuse_links(run.path)
    return run


def refuse_links(folder: Path) -> None:
    """Refuse a run folder through which files elsewhere would be read, written or removed: a received one may hold such links.

    Raises:
        RunError: naming the first link that leaves it.
    """
    root = os.path.realpath(folder)
    for place, folders, files in os.walk(root):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise RunError(
                    f"{folder}: holds the link {path.relative_to(root)} -> {os.readlink(path)}, which leaves the run folder; nothing was "
                    "touched. Replace it by what it names, or remove it."
                )


def check_same(run: RunDir, config: RunConfig) -> None:
    """Refuse to resume a run folder that was made for other values.

    Raises:
        RunError: naming the keys.
    """
    before = dict(compose.leaves(dataclasses.asdict(compose.load(run.config))))
    now = dict(compose.leaves(dataclasses.asdict(config)))
    other = [key for key in now if before.get(key) != now[key] and key not in ("run_dir", "name")]
    if other:
        raise RunError(
            f"{run.path}: holds a run with another {', '.join(other)}; nothing in it was touched. Choose another "
            "hydra.sweep.dir, or the values that it was begun with."
        )


def finite_number(value: Any) -> float | None:
    """A finite number of a file; None for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return value if plain and math.isfinite(value) else None


def _are_metrics(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(one is None or finite_number(one) is not None for one in value.values())
    )


_RESULT: dict[str, Callable[[Any], bool]] = {  # what `result.json` must say to be one
    "steps": lambda value: isinstance(value, int),
    "tuned": _are_metrics,
    "coverage": lambda value: isinstance(value, dict),
    "unmade": lambda value: (
        value is None or (isinstance(value, dict) and all(isinstance(one, str) for one in value.values()))
    ),
}


def read_result(run: RunDir) -> tuple[dict[str, Any] | None, str]:
    """What `result.json` says, once the run is finished, and why it is of no use if it is not whole: the run is not finished then."""
    if not os.path.lexists(run.result):
        return None, ""
    try:
        found = read_json(run.result, RunError)
    except RunError as error:
        return None, str(error)
    if isinstance(found.get("made_of"), dict):  # it was not trained
        return found, ""
    odd = next((key for key, fits in _RESULT.items() if not fits(found.get(key))), None)
    return (found, "") if odd is None else (None, f"{run.result}: {odd} is missing or not what a run writes.")


def write_manifest(
    run: RunDir, config: RunConfig, base: BaseFiles, data: dict[str, dict[str, str]], made_of: Any = None
) -> None:
    """Record what the run is made of: its configuration, versions, the base and what goes with it, the data's hashes, the code's
    commit.

    Args:
        made_of: of which runs' adapters it is made, where it is not trained.
    """
    manifest = {
        "config": dataclasses.asdict(config),
        "base": {**base.recorded(), "folder": str(base.folder)},
        "data": data,
        "versions": versions(),
        "git_commit": _git_commit(),
    } | ({} if made_of is None else {"made_of": made_of})
    storage.write_text(run.manifest, storage.dump_json(manifest))


def read_manifest(run: RunDir) -> dict[str, Any] | None:
    """What was recorded when the run began; None if it was stopped before that.

    Raises:
        RunError: the file is damaged, or it is gone although there is something to resume.
    """
    if not run.manifest.exists():
        if run.adapter.exists() or run.result.exists() or any(run.checkpoints.glob("step-*")):
            raise RunError(
                f"{run.manifest}: missing, so it is unknown what the run was made of. Restore it, or start a new run."
            )
        return None
    saved: dict[str, Any] = read_json(run.manifest, RunError)
    shapes = {"base": dict, "data": dict, "versions": dict}
    wrong = [key for key, kind in shapes.items() if not isinstance(saved.get(key), kind)]
    if wrong or not all(isinstance(files, dict) for files in saved["data"].values()):
        raise RunError(f"{run.manifest}: '{(wrong or ['data'])[0]}' is not what lora-lab wrote. Restore the file.")
    return saved


def refuse_derived(run: RunDir) -> None:
    """Refuse to train a run that was to be made of others.

    Raises:
        RunError: naming the way out.
    """
    if (read_manifest(run) or {}).get("made_of") is not None:
        raise RunError(
            f"{run.path}: was to be made of other runs' adapters, and was stopped before it was. Remove the folder and give the "
            "same lora-lab merge or lora-lab shrink again."
        )


def check_config(run: RunDir, config: RunConfig) -> None:
    """Refuse a `config.yaml` that was edited since the run began.

    Args:
        config: what the file says.

    Raises:
        RunError: naming the keys with both values.
    """
    recorded = (read_manifest(run) or {}).get("config")
    if not isinstance(recorded, dict):  # made by an earlier version
        return
    then, now = dict(compose.leaves(renamed(recorded)[0])), dict(compose.leaves(dataclasses.asdict(config)))
    moved = ("name", "run_dir")  # a run may be
    edited = [
        f"{key} is {now[key]} and was {then[key]}"
        for key in now
        if key in then and now[key] != then[key] and key not in moved
    ]
    if edited:
        raise RunError(
            f"{run.config}: edited since the run began: {'; '.join(edited)}. Restore it, or start a new run."
        )


def check_manifest(run: RunDir, base: BaseFiles, data: dict[str, dict[str, str]]) -> None:
    """Refuse to go on when the base or the data are not what the run was started with; tell other versions.

    Raises:
        RunError: naming what changed.
    """
    saved = read_manifest(run)
    if saved is None:
        return
    changed = base.changed(saved["base"])
    if changed:
        raise RunError(
            f"{run.path}: the base {base.name} has another {', '.join(changed)} than at the start. Restore what was changed, or "
            "start a new run."
        )
    for key, files in data.items():
        if sorted(saved["data"].get(key, {}).values()) != sorted(files.values()):
            raise RunError(f"{run.path}: the files of {key} changed since the start. Restore them, or start a new run.")
    tell_versions(saved)


def tell_versions(saved: dict[str, Any]) -> None:
    """Say which libraries have another version than when the run began: results may differ in the last bits."""
    now = versions()
    other = [
        f"{name} {then} then, {now[name]} now"
        for name, then in saved["versions"].items()
        if name in now and now[name] != then
    ]
    if other:
        console.say("versions", f"{'; '.join(other)}: the same bytes cannot be promised")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of lora_lab, Python and the libraries that decide results."""
    return {
        "lora_lab": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in (*_PACKAGES, *filter(_installed, _EXTRAS))},
    }


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _git_commit() -> str | None:
    """Commit of the checkout that the code runs from, '-dirty' with uncommitted changes; None for an installed wheel."""
    checkout = Path(__file__).parents[2]
    if not (checkout / "pyproject.toml").is_file():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = children.run(command, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip() or None) if done.returncode == 0 else None
