"""Processes that lora_lab starts: they end with it, however it ends, and leave no memory of a GPU taken.

Run as a script (python children.py PARENT COMMAND ...), it ties itself to its parent and becomes the command.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with the output captured as text, of a process that the kernel kills when this one dies.

    The tie is made by a tiny program of its own, as nothing may run between fork and exec in a process with threads.
    """
    return subprocess.run(tied(*command), capture_output=True, text=True, errors="replace", check=False, **options)


def tied(*command: str) -> list[str]:
    """A command whose process the kernel kills when this one dies."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere it lives until its work is done).

    Args:
        parent: process number of the one that started it, which may be dead already.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def _main(parent: str, *command: str) -> None:
    end_with_parent(int(parent))
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        sys.exit(f"Error: {command[0]}: {error.strerror}")


if __name__ == "__main__":
    _main(*sys.argv[1:])
