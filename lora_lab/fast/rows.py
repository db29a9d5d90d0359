"""The last decoder layer, behind its attention, for the positions whose logits are wanted: nothing reads the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PARTS = {
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
}  # of a layer in Llama's manner, and no others


def last_layer(model: PreTrainedModel) -> nn.Module | None:
    """The last layer, if it is built as Llama's, h += attention(norm(h)); h += mlp(norm(h)), and drops nothing: with fewer rows
    dropout would draw other numbers."""
    layers = getattr(getattr(model, model.base_model_prefix, None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    layer = layers[-1]
    named = {name for name, _ in layer.named_children()}
    drops = any(isinstance(module, nn.Dropout) and module.p for module in layer.modules())
    return layer if named == _PARTS and hasattr(layer.get_submodule("self_attn"), "o_proj") and not drops else None


def forward_of(layer: Any) -> Callable[..., torch.Tensor]:
    """What replaces the layer's forward; without `wanted_positions` ([S] int64) it is the layer's own."""
    plain = layer.forward

    def forward(
        hidden_states: torch.Tensor, *args: Any, wanted_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if wanted_positions is None:
            return plain(hidden_states, *args, **kwargs)
        with _only(layer.self_attn.o_proj, wanted_positions):
            attended, _ = layer.self_attn(layer.input_layernorm(hidden_states), *args, **kwargs)
        hidden = hidden_states[:, wanted_positions] + attended
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    return forward


@contextlib.contextmanager
def _only(projection: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    handle = projection.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, positions], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
