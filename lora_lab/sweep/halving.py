"""Successive halving (arXiv:1502.07943) with warm continuation: the better runs go on from where they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lora_lab.config.sweep import SweepConfig
from lora_lab.run.run_dir import finite_number
from lora_lab.runtime import console
from lora_lab.tasks.metrics import as_cost

if TYPE_CHECKING:
    from lora_lab.training.cohort import Member


@dataclasses.dataclass
class Rung:
    """A stretch of training after which the worse members stop."""

    members: list[Member]
    keep: int  # how many go on
    kept: list[Member] = dataclasses.field(default_factory=list)

    def choose(self, trained: Sequence[Member]) -> None:
        """Keep the members that are best on held-out rows where they stopped; one without a finite figure is never kept."""
        scored = sorted(
            (score_at(member, member.stop_at), place) for place, member in enumerate(trained) if member.failure is None
        )
        finite = [place for loss, place in scored if math.isfinite(loss)][: self.keep]
        self.kept = [trained[place] for place in sorted(finite)]


def rungs(members: list[Member], sweep: SweepConfig) -> Iterator[Rung]:
    """The stretches of a sweep, each with the members that are left. A grid has one stretch.

    With the factor eta the first of n rungs ends after 1 / eta^(n-1) of each member's steps, and of each rung 1 / eta go on.
    The learning-rate schedule is that of the whole run, so a member that reaches its end is as if it had run alone.
    """
    if sweep.strategy == "grid":
        yield Rung(members, len(members))
        return
    eta, count = sweep.eta, sweep.rungs or 1
    while sweep.rungs is None and eta**count <= len(members):
        count += 1
    for number in range(count):
        last = number == count - 1
        for member in members:
            share = member.total_steps / eta ** (count - 1 - number)
            member.stop_at = member.total_steps if last else max(1, round(share))
        rung = Rung(members, len(members) if last else max(1, len(members) // eta))
        yield rung
        if not last:
            console.say(
                "halving", f"{len(rung.kept)} of {len(members)} runs continue after rung {number + 1} of {count}"
            )
            members = rung.kept


def score_at(member: Member, step: int) -> float:
    """What was measured on held-out rows after a step, such that lower is better: `sweep.metric` where training measures it (not
    generated answers), else the loss."""
    metric = member.config.sweep.metric
    for line in member.log.read():
        if isinstance(line, dict) and line.get("step") == step and "eval_loss" in line:
            name = metric if f"eval_{metric}" in line else "loss"
            value = finite_number(line[f"eval_{name}"])
            return math.inf if value is None else as_cost(name, value)
    return math.inf
