"""Losses of vectors, each over all rows of a step. What is equal is never a negative."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize


def equal_texts(queries: Sequence[Sequence[object]], documents: Sequence[Sequence[object]]) -> np.ndarray:
    """Which documents must not be negatives of which queries: [N, M] bool. Document i < N is the positive of query i, and never masked
    for it.

    Masked are, for each query, documents that equal it, and those that equal a positive of an equal query.

    Args:
        queries: for each, the marks by which it is known, such as its text and its tokens; texts are equal that have one in common.
        documents: the same.
    """
    count = len(queries)
    same_query = _same(queries, queries)
    same_positive = _same(documents[:count], documents)
    masked: np.ndarray = same_query.astype(np.float32) @ same_positive.astype(np.float32) > 0
    masked |= _same(queries, documents)
    masked[np.arange(count), np.arange(count)] = False
    return masked


def _same(ones: Sequence[Sequence[object]], others: Sequence[Sequence[object]]) -> np.ndarray:
    """[N, M] bool: they have a mark in common."""
    found = np.zeros((len(ones), len(others)), dtype=bool)
    for first, second in zip(zip(*ones, strict=True), zip(*others, strict=True), strict=True):
        numbers: dict[object, int] = {}
        one, other = (np.array([numbers.setdefault(mark, len(numbers)) for mark in side]) for side in (first, second))
        found |= one[:, None] == other[None]
    return found


def infonce(
    queries: torch.Tensor, documents: torch.Tensor, masked: torch.Tensor, temperature: float, symmetric: bool
) -> torch.Tensor:
    """[N] how badly each query's positive is told apart from the other documents of the step (arXiv:1807.03748); with `symmetric` the
    mean of that and of how badly the query is told apart for its positive.

    Args:
        queries: [N, D].
        documents: [M, D], of which the first N are the positives.
        masked: [N, M] bool, see `equal_texts`.
    """
    scores = normalize(queries, dim=-1) @ normalize(documents, dim=-1).T / temperature
    scores = scores.masked_fill(masked, float("-inf"))
    own = torch.arange(len(queries), device=queries.device)
    forth = cross_entropy(scores, own, reduction="none")
    if not symmetric:
        return forth
    return (forth + cross_entropy(scores[:, : len(queries)].T, own, reduction="none")) / 2


def ordered(similarities: torch.Tensor, scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """How badly similarities [N] come in the order of scores [N] (CoSENT): a scalar over all pairs of different scores."""
    gaps = (similarities[None] - similarities[:, None]) / temperature  # [i, j]: how far j is above i
    wanted = scores[:, None] > scores[None]
    gaps = gaps.masked_fill(~wanted, -torch.inf)  # to pick them would wait for a card
    return torch.cat([gaps.new_zeros(1), gaps.flatten()]).logsumexp(0)


def cosines(ones: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[N] of vectors [N, D] each."""
    return (normalize(ones, dim=-1) * normalize(others, dim=-1)).sum(-1)


def angles(ones: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """[N] similarity by the angle of vectors [N, D] as complex ones, the first half of each real (AnglE, arXiv:2309.12871)."""
    (a, b), (c, d) = ones.chunk(2, dim=-1), others.chunk(2, dim=-1)
    size = (c**2 + d**2).sum(-1, keepdim=True)
    real, imaginary = (a * c + b * d) / size, (b * c - a * d) / size
    scale = ((a**2 + b**2).sum(-1, keepdim=True) / size).sqrt()
    return (torch.cat([real, imaginary], dim=-1) / scale).sum(-1).abs()
