"""Elementwise work on a CUDA card by Liger's Triton kernels (arXiv:2410.10989), where the package is installed: `lora-lab[liger]`.

The functions in `norm.py` and `mlp.py` are the twins: they compute the same, are proved on the model first, and stay wherever these are
not. A norm is one kernel instead of eight to ten, a gate three in all, forward and backward, instead of nine.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

DEVICES = ("cuda",)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What is taken from the package, under names of our own."""

    rms_norm: Callable[
        ..., torch.Tensor
    ]  # x, weight, eps, what is added to the weight, where it rounds, whether over the gradient
    gate: Callable[
        [torch.Tensor], tuple[torch.Tensor, torch.Tensor]
    ]  # [T, 2 F] -> itself, silu(first half) * second half
    gate_backward: Callable[..., torch.Tensor]  # [T, 2 F], the gradient [T, F], whether over the first; its gradient


@functools.cache
def kernels() -> Kernels | None:
    """None where the package is missing, or is one that knows no gate in one tensor (before 0.8)."""
    try:
        from liger_kernel.ops import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward, swiglu_fused_gate_up_forward
    except ImportError:
        return None
    return Kernels(LigerRMSNormFunction.apply, swiglu_fused_gate_up_forward, swiglu_fused_gate_up_backward)


_NORMS: dict[str, tuple[float, str]] = {
    "weight": (0.0, "llama"),
    "1 + weight": (1.0, "gemma"),
}  # as `norm.py` names them


def norm_forward_of(own: Kernels, module: Any, eps: float, scale: str) -> Callable[..., torch.Tensor]:
    """What replaces the forward of a norm, as `norm.forward_of`."""
    plain = module.forward
    offset, rounding = _NORMS[scale]

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs:
            return plain(x, *args, **kwargs)
        # its gradient gets memory of its own: what comes in is the residual's too
        return own.rms_norm(x, module.weight, eps, offset, rounding, False)

    return forward


class Gate:
    """silu(gate) * up, see `mlp.Gate`."""

    def __init__(self, own: Kernels):
        self.own = own

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        return self.own.gate(both)[1]

    def again(self, both: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return self.forward(both), None

    def backward(self, both: torch.Tensor, _: Any, dinner: torch.Tensor) -> None:
        self.own.gate_backward(both, dinner, True)
