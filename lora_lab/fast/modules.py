"""What stands in for a model's modules: projections that read the same input, and gated MLPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer as AnyLoraLayer
from torch import nn

from lora_lab.fast import liger, mlp
from lora_lab.fast.dropout import kept, scale
from lora_lab.fast.frozen import FrozenWeight, Scratch
from lora_lab.fast.linear import Layout, lora_linear
from lora_lab.fast.routing import Route, Routing, spread


class Projection:
    """A linear layer of the model, adapted or not."""

    def __init__(self, module: Any):
        self.module = module  # a linear layer, or peft's layer around it
        adapted = isinstance(module, AnyLoraLayer)
        self.base: nn.Linear = self.module.base_layer if adapted else module
        self.plain = module.forward

    @property
    def adapted(self) -> bool:
        return self.module is not self.base

    def members(self) -> list[str]:
        """The active adapters."""
        return [name for name in self.module.active_adapters if self.has(name)] if self.adapted else []

    def has(self, member: str) -> bool:
        """Whether a member's adapter works here now."""
        return self.adapted and not self.module.disable_adapters and member in self.module.lora_A

    @property
    def ready(self) -> bool:
        """Whether the layer is as it was found: not merged, and one adapter at most."""
        return not self.adapted or (not self.module.merged and len(self.module.active_adapters) <= 1)

    def parameters(self, member: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """A [r, D], B [N, r], and what B is multiplied by."""
        layer = self.module
        return layer.lora_A[member].weight, layer.lora_B[member].weight, layer.scaling[member]

    def rank(self, member: str) -> int:
        """0: no adapter of this member works here."""
        return len(self.module.lora_A[member].weight) if self.has(member) else 0

    def scaled(self, members: list[str]) -> torch.Tensor:
        """The scaled B of members of one rank, [K, N, r]."""
        layer = self.module
        factors = [layer.lora_B[member].weight for member in members]
        scaling = [layer.scaling[member] for member in members]
        if len(set(scaling)) == 1:
            return torch.stack(factors) * scaling[0]
        return torch.stack(torch._foreach_mul(factors, scaling))

    def dropout(self, member: str) -> float:
        dropout = self.module.lora_dropout[member]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def drawn(
        self,
        member: str,
        shape: torch.Size,
        x: torch.Tensor,
        generator: torch.Generator | None,
        rows: int | None = None,
    ) -> torch.Tensor | None:
        """[T, D] int16: what dropout leaves, drawn as the plain layer draws it; see `dropout.kept`.

        Args:
            shape: of the member's tensor in a pass of its own.
            rows: T, where a shared pass has more padding.
        """
        p = self.dropout(member)
        if not p:
            return None
        mask = kept(shape, p, x.device, generator)
        return mask.view(-1, shape[-1]) if rows is None else spread(mask, rows)


def lora(
    projections: list[Projection], routing: Routing, x: torch.Tensor, shape: torch.Size
) -> tuple[list[Layout], list[torch.Tensor]]:
    """The layouts and factors of projections that read a tensor of `shape`, in the type of `x`."""
    if not routing.routes:
        active = dict.fromkeys(name for one in projections for name in one.members())
        found = [_lora(projections, name, slice(None), None, x, shape, routing.kept) for name in active]
    else:
        routed = [
            (route, rows)
            for route, rows in routing.rows(shape[:-1])
            if any(one.has(route.member) for one in projections)
        ]
        alone = {part.route.member: torch.Size([*part.alone, shape[-1]]) for part in routing.parts(shape[:-1])}
        found = [
            _stacked(projections, run, x, alone)
            if len(run) > 1
            else _lora(projections, run[0][0].member, run[0][1], run[0][0].generator, x, alone[run[0][0].member])
            for run in _runs(projections, routed)
        ]
    return [layout for layout, _ in found], [factor for _, factors in found for factor in factors]


def _lora(
    projections: list[Projection],
    member: str,
    rows: slice,
    generator: torch.Generator | None,
    x: torch.Tensor,
    shape: torch.Size,
    kept: dict[Any, tuple[torch.Tensor, ...]] | None = None,
) -> tuple[Layout, list[torch.Tensor]]:
    """One member's layout on some rows, a tensor of `shape` in a pass of its own, and its factors.

    Args:
        kept: factors that were made before, see `Routing.keeping_factors`.
    """
    count = None if rows.stop is None else rows.stop - rows.start
    own = [one if one.has(member) else None for one in projections]
    keep = [None if one is None else one.drawn(member, shape, x, generator, count) for one in own]
    found = [one.parameters(member) for one in own if one is not None]
    p = max(one.dropout(member) for one in own if one is not None)
    ranks = [0 if one is None else one.rank(member) for one in own]
    layout = Layout(rows, ranks, keep, scale(p))
    downs, ups, scaling = zip(*found, strict=True)
    key = (id(projections[0]), member, x.dtype)
    made = kept.get(key) if kept is not None else None
    if made is None:
        made = Factors.apply(x.dtype, scaling, *downs, *ups)
        if kept is not None:
            kept[key] = made
    a, *bs = made
    each = iter(bs)
    return layout, [
        a,
        *(
            x.new_empty(one.base.out_features, 0) if not r else next(each)
            for one, r in zip(projections, ranks, strict=True)
        ),
    ]


class Factors(torch.autograd.Function):
    """Adapters' matrices as products want them: A [r_i, D] one under another [R, D], each B [N_i, r_i] scaled, all in one type.

    Arguments: the type, what each B is multiplied by, every A, every B.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, scaling: tuple[float, ...], *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        downs, ups = parameters[: len(scaling)], parameters[len(scaling) :]
        ctx.scaling, ctx.ranks, ctx.dtypes = scaling, [len(one) for one in downs], [one.dtype for one in parameters]
        scaled = (up * factor for up, factor in zip(ups, scaling, strict=True))
        return torch.cat(downs).to(dtype), *(one.to(dtype) for one in scaled)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        da, *dbs = grads
        kinds = ctx.dtypes[len(dbs) :]
        downs = (one.to(kind) for one, kind in zip(da.split(ctx.ranks), ctx.dtypes, strict=False))
        ups = (one.to(kind) * factor for one, kind, factor in zip(dbs, kinds, ctx.scaling, strict=True))
        return None, None, *downs, *ups


def _runs(projections: list[Projection], routed: list[tuple[Route, slice]]) -> list[list[tuple[Route, slice]]]:
    """Members side by side whose products can be made at once."""
    runs: list[list[tuple[Route, slice]]] = []
    for one in routed:
        if runs and _alike(projections, [runs[-1][-1], one]):
            runs[-1].append(one)
        else:
            runs.append([one])
    return runs


def _alike(projections: list[Projection], routed: list[tuple[Route, slice]]) -> bool:
    """Whether two members' products can be made at once: as many rows side by side, adapters of one shape, as much dropout.

    So it is where a sweep varies anything but rows and ranks. Each product stays of one member's numbers alone, so that one who
    diverges spoils nobody else.
    """
    (one, rows), (other, more) = routed
    if rows.stop != more.start or rows.stop - rows.start != more.stop - more.start:
        return False
    return all(
        part.rank(one.member) == part.rank(other.member)
        and (not part.has(one.member) or part.dropout(one.member) == part.dropout(other.member))
        for part in projections
    )


def _stacked(
    projections: list[Projection], routed: list[tuple[Route, slice]], x: torch.Tensor, alone: dict[str, torch.Size]
) -> tuple[Layout, list[torch.Tensor]]:
    """One layout of members who are alike, and their factors, one behind another."""
    members = [route.member for route, _ in routed]
    own = [one for one in projections if one.has(members[0])]
    ranks = [one.rank(members[0]) for one in projections]
    a = torch.cat([one.module.lora_A[member].weight for member in members for one in own]).to(x.dtype)
    bs = [
        one.scaled(members).to(x.dtype) if rank else x.new_empty(len(members), one.base.out_features, 0)
        for one, rank in zip(projections, ranks, strict=True)
    ]
    rows, count = slice(routed[0][1].start, routed[-1][1].stop), routed[0][1].stop - routed[0][1].start
    p = max(one.dropout(members[0]) for one in own)
    keep = [
        _together([one.drawn(route.member, alone[route.member], x, route.generator, count) for route, _ in routed])
        if rank
        else None
        for one, rank in zip(projections, ranks, strict=True)
    ]
    layout = Layout(rows, ranks, keep, scale(p), members=len(members))
    return layout, [a.view(len(members), sum(ranks), -1), *bs]


def _together(masks: list[torch.Tensor | None]) -> torch.Tensor | None:
    """[K, T, D] of members' masks [T, D]; none drops anything if one does not."""
    found = [mask for mask in masks if mask is not None]
    return torch.stack(found) if found else None


def computed_in(x: torch.Tensor) -> torch.Tensor:
    """`x` in the type in which a matrix product would compute."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Group:
    """Projections that are called with the same tensor, one after another; the first call computes them all."""

    def __init__(self, projections: list[Projection], scratch: Scratch, routing: Routing):
        self.projections, self.routing = projections, routing
        self.weight = FrozenWeight([one.base for one in projections], scratch)
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def forward(self, place: int) -> Callable[..., torch.Tensor]:
        """What replaces the forward of a projection."""
        own = self.projections[place]

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args or kwargs or not all(one.ready for one in self.projections):
                return own.plain(x, *args, **kwargs)
            if x is not self._input or place not in self._outputs:
                self._input, self._outputs = x, dict(enumerate(self._compute(x)))
            out = self._outputs.pop(place)
            if not self._outputs:
                self._input = None
            return out

        return forward

    def _compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = computed_in(x)
        layouts, factors = lora(self.projections, self.routing, inputs, x.shape)
        return lora_linear(inputs, self.weight, layouts, factors).split(self.weight.sizes, -1)


class FusedMLP:
    """A gated MLP."""

    def __init__(
        self,
        module: Any,
        up: list[Projection],
        down: Projection,
        scratch: Scratch,
        routing: Routing,
        gate: mlp.Gate | liger.Gate,
    ):
        self.up, self.down, self.routing, self.gate = up, down, routing, gate
        self.weights = FrozenWeight([one.base for one in up], scratch), FrozenWeight([down.base], scratch)
        self.plain = module.forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or not all(one.ready for one in (*self.up, self.down)):
            return self.plain(x, *args, **kwargs)
        inputs = computed_in(x)
        first, factors = lora(self.up, self.routing, inputs, x.shape)
        inner = torch.Size([*x.shape[:-1], self.down.base.in_features])
        second, more = lora([self.down], self.routing, inputs, inner)
        return mlp.gated(inputs, self.weights, (first, second), self.gate, [*factors, *more])
