"""Which examples a step trains on: a pure function of seed and step, so that resuming needs no stored position."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from lora_lab.config.run import RunConfig
from lora_lab.data.dataset import Dataset, Mixture, Stream


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """Shuffled epochs over `num_examples`, `batch_size` at a time; the last step of an epoch may be smaller.

    With a mixture, an epoch draws from each source as often as the mixture says, going through the source again and again
    in fresh orders, so that within a source no example comes up twice before all have come up once.
    """

    num_examples: int
    batch_size: int
    micro_batch_size: int
    seed: int
    mixture: Mixture | None = None
    micro_batch_tokens: int | None = None  # see `filled`; a step's rows are known by number here, so the loop does it
    # [num_examples] a number for each: examples of one number come into different steps, as far as there are steps
    groups: np.ndarray | None = dataclasses.field(default=None, compare=False)

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
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = self._order(epoch)
        chosen = self._orders[epoch][offset * self.batch_size : (offset + 1) * self.batch_size]
        return [chosen[i : i + self.micro_batch_size] for i in range(0, len(chosen), self.micro_batch_size)]

    @functools.cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        """The examples of the epoch that was asked for last."""
        return {}

    def _order(self, epoch: int) -> np.ndarray:
        if self.mixture is None:
            order = _permutation(self.num_examples, self.seed, epoch)
        else:
            order = _mixed(self.mixture, self.seed, epoch)
        return order if self.groups is None else self._parted(order, self.groups[order], epoch)

    def _parted(self, order: np.ndarray, groups: np.ndarray, epoch: int) -> np.ndarray:
        """The same examples, group after group, dealt to the steps in turn."""
        steps, size = self.steps_per_epoch, self.batch_size
        last = len(order) - (steps - 1) * size  # examples of the last step, which are at most as many as another has
        turns = np.concatenate([np.tile(np.arange(steps), last), np.tile(np.arange(steps - 1), size - last)])
        _, numbers = np.unique(groups, return_inverse=True)
        ranks = np.random.default_rng([self.seed, epoch, 5]).permutation(len(order))
        return order[np.argsort(ranks[numbers], kind="stable")][np.argsort(turns, kind="stable")]

    def dropout_seed(self, step: int) -> int:
        """Seed of everything random inside step `step`."""
        return int(np.random.SeedSequence([self.seed, step, 1]).generate_state(1, np.uint64)[0] >> 1)


def pass_seed(seed: int, place: int) -> int:
    """Seed of everything random inside one pass of a step, so that it does not matter who makes the passes before it.

    Args:
        seed: `BatchPlan.dropout_seed` of the step, which is the first pass's own.
        place: of the pass among those of the step.
    """
    return int(np.random.SeedSequence([seed, place, 4]).generate_state(1, np.uint64)[0] >> 1) if place else seed


def plan_of(config: RunConfig, data: Dataset | Stream) -> BatchPlan:
    """The batches of a run on its training rows."""
    train = config.train
    rows = train.micro_batch_size or train.batch_size
    apart = config.task.apart
    groups = data.numbered(apart) if apart is not None and isinstance(data, Dataset) else None
    return BatchPlan(len(data), train.batch_size, rows, config.seed, data.mixture, train.micro_batch_tokens, groups)


def filled(lengths: Sequence[int], rows: int, tokens: int, padded: bool = False) -> list[slice]:
    """Where rows one after another are cut into passes, each filled up with as many as it takes, and at least one.

    Args:
        lengths: tokens of each row.
        rows: of a pass, at most.
        tokens: of a pass, at most, if it has more than one row.
        padded: whether each row of a pass takes as many tokens as its longest.
    """
    cuts = [0]
    for place in range(1, len(lengths)):
        own = lengths[cuts[-1] : place + 1]
        size = len(own) * max(own) if padded else sum(own)
        if len(own) > rows or size > tokens:
            cuts.append(place)
    return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(lengths)], strict=True) if end > start]


@functools.lru_cache(maxsize=16)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


@functools.lru_cache(maxsize=16)
def _mixed(mixture: Mixture, seed: int, epoch: int) -> np.ndarray:
    drawn, offset = [], 0
    for source, (size, draws) in enumerate(zip(mixture.sizes, mixture.draws, strict=True)):
        positions = np.arange(epoch * draws, (epoch + 1) * draws)  # in the endless row of this source's passes
        for turn in np.unique(positions // size) if size else []:
            order = np.random.default_rng([seed, source, int(turn), 2]).permutation(size)
            drawn.append(order[positions[positions // size == turn] % size] + offset)
        offset += size
    every = np.concatenate(drawn)
    return every[np.random.default_rng([seed, epoch, 3]).permutation(len(every))]
