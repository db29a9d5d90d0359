"""A gated MLP, down(act(gate(x)) * up(x)), as one autograd function.

Kept for backward: the input, the gate and up projections and the rank-r products; what the down-projection reads is computed
again from them (as in Unsloth's fused MLP, unslothai/unsloth, kernels/fast_lora.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu, silu

from lora_lab.fast import liger
from lora_lab.fast.frozen import FEW, FrozenWeight
from lora_lab.fast.linear import Layout, branches, project, project_backward

Forward = Callable[[torch.Tensor], torch.Tensor]
Backward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # gradient of the output, input
_aten = torch.ops.aten
TILE_BYTES = 64 * 2**20  # of a tensor as wide as the MLP
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


class Gate:
    """act(gate) * up of [T, 2 F], gate and up side by side."""

    def __init__(self, act: tuple[Forward, Backward]):
        self.act, self.act_backward = act

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=1)
        return self.act(gate).mul_(up)

    def again(self, both: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The same, and what `backward` wants to be given of it."""
        gate, up = both.chunk(2, dim=1)
        activated = self.act(gate)
        return activated * up, activated

    def backward(self, both: torch.Tensor, activated: Any, dinner: torch.Tensor) -> None:
        """Put the gradients of gate and up in their places; the gradient [T, F] of what `forward` gave is used up."""
        gate, up = both.chunk(2, dim=1)
        activated.mul_(dinner)  # the gradient of up
        gate.copy_(self.act_backward(dinner.mul_(up), gate))
        up.copy_(activated)


def gated(
    x: torch.Tensor,
    weights: tuple[FrozenWeight, FrozenWeight],
    layouts: tuple[list[Layout], list[Layout]],
    gate: Gate | liger.Gate,
    factors: list[torch.Tensor],
) -> torch.Tensor:
    """x [..., D] -> [..., D]; arguments as `GatedMLP`'s."""
    if torch.is_grad_enabled() or x.shape[:-1].numel() > FEW:
        return GatedMLP.apply(x, weights, layouts, gate, *factors)
    first = sum(layout.num_factors for layout in layouts[0])
    up, down = branches(layouts[0], tuple(factors[:first])), branches(layouts[1], tuple(factors[first:]))
    both, _ = project(x.reshape(-1, x.shape[-1]), weights[0], up, learned=False)
    y, _ = project(gate.forward(both), weights[1], down, learned=False)
    return y.view(x.shape)


class GatedMLP(torch.autograd.Function):
    """x [..., D] -> [..., D]. Arguments: x, the frozen weights of gate and up and of down, their layouts, what is between them, and
    the factors of both.

    What is as wide as the MLP and not kept is made for some tokens at a time, and the gradients of gate and up take the place of
    gate and up, so that a long row needs their [T, 2 F] once. A graph can be gone through once, therefore.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weights: tuple[FrozenWeight, FrozenWeight],
        layouts: tuple[list[Layout], list[Layout]],
        gate: Gate | liger.Gate,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        first = sum(layout.num_factors for layout in layouts[0])
        both, hidden = project(flat, weights[0], branches(layouts[0], factors[:first]))
        found = []
        with weights[1].held(both.dtype):
            for rows in _tiles(both, layouts[1]):
                down = branches(_of_tile(layouts[1], rows), factors[first:])
                found.append(project(gate.forward(both[rows]), weights[1], down))
        y, more = (
            _joined([y for y, _ in found]),
            [_joined(list(parts)) for parts in zip(*(h for _, h in found), strict=True)],
        )
        ctx.weights, ctx.layouts, ctx.gate, ctx.first, ctx.shape = weights, layouts, gate, first, x.shape
        ctx.save_for_backward(flat, both, *hidden, *more, *factors)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, both, *others = ctx.saved_tensors
        one, two = len(ctx.layouts[0]), len(ctx.layouts[1])
        hidden, more, factors = others[:one], others[one : one + two], tuple(others[one + two :])
        dy = dy.reshape(-1, dy.shape[-1])
        found = []
        with ctx.weights[1].held(dy.dtype):
            for rows in _tiles(both, ctx.layouts[1]):
                down = branches(_of_tile(ctx.layouts[1], rows), factors[ctx.first :])
                inner, kept = ctx.gate.again(both[rows])
                dinner, grads = project_backward(
                    dy[rows], inner, [h[rows] for h in more], ctx.weights[1], down, need_dx=True
                )
                del inner
                ctx.gate.backward(both[rows], kept, dinner)
                found.append(grads)
        own = branches(ctx.layouts[0], factors[: ctx.first])
        dx, grads = project_backward(both, x, hidden, ctx.weights[0], own, ctx.needs_input_grad[0])
        return (
            None if dx is None else dx.view(ctx.shape),
            None,
            None,
            None,
            *grads,
            *map(_summed, zip(*found, strict=True)),
        )


def _tiles(both: torch.Tensor, layouts: list[Layout]) -> list[slice]:
    """Tokens of gate and up [T, 2 F] that are worked on at once; of several members all, because each has tokens of its own."""
    count, width = both.shape[0], both.shape[1] // 2
    if len(layouts) > 1 or any(layout.members > 1 or layout.rows != slice(None) for layout in layouts):
        return [slice(None)]
    parts = -(-count * width * both.element_size() // TILE_BYTES)
    if parts < 2:
        return [slice(None)]
    size = -(-count // parts)  # of like size, so that the last one is not a small rest
    return [slice(start, start + size) for start in range(0, count, size)]


def _of_tile(layouts: list[Layout], rows: slice) -> list[Layout]:
    """The layouts of some tokens; what dropout leaves is theirs."""
    if rows == slice(None):
        return layouts
    return [
        dataclasses.replace(layout, keep=[None if keep is None else keep[rows] for keep in layout.keep])
        for layout in layouts
    ]


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _summed(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum over tiles, in float32 as inside a matrix product."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0, dtype=torch.float32).to(parts[0].dtype)
