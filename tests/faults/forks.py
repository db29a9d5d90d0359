"""Things that end a process, or change what the system lets it do, done in a fork of the tests."""

from __future__ import annotations

import ctypes
import itertools
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

_SYSTEM = ("posix", "fcntl", "io", "_io")  # modules whose functions ask something of the system
_CHANGES = (
    "open write fsync rename replace mkdir unlink rmdir chmod ftruncate flock".split()
)  # those that change something
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MS_REMOUNT = 0x20000, 0x4000, 0x40000, 0x20


def fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of threads, which the child does not use
        return os.fork()


def in_fork(action: Callable[[], object]) -> str:
    """What the action returns, as text, or its error as 'Kind: message'."""
    readable, writable = os.pipe()
    pid = fork()
    if pid == 0:
        try:
            said = str(action())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writable, said.encode())
        os._exit(0)
    os.close(writable)
    with open(readable, encoding="utf-8") as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    return said


def killed_at_every_call(action: Callable[[], None], prepare: Callable[[], None], check: Callable[[], None]) -> int:
    """Do the action in a fork that kills itself with SIGKILL before its n-th call that changes something on the disk, for n from 0 until
    it ends by itself.

    Args:
        prepare: before each of them.
        check: after each of them.

    Returns:
        How many calls there are.
    """
    for calls in itertools.count():
        prepare()
        pid = fork()
        if pid == 0:
            _killed(action, calls)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL), f"at call {calls}"
        check()
        if os.WIFEXITED(status):
            break
    return calls


def _killed(action: Callable[[], None], at: int) -> None:
    seen = 0

    def watch(_frame, event: str, called: object) -> None:
        nonlocal seen
        if event != "c_call":
            return
        module = getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
        if module not in _SYSTEM or called.__name__ not in _CHANGES:
            return
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    code = 1
    try:
        sys.setprofile(watch)
        action()
        code = 0
    except BaseException:
        sys.setprofile(None)
        traceback.print_exc(file=sys.__stderr__)
    finally:
        sys.setprofile(None)
        os._exit(code)


def files_of_at_most(size: int) -> None:
    """From now on, no file of this process may become larger: the write fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def small_disk(folder: Path, size: str, read_only: bool = False) -> None:
    """Mount an empty file system of its own on an existing folder, for this process alone.

    Raises:
        NotMounted: that is not allowed here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(_CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        or libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", int(read_only), f"size={size}".encode())
    ):
        raise NotMounted(os.strerror(ctypes.get_errno()))


def resized(folder: Path, size: str) -> None:
    """Give the file system of `small_disk` another size."""
    assert ctypes.CDLL(None).mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _MS_REMOUNT, f"size={size}".encode()) == 0


class NotMounted(Exception):
    """The tests may not mount."""


def skip_if_not_mounted(said: str) -> None:
    """Skip the test whose fork said so."""
    if said.startswith("NotMounted"):
        pytest.skip(f"a small file system cannot be mounted here ({said.partition(': ')[2]})")
