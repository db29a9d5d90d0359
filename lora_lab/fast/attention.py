"""Causal attention within segments by matrix products, for a CPU.

torch's fused attention is made for many long rows. Here a long segment goes in blocks of queries, each with the keys up to its own
end, so that almost half of the products are never made; short segments of like length go side by side, padded. Nothing of size
T x T is kept: backward computes it again, block by block.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_BLOCK = 128  # queries at once
_WASTE = 1.25  # how much longer than the shortest segment beside it a short segment may be


@dataclasses.dataclass(frozen=True)
class Tile:
    """A block of queries of one segment, and the keys up to its end."""

    queries: slice
    keys: slice

    def at_queries(self, x: torch.Tensor) -> torch.Tensor:
        """[H, G, T, d] -> [H, G L, d], of the queries."""
        return self._take(x, self.queries)

    def at_keys(self, x: torch.Tensor) -> torch.Tensor:
        """[H, 1, T, d] -> [H, K, d], of the keys."""
        return self._take(x, self.keys)

    def _take(self, x: torch.Tensor, tokens: slice) -> torch.Tensor:
        return x[:, :, tokens].reshape(len(x), -1, x.shape[-1])

    def put(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Write [H, G L, d], of the queries, into [H, G, T, d]."""
        out[:, :, self.queries] = part.view(len(out), out.shape[1], -1, out.shape[-1])

    def add(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Add [H, K, d], of the keys, to [H, 1, T, d]."""
        out[:, 0, self.keys] += part


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Several short segments, padded."""

    queries: np.ndarray  # [n, L] int64: tokens; padding repeats the first
    valid: np.ndarray  # [n, L] bool: no padding

    def at_queries(self, x: torch.Tensor) -> torch.Tensor:
        """[H, G, T, d] -> [H n, G L, d]; zeros for padding, so that nothing comes back from there."""
        part = x[:, :, torch.from_numpy(self.queries)].mul_(torch.from_numpy(self.valid)[..., None]).transpose(1, 2)
        return part.reshape(len(x) * len(self.queries), -1, x.shape[-1])

    def put(self, out: torch.Tensor, part: torch.Tensor) -> None:
        """Write [H n, G L, d] into [H, G, T, d]."""
        count, length = self.queries.shape
        part = part.view(len(out), count, out.shape[1], length, out.shape[-1]).transpose(1, 2).flatten(2, 3)
        real = torch.from_numpy(np.flatnonzero(self.valid))
        out[:, :, torch.from_numpy(self.queries[self.valid])] = part[:, :, real].to(out.dtype)

    at_keys, add = at_queries, put  # no segment has keys in another tile


@functools.lru_cache(maxsize=64)
def tiles(lengths: tuple[int, ...]) -> tuple[Tile | SideBySide, ...]:
    """The tiles of segments that lie end to end."""
    found: list[Tile | SideBySide] = []
    short: list[tuple[int, int]] = []
    start = 0
    for length in lengths:
        if length <= _BLOCK:
            short.append((start, length))
        else:  # blocks of like size, so that the last one is not a small rest
            count = -(-length // _BLOCK)
            ends = [start + length * i // count for i in range(count + 1)]
            found += [Tile(slice(a, b), slice(start, b)) for a, b in itertools.pairwise(ends)]
        start += length
    return (*found, *_side_by_side(sorted(short, key=lambda one: one[1])))


def _side_by_side(segments: list[tuple[int, int]]) -> Iterator[Tile | SideBySide]:
    """Tiles of segments (start, length), shortest first."""
    while segments:
        group = [one for one in segments if one[1] <= _WASTE * segments[0][1]]
        segments = segments[len(group) :]
        if len(group) == 1:
            [(start, length)] = group
            yield Tile(slice(start, start + length), slice(start, start + length))
            continue
        starts, lengths = (np.array(column)[:, None] for column in zip(*group, strict=True))
        places = np.arange(group[-1][1])
        yield SideBySide(np.where(places < lengths, starts + places, starts), places < lengths)


class SegmentAttention(torch.autograd.Function):
    """q [H, T, d], k and v [H_kv, T, d], the segments' lengths, a scale -> [H, T, d].

    The query heads of one key head stand one under another."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], scale: float
    ) -> torch.Tensor:
        q, k, v = _grouped(q * scale, len(k)), _grouped(k, len(k)), _grouped(v, len(k))
        out, future = torch.empty_like(q), _future(q)
        for tile in tiles(lengths):
            p = _probabilities(tile.at_queries(q), tile.at_keys(k), q.shape[1], future)
            tile.put(out, torch.bmm(p, tile.at_keys(v)))
        ctx.scale, ctx.lengths = scale, lengths
        ctx.save_for_backward(q, k, v)
        return out.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dout, future = _grouped(dout, len(k)), _future(q)
        wide = torch.promote_types(k.dtype, torch.float32)  # a key's gradient is a sum over several blocks
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for tile in tiles(ctx.lengths):
            own, keys, grad = tile.at_queries(q), tile.at_keys(k), tile.at_queries(dout)
            p = _probabilities(own, keys, q.shape[1], future)
            tile.add(dv, torch.bmm(p.transpose(1, 2), grad))
            dp = torch.bmm(grad, tile.at_keys(v).transpose(1, 2))
            dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
            tile.put(dq, torch.bmm(dscores, keys))
            tile.add(dk, torch.bmm(dscores.transpose(1, 2), own))
        return dq.flatten(0, 1).mul_(ctx.scale), dk[:, 0].to(k.dtype), dv[:, 0].to(v.dtype), None, None


def _grouped(x: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[H, T, d] -> [H_kv, G, T, d]."""
    return x.contiguous().view(key_heads, -1, *x.shape[1:])


def _future(like: torch.Tensor) -> torch.Tensor:
    """[128, 128]: minus infinity for keys behind the query."""
    return torch.full((_BLOCK, _BLOCK), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)


def _probabilities(q: torch.Tensor, k: torch.Tensor, groups: int, future: torch.Tensor) -> torch.Tensor:
    """[B, G L, K] of scaled q [B, G L, d] and k [B, K, d]; the last query sees all keys, the one before it one less, ..."""
    scores = torch.bmm(q, k.transpose(1, 2))
    length = scores.shape[1] // groups
    scores.view(len(q), groups, length, -1)[..., scores.shape[2] - length :].add_(future[:length, :length])
    return torch.softmax(scores, -1)
