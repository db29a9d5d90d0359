"""Ctrl-C and SIGTERM: raised at once where nothing can be lost, held back where a state must be saved first."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from lora_lab.errors import Interrupted

_held: list[int] | None = None  # None: raise at once; a list: hold back and collect


def _handle(signum: int, _frame) -> None:
    if _held is None or _held:  # nothing to save, or the second signal: leave at once
        raise Interrupted(signum)
    _held.append(signum)


def install() -> None:
    """Turn SIGINT and SIGTERM into `Interrupted`. Called once, by the command line."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _handle)


@contextlib.contextmanager
def held() -> Iterator[list[int]]:
    """Hold back the first signal inside the block.

    Yields:
        The list of signals that arrived; the block looks at it where it is safe to stop, saves, and raises
        `Interrupted(signals[0])`. A second signal raises at once.
    """
    global _held
    outer, _held = _held, []
    try:
        yield _held
    finally:
        _held = outer
