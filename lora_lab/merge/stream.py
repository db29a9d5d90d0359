"""Merge tensor by tensor: each of the base's is read, changed and written in turn, so that memory holds one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_lab.adapters.deltas import Deltas
from lora_lab.base.weights import FORMAT_NAMES, Weights
from lora_lab.base.weights import write as write_tensors
from lora_lab.verify import layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Held:
    """The tensors of a model as `Weights` gives those of a folder."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Args:
            tensors: its `state_dict`.
        """
        self._tensors = tensors
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.floating = {name: tensor.is_floating_point() for name, tensor in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        """A copy; what is mapped from a file leaves memory with it."""
        tensor = self._tensors[name]
        own = tensor.to("cpu", copy=True)
        layers.forget([tensor])
        return own


def reason_against(skeleton: PreTrainedModel, weights: Weights | Held, deltas: Deltas) -> str:
    """Why this base cannot be merged tensor by tensor; empty if it can.

    Args:
        skeleton: the merged model without its weights (see `base.load.skeleton`).
    """
    from transformers.pytorch_utils import Conv1D

    for name in _needed(skeleton):
        if name not in weights and name not in deltas.whole:
            return f"the base's files have no tensor {name}"
        if name in weights and not weights.floating[name]:
            return f"{name} holds no floating numbers"
    turned = [name for name in deltas.layers if isinstance(skeleton.get_submodule(name), Conv1D)]
    return f"{turned[0]} stores its weight transposed" if turned else ""


def _needed(skeleton: PreTrainedModel) -> list[str]:
    """Names of the tensors that a checkpoint of this model must hold: of tied ones, the first."""
    tied = set(skeleton.all_tied_weights_keys)
    return [name for name in skeleton.state_dict() if name not in tied]


def write(
    skeleton: PreTrainedModel,
    weights: Weights | Held,
    deltas: Deltas,
    dtype: torch.dtype,
    shard_size: str,
    folder: Path,
) -> None:
    """Write the merged checkpoint into a folder: config, generation settings, shards, and the index last.

    Args:
        skeleton: see `reason_against`.
        dtype: of every tensor.
        shard_size: as `export.max_shard_size`.
    """
    skeleton.config.dtype = dtype
    skeleton.config.architectures = [type(skeleton).__name__]
    skeleton.config.save_pretrained(folder)
    if skeleton.can_generate():
        skeleton.generation_config.save_pretrained(folder)
    shapes = {
        name: deltas.whole[name].shape if name in deltas.whole else weights.shapes[name] for name in _needed(skeleton)
    }
    tensors = {name: (shape, FORMAT_NAMES[dtype]) for name, shape in shapes.items()}
    write_tensors(folder, tensors, lambda name: _merged(name, weights, deltas, dtype), shard_size)


@torch.no_grad()
def _merged(name: str, weights: Weights | Held, deltas: Deltas, dtype: torch.dtype) -> torch.Tensor:
    if name in deltas.whole:
        return deltas.whole[name].to(dtype)
    tensor, update = weights[name], deltas.layers.get(name.removesuffix(".weight"))
    if update is not None and name.endswith(".weight"):
        tensor = update.added_to(tensor)
    return tensor.to(dtype)
