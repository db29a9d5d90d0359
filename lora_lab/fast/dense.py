"""A linear layer of an encoder with what follows it, as one autograd function: its activation, or dropout, the residual and LayerNorm.

So BERT and its relatives are built, and whatever has modules of these shapes. What follows works in place on what the product made, and for
backward there is its sum or its input, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lora_lab.fast import mlp
from lora_lab.fast.dropout import kept, kept_of_members, scale
from lora_lab.fast.frozen import FrozenWeight, Scratch
from lora_lab.fast.linear import Layout, branches, project, project_backward
from lora_lab.fast.modules import Projection, computed_in, lora
from lora_lab.fast.routing import Routing

_OUTPUT = {"dense", "LayerNorm"}  # of a module that is called with what it projects and with what is added


def activation_of(module: nn.Module) -> tuple[mlp.Forward, mlp.Backward] | None:
    """What follows the linear layer of a module that consists of it and an activation, if it is known here."""
    others = {name: child for name, child in module.named_children() if name != "dense"}
    return mlp.activation(next(iter(others.values()))) if len(others) == 1 else None


def is_output(module: nn.Module) -> bool:
    """Whether a module is LayerNorm(dropout(dense(x)) + residual), by the names of its parts."""
    parts = dict(module.named_children())
    norm = parts.get("LayerNorm")
    if not _OUTPUT <= parts.keys() <= {*_OUTPUT, "dropout"} or not isinstance(norm, nn.LayerNorm):
        return False
    drops = isinstance(parts.get("dropout", nn.Dropout()), nn.Dropout)
    return drops and norm.bias is not None and not (norm.weight.requires_grad or norm.bias.requires_grad)


class FusedActivation:
    """act(dense(x))."""

    def __init__(
        self, module: Any, dense: Projection, scratch: Scratch, routing: Routing, act: tuple[mlp.Forward, mlp.Backward]
    ):
        self.dense, self.routing, self.act = dense, routing, act
        self.weight = FrozenWeight([dense.base], scratch)
        self.plain: Callable[..., torch.Tensor] = module.forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not self.dense.ready or computed_in(x).dtype != x.dtype:
            return self.plain(x, *args, **kwargs)
        layouts, factors = lora([self.dense], self.routing, x, x.shape)
        found: torch.Tensor = Activated.apply(x, self.weight, layouts, self.act, *factors)
        return found


class FusedOutput:
    """LayerNorm(dropout(dense(x)) + residual)."""

    def __init__(self, module: Any, dense: Projection, scratch: Scratch, routing: Routing):
        self.dense, self.routing = dense, routing
        self.norm: nn.LayerNorm = module.LayerNorm
        self.module = module  # whose dropout may be replaced
        self.weight = FrozenWeight([dense.base], scratch)
        self.plain: Callable[..., torch.Tensor] = module.forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(args) != 1 or kwargs or not self.dense.ready or not self._as_they_are(x, args[0]):
            return self.plain(x, *args, **kwargs)
        layouts, factors = lora([self.dense], self.routing, x, x.shape)
        dropout: nn.Dropout | None = getattr(self.module, "dropout", None)
        p = dropout.p if dropout is not None and dropout.training else 0.0
        found: torch.Tensor = Normed.apply(
            x, args[0], self.weight, layouts, self.norm, self._keep(args[0], p), scale(p), *factors
        )
        return found

    def _as_they_are(self, x: torch.Tensor, residual: torch.Tensor) -> bool:
        """Whether all is computed in one type, as the plain module computes it, and masks are drawn as it draws them."""
        types = {x.dtype, computed_in(x).dtype, residual.dtype, self.norm.weight.dtype}
        return len(types) == 1 and x.device.type == "cpu"

    def _keep(self, residual: torch.Tensor, p: float) -> torch.Tensor | None:
        """[..., N] int16: what dropout leaves of what is projected."""
        if not p:
            return None
        if self.routing.routes:
            return kept_of_members(self.routing, residual.shape, p, residual.device)
        return kept(residual.shape, p, residual.device)


class Activated(torch.autograd.Function):
    """x [..., D] -> [..., N]. Arguments: x, the frozen weight, the layouts, the activation and its gradient, the factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: FrozenWeight,
        layouts: list[Layout],
        act: tuple[mlp.Forward, mlp.Backward],
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, hidden = project(flat, weight, branches(layouts, factors))
        ctx.weight, ctx.layouts, ctx.act, ctx.shape = weight, layouts, act, x.shape
        ctx.save_for_backward(flat, y, *hidden, *factors)
        return act[0](y).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y, *others = ctx.saved_tensors
        dy = ctx.act[1](dout.reshape(y.shape), y)
        dx, grads = _project_back(ctx, dy, x, others)
        return dx, None, None, None, *grads


class Normed(torch.autograd.Function):
    """x [..., D] and the residual [..., N] -> [..., N]. Arguments: x, the residual, the frozen weight, the layouts, the frozen LayerNorm,
    what dropout leaves (None: all) and what that is multiplied by, the factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: FrozenWeight,
        layouts: list[Layout],
        norm: nn.LayerNorm,
        keep: torch.Tensor | None,
        keep_scale: float,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, hidden = project(flat, weight, branches(layouts, factors))
        keep = None if keep is None else keep.view(y.shape)
        if keep is not None:
            y.mul_(keep).mul_(keep_scale)
        y.add_(residual.reshape(y.shape))
        out, mean, inverse = torch.native_layer_norm(y, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        ctx.weight, ctx.layouts, ctx.norm, ctx.keep_scale, ctx.shape = weight, layouts, norm, keep_scale, x.shape
        ctx.save_for_backward(flat, y, mean, inverse, keep, *hidden, *factors)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, y, mean, inverse, keep, *others = ctx.saved_tensors
        norm: nn.LayerNorm = ctx.norm
        dy, _, _ = torch.ops.aten.native_layer_norm_backward(
            dout.reshape(y.shape), y, norm.normalized_shape, mean, inverse, norm.weight, norm.bias, [True, False, False]
        )
        dresidual = dy.view(dout.shape) if ctx.needs_input_grad[1] else None
        if keep is not None:
            dy = (dy * keep).mul_(ctx.keep_scale)
        dx, grads = _project_back(ctx, dy, x, others)
        return dx, dresidual, None, None, None, None, None, *grads


def _project_back(
    ctx: Any, dy: torch.Tensor, x: torch.Tensor, others: list[torch.Tensor]
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The gradients of x [..., D], if it needs one, and of the factors; `others`: the rank-r products, then the factors."""
    hidden, factors = others[: len(ctx.layouts)], tuple(others[len(ctx.layouts) :])
    dx, grads = project_backward(dy, x, hidden, ctx.weight, branches(ctx.layouts, factors), ctx.needs_input_grad[0])
    return None if dx is None else dx.view(ctx.shape), grads
