"""Put examples together: end to end in one padding-free row where each keeps its own positions and attention, or as rows
padded to the length of the longest."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from lora_lab.data.encode import Example


_IDS = ("input_ids", "decoder_input_ids")  # padded inputs by their names


class Batch:
    """Examples that one forward pass learns from, `S` things in all. What a subclass, a dataclass, holds at least."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    lengths: list[int]  # tokens of each row, padding not counted
    targets: torch.Tensor  # [S] int64, or float for numbers
    weights: torch.Tensor | None  # [S] float32: how much each counts in the loss; None: all one
    origins: list[str]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads, padding not counted."""
        return sum(self.lengths)

    @property
    def num_places(self) -> int:
        """How many tokens there are whose output alone some module may be given; 0: none is."""
        return len(self.targets)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Rows and places of each padded input."""
        return ()

    @functools.cached_property
    def weight(self) -> float:
        """Sum of the weights of its items."""
        return float(len(self.targets)) if self.weights is None else float(self.weights.sum())

    def to(self, device: torch.device | str) -> Self:
        """The batch with all of its tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = dataclasses.replace(
            self,
            **{name: tree_map_only(torch.Tensor, lambda t: t.to(device), value) for name, value in values.items()},
        )
        moved.__dict__["weight"] = self.weight  # a GPU would be waited for
        return moved


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch(Batch):
    """Some examples in one row of `T` tokens, `S` of them supervised."""

    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64, from 0 in each example
    lengths: list[int]  # tokens of each example; they sum to T
    logit_positions: torch.Tensor  # [S] int64: where in the row the logits of each target stand
    targets: torch.Tensor  # [S] int64: the tokens to predict there
    weights: torch.Tensor | None
    origins: list[str]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class PaddedBatch(Batch):
    """`B` rows padded on the right to `T` tokens, with `S` things to learn."""

    inputs: dict[str, torch.Tensor]  # what the model is called with: [B, T] int64 each
    lengths: list[int]
    places: tuple[torch.Tensor, torch.Tensor] | None  # row and token of each item, [S] int64 each; None: an item a row
    targets: torch.Tensor
    weights: torch.Tensor | None
    origins: list[str]

    @property
    def num_places(self) -> int:
        return 0 if self.places is None else len(self.places[0])

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The encoder's, and the decoder's if there is one."""
        named = (self.inputs[name].shape for name in _IDS if name in self.inputs)
        return tuple((rows, width) for rows, width in named)


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedBatch(PaddedBatch):
    """Padded rows whose items are tokens."""

    places: tuple[torch.Tensor, torch.Tensor]


def pad(rows: Sequence[np.ndarray | Sequence[int]], fill: int) -> torch.Tensor:
    """[B, T] int64: rows of unlike length, filled up on the right."""
    padded = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return torch.from_numpy(padded)


def join(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Batches end to end: what `pack` makes of all their examples."""
    starts = itertools.accumulate((batch.num_tokens for batch in batches), initial=0)
    weights = None
    if any(batch.weights is not None for batch in batches):
        weights = torch.cat(
            [torch.ones_like(b.targets, dtype=torch.float32) if b.weights is None else b.weights for b in batches]
        )
    return PackedBatch(
        input_ids=torch.cat([batch.input_ids for batch in batches], 1),
        position_ids=torch.cat([batch.position_ids for batch in batches], 1),
        lengths=[length for batch in batches for length in batch.lengths],
        logit_positions=torch.cat([b.logit_positions + start for b, start in zip(batches, starts, strict=False)]),
        targets=torch.cat([batch.targets for batch in batches]),
        weights=weights,
        origins=[origin for batch in batches for origin in batch.origins],
    )


def join_rows(batches: Sequence[PaddedBatch], pad_id: int) -> tuple[dict[str, torch.Tensor], list[slice]]:
    """What a model is called with to read all rows of some batches, one batch under another, and which rows are whose."""
    widths = dict(zip(_IDS, joint_widths([batch.shapes for batch in batches]), strict=False))
    inputs = {}
    for name in batches[0].inputs:
        width = widths[_IDS[1] if name.startswith("decoder_") else _IDS[0]]
        fill = pad_id if name in _IDS else 0
        inputs[name] = torch.cat([_widened(batch.inputs[name], width, fill) for batch in batches])
    ends = list(itertools.accumulate(batch.shapes[0][0] for batch in batches))
    return inputs, [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


def joint_widths(shapes: Sequence[tuple[tuple[int, int], ...]]) -> list[int]:
    """How many places each padded input of some batches has when they are joined. Those of encoder and decoder are never as many, so
    that it can be told which of them a tensor is of."""
    widths = [max(width for _, width in own) for own in zip(*shapes, strict=True)]
    return [widths[0], widths[1] + (widths[1] == widths[0])] if len(widths) == 2 else widths


def _widened(ids: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    missing = width - ids.shape[1]
    return torch.nn.functional.pad(ids, (0, missing), value=fill) if missing else ids


def pack(examples: list[Example], device: torch.device | str = "cpu") -> PackedBatch:
    """Concatenate examples. The logits that predict token t stand at t - 1 of the same example."""
    lengths = [len(example.input_ids) for example in examples]
    ids = np.concatenate([example.input_ids for example in examples])
    positions = np.concatenate([np.arange(length) for length in lengths])
    weights = np.concatenate([example.weights for example in examples])
    where = np.flatnonzero(weights)
    weights = weights[where]
    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None].to(device),
        position_ids=torch.from_numpy(positions)[None].to(device),
        lengths=lengths,
        logit_positions=torch.from_numpy(where - 1).to(device),
        targets=torch.from_numpy(ids[where]).to(device),
        weights=None if (weights == 1).all() else torch.from_numpy(weights).to(device),
        origins=[example.origin for example in examples],
    )


def of_like_length(lengths: Sequence[int], most: int, enough_tokens: int) -> list[list[int]]:
    """Numbers of rows of these lengths, shortest first, in groups of at most so many, ended early where the rest would be mostly padding,
    unless a group has fewer than `enough_tokens`."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        group = groups[-1] if groups else []
        large = len(group) * lengths[row] > enough_tokens
        if not group or len(group) == most or (large and lengths[row] > 1.5 * lengths[group[0]]):
            groups.append([])
        groups[-1].append(row)
    return groups
