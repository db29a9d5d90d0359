"""Linear layers whose frozen weight torchao keeps in 8 bits (`quant.method=torchao_int8`).

torchao stores the weight, and reads and writes it in model folders. Its own product is not used: autograd keeps each layer's weight
in floating point from the forward pass to the backward pass, which for a whole model is more than the unquantized base.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Int8Linear(nn.Linear):
    """x [..., D] -> [..., N] with a weight in 8 bits, which is dequantized in each pass and never kept.

    The numbers are those of a linear layer with the dequantized weight, so that a merge into that weight is a merge into what training
    saw.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [N, D]."""
        weight: Any = self.weight  # torchao's own kind of tensor
        return weight.dequantize(dtype)


class _Product(torch.autograd.Function):
    """Arguments: x, an `Int8Linear`, which gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
        ctx.layer, kind = layer, x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return linear(x.to(dtype), layer.dequantized(dtype), None if layer.bias is None else layer.bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy @ ctx.layer.dequantized(dy.dtype), None


def is_stored(weight: object) -> bool:
    """Whether a parameter is one of torchao's."""
    return type(weight).__module__.startswith("torchao.")


def own_products(model: nn.Module) -> None:
    """Let the layers that torchao has quantized compute as `Int8Linear`."""
    for module in model.modules():
        if type(module) is nn.Linear and is_stored(getattr(module, "weight", None)):
            module.__class__ = Int8Linear


def dequantize(
    model: PreTrainedModel, dtype: torch.dtype, put: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> PreTrainedModel:
    """The model as it was before torchao quantized it, with the weights that training saw, in `dtype`.

    Args:
        put: where to, each weight as soon as it is read back; None: it stays in memory.
    """
    for module in model.modules():
        layer: Any = module  # its weight may be torchao's own kind of tensor
        if is_stored(getattr(module, "weight", None)):
            weight = layer.weight.dequantize().to(dtype)
            layer.weight = nn.Parameter(weight if put is None else put(weight), requires_grad=False)
        if type(module) is Int8Linear:
            layer.__class__ = nn.Linear
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    return model
