"""Bounds for what a row, and a model's chat template, may take: somebody else wrote both, and a template is a program."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

MAX_ROW_CHARS = 2**23  # of all texts of a row: two million tokens
_HALF = re.compile("[\ud800-\udfff]")  # JSON can write half of a character; no file of text and no tokenizer can
_MAX_DEPTH = 100  # of lists and objects inside a row
_AGAIN_SECONDS = 0.1  # an exception that is raised inside a destructor is lost, so it is raised again
_LAST_SECONDS = 30.0
_STATUS = "/proc/self/statm"  # the process's size in pages comes first


def fault_of(values: Any) -> str | None:
    """What is wrong with the texts of a row, at any depth, keys included; None if nothing is."""
    size = 0
    inside: list[tuple[list[Any] | dict[Any, Any], int]] = [([values], 0)]
    for node, depth in inside:  # which grows
        if depth > _MAX_DEPTH:
            return f"is nested deeper than {_MAX_DEPTH} levels."
        for child in [*node, *node.values()] if isinstance(node, dict) else node:
            if isinstance(child, str):
                size += len(child)
                if not child.isascii() and (half := _HALF.search(child)):
                    return (
                        f"holds half of a character ({half.group()!r}), which is no text. Remove it, or write it whole."
                    )
            elif isinstance(child, (dict, list)):
                inside.append((child, depth + 1))
    if size > MAX_ROW_CHARS:
        return f"holds {size:,} characters, above {MAX_ROW_CHARS:,}. Split it into several rows."
    return None


class Bounds:
    """Inside the block memory is bounded, and so is the processor time of whatever runs in `slice`.

    More memory than `new_bytes` above what the process has is a MemoryError. The bound is the kernel's, so that it holds in C
    code as well, and keeps every single operation there short: Python interrupts none. What nevertheless does not come back from
    C in half a minute of processor time ends the process (SIGVTALRM). Time is the process's own, in user and system mode: a
    machine that is busy or was suspended does not matter. Signals reach the main thread only; elsewhere time has no bound.
    """

    def __init__(self, new_bytes: int, seconds: float):
        """`seconds`: for all slices together."""
        self.new_bytes, self.left = new_bytes, seconds
        self._too_slow: Exception | None = None
        self._timed = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        self._before = resource.getrlimit(resource.RLIMIT_AS)
        size = _size()
        if size is not None:
            known = [limit for limit in self._before if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min([size + self.new_bytes, *known]), self._before[1]))
        if self._timed:
            self._handlers = (
                signal.signal(signal.SIGPROF, self._stop),
                signal.signal(signal.SIGVTALRM, signal.SIG_DFL),
            )
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._before)
        if self._timed:
            signal.signal(signal.SIGPROF, self._handlers[0])
            signal.signal(signal.SIGVTALRM, self._handlers[1])

    def _stop(self, *_: object) -> None:
        if self._too_slow is not None:
            raise self._too_slow

    @contextlib.contextmanager
    def slice(self, seconds: float, too_slow: Exception) -> Iterator[None]:
        """Raise `too_slow` when the block takes more processor time than `seconds`, or than is left of all."""
        if not self._timed:
            yield
            return
        if self.left <= 0:
            raise too_slow
        started, self._too_slow = time.process_time(), too_slow
        signal.setitimer(signal.ITIMER_VIRTUAL, _LAST_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, min(seconds, self.left), _AGAIN_SECONDS)
        try:
            yield
        finally:
            self._too_slow = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            self.left -= time.process_time() - started


def _size() -> int | None:
    """Bytes of address space that the process has; None where the system does not say."""
    try:
        descriptor = os.open(_STATUS, os.O_RDONLY)
    except OSError:
        return None
    try:
        return int(os.read(descriptor, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(descriptor)
