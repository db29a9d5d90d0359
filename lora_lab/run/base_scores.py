"""What the base scores on held-out rows, kept for later runs: it depends on the base, the rows and the settings that it is measured by,
and on no adapter.

The entry's name is a digest of everything that decides the scores. They are the same up to rounding on any machine of a kind and with any
number of threads and processes, so those are not among it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_lab.base import cache
from lora_lab.base.resolve import cache_dir
from lora_lab.data import store
from lora_lab.errors import CheckpointError, RunError
from lora_lab.run import run_dir
from lora_lab.runtime import console, ranks, storage
from lora_lab.runtime.reading import read_json
from lora_lab.tasks.base import Answer, EvalResult

if TYPE_CHECKING:
    from lora_lab.run.setup import Setup

_FILE = "scores.json"


def kept_or(setup: Setup, measure: Callable[[], EvalResult]) -> EvalResult:
    """What the base scores on the held-out rows of a setup: as it was measured before, or measured now and kept.

    Args:
        setup: of a loaded model, so that its task knows how rows go through it.
    """
    folder = folder_of(setup)
    known = ranks.from_main(_read(folder) if ranks.main() else None)
    if known is not None:
        console.say("base", f"its scores on these rows were measured before and are taken from the cache ({folder})")
        return _result(known)
    found = measure()
    if ranks.main():
        _keep(folder, dataclasses.asdict(found))
    return found


def folder_of(setup: Setup) -> Path:
    """Where the scores are kept."""
    config, held_out, task = setup.config, setup.held_out_rows(), setup.task
    parts = {
        "base": [setup.base.fingerprint, setup.base.companions],
        "model": dataclasses.asdict(setup.kind),
        "new modules": config.seed if setup.kind.new_modules else None,
        "dtype": config.model.dtype,
        "quant": dataclasses.asdict(setup.base.stored(config.quant)),
        "speed": dataclasses.asdict(config.speed),
        "machine": _machine(setup.device),
        "rows": held_out.digest,
        "rows together": task.forward.together,
        "encoding": [store.encoding_options(config.data), str(setup.encoder.day)],
        "task": [dataclasses.asdict(config.task), task.learned, task.read_beside()],
        "versions": run_dir.versions(),
        "code": _code_version(),
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_dir() / "scores" / digest[:40]


def _machine(device: torch.device) -> str:
    """The kind of units that compute, which decide how sums are rounded."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _code_version() -> str:
    """Digest of this package's code: any of it may decide a score."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _read(folder: Path) -> dict[str, Any] | None:
    if not folder.exists():
        return None
    with contextlib.suppress(RunError), cache.entry(folder, RunError) as there:
        found: dict[str, Any] | None = read_json(folder / _FILE, CheckpointError) if there else None
        return found
    return None


def _keep(folder: Path, found: dict[str, Any]) -> None:
    """Write what JSON gives back as it was; a cache that cannot be written costs time, nothing else."""
    text = storage.dump_json(found)
    if json.loads(text) != found:  # such as what is not a number
        return
    with contextlib.suppress(RunError), cache.entry(folder, RunError) as there:
        if not there:
            with storage.new_folder(folder) as temporary:
                (temporary / _FILE).write_text(text, encoding="utf-8")


def _result(found: dict[str, Any]) -> EvalResult:
    return EvalResult(found["metrics"], [Answer(**one) for one in found["answers"]], found["details"])
