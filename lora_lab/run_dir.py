"""The folder of a run: what lies where, how it is made, and who may work in it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lab import __version__, compose, console, storage
from lora_lab.base.load import BaseFiles
from lora_lab.config import RunConfig
from lora_lab.errors import RunError
from lora_lab.reading import read_json

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "hydra-core", "safetensors")


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
        """Only one process at a time works in a run folder; what it says goes into `log.txt` as well."""
        with storage.locked(self.path), console.logged_to(self.path / "log.txt"):
            yield


def check_free(config: RunConfig) -> RunDir:
    """The run folder that the configuration names, still to be made; called before any long work.

    Raises:
        RunError: it holds something already, is a file, or its parent cannot be written.
    """
    run = RunDir(Path(config.run_dir).expanduser())
    if run.path.is_dir() and any(run.path.iterdir()):
        raise RunError(
            f"run_dir={run.path}: exists and is not empty; nothing in it was touched. Choose another run_dir, or go on "
            f"with it: lora-lab resume run={run.path}"
        )
    if run.path.exists() and not run.path.is_dir():
        raise RunError(f"run_dir={run.path}: a file of that name exists. Choose another run_dir.")
    parent = next(folder for folder in [run.path.absolute(), *run.path.absolute().parents] if folder.exists())
    if not os.access(parent, os.W_OK):
        raise RunError(f"run_dir={run.path}: {parent} is read-only. Choose another run_dir.")
    return run


def create(config: RunConfig) -> RunDir:
    """Make the run folder and save the resolved configuration in it.

    Raises:
        RunError: as `check_free`, or the system refuses to make it.
    """
    run = check_free(config)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"run_dir={run.path}: cannot be made ({error.strerror}). Choose another run_dir.") from error
    storage.write_text(run.config, compose.to_yaml(config))
    return run


def open_existing(path: str) -> RunDir:
    """The run folder that `run=DIR` names.

    Raises:
        RunError: there is no run in it.
    """
    run = RunDir(Path(path).expanduser())
    if not run.config.is_file():
        raise RunError(f"run={path}: no run there (no config.yaml). Name a folder that lora-lab train made.")
    return run


def check_same(run: RunDir, config: RunConfig) -> None:
    """Refuse to go on with a run folder that was made for other values.

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


def write_manifest(run: RunDir, config: RunConfig, base: BaseFiles, data: dict[str, dict[str, str]]) -> None:
    """Record what the run is made of: its configuration, versions, the base and what goes with it, the data's hashes, the code's
    commit."""
    manifest = {
        "config": dataclasses.asdict(config),
        "base": {**base.recorded(), "folder": str(base.folder)},
        "data": data,
        "versions": versions(),
        "git_commit": _git_commit(),
    }
    storage.write_text(run.manifest, storage.dump_json(manifest))


def read_manifest(run: RunDir) -> dict[str, Any] | None:
    """What was recorded when the run began; None if it was stopped before that.

    Raises:
        RunError: the file is damaged, or it is gone although there is something to go on with.
    """
    if not run.manifest.exists():
        if run.adapter.exists() or run.result.exists() or any(run.checkpoints.glob("step-*")):
            raise RunError(
                f"{run.manifest}: missing, so nothing tells what the run was made of. Restore it, or start anew."
            )
        return None
    saved = read_json(run.manifest, RunError)
    shapes = {"base": dict, "data": dict, "versions": dict}
    wrong = [key for key, kind in shapes.items() if not isinstance(saved.get(key), kind)]
    if wrong or not all(isinstance(files, dict) for files in saved["data"].values()):
        raise RunError(f"{run.manifest}: '{(wrong or ['data'])[0]}' is not what lora-lab wrote. Restore the file.")
    return saved


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
    then, now = dict(compose.leaves(recorded)), dict(compose.leaves(dataclasses.asdict(config)))
    edited = [f"{key} is {now[key]} and was {then[key]}" for key in now if key in then and now[key] != then[key]]
    if edited:
        raise RunError(f"{run.config}: edited since the run began: {'; '.join(edited)}. Restore it, or start anew.")


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
            "start anew."
        )
    for key, files in data.items():
        if sorted(saved["data"].get(key, {}).values()) != sorted(files.values()):
            raise RunError(f"{run.path}: the files of {key} changed since the start. Restore them, or start anew.")
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


def versions() -> dict[str, str]:
    """Versions of lora_lab, Python and the libraries that decide results."""
    return {
        "lora_lab": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _git_commit() -> str | None:
    """Commit of the checkout that the code runs from, '-dirty' with uncommitted changes; None for an installed wheel."""
    checkout = Path(__file__).parents[1]
    if not (checkout / "pyproject.toml").is_file():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
