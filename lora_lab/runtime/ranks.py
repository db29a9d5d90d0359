"""The processes that train one run together. There is one so far (`cli` refuses WORLD_SIZE > 1), and the loop asks here at the four
places where their number will matter: a step's weight, its gradients, the decision to stop, and who writes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def sum(value: float) -> float:
    """The sum of what each process has."""
    return value


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give each process the sum of all gradients, in place."""


def agree(stop: bool) -> bool:
    """Whether any process wants to stop; all of them hear the same."""
    return stop


def main() -> bool:
    """Whether this process writes the run's files."""
    return True
