"""Several processes that answer at one address (`serve.replicas`), which uvicorn's own process manager starts and keeps alive.

Each is a whole server: it loads base and adapters by itself, and nothing that a client may change is in one of them alone. What they
count comes together in files, by prometheus_client's way for several processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from lora_lab.errors import Interrupted, LoraLabError, RunError
from lora_lab.runtime import children, console, signals, storage
from lora_lab.runtime.environment import usable_cores
from lora_lab.serve import listening

if TYPE_CHECKING:
    from types import FrameType

    from lora_lab.serve.app import Service
    from lora_lab.serve.config import ServeConfig
    from lora_lab.serve.guard import Guard

_LOOKS = 1.0  # seconds between two looks at what is watched


@dataclasses.dataclass(frozen=True)
class Replica:
    """What one of the processes begins with; called there, the application."""

    made: Callable[[Path], tuple[Guard, Service]]
    parent: int
    folder: Path  # of what all processes count
    address: str
    stop_seconds: float

    def __call__(self) -> Guard:
        """The application, once everything is loaded."""
        children.end_with_parent(self.parent)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends one to all; the parent tells what it means
        ends = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # uvicorn's; while it loads there is nothing to wait for
        app, service = self._loaded()

        def told(number: int, frame: FrameType | None) -> None:
            service.engine.stop(0 if service.engine.stopping else self.stop_seconds)
            if callable(ends):
                ends(number, frame)

        signal.signal(signal.SIGTERM, told)
        threading.Thread(target=_watch, args=(service,), daemon=True).start()
        self._began.touch()
        console.say("serving", f"{self.address} (process {os.getpid()})")
        return app

    @property
    def _began(self) -> Path:
        """There once one of them has answered."""
        return self.folder / "began"

    def _loaded(self) -> tuple[Guard, Service]:
        """Where the first ones cannot begin, none could, and the parent ends by the exit code. Later on it tries again: others answer."""
        try:
            return self.made(self.folder)
        except LoraLabError as error:
            console.complain(f"lora-lab: {error}")
        except Exception:  # uvicorn would take a TypeError for its own
            console.complain(traceback.format_exc().rstrip())
        sys.exit(1 if self._began.exists() else STARTUP_FAILURE)


def _watch(service: Service) -> None:
    """Tell what is watched; end the process if nobody answers in it any more, so that another takes its place."""
    while service.engine.alive or service.engine.stopping:
        service.metrics.look()
        time.sleep(_LOOKS)
    os._exit(1)


class _Process(Process):
    """uvicorn's. Whether it lives the system knows. To ask it takes as long as it loads, and no signal would be heard meanwhile."""

    def ping(self, timeout: float = 0) -> bool:
        """Nobody is asked."""
        return True


class Keeper(Multiprocess):
    """uvicorn's process manager. It says what it does, and ends by a signal as one process does."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], folder: Path, stop_seconds: float):
        """
        Args:
            folder: of what all processes count.
        """
        super().__init__(config, sockets)
        self.ended_by: signal.Signals | None = None  # None: a process could not begin
        self._folder, self._stop_seconds = folder, stop_seconds

    def init_processes(self) -> None:
        """Start all of them."""
        self.processes = [self._begun() for _ in range(self.processes_num)]

    def _begun(self) -> Process:
        process = _Process(self.config, self.sockets)
        process.start()
        return process

    def keep_subprocess_alive(self) -> None:
        """Start another for each that has ended, of which only what it counted is kept; end where none can begin."""
        for place, process in enumerate(self.processes):
            if process.is_alive():
                continue
            process.join()
            mark_process_dead(process.pid, str(self._folder))
            if process.exitcode == STARTUP_FAILURE:
                self.should_exit.set()
                return
            console.say("replica", f"process {process.pid} has ended and is replaced")
            self.processes[place] = self._begun()

    def handle_int(self) -> None:
        """Ctrl-C."""
        self._end(signal.SIGINT)

    def handle_term(self) -> None:
        """SIGTERM."""
        self._end(signal.SIGTERM)

    def handle_hup(self) -> None:
        """A closed terminal, which uvicorn would begin anew by."""
        self._end(signal.SIGHUP)

    def handle_ttin(self) -> None:
        """Nothing: `serve.replicas` says how many there are."""

    handle_ttou = handle_ttin

    def _end(self, number: signal.Signals) -> None:
        self.ended_by = number
        console.say("stopping", f"by {number.name}: open answers may go on for {self._stop_seconds:g} s")
        self.should_exit.set()

    def join_all(self) -> None:
        """Wait for all of them; a second signal is handed on, and they do not wait then."""
        for own in [process.process for process in self.processes]:
            while own.is_alive():
                own.join(0.1)
                if self.signal_queue:
                    self.signal_queue.clear()
                    self._hurry()

    def _hurry(self) -> None:
        for process in self.processes:
            if process.process.is_alive() and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)


def keep(made: Callable[[Path], tuple[Guard, Service]], config: ServeConfig, tls: dict[str, Any]) -> NoReturn:
    """Answer in `config.replicas` processes until a signal comes.

    Args:
        made: the application and what it asks, of the folder of `Metrics`; called in each process, into which it is pickled.
        tls: options of uvicorn's for certificates.

    Raises:
        LoraLabError: the address cannot be listened on, or the processes cannot begin.
        Interrupted: by the signal.
    """
    with listening.bound(config.host, config.port, "serve.port") as own, storage.scratch() as folder, signals.kept():
        address = f"{'https' if tls else 'http'}://{config.host}:{own.getsockname()[1]}"
        console.say("replicas", f"{config.replicas} processes load; requests wait until the first of them answers")
        replica = Replica(made, os.getpid(), folder, address, config.stop_seconds)
        settings = uvicorn.Config(
            replica,
            factory=True,
            workers=config.replicas,
            timeout_graceful_shutdown=int(config.stop_seconds) + 5,
            **listening.QUIET,
            **tls,
        )
        keeper = Keeper(settings, [own], folder, config.stop_seconds)
        with _environment(folder, config.replicas):
            keeper.run()
    if keeper.ended_by is None:
        raise RunError(f"serve.replicas={config.replicas}: a process could not begin. Why stands above.")
    raise Interrupted(keeper.ended_by)


@contextlib.contextmanager
def _environment(folder: Path, processes: int) -> Iterator[None]:
    """Of the processes that are started inside: where they count, and their share of the cores, unless the user says it."""
    told = {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    if "OMP_NUM_THREADS" not in os.environ:
        told["OMP_NUM_THREADS"] = str(max(1, usable_cores() // processes))
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
