"""Hidden states behind the frozen layers that come before every adapter, kept from one pass over a row to the next.

Nothing in front of the lowest adapted layer ever changes, so a row's hidden states there are the same in every epoch, in every
evaluation and for every cohort member. Rows are known by their tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_lab.adapters.attach import base_of

if TYPE_CHECKING:
    from peft import PeftModel

_SHARE = 0.25  # of the free memory


class Prefix:
    """The frozen layers of a model, and what they made of the rows that were seen."""

    def __init__(self, layers: list[nn.Module], limit: int):
        """
        Args:
            layers: from the first on, none of them adapted.
            limit: bytes that may be kept; later rows are computed again and again.
        """
        self.layers, self.limit = layers, limit
        self.num_bytes = 0
        self._kept: dict[bytes, torch.Tensor] = {}

    def forward_of(self, place: int) -> Callable[..., torch.Tensor]:
        """What replaces a layer's forward; without `row_keys` it is the layer's own."""
        plain, last = self.layers[place].forward, place == len(self.layers) - 1

        def forward(
            hidden_states: torch.Tensor, *args: Any, row_keys: list[bytes] | None = None, **kwargs: Any
        ) -> torch.Tensor:
            if row_keys is None:
                return plain(hidden_states, *args, **kwargs)
            if all(key in self._kept for key in row_keys):
                return torch.cat([self._kept[key] for key in row_keys])[None] if last else hidden_states
            out = plain(hidden_states, *args, **kwargs)
            if last:
                self._keep(out.detach()[0], row_keys, kwargs["segment_lengths"])
            return out

        return forward

    def _keep(self, hidden: torch.Tensor, keys: list[bytes], lengths: list[int]) -> None:
        for key, part in zip(keys, hidden.split(lengths), strict=True):
            size = part.numel() * part.element_size()
            if key not in self._kept and self.num_bytes + size <= self.limit:
                self._kept[key] = part.clone()
                self.num_bytes += size


def find(model: PeftModel, free: int) -> Prefix | str:
    """The frozen layers in front of every adapter, or why nothing can be kept behind them."""
    base = base_of(model)
    layers = getattr(getattr(base, base.base_model_prefix, None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return "the model's layers are not in one list"
    if any(parameter.requires_grad for parameter in base.get_input_embeddings().parameters()):
        return "the input embeddings are trained"
    count = next(i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters()))
    frozen = list(layers[:count])
    if any(_drops(module) for layer in frozen for module in layer.modules()):
        return "the model drops activations at random"
    return Prefix(frozen, int(_SHARE * free)) if frozen else "the first layer is adapted"


def _drops(module: nn.Module) -> bool:
    return bool(isinstance(module, nn.Dropout) and module.p) or bool(getattr(module, "attention_dropout", 0.0))


def row_keys(input_ids: torch.Tensor, lengths: list[int]) -> list[bytes]:
    """What the rows [1, T] of a packed batch are known by."""
    return [row.numpy().tobytes() for row in input_ids[0].cpu().split(lengths)]
