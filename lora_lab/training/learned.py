"""What the processes of a run learned in a step, each from its part of the micro-batches, summed up.

A step's loss is a sum over items, divided once by what the whole step weighs. Every process puts the whole step together, so the weight is
known everywhere; gradients are sums too, and sums of sums are the same sum. Nothing is averaged twice, whatever each process had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Self

import torch

from lora_lab.errors import ProcessError
from lora_lab.runtime import ranks
from lora_lab.training.cohort import Counts, Share


@ranks.said
@dataclasses.dataclass(frozen=True)
class Told:
    """What a process says of its part of a step, as plain values."""

    finished: bool  # whether no signal ended it
    counts: list[Counts]  # of each member
    present: bytes  # for each parameter whether it has a gradient


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a process learned in its part of a step; gradients of all members lie in one buffer, after their losses."""

    shares: Sequence[Share]
    parameters: list[torch.nn.Parameter]
    told: Told
    buffer: torch.Tensor | None  # None: there is one process

    @classmethod
    def of(cls, shares: Sequence[Share], finished: bool) -> Self:
        """Of members that took the step together.

        Args:
            finished: whether all of the part's passes were made.
        """
        if ranks.size() == 1:
            return cls(shares, [], Told(finished, [], b""), None)
        parameters = [parameter for one in shares for parameter in one.member.parameters.values()]
        told = Told(finished, [one.counts for one in shares], ranks.present(parameters))
        return cls(shares, parameters, told, ranks.flat(parameters, [_summed(one) for one in shares]))

    def sum(self, told: Sequence[Told]) -> None:
        """Give the members the losses, counts and gradients of all processes.

        Args:
            told: by each process.

        Raises:
            ProcessError: they did not take the same step.
        """
        if self.buffer is None:
            return
        _same_step(told)
        ranks.sum_flat(self.buffer)
        count = len(self.shares)
        ranks.unflatten(self.buffer[count:], self.parameters, [one.present for one in told])
        for place, share in enumerate(self.shares):
            share.receive([one.counts[place] for one in told], self.buffer[place])


def _summed(share: Share) -> torch.Tensor:
    """The sum of a member's losses, float32, where they were computed."""
    return torch.stack([loss.float() for loss in share.losses]).sum() if share.losses else torch.zeros(())


def _same_step(told: Sequence[Told]) -> None:
    steps = [[(one.weight, one.batches) for one in each.counts] for each in told]
    for number, step in enumerate(steps):
        if step != steps[0]:
            raise ProcessError(
                f"{ranks.title(number)}: put another step together than process 0 (weight and micro-batches of each member: {step} and "
                f"{steps[0]}), so the update was not made. All machines must read the same rows."
            )
