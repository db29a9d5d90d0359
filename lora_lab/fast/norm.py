"""RMSNorm (arXiv:1910.07467) that keeps its input and one number a token for backward, instead of float32 copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _round_first(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight * x.to(dtype)  # Llama's way


def _round_last(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x * (1.0 + weight.float())).to(dtype)  # Gemma's way


_SCALES = {"weight": (_round_first, 0.0), "1 + weight": (_round_last, 1.0)}


class RMSNorm(torch.autograd.Function):
    """x [..., D] -> [..., D]; the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, scale: str) -> torch.Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.scale = scale
        ctx.save_for_backward(x, inverse, weight)
        return _SCALES[scale][0](wide * inverse, weight, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        normal = x.float() * inverse
        wide = dy.float() * (weight.float() + _SCALES[ctx.scale][1])
        shared = (wide * normal).mean(-1, keepdim=True)
        return wide.sub_(normal.mul_(shared)).mul_(inverse).to(dy.dtype), None, None, None


def of_module(module: nn.Module, seen: torch.Tensor, prove: bool = True) -> tuple[float, str] | None:
    """A norm module's epsilon and kind of scale, if this function gives the very numbers that it gives; without proof, some.

    Args:
        seen: what the module was called with.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if eps is None or weight is None or weight.dim() != 1 or weight.requires_grad:
        return None
    if not prove:
        return eps, next(iter(_SCALES))
    with torch.no_grad():
        plain = module(seen)
        for scale in _SCALES:
            if torch.equal(plain, RMSNorm.apply(seen, weight, eps, scale)):
                return eps, scale
    return None


def forward_of(module: nn.Module, eps: float, scale: str) -> Callable[..., torch.Tensor]:
    """What replaces the module's forward; called with more than one tensor, it is the module's own."""
    plain = module.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs:
            return plain(x, *args, **kwargs)
        return RMSNorm.apply(x, module.weight, eps, scale)

    return forward
