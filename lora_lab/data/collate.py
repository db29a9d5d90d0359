"""Lay examples end to end: one padding-free row in which each example keeps its own positions and attention."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from lora_lab.data.encode import Example


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch:
    """Some examples in one row of `T` tokens, `S` of them supervised."""

    input_ids: torch.Tensor  # [1, T] int64
    position_ids: torch.Tensor  # [1, T] int64, from 0 in each example
    lengths: list[int]  # tokens of each example; they sum to T
    logit_positions: torch.Tensor  # [S] int64: where in the row the logits of each target stand
    targets: torch.Tensor  # [S] int64: the tokens to predict there
    weights: torch.Tensor | None  # [S] float32: how much each counts in the loss; None: all one
    origins: list[str]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[1]


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
