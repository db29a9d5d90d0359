"""Frozen linear layers that read the same input, with the LoRA of each cohort member on its own rows, as one autograd function.

One matrix product for all layers, one for all down-projections; up-projections are added in place. For backward the input and
the rank-r products are kept and nothing else: no dequantized weight, no scaled or cast copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch

from lora_lab.fast.frozen import FrozenWeight


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one member's LoRA works: on which tokens, with which rank for each layer of the group."""

    rows: slice  # of the tokens; of several members together, who have as many each
    ranks: list[int]  # of each layer; 0: not adapted
    keep: list[
        torch.Tensor | None
    ]  # [T_k, D] int16 of each layer ([K, T_k, D] of several members): what dropout leaves; None: all
    keep_scale: float = 1.0  # 1 / (1 - p)
    members: int = 1  # whose products are made at once

    @property
    def num_factors(self) -> int:
        return 1 + len(self.ranks)


@dataclasses.dataclass(frozen=True)
class Branch:
    """A layout with its factors: `a` [R, D], the down-projections one under another; `bs` [N_i, r_i], scaled. Of several members all
    have a dimension more in front."""

    layout: Layout
    a: torch.Tensor
    bs: tuple[torch.Tensor, ...]

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T_k, D], or [K, T_k, D] of several members: a view."""
        x = x[self.layout.rows]
        return (
            x if self.layout.members == 1 else x.view(self.layout.members, len(x) // self.layout.members, x.shape[-1])
        )

    def parts(self, sizes: list[int]) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor | None]]:
        """For each adapted layer: its columns of the output, its columns of the rank-r product, its B, what dropout leaves."""
        column = rank = 0
        for size, r, b, keep in zip(sizes, self.layout.ranks, self.bs, self.layout.keep, strict=True):
            if r:
                yield slice(column, column + size), slice(rank, rank + r), b, keep
            column, rank = column + size, rank + r

    def dropped(self, x: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        return x if keep is None else (x * keep).mul_(self.layout.keep_scale)


def branches(layouts: list[Layout], factors: tuple[torch.Tensor, ...]) -> list[Branch]:
    """Layouts with their factors, which lie in one row: a, b_1, b_2, ... of each."""
    found, place = [], 0
    for layout in layouts:
        a, *bs = factors[place : place + layout.num_factors]
        found.append(Branch(layout, a, tuple(bs)))
        place += layout.num_factors
    return found


def project(
    x: torch.Tensor, weight: FrozenWeight, own: list[Branch], learned: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x [T, D] -> y [T, N], and each branch's rank-r product [T_k, R].

    Args:
        learned: whether somebody may learn from it, see `FrozenWeight.times`.
    """
    y = weight.times(x, learned)
    hidden = []
    for branch in own:
        inputs, out = branch.own(x), branch.own(y)
        dropout = any(keep is not None for keep in branch.layout.keep)
        h = x.new_empty(*inputs.shape[:-1], branch.a.shape[-2]) if dropout else inputs @ branch.a.mT
        for columns, ranks, b, keep in branch.parts(weight.sizes):
            if dropout:
                h[..., ranks] = branch.dropped(inputs, keep) @ branch.a[..., ranks, :].mT
            _add(out[..., columns], h[..., ranks], b.mT)
        hidden.append(h)
    return y, hidden


def _add(out: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """Add a matrix product, or one for each member."""
    out.addmm_(one, other) if out.dim() == 2 else out.baddbmm_(one, other)


@overload
def project_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    hidden: list[torch.Tensor],
    weight: FrozenWeight,
    own: list[Branch],
    need_dx: Literal[True],
) -> tuple[torch.Tensor, list[torch.Tensor]]: ...


@overload
def project_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    hidden: list[torch.Tensor],
    weight: FrozenWeight,
    own: list[Branch],
    need_dx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]: ...


def project_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    hidden: list[torch.Tensor],
    weight: FrozenWeight,
    own: list[Branch],
    need_dx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """dy [T, N] -> dx [T, D] if it is needed, and the gradients of the factors, in their order."""
    dx = dy @ weight.dense(dy.dtype) if need_dx else None
    grads: list[torch.Tensor] = []
    for branch, h in zip(own, hidden, strict=True):
        inputs, out = branch.own(x), branch.own(dy)
        dropout = any(keep is not None for keep in branch.layout.keep)
        dh = torch.empty_like(h)
        dbs = [torch.zeros_like(b) for b in branch.bs]
        da = torch.empty_like(branch.a)
        which = (i for i, r in enumerate(branch.layout.ranks) if r)
        for i, (columns, ranks, b, keep) in zip(which, branch.parts(weight.sizes), strict=True):
            dh[..., ranks] = out[..., columns] @ b
            dbs[i] = out[..., columns].mT @ h[..., ranks]
            if dropout:
                da[..., ranks, :] = dh[..., ranks].mT @ branch.dropped(inputs, keep)
                if dx is not None:
                    branch.own(dx).add_(branch.dropped(dh[..., ranks] @ branch.a[..., ranks, :], keep))
        if not dropout:
            torch.matmul(dh.mT, inputs, out=da)
            if dx is not None:
                _add(branch.own(dx), dh, branch.a)
        grads += [da, *dbs]
    return dx, grads


def lora_linear(
    x: torch.Tensor, weight: FrozenWeight, layouts: list[Layout], factors: list[torch.Tensor]
) -> torch.Tensor:
    """x [..., D] -> [..., N]."""
    if torch.is_grad_enabled():
        return LoraLinear.apply(x, weight, layouts, *factors)
    flat = x.reshape(-1, x.shape[-1])
    y, _ = project(flat, weight, branches(layouts, tuple(factors)), learned=False)
    return y.view(*x.shape[:-1], -1)


class LoraLinear(torch.autograd.Function):
    """x [..., D] -> [..., N]. Arguments: x, a `FrozenWeight`, the layouts, and their factors."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: FrozenWeight, layouts: list[Layout], *factors: torch.Tensor
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, hidden = project(flat, weight, branches(layouts, factors))
        ctx.weight, ctx.layouts, ctx.shape = weight, layouts, x.shape
        ctx.save_for_backward(flat, *hidden, *factors)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        hidden, factors = others[: len(ctx.layouts)], tuple(others[len(ctx.layouts) :])
        dy = dy.reshape(-1, dy.shape[-1])
        dx, grads = project_backward(dy, x, hidden, ctx.weight, branches(ctx.layouts, factors), ctx.needs_input_grad[0])
        return None if dx is None else dx.view(ctx.shape), None, None, *grads
