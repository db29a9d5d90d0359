"""Which examples a step trains on: a pure function of seed and step, so that resuming needs no stored position."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Shuffled epochs over `num_examples`, `batch_size` at a time; the last step of an epoch may be smaller."""

    num_examples: int
    batch_size: int
    micro_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_examples / self.batch_size)

    def total_steps(self, epochs: int, max_steps: int | None) -> int:
        """Optimizer steps of the whole run: the epochs, cut at `max_steps`."""
        steps = epochs * self.steps_per_epoch
        return steps if max_steps is None else min(steps, max_steps)

    def step(self, step: int) -> list[np.ndarray]:
        """Example numbers of optimizer step `step` (from 0), as micro-batches."""
        epoch, offset = divmod(step, self.steps_per_epoch)
        chosen = self._order(epoch)[offset * self.batch_size : (offset + 1) * self.batch_size]
        return [chosen[i : i + self.micro_batch_size] for i in range(0, len(chosen), self.micro_batch_size)]

    def _order(self, epoch: int) -> np.ndarray:
        return _permutation(self.num_examples, self.seed, epoch)

    def dropout_seed(self, step: int) -> int:
        """Seed of everything random inside step `step`."""
        return int(np.random.SeedSequence([self.seed, step, 1]).generate_state(1, np.uint64)[0] >> 1)


@functools.lru_cache(maxsize=16)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
