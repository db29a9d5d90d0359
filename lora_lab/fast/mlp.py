"""A gated MLP, down(act(gate(x)) * up(x)), as one autograd function.

Kept for backward: the input, the gate and up projections and the rank-r products; what the down-projection reads is computed
again from them (as in Unsloth's fused MLP, unslothai/unsloth, kernels/fast_lora.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, silu

from lora_lab.fast.frozen import FrozenWeight
from lora_lab.fast.linear import Layout, branches, project, project_backward

Forward = Callable[[torch.Tensor], torch.Tensor]
Backward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # gradient of the output, input
_aten = torch.ops.aten
# name of the activation's class -> itself, and its gradient
ACTIVATIONS: dict[str, tuple[Forward, Backward]] = {
    "SiLUActivation": (silu, _aten.silu_backward),
    "SiLU": (silu, _aten.silu_backward),
    "GELUActivation": (gelu, _aten.gelu_backward),
    "GELUTanh": (
        lambda x: gelu(x, approximate="tanh"),
        lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
    ),
}


def activation(module: nn.Module) -> tuple[Forward, Backward] | None:
    """An activation module's function and gradient, if they are known here."""
    return ACTIVATIONS.get(type(module).__name__)


class GatedMLP(torch.autograd.Function):
    """x [..., D] -> [..., D]. Arguments: x, the frozen weights of gate and up and of down, their layouts, the activation, and the
    factors of both."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: tuple[FrozenWeight, FrozenWeight],
        layouts: tuple[list[Layout], list[Layout]],
        act: tuple[Forward, Backward],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        first = sum(layout.num_factors for layout in layouts[0])
        both, hidden = project(flat, weights[0], branches(layouts[0], factors[:first]))
        gate, up = both.split(weights[0].sizes, dim=1)
        y, more = project(act[0](gate).mul_(up), weights[1], branches(layouts[1], factors[first:]))
        ctx.weights, ctx.layouts, ctx.act, ctx.first, ctx.shape = weights, layouts, act, first, x.shape
        ctx.save_for_backward(flat, both, *hidden, *more, *factors)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, both, *others = ctx.saved_tensors
        one, two = len(ctx.layouts[0]), len(ctx.layouts[1])
        hidden, more, factors = others[:one], others[one : one + two], tuple(others[one + two :])
        gate, up = both.split(ctx.weights[0].sizes, dim=1)
        activated = ctx.act[0](gate)
        dy = dy.reshape(-1, dy.shape[-1])
        down = branches(ctx.layouts[1], factors[ctx.first :])
        dinner, down_grads = project_backward(dy, activated * up, more, ctx.weights[1], down, need_dx=True)
        dboth = torch.empty_like(both)
        dgate, dup = dboth.split(ctx.weights[0].sizes, dim=1)
        torch.mul(dinner, activated, out=dup)
        dgate.copy_(ctx.act[1](dinner.mul_(up), gate))
        own = branches(ctx.layouts[0], factors[: ctx.first])
        dx, grads = project_backward(dboth, x, hidden, ctx.weights[0], own, ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, None, None, *grads, *down_grads
