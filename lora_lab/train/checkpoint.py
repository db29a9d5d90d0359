"""Checkpoints that can be trusted: everything a member needs to go on, in safetensors and JSON, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from lora_lab import storage
from lora_lab.adapters import files
from lora_lab.errors import CheckpointError

if TYPE_CHECKING:
    from lora_lab.train.cohort import Member

_NAME = re.compile(r"^step-(\d+)$")
_STATE, _OPTIMIZER = "state.json", "optimizer.safetensors"


def save(member: Member) -> Path:
    """Write `checkpoints/step-N/`, then drop older checkpoints beyond `train.keep_checkpoints` (never the best one)."""
    folder = member.run.checkpoints / f"step-{member.state.step}"
    tensors, scalars = _flatten(member.optimizer.state_dict())
    state = {
        "member": dataclasses.asdict(member.state),
        "schedule": member.schedule.state_dict(),
        "optimizer": scalars,
    }
    with storage.new_folder(folder, {"step": member.state.step}) as temporary:
        files.write(temporary, member.model, member.name, member.config, member.base, member.learned)
        save_file(tensors, temporary / _OPTIMIZER)
        (temporary / _STATE).write_text(storage.dump_json(state), encoding="utf-8")
    keep = member.config.train.keep_checkpoints
    for step, old in _steps(member.run.checkpoints)[keep:]:
        if step != member.state.best_step:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that matches its manifest, and a line for each newer one that had to be skipped."""
    skipped = []
    for _, folder in _steps(checkpoints):
        try:
            storage.verify(folder)
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return folder, skipped
    return None, skipped


def restore(member: Member, folder: Path) -> None:
    """Bring a freshly built member back to the state saved in a verified checkpoint."""
    files.check_base(folder, member.base)
    files.check_settings(folder, member.model.peft_config[member.name])
    files.read_into(folder, member.model, member.name)
    saved = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    member.state = type(member.state)(**saved["member"])
    member.schedule.load_state_dict(saved["schedule"])
    member.optimizer.load_state_dict(_unflatten(load_file(folder / _OPTIMIZER), saved["optimizer"]))


def _steps(checkpoints: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders, newest step first (by number: names and times of change may lie)."""
    found = [(int(match[1]), path) for path in checkpoints.glob("step-*") if (match := _NAME.match(path.name))]
    return sorted(found, reverse=True)


def _flatten(tree: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[list[Any]]]:
    """An optimizer's state as tensors by path, and every other value as [path, value].

    A path is a JSON list of keys, because optimizers use numbers as well as names.
    """
    tensors, scalars = {}, []
    for path, value in _walk(tree, ()):
        if isinstance(value, torch.Tensor):
            tensors[json.dumps(path)] = value.detach().cpu().contiguous().clone()
        else:
            scalars.append([path, value])
    return tensors, scalars


def _walk(node: Any, path: tuple) -> Iterator[tuple[tuple, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _walk(value, (*path, key))
    else:
        yield path, node


def _unflatten(tensors: dict[str, torch.Tensor], scalars: list[list[Any]]) -> dict[str, Any]:
    tree: dict[Any, Any] = {}
    for path, value in [*((json.loads(path), tensor) for path, tensor in tensors.items()), *scalars]:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
