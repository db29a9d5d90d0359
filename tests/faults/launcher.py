"""What goes wrong in a process of the fault programme, and when. Installed in the forked child; the product knows nothing of it.

Every call that changes the file system below one of the plan's `roots` is an event, once before and once after the call:
open for writing, write, fsync, rename, exchange, unlink, rmdir, mkdir, link, truncate. Events are counted from 1.

Keys of a plan:
    roots: folders whose events count.
    record: a file that gets one JSON list [event, phase, path] a line.
    modules: a file that gets the names of all imported modules at the end.
    kill_at: the event at which the process kills itself with SIGKILL.
    torn: with `kill_at` before an fsync: half of the file is cut off first, as when the power fails.
    limit_at: the event from which on no file may grow (RLIMIT_FSIZE), as on a full disk.
    fill_at, mount: the event at which the file system at `mount` is filled up.
    signal, stage, nth: a signal that the process sends itself at the n-th entry (from 1) of one of `STAGES`.
    reload: 'process' starts the reloading script as the product does; else it runs in a fork of this process (no imports again).
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("data", "forward", "backward", "save", "eval", "merge", "serve")
_FOREIGN = ("renameat2", "renameat", "rename", "syscall", "copy_file_range")  # that may be called through ctypes
_PID = re.compile(r"\b\d{2,}\b")

_plan: dict[str, Any] = {}
_roots: tuple[str, ...] = ()
_count = 0
_inside = False  # an event is being handled
_recorded: list[list[str]] = []
_pid = 0


def install(plan: dict[str, Any]) -> None:
    """Watch this process from now on, and let happen what the plan says."""
    global _plan, _roots, _pid
    _plan, _pid = plan, os.getpid()
    _roots = tuple(str(Path(root)) for root in plan.get("roots", ()))
    if _roots:
        _watch_files()
    if "stage" in plan:
        _watch_stage(plan["stage"], plan["signal"], plan.get("nth", 1))
    if plan.get("reload") != "process":
        subprocess.Popen = _ForkedReload


def finish() -> None:
    """Write down what was seen."""
    if "record" in _plan:
        _real_write(_plan["record"], "".join(json.dumps(line) + "\n" for line in _recorded))
    if "modules" in _plan:
        _real_write(_plan["modules"], json.dumps(sorted(name for name in sys.modules if not name.startswith("__"))))


def _real_write(file: str, text: str) -> None:
    descriptor = _real["os.open"](file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    _real["os.write"](descriptor, text.encode())
    os.close(descriptor)


# -- events -----------------------------------------------------------------------------------------------------------

_REAL_NAMES = (
    "replace", "rename", "fsync", "fdatasync", "unlink", "remove", "rmdir", "mkdir", "open", "write", "link", "symlink",
    "truncate", "ftruncate",
)  # fmt: skip
_real: dict[str, Callable] = {f"os.{name}": getattr(os, name) for name in _REAL_NAMES}
_real["open"] = builtins.open


def _reach(event: str, phase: str, path: str) -> None:
    """Count an event, and act if it is the one."""
    global _count, _inside
    if _inside or os.getpid() != _pid or not path.startswith(_roots):
        return
    _inside = True
    try:
        _count += 1
        if "record" in _plan:
            _recorded.append([event, phase, path])
        if _count == _plan.get("kill_at"):
            if _plan.get("torn") and event == "fsync" and phase == "before" and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if _count == _plan.get("fill_at"):
            fill(_plan["mount"])
        if _count == _plan.get("limit_at"):
            size = os.path.getsize(path) if os.path.isfile(path) else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        if _plan.get("stage") in ("save", "merge") and event == "fsync" and phase == "before":
            _enter(_plan["stage"], path)
    finally:
        _inside = False


def fill(mount: str) -> None:
    """Leave no free block on the file system at `mount`."""
    with contextlib.suppress(OSError), _real["open"](f"{mount}/ballast", "ab", buffering=0) as ballast:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while ballast.write(bytes(size)):
                    pass


def _path(value: Any, dir_fd: int | None = None) -> str:
    if isinstance(value, int):
        return os.readlink(f"/proc/self/fd/{value}")
    text = os.fsdecode(value)
    if os.path.isabs(text):
        return text
    start = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    return os.path.join(start, text)


def _around(name: str, event: str, place: Callable[..., Any]) -> Callable:
    real = _real[name]

    def call(*args: Any, **options: Any) -> Any:
        value = place(*args)
        path = _path(value, options.get("dir_fd", options.get("src_dir_fd")))
        _reach(event, "before", path)
        done = real(*args, **options)
        _reach(event, "after", path)
        return done

    return call


def _first(value: Any, *_: Any) -> Any:
    return value


def _second(_: Any, value: Any = None, *__: Any) -> Any:
    return value


def _opens_for_writing(mode: str) -> bool:
    return any(letter in mode for letter in "wax+")


def _open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
    if isinstance(file, int) or not _opens_for_writing(mode):
        return _real["open"](file, mode, *args, **options)
    path = _path(file)
    _reach("open", "before", path)
    stream = _real["open"](file, mode, *args, **options)
    _reach("open", "after", path)
    return stream


def _os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
    writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    place = _path(path, options.get("dir_fd")) if writes else ""
    if writes:
        _reach("open", "before", place)
    descriptor = _real["os.open"](path, flags, *args, **options)
    if writes:
        _reach("open", "after", place)
    return descriptor


def _watch_files() -> None:
    names = {
        "replace": ("rename", _second), "rename": ("rename", _second), "fsync": ("fsync", _first),
        "fdatasync": ("fsync", _first), "unlink": ("unlink", _first), "remove": ("unlink", _first),
        "rmdir": ("rmdir", _first), "mkdir": ("mkdir", _first), "write": ("write", _first), "link": ("link", _second),
        "symlink": ("link", _second), "truncate": ("truncate", _first), "ftruncate": ("truncate", _first),
    }  # fmt: skip
    for name, (event, place) in names.items():
        setattr(os, name, _around(f"os.{name}", event, place))
    os.open = _os_open
    builtins.open = io.open = _open
    _watch_tensors()


def _watch_tensors() -> None:
    """safetensors writes in Rust."""
    import safetensors.torch

    real = safetensors.torch.serialize_file

    def serialize_file(tensors: Any, filename: Any, *args: Any, **options: Any) -> Any:
        _reach("write", "before", _path(filename))
        done = real(tensors, filename, *args, **options)
        _reach("write", "after", _path(filename))
        return done

    safetensors.torch.serialize_file = serialize_file


class _Foreign:
    """A C function that renames, as an event."""

    def __init__(self, real: Any):
        object.__setattr__(self, "_real", real)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._real, name, value)

    def __call__(self, *args: Any) -> Any:
        paths = [os.fsdecode(value) for value in args if isinstance(value, (bytes, str))]
        for phase in ("before", "after"):
            if phase == "after":
                done = self._real(*args)
            for path in paths[-1:]:
                _reach("exchange", phase, path)
        return done


def watch_foreign_calls() -> None:
    """Make renames through ctypes events too. To be called before the product is imported."""
    real = ctypes.CDLL.__getitem__

    def getitem(self: Any, name: Any) -> Any:
        function = real(self, name)
        return _Foreign(function) if name in _FOREIGN else function

    ctypes.CDLL.__getitem__ = getitem


def stripped(path: str) -> str:
    """A path without the numbers of processes and steps, so that the same file of two saves is one."""
    return _PID.sub("N", path)


# -- signals ----------------------------------------------------------------------------------------------------------

_entered = 0


def _enter(stage: str, path: str = "") -> None:
    global _entered
    if stage == "save" and "checkpoints" not in path:
        return
    if stage == "merge" and "merged" not in path:
        return
    _entered += 1
    if _entered == _plan.get("nth", 1):
        os.kill(os.getpid(), _plan["signal"])


def _watch_stage(stage: str, signum: int, nth: int) -> None:
    if stage == "data":
        from lora_lab.data.dataset import Dataset

        _before(Dataset, "__getitem__", lambda *_: True)
    if stage == "forward":
        from lora_lab.tasks.causal_lm.task import CausalLM

        _before(CausalLM, "loss", lambda _, model, *__: model.training)
    if stage == "eval":
        from lora_lab.tasks.causal_lm.task import CausalLM

        _before(CausalLM, "measure", lambda *_: True)
    if stage == "backward":
        _inside_backward()
    if stage == "serve":
        _once_it_listens()


def _before(kind: type, name: str, counts: Callable[..., bool]) -> None:
    real = getattr(kind, name)

    def call(*args: Any, **options: Any) -> Any:
        if counts(*args):
            _enter(_plan["stage"])
        return real(*args, **options)

    setattr(kind, name, call)


def _inside_backward() -> None:
    """The signal arrives while gradients are computed."""
    import torch

    real = torch.Tensor.backward

    def backward(self: Any, *args: Any, **options: Any) -> Any:
        if self.requires_grad:
            self.register_hook(lambda gradient: _enter("backward"))
        return real(self, *args, **options)

    torch.Tensor.backward = backward


def _once_it_listens() -> None:
    """The signal arrives when a server has loaded everything and listens."""
    from lora_lab.serve.listening import Server

    real = Server.startup

    async def startup(self: Any, sockets: Any = None) -> None:
        await real(self, sockets)
        _enter("serve")

    Server.startup = startup


# -- processes that the product starts ------------------------------------------------------------------------------


class _ForkedReload(subprocess.Popen):
    """A process of its own that reloads a checkpoint, forked from this one instead of started anew: seconds saved."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *more: Any) -> None:
        script = [str(word) for word in args] if isinstance(args, (list, tuple)) else []
        place = next((i for i, word in enumerate(script) if word.endswith("/verify/reload.py")), None)
        if place is None:
            return super()._execute_child(args, executable, preexec_fn, *more)
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = more[7:13]
        self.pid = os.fork()
        if self.pid == 0:
            self._run(script[place + 1 :], preexec_fn, c2pwrite, errwrite)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        return None

    @staticmethod
    def _run(words: list[str], preexec_fn: Any, out: int, err: int) -> None:
        code = 0
        try:
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_DFL)
            if preexec_fn is not None:
                preexec_fn()
            for number, end in ((1, out), (2, err)):
                if end != -1:
                    os.dup2(end, number)
            from lora_lab.verify import reload

            reload.main(*words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            os.write(2, f"{end.code}\n".encode())
        except BaseException as error:
            code = 1
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(code)
