"""Several members in one forward and backward pass: all their rows through each frozen weight at once, each adapter on its own.

A member's loss, and so its gradients, depend on its own rows only, and it learns from the same micro-batches, with the same
dropout, as it would alone; what differs is the order in which products are summed up (float32: 1e-5 after many steps).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_lab.data.dataset import Dataset, Stream, first_examples
from lora_lab.data.encode import Example
from lora_lab.errors import TrainingError
from lora_lab.fast.roster import Roster, Seat
from lora_lab.tasks.causal_lm import DecoderTask
from lora_lab.train import packing

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lora_lab.tasks.base import Task
    from lora_lab.train.cohort import Member

# How far gradients of a shared pass may be from those of a pass alone, as a share of their norm. bfloat16: 0.02 to 0.035 were
# measured on rows of 48 tokens; one token that reaches the wrong member moves them by about 1 / sqrt(48) = 0.14.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-1}


@dataclasses.dataclass
class Share:
    """What one member brings into a step, and what it learned in it."""

    member: Member
    parts: list[list[Example]]  # of each micro-batch
    seed: int
    weight: float  # sum of the weights of all that it learns from
    generator: torch.Generator
    loss: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(example.num_tokens for part in self.parts for example in part)

    @property
    def supervised(self) -> int:
        return sum(int(example.supervised.sum()) for part in self.parts for example in part)


def reason_against(task: Task, members: Sequence[Member], alone: str) -> str:
    """Why these members cannot share passes; empty if they can.

    Args:
        alone: what the model's modules say, see `fast.apply`.
    """
    train = [member.config.train for member in members]
    dropout = any(member.config.adapter.dropout for member in members)
    reasons = {
        f"task={members[0].config.task.name} is not trained on packed rows, each by itself": not (
            isinstance(task, DecoderTask) and type(task).loss is DecoderTask.loss and task.together
        ),
        "train.neftune_alpha, train.fgm_epsilon or train.rdrop_alpha change the pass itself": any(
            one.neftune_alpha or one.fgm_epsilon or one.rdrop_alpha for one in train
        ),
        "dropout is drawn again where activations are recomputed": dropout
        and any(one.gradient_checkpointing for one in train),
        "the base itself drops activations": _drops(members[0]),
        alone: bool(alone),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _drops(member: Member) -> bool:
    base = member.model.get_base_model()
    rates = (
        getattr(base.config.get_text_config(), name, 0.0)
        for name in dir(base.config.get_text_config())
        if "drop" in name
    )
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def share(member: Member, parts: list[list[Example]]) -> Share:
    """What a member brings into its coming step."""
    seed = member.plan.dropout_seed(member.state.step)
    weight = sum(float(example.weights.sum()) for part in parts for example in part)
    return Share(member, parts, seed, weight, torch.Generator(member.model.device))


def learn(shares: Sequence[Share], task: DecoderTask, roster: Roster, accelerator: Accelerator) -> None:
    """Add the gradients of each member's step, and its summed loss to its share."""
    for one in shares:
        one.loss = 0.0
        one.generator.manual_seed(one.seed)  # a step that is made again drops the same
        for parameter in one.member.parameters.values():
            parameter.requires_grad_()  # peft lets only the active adapter have gradients
    for place in range(max(len(one.parts) for one in shares)):
        _learn_part([one for one in shares if place < len(one.parts)], place, task, roster, accelerator)


def _learn_part(
    shares: Sequence[Share], place: int, task: DecoderTask, roster: Roster, accelerator: Accelerator
) -> None:
    model = shares[0].member.model
    examples = [example for one in shares for example in one.parts[place]]
    batch = task.collate(examples, np.random.default_rng(0)).to(model.device)
    seats = [_seat(one, place) for one in shares]
    with roster.seated(seats):
        with accelerator.autocast():
            losses, _ = task.weighted_losses(model, batch)
        sums = [part.sum() for part in losses.split([seat.items for seat in seats])]
        accelerator.backward(sum(loss / one.weight for loss, one in zip(sums, shares, strict=True)))
    for loss, one in zip(sums, shares, strict=True):
        one.loss += loss.item()


def _seat(one: Share, place: int) -> Seat:
    part = one.parts[place]
    items = sum(int((example.weights != 0).sum()) for example in part)
    return Seat(one.member.name, sum(len(example.input_ids) for example in part), items, one.generator)


def check(
    members: Sequence[Member], train: Dataset | Stream, task: DecoderTask, roster: Roster, accelerator: Accelerator
) -> None:
    """Prove on real rows, cut short, that a shared pass gives each member the gradients of a pass of its own.

    Raises:
        TrainingError: they differ by more than rounding.
    """
    rows = [packing.tail(example) for example in first_examples(train, len(members))]
    model = members[0].model.train()

    def own(place: int) -> Share:
        row = rows[place % len(rows)]
        return Share(members[place], [[row]], 0, float(row.weights.sum()), torch.Generator(model.device))

    learn([own(place) for place in range(len(members))], task, roster, accelerator)
    together = [_gradients(member) for member in members]
    limit = _ROUNDING[model.get_base_model().dtype]
    for place, (member, found) in enumerate(zip(members, together, strict=True)):
        with member.turn():
            torch.manual_seed(0)
            with accelerator.autocast():
                out = task.loss(model, task.collate(own(place).parts[0], np.random.default_rng(0)).to(model.device))
            accelerator.backward(out.loss / out.weight)
            alone = _gradients(member)
        gap = ((found - alone).norm() / alone.norm()).item()
        if not gap <= limit:
            raise TrainingError(
                f"sweep.execution=joint: a shared pass changes the gradients of {member.run.path} by {gap:.1e} of their norm "
                f"(allowed: {limit:.0e}). Set sweep.execution=turns."
            )


def _gradients(member: Member) -> torch.Tensor:
    flat = torch.cat(
        [parameter.grad.flatten() for parameter in member.parameters.values() if parameter.grad is not None]
    )
    member.optimizer.zero_grad()
    return flat
