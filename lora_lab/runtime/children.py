"""Processes that lora_lab starts: they end with it, however it ends, and leave no memory of a GPU taken.

Run as a script (python children.py PARENT COMMAND ...), it ties itself to its parent and becomes the command; with `--group` before that it
stays beside the command, and ends it with all that the command has started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1
_PATIENCE = 8.0


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with the output captured as text, of a process that the kernel kills when this one dies.

    The tie is made by a tiny program of its own, as nothing may run between fork and exec in a process with threads.
    """
    return subprocess.run(tied(*command), capture_output=True, text=True, errors="replace", check=False, **options)


def tied(*command: str) -> list[str]:
    """A command whose process the kernel kills when this one dies."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def tied_group(*command: str) -> list[str]:
    """A command that starts processes of its own. They end with it, and all of them when this one dies, or the process is told to end
    (SIGTERM): they are told first, and killed after `_PATIENCE` seconds."""
    return [sys.executable, "-I", "-S", __file__, "--group", str(os.getpid()), *command]


def end_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent dies (Linux; elsewhere it lives until its work is done).

    Args:
        parent: process number of the one that started it, which may be dead already.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:
        os._exit(128 + by)


def _lead(parent: str, *command: str) -> int:
    """Run a command in a process group of its own; its exit code, once nothing of the group is left."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _told)
    end_with_parent(int(parent), signal.SIGTERM)
    own = None
    try:
        own = subprocess.Popen(tied(*command), process_group=0)
        code = own.wait()
    except _Told:
        if own is None:
            return 128 + signal.SIGTERM
        _send(own.pid, signal.SIGTERM)
        try:
            code = own.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
    _send(own.pid, signal.SIGKILL)
    return code if code >= 0 else 128 - code


class _Told(BaseException):
    """By a signal to end."""


def _told(number: int, frame: object) -> None:
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    raise _Told


def _send(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _main(parent: str, *command: str) -> None:
    end_with_parent(int(parent))
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        sys.exit(f"Error: {command[0]}: {error.strerror}")


if __name__ == "__main__":
    if sys.argv[1] == "--group":
        sys.exit(_lead(*sys.argv[2:]))
    _main(*sys.argv[1:])
