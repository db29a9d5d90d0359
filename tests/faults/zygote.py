"""A warm process that forks a child for each command line: python -m tests.faults.zygote

Importing torch, transformers and peft takes seconds, and the fault programme starts thousands of processes. The zygote imports
them once, before any thread of theirs is started, and forks. A request is one line of JSON on stdin, an answer one on stdout.

A request:
    argv: the command line. target: 'module:function' that gets it (default: `lora_lab.cli:main`).
    cwd, env: of the child. timeout: seconds until it is killed as hanging.
    kill_after: seconds after which it is killed with SIGKILL, or absent.
    every other key: a plan for `tests.faults.launcher`.
An answer:
    rc: exit code, or the negative number of the signal. out, err: what it printed. seconds. hang: whether it was killed as hanging.
    orphans: processes that it left behind and that did not end by themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import selectors
import signal
import sys
import time
import traceback
from typing import Any

from tests.faults import launcher

_PR_SET_CHILD_SUBREAPER = 36
_ORPHAN_SECONDS = 10  # in which what a killed process started must have noticed it


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    launcher.watch_foreign_calls()
    import lora_lab.run.pipeline
    import lora_lab.sweep.sweep  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        answer = _import(request["import"]) if "import" in request else _try(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _import(modules: list[str]) -> dict[str, Any]:
    """Import what a first child had imported by its end; nothing of it computes."""
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    return {"modules": len(sys.modules)}


def _try(request: dict[str, Any]) -> dict[str, Any]:
    pipes = os.pipe(), os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(request, pipes)
    for _, writing in pipes:
        os.close(writing)
    told, rc, hang = _listen(child, request, {pipes[0][0]: "out", pipes[1][0]: "err"}, started)
    seconds = time.monotonic() - started
    return {**told, "rc": rc, "hang": hang, "seconds": round(seconds, 3), "orphans": _orphans()}


def _child(request: dict[str, Any], pipes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(pipes[0][1], 1)
        os.dup2(pipes[1][1], 2)
        os.closerange(3, max(end for pipe in pipes for end in pipe) + 1)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(request.get("env", {}))
        os.chdir(request.get("cwd", "/"))
        module, _, name = request.get("target", "lora_lab.cli:main").partition(":")
        launcher.install(request)
        code = getattr(importlib.import_module(module), name)(request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            launcher.finish()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code or 0)


def _listen(
    child: int, request: dict[str, Any], ends: dict[int, str], started: float
) -> tuple[dict[str, str], int, bool]:
    """Read both pipes until the child has ended; kill it when its time comes."""
    told, hang = {"out": b"", "err": b""}, False
    limit, kill_after = started + request.get("timeout", 60), request.get("kill_after")
    kill_at = None if kill_after is None else started + kill_after
    with selectors.DefaultSelector() as selector:
        for end in ends:
            selector.register(end, selectors.EVENT_READ)
        ended = os.pidfd_open(child)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            now = time.monotonic()
            due = limit if kill_at is None else min(limit, kill_at)
            ready = [key.fd for key, _ in selector.select(max(0.0, due - now))]
            for end in set(ready) & set(ends):
                data = os.read(end, 1 << 16)
                told[ends[end]] += data
                if not data:
                    selector.unregister(end)
            if ended in ready:
                break
            now = time.monotonic()
            if kill_at is not None and now >= kill_at:
                os.kill(child, signal.SIGKILL)
                kill_at = None
            elif now >= limit:
                hang, limit = True, now + 60
                os.kill(child, signal.SIGKILL)
        os.close(ended)
    _, status = os.waitpid(child, 0)
    for end, name in ends.items():
        os.set_blocking(end, False)  # what it left behind may hold the other end
        with contextlib.suppress(BlockingIOError):
            while data := os.read(end, 1 << 16):
                told[name] += data
        os.close(end)
    text = {name: data.decode(errors="replace") for name, data in told.items()}
    return text, os.waitstatus_to_exitcode(status), hang


def _orphans() -> int:
    """Wait for what the child left behind; how many of them had to be killed."""
    until, killed = time.monotonic() + _ORPHAN_SECONDS, 0
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return killed
        if pid == 0 and time.monotonic() > until:
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="utf-8") as file:
                for left in file.read().split():
                    os.kill(int(left), signal.SIGKILL)
                    killed += 1
            os.waitpid(-1, 0)
        elif pid == 0:
            os.sched_yield()


if __name__ == "__main__":
    main()
