"""Whether members can share passes (see `cohort.learn`), said beforehand and proved on their own rows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from lora_lab.adapters.attach import base_of
from lora_lab.data.dataset import Dataset, Stream, first_examples
from lora_lab.data.encode import Example
from lora_lab.errors import TrainingError
from lora_lab.runtime import console
from lora_lab.runtime.memory import is_out_of_memory
from lora_lab.training.cohort import learn, learning, share

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lora_lab.config.run import RunConfig
    from lora_lab.tasks.base import AnyTask
    from lora_lab.training.cohort import Member

# How far gradients of a shared pass may be from those of a pass alone, as a share of their norm. bfloat16: 0.02 to 0.035 were
# measured on rows of 48 tokens; one token that reaches the wrong member moves them by about 1 / sqrt(48) = 0.14.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 2e-2}


def reason_against(members: Sequence[Member]) -> str:
    """Why these members, of one model, cannot share passes; empty if they can."""
    config, task = members[0].config, members[0].task
    train = [member.config.train for member in members]
    drops, on_cpu = _drops(members[0]), members[0].model.device.type == "cpu"
    dropout = drops or any(member.config.adapter.dropout for member in members)
    reasons = {
        "train.neftune_alpha, train.fgm_epsilon or train.rdrop_alpha change the pass itself": any(
            one.neftune_alpha or one.fgm_epsilon or one.rdrop_alpha for one in train
        ),
        "dropout is drawn again where activations are recomputed": dropout
        and any(one.gradient_checkpointing for one in train),
        "the base itself drops activations, by kernels that know no members": drops and not on_cpu,
    }
    found = next((reason for reason, holds in reasons.items() if holds), "")
    return reason_of_rows(config, task) or found or task.forward.unshareable


def reason_of_rows(config: RunConfig, task: AnyTask) -> str:
    """Why the rows of several adapters of a run cannot be told apart in one pass of its task; empty if nothing is known against it."""
    if config.adapter.against_packing:
        return config.adapter.against_packing
    if not config.adapter.shares_passes:
        return f"{config.adapter.label} cannot be told apart by row"
    return "" if task.shares_passes else f"task={config.task.name} needs passes of each member's own"


def _drops(member: Member) -> bool:
    config = base_of(member.model).config.get_text_config()
    rates = (getattr(config, name, 0.0) for name in dir(config) if "drop" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def check(members: Sequence[Member], train: Dataset | Stream, accelerator: Accelerator) -> None:
    """Prove on real rows, cut short, that a shared pass gives each member the gradients of a pass of its own. Where they differ by more
    than rounding, or it cannot be told whose rows or random numbers are whose, members take turns from now on.

    Raises:
        TrainingError: so they would, but were told to share.
    """
    rows = _rows(members, train)

    def gradients(places: Sequence[int]) -> list[torch.Tensor]:
        """Of one pass of these members."""
        own, alone = [members[place] for place in places], len(places) == 1
        with learning(own):
            shares = [
                share(member, [rows[place]], place, accelerator, alone)
                for member, place in zip(own, places, strict=True)
            ]
            with contextlib.nullcontext() if alone else _nothing_drawn(members[0].model.device):
                learn(shares, 0, accelerator)
            return [_taken(member) for member in own]

    states = [dataclasses.replace(member.state) for member in members]
    try:
        together = gradients(range(len(members)))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        for member in members:
            member.optimizer.zero_grad()
        _take_turns(members, f"{error}".partition("\n")[0])
        return
    while not all(found.isfinite().all() for found in together) and all(member.lower_scale() for member in members):
        together = gradients(range(len(members)))  # so few tokens can be too much for float16
    limit = _ROUNDING[base_of(members[0].model).dtype]
    for place, (member, found) in enumerate(zip(members, together, strict=True)):
        [alone] = gradients([place])
        gap = ((found - alone).norm() / alone.norm()).item()
        if not gap <= limit:
            _take_turns(
                members,
                f"a shared pass changes the gradients of {member.run.path} by {gap:.1e} of their norm (allowed: {limit:.0e})",
            )
            break
    for member, state in zip(members, states, strict=True):
        member.state = state  # a resumed run goes on with the scale that it had


def _rows(members: Sequence[Member], train: Dataset | Stream) -> list[list[Example]]:
    """What each member is tried on: a row, or two, of which one may be padded."""
    task = members[0].task
    count = 1 if task.forward.packed or not task.forward.together else 2
    found = [task.shortened(example) for example in first_examples(train, count * len(members))]
    return [[found[(count * place + i) % len(found)] for i in range(count)] for place in range(len(members))]


@contextlib.contextmanager
def _nothing_drawn(device: torch.device) -> Iterator[None]:
    """Refuse that anything is drawn inside the block but by members' own generators.

    Raises:
        TrainingError: something was.
    """
    before = _drawn(device)
    yield
    if not torch.equal(before, _drawn(device)):
        raise TrainingError("the base drops something in a way that knows no members")


def _drawn(device: torch.device) -> torch.Tensor:
    """The state of torch's own generators."""
    on_card = [torch.cuda.get_rng_state(device)] if device.type == "cuda" and torch.cuda.is_initialized() else []
    return torch.cat([torch.get_rng_state(), *on_card])


def _take_turns(members: Sequence[Member], reason: str) -> None:
    """Let members take turns.

    Raises:
        TrainingError: they were told to share passes.
    """
    if members[0].config.sweep.execution == "batched":
        raise TrainingError(f"sweep.execution=batched: {reason}. Set sweep.execution=interleaved.")
    members[0].task.forward.members = 1
    console.say("cohort", f"{len(members)} runs take turns after all: {reason}")


def _taken(member: Member) -> torch.Tensor:
    """The member's gradients, flat; they are gone then."""
    flat = torch.cat(
        [parameter.grad.flatten() for parameter in member.parameters.values() if parameter.grad is not None]
    )
    member.optimizer.zero_grad()
    return flat
