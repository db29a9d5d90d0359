"""Whose rows are whose, in a forward pass that several cohort members share."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from lora_lab.data.collate import joint_widths
from lora_lab.errors import TrainingError


@dataclasses.dataclass(frozen=True)
class Route:
    """One member's rows in a shared pass."""

    member: str
    tokens: int  # of its rows
    items: int  # of its tokens that have a loss
    generator: torch.Generator | None  # draws its dropout; None: it has none
    padded: tuple[
        tuple[int, int], ...
    ] = ()  # rows and places of each of its padded inputs, the encoder's and the decoder's


@dataclasses.dataclass(frozen=True)
class Part:
    """One member's part of a tensor."""

    route: Route
    rows: slice  # of the tensor's rows, all dimensions but the last being one
    alone: tuple[int, ...]  # these dimensions in a pass of the member's own


class Routing:
    """Tells every module of a model which adapter works on which rows.

    Rows of a member lie side by side, members in the order of their routes. A module may see all tokens, padded ones, one
    token of each row, or, behind the last layer's attention, only those that have a loss (`rows.py`).
    """

    def __init__(self) -> None:
        self._parts: dict[
            tuple[int, ...], list[Part] | None
        ] = {}  # by all dimensions but the last; None: two things look like it
        self.routes: Sequence[Route] = ()
        self.kept: dict[Any, tuple[torch.Tensor, ...]] | None = None  # factors; None: made anew in every pass

    @contextlib.contextmanager
    def keeping_factors(self) -> Iterator[None]:
        """Inside the block, in which nobody learns, the adapters' matrices are brought into the type of the products once."""
        self.kept = {}
        try:
            yield
        finally:
            self.kept = None

    @contextlib.contextmanager
    def routed(self, routes: Sequence[Route]) -> Iterator[None]:
        """Inside the block a pass is of these members; outside it is the active adapter's alone."""
        self.routes, self._parts = routes, _parts_of(routes)
        before = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(before)
            self.routes, self._parts = (), {}

    @contextlib.contextmanager
    def alone(self, route: Route) -> Iterator[None]:
        """Inside the block, in which only modules of this member's own are called, a pass is the member's alone: torch's generator
        goes on where the member's is."""
        before = _CURRENT.set(None)
        kept, self.routes = self.routes, ()
        try:
            with _drawing(route.generator):
                yield
        finally:
            self.routes = kept
            _CURRENT.reset(before)

    def parts(self, shape: Sequence[int]) -> list[Part]:
        """Each member's part of a tensor whose dimensions, all but the last, are these.

        Raises:
            TrainingError: it cannot be told whose rows they are.
        """
        lead = tuple(shape)
        if lead not in self._parts:  # with some dimensions as one
            lead = (torch.Size(lead).numel(),)
        found = self._parts.get(lead)
        if found is None:
            raise TrainingError(f"it cannot be told whose rows a tensor of {list(shape)} rows holds")
        return found

    def rows(self, shape: Sequence[int]) -> Iterator[tuple[Route, slice]]:
        """Each member's route, and its rows in a tensor whose dimensions, all but the last, are these."""
        return ((part.route, part.rows) for part in self.parts(shape))

    def split(self, x: torch.Tensor, dims: int) -> list[tuple[Part, torch.Tensor]]:
        """Each member's part of a tensor as it is in a pass of its own.

        Args:
            dims: of the tensor, that tell whose rows are whose.
        """
        flat = x.flatten(0, dims - 1)
        found = []
        for part in self.parts(x.shape[:dims]):
            own = flat[part.rows].unflatten(0, (part.alone[0], -1))[:, : part.alone[1]]
            found.append((part, own if dims > 1 else own[0]))
        return found

    def joined(self, outs: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """What members' modules made of their parts of a tensor whose dimensions, all but the last, are these."""
        if len(shape) < 2 or shape[0] == 1:
            return torch.cat(list(outs), len(shape) - 1)
        return torch.cat([widened(one, shape[1]) if one.dim() > 2 else one for one in outs])

    @property
    def row_counts(self) -> list[int]:
        """How many padded rows each member has."""
        return [route.padded[0][0] for route in self.routes]


_CURRENT: contextvars.ContextVar[Routing | None] = contextvars.ContextVar("routing", default=None)


def current() -> Routing | None:
    """The routing of the pass that several members share just now; for modules that nobody could tell of it."""
    return _CURRENT.get()


def whole(tokens: int) -> int:
    """How many tokens a pass without padding is made of, a sixteenth more at most (16 where there are few): oneDNN makes its products for
    each number of tokens that it meets, which takes it half a millisecond for a product, so they had better be few."""
    step = max(16, 2 ** (tokens.bit_length() - 5))
    return -(-tokens // step) * step


def widened(x: torch.Tensor, width: int, fill: float = 0) -> torch.Tensor:
    """[B, T, ...] -> [B, width, ...]"""
    missing = width - x.shape[1]
    return pad(x, (0, 0) * (x.dim() - 2) + (0, missing), value=fill) if missing else x


def spread(mask: torch.Tensor, rows: int) -> torch.Tensor:
    """What dropout leaves of a member's rows in a pass of its own, [..., D], as they lie in a shared one, [rows, D]; places that are
    padding only there are kept."""
    if mask.shape[:-1].numel() != rows:  # [B, T, D], or [1, T, D] of tokens end to end
        mask = widened(mask, rows // len(mask), fill=1)
    return mask.reshape(rows, mask.shape[-1])


def _parts_of(routes: Sequence[Route]) -> dict[tuple[int, ...], list[Part] | None]:
    found: dict[tuple[int, ...], list[Part] | None] = {}

    def note(lead: tuple[int, ...], sizes: Sequence[int], alone: Sequence[tuple[int, ...]]) -> None:
        ends = list(itertools.accumulate(sizes))
        parts = [
            Part(route, slice(end - size, end), own)
            for route, end, size, own in zip(routes, ends, sizes, alone, strict=True)
        ]
        before = found.setdefault(lead, parts)
        if before is None or any(not _same(one, other) for one, other in zip(before, parts, strict=True)):
            found[lead] = None

    def note_flat(sizes: Sequence[int], alone: Sequence[int]) -> None:
        total = sum(sizes)
        note((1, total), sizes, [(1, size) for size in alone])
        note((total,), sizes, [(1, size) for size in alone])

    shapes = [route.padded for route in routes]
    for kind, width in enumerate(joint_widths(shapes)):
        own = [padded[kind] for padded in shapes]
        sizes = [rows * width for rows, _ in own]
        note((sum(sizes) // width, width), sizes, own)
        note((sum(sizes),), sizes, own)
    for sizes in ([padded[0][0] for padded in shapes if padded], [route.items for route in routes]):
        if any(sizes):  # one place of each row, and those that have a loss
            note_flat(sizes, sizes)
    tokens = [whole(route.tokens) if route.padded else route.tokens for route in routes]
    as_many = [max(tokens)] * len(tokens) if any(shapes) else tokens  # without padding, see `unpadded.Rows`
    note_flat(as_many, tokens)
    return found


def _same(one: Part, other: Part) -> bool:
    return one.rows == other.rows and torch.Size(one.alone).numel() == torch.Size(other.alone).numel()


@contextlib.contextmanager
def _drawing(generator: torch.Generator | None) -> Iterator[None]:
    """Inside the block torch's own generator is in the state of this one, which goes on where it ends."""
    if generator is None:
        yield
        return
    device = generator.device
    own = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    before = own.get_state()
    own.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(own.get_state())
        own.set_state(before)
