"""Whether two examples are the same, types included."""

from __future__ import annotations

import numpy as np

from lora_lab.data.encode import Example


def same(one, other) -> bool:
    """Equal, and of equal type, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other


def assert_same(one: Example, other: Example) -> None:
    for name in ("input_ids", "weights", "origin", "own_tokens", "own_items", "copy", "num_tokens", "num_items"):
        assert same(getattr(one, name), getattr(other, name)), name
    assert list(one.own) == list(other.own)
    for name in one.own:
        assert same(one[name], other[name]), name
