"""Frozen linear layers that read the same input, with the LoRA of each cohort member on its own rows, as one autograd function.

One matrix product for all layers, one for all down-projections; up-projections are added in place. For backward the input and
the rank-r products are kept and nothing else: no dequantized weight, no scaled or cast copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch.nn.functional import linear

from lora_lab.fast.frozen import FrozenWeight


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one member's LoRA works: on which tokens, with which rank for each layer of the group."""

    rows: slice  # of the tokens
    ranks: list[int]  # of each layer; 0: not adapted
    keep: list[torch.Tensor | None]  # [T_k, D] int16 of each layer: what dropout leaves; None: no dropout
    keep_scale: float = 1.0  # 1 / (1 - p)

    @property
    def num_factors(self) -> int:
        return 1 + len(self.ranks)


@dataclasses.dataclass(frozen=True)
class Branch:
    """A layout with its factors: `a` [R, D], the down-projections one under another; `bs` [N_i, r_i], scaled."""

    layout: Layout
    a: torch.Tensor
    bs: tuple[torch.Tensor, ...]

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


def project(x: torch.Tensor, weight: FrozenWeight, own: list[Branch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x [T, D] -> y [T, N], and each branch's rank-r product [T_k, R]."""
    y = linear(x, weight.dense(x.dtype), weight.bias(x.dtype))
    hidden = []
    for branch in own:
        rows = branch.layout.rows
        inputs, out = x[rows], y[rows]
        dropout = any(keep is not None for keep in branch.layout.keep)
        h = x.new_empty(len(inputs), len(branch.a)) if dropout else inputs @ branch.a.t()
        for columns, ranks, b, keep in branch.parts(weight.sizes):
            if dropout:
                h[:, ranks] = branch.dropped(inputs, keep) @ branch.a[ranks].t()
            out[:, columns].addmm_(h[:, ranks], b.t())
        hidden.append(h)
    return y, hidden


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
        rows = branch.layout.rows
        inputs, out = x[rows], dy[rows]
        dropout = any(keep is not None for keep in branch.layout.keep)
        dh = torch.empty_like(h)
        dbs = [torch.zeros_like(b) for b in branch.bs]
        da = torch.empty_like(branch.a)
        which = (i for i, r in enumerate(branch.layout.ranks) if r)
        for i, (columns, ranks, b, keep) in zip(which, branch.parts(weight.sizes), strict=True):
            dh[:, ranks] = out[:, columns] @ b
            dbs[i] = out[:, columns].t() @ h[:, ranks]
            if dropout:
                da[ranks] = dh[:, ranks].t() @ branch.dropped(inputs, keep)
                if dx is not None:
                    dx[rows] += branch.dropped(dh[:, ranks] @ branch.a[ranks], keep)
        if not dropout:
            torch.mm(dh.t(), inputs, out=da)
            if dx is not None:
                dx[rows].addmm_(dh, branch.a)
        grads += [da, *dbs]
    return dx, grads


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
