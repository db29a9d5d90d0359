"""Whose rows are whose, in a forward pass that several cohort members share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Route:
    """One member's rows in a shared pass."""

    member: str
    tokens: int  # of its rows
    items: int  # of its tokens that have a loss
    generator: torch.Generator | None  # draws its dropout; None: it has none


class Routing:
    """Tells every module of a model which adapter works on which rows.

    Rows of a member lie side by side, members in the order of their routes. A module may see all tokens, or, behind the last
    layer's attention, only those that have a loss (`rows.py`).
    """

    def __init__(self) -> None:
        self._slices: dict[int, list[slice]] = {}  # by the number of rows of a tensor
        self.routes: Sequence[Route] = ()

    @contextlib.contextmanager
    def routed(self, routes: Sequence[Route]) -> Iterator[None]:
        """Inside the block a pass is of these members; outside it is the active adapter's alone."""
        self.routes = routes
        self._slices = {
            sum(sizes): _slices(sizes)
            for sizes in ([route.items for route in routes], [route.tokens for route in routes])
        }
        try:
            yield
        finally:
            self.routes, self._slices = (), {}

    def rows(self, count: int) -> Iterator[tuple[Route, slice]]:
        """Each member's route and its rows in a tensor of `count` rows."""
        return zip(self.routes, self._slices[count], strict=True)


def _slices(sizes: list[int]) -> list[slice]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
