"""Which rows without labels to label first."""

from __future__ import annotations

import numpy as np

_BLOCK = 1024  # rows that all others are compared with at once


def uncertain(shares: np.ndarray, count: int) -> list[int]:
    """Places of the rows whose most likely class is the least likely (Lewis and Gale 1994), the least first; shares are [n, C]."""
    return np.argsort(shares.max(1), kind="stable")[:count].tolist()


def diverse(vectors: np.ndarray, known: np.ndarray, count: int) -> list[int]:
    """Places of rows that are far from all that are labelled and from each other: each is the farthest from those before (k-center greedy,
    Sener and Savarese 2018, arXiv:1708.00489).

    Args:
        vectors: [n, D] float32 of unit length, of rows to choose from.
        known: [m, D], of rows that are labelled; none: it begins with the row that is nearest to the mean.
    """
    if len(known):
        parts = np.array_split(known, -(-len(known) // _BLOCK))
        nearest = np.min([(1 - vectors @ part.T).min(1) for part in parts], axis=0)
        chosen: list[int] = []
    else:
        chosen = [int((vectors @ vectors.mean(0)).argmax())]
        nearest = 1 - vectors @ vectors[chosen[0]]
    while len(chosen) < min(count, len(vectors)):
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, 1 - vectors @ vectors[chosen[-1]])
    return chosen[:count]


def at_random(rows: int, count: int, seed: int) -> list[int]:
    """Places of so many of `rows` rows, in their order."""
    return sorted(np.random.default_rng(seed).permutation(rows)[:count].tolist())
