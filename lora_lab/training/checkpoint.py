"""Checkpoints that can be trusted: everything a member needs to go on, in safetensors and JSON, whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_lab.adapters import files
from lora_lab.errors import CheckpointError, LoraLabError, RunError
from lora_lab.runtime import console, ranks, reading, storage

if TYPE_CHECKING:
    from lora_lab.training.cohort import Member

_NAME = re.compile(r"^step-(\d+)$")
_STATE, _OPTIMIZER = "state.json", "optimizer.safetensors"
_KEPT = "kept.safetensors"  # what the adapter's section keeps beside; few do
_UNWRITTEN = "unwritten_metrics"  # lines of metrics.jsonl that no disk took
# fields that checkpoints of earlier versions do not have
_LATER = {"best_lost", "loss_scale", "steps_at_scale", "micro_batch_tokens", "dequantizing", "unmeasured"}


def save(member: Member) -> Path:
    """Write `checkpoints/step-N/`, then drop older checkpoints beyond `train.keep_checkpoints` (never the best one).

    Raises:
        ProcessError: the adapter of another process is not the same to the last bit.
    """
    if ranks.size() > 1:
        ranks.prove(
            {f"adapter after step {member.state.step} (SHA-256)": _digest(member)},
            "Nothing was saved: resume from the checkpoint before. Processes of one run need cards or processors of one kind.",
        )
    ranks.on_main(lambda: _write(member))
    return _folder(member, member.state.step)


def _digest(member: Member) -> str:
    """Of all bytes of the adapter."""
    found = hashlib.sha256()
    for name, parameter in member.parameters.items():
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _write(member: Member) -> None:
    folder = _folder(member, member.state.step)
    tensors, scalars = _flatten(member.optimizer.state_dict())
    state = {
        "member": dataclasses.asdict(member.state),
        "schedule": member.schedule.state_dict(),
        "optimizer": scalars,
    }
    unwritten = member.log.sync()  # the checkpoint counts on every line up to its step
    if unwritten:
        state[_UNWRITTEN] = unwritten
    with storage.new_folder(folder, {"step": member.state.step}) as temporary:
        files.write(temporary, member.model, member.name, member.config, member.base, member.task.learned)
        save_file(tensors, temporary / _OPTIMIZER)
        if kept := member.config.adapter.kept(member.model, member.name):
            save_file({key: one.detach().cpu().contiguous() for key, one in kept.items()}, temporary / _KEPT)
        (temporary / _STATE).write_text(storage.dump_json(state), encoding="utf-8")
    _purge(member)


def _folder(member: Member, step: int) -> Path:
    return member.run.checkpoints / f"step-{step}"


def _purge(member: Member) -> None:
    """Drop checkpoints that are not needed any more, and those beyond the step, which were damaged when the run was resumed: they
    must not push out whole ones."""
    found = _steps(member.run.checkpoints)
    done = [step for step, _ in found if step <= member.state.step]
    kept = {*done[: member.config.train.keep_checkpoints], member.state.best_step}
    for step, old in found:
        if step not in kept:
            try:
                storage.remove(old)
            except RunError as error:  # it takes room, and nothing else
                console.say("purge", error)


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that matches its manifest, and a line for each newer one that had to be skipped."""
    skipped = []
    for _, folder in _steps(checkpoints):
        try:
            check(folder)
        except LoraLabError as error:
            skipped.append(str(error))
        else:
            return folder, skipped
    return None, skipped


def check(folder: Path) -> None:
    """Check that a checkpoint is whole and says what `save` says.

    Raises:
        LoraLabError: it is damaged.
    """
    listed = storage.verify(folder)["files"]
    absent = [name for name in (files.WEIGHTS, files.PROVENANCE, _OPTIMIZER, _STATE) if name not in listed]
    if absent:
        raise CheckpointError(f"{folder}: {storage.MANIFEST} does not list {absent[0]}, so the folder is incomplete.")
    state = _read_state(folder)["member"]
    if folder.name != f"step-{state['step']}":
        raise CheckpointError(f"{folder}: holds the state of step {state['step']}, so it was renamed. It is not used.")
    for name in (files.WEIGHTS, _OPTIMIZER):
        storage.check_safetensors(folder / name)
    with reading.reading(folder / _OPTIMIZER, CheckpointError), safe_open(folder / _OPTIMIZER, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            _path(json.loads(name))


def _read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint's `state.json` says.

    Raises:
        CheckpointError: it is not of the shape that `save` writes.
    """
    from lora_lab.training.cohort import State

    file = folder / _STATE
    saved: dict[str, Any] = reading.read_json(file, CheckpointError)
    member, known = saved.get("member"), typing.get_type_hints(State)
    if not isinstance(member, dict) or not isinstance(saved.get("schedule"), dict):
        raise CheckpointError(f"{file}: has no member or no schedule, so it is no checkpoint's state.")
    unlike = sorted((member.keys() ^ known.keys()) - _LATER)
    unlike += [name for name, value in member.items() if name in known and not _is(value, known[name])]
    if unlike or member["step"] < 0:
        raise CheckpointError(f"{file}: {(unlike or ['step'])[0]} is missing, unknown or of another type.")
    with reading.reading(file, CheckpointError):
        for path, _ in saved["optimizer"]:
            _path(path)
    if not all(isinstance(line, str) for line in saved.get(_UNWRITTEN, [])):
        raise CheckpointError(f"{file}: {_UNWRITTEN} is not a list of lines.")
    return saved


def _is(value: Any, hint: Any) -> bool:
    kinds = typing.get_args(hint) or (hint,)
    return type(value) in kinds or (float in kinds and type(value) is int)


def _path(path: Any) -> None:
    """Check one of the paths that `_flatten` gives."""
    if not path or not all(type(key) in (str, int) for key in path) or not isinstance(path, list):
        raise ValueError(f"{path!r} is no path into an optimizer's state")


def restore(member: Member, folder: Path) -> None:
    """Bring a freshly built member back to the state saved in a checkpoint. If its best checkpoint is damaged, another one becomes
    the best, aloud.

    Raises:
        CheckpointError: the checkpoint is damaged, or was written with another optimizer or schedule.
        AdapterError: it is of another base, or does not fit the adapter.
    """
    files.check_base(folder, member.base)
    files.check_settings(folder, member.model.peft_config[member.name])
    saved = _read_state(folder)
    with reading.reading(folder / _OPTIMIZER, CheckpointError):
        optimizer = _unflatten(load_file(folder / _OPTIMIZER), saved["optimizer"])
    if saved["schedule"].keys() != member.schedule.state_dict().keys():
        raise CheckpointError(f"{folder / _STATE}: its schedule is of another kind than the run's.")
    files.read_into(folder, member.model, member.name)
    _restore_kept(member, folder)
    with reading.reading(folder, CheckpointError):
        member.schedule.load_state_dict(saved["schedule"])
        member.optimizer.load_state_dict(optimizer)
    member.state = type(member.state)(**saved["member"])
    member.log.unwritten = saved.get(_UNWRITTEN, [])
    _replace_lost_best(member)


@torch.no_grad()
def hand_out(member: Member) -> None:
    """Give the member of each process what process 0 has: adapter, optimizer, schedule and state, as a checkpoint would."""
    if ranks.size() == 1:
        return
    own = {**member.parameters, **member.config.adapter.kept(member.model, member.name)}
    content = None
    if ranks.main():
        tensors = {key: one.detach().cpu().contiguous() for key, one in own.items()}
        optimizer = _flatten(member.optimizer.state_dict())
        content = tensors, optimizer, member.schedule.state_dict(), dataclasses.asdict(member.state)
    content = ranks.from_main(content)
    if ranks.main() or content is None:
        return
    tensors, optimizer, schedule, state = content
    for key, one in own.items():
        one.copy_(tensors[key])
    member.optimizer.load_state_dict(_unflatten(*optimizer))
    member.schedule.load_state_dict(schedule)
    member.state = type(member.state)(**state)


@torch.no_grad()
def _restore_kept(member: Member, folder: Path) -> None:
    kept = member.config.adapter.kept(member.model, member.name)
    if not kept:
        return
    with reading.reading(folder / _KEPT, CheckpointError):
        saved = load_file(folder / _KEPT)
    other = sorted(saved.keys() ^ kept.keys()) or [key for key in kept if saved[key].shape != kept[key].shape]
    if other:
        raise CheckpointError(f"{folder / _KEPT}: does not fit the run's adapter, first at {other[0]}.")
    for key, tensor in kept.items():
        tensor.copy_(saved[key])


def _replace_lost_best(member: Member) -> None:
    """If the checkpoint with the lowest held-out loss is damaged, the best of those that are whole takes its place, and `best_lost`
    keeps its step; if there is none, the best is what will be measured from now on, or the last state."""
    state = member.state
    if not member.config.train.keep_best or state.best_step is None or state.best_step == state.step:
        return
    try:
        check(_folder(member, state.best_step))
        return
    except LoraLabError as error:
        console.say("lost", f"the best checkpoint: {error}")
    state.best_lost = state.best_step
    losses = {step: loss for step, loss in _measured(member).items() if step == state.step or _whole(member, step)}
    state.best_step, state.best_loss = min(losses.items(), key=lambda one: one[1], default=(None, None))
    if state.best_step is None:
        console.say("best", "no other measured checkpoint is intact: the run selects among those that follow")
        return
    console.say("best", f"step {state.best_step} takes its place (held-out loss {state.best_loss:.4f})")


def _measured(member: Member) -> dict[int, float]:
    """The held-out losses that were logged up to where the member stands."""
    lines = [*member.log.read(), *member.log.waiting()]
    found = {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}
    return {step: loss for step, loss in found.items() if step <= member.state.step}


def _whole(member: Member, step: int) -> bool:
    try:
        check(_folder(member, step))
    except LoraLabError:
        return False
    return True


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


def _walk(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
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
