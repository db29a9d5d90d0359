"""Ctrl-C, SIGTERM and SIGHUP: raised at once where nothing can be lost, held back where a state must be saved first."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator

from lora_lab.errors import Interrupted

_held: list[int] | None = None  # None: raise at once; a list: hold back and collect
_deferred: list[int] | None = None  # a list: inside `deferred`, where nothing is raised at all


def _handle(signum: int, _frame: object) -> None:
    if signum == signal.SIGHUP:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # shell and kernel both send one: the second asks for nothing more
        _leave_terminal()
        if _held:  # and none of them is a person who cannot wait for the save
            return
    if _deferred is not None:
        _deferred.append(signum)
        return
    if _held is None or _held:  # nothing to save, or the second signal: leave at once
        raise Interrupted(signum)
    _held.append(signum)


def _leave_terminal() -> None:
    """Write to nowhere what went to a terminal or a reader that has gone: each line would fail, and with it the save."""
    for descriptor in (1, 2):
        asked = select.poll()
        asked.register(descriptor, 0)  # errors and hang-ups are always told
        if asked.poll(0):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def install() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into `Interrupted`. Called once, by the command line. A SIGHUP that is ignored (nohup) stays
    so."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _handle)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _handle)


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


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Deliver every signal after the block: for a short moment that must not be cut in two, such as two renames."""
    global _deferred
    if _deferred is not None:
        yield
        return
    arrived: list[int] = []
    _deferred = arrived
    try:
        yield
    finally:
        _deferred = None
        for signum in arrived:
            _handle(signum, None)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Leave signals after the block to whom they belonged before it, whatever a library does with them inside."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # nobody else can set them
            for signum, handler in before.items():
                if handler is not None:  # else it is no function of Python
                    signal.signal(signum, handler)
