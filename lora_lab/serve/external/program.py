"""Another program that listens on this machine alone: started, asked over HTTP, and ended with this one."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import psutil

from lora_lab.data import personal
from lora_lab.errors import RunError
from lora_lab.runtime import children, console

HOST = "127.0.0.1"
_LINES = 30  # of what it says last
_SAID_EVERY = 15.0  # seconds between two lines while it starts
# A program that does not answer, and computes nothing to speak of for so long, is not slow but hangs. What it takes to be asked whether it
# is healthy is far below.
_IDLE_SECONDS, _WORK_SECONDS = 600.0, 5.0
_LOOK_SECONDS = 1.0  # between two looks at what it computes, which read all processes of the machine
_STOP_SECONDS = 10.0
_MOST_LINE = 2**22  # bytes of a line of its answers


class Refused(Exception):
    """The program answered with an error."""

    def __init__(self, status: int, told: str):
        super().__init__(f"{status}: {told}")
        self.status = status


class Idle:
    """Since when a program has computed nothing to speak of. So a start may take any time on a slow machine, and ends where it hangs."""

    def __init__(self, now: float, worked: float):
        """
        Args:
            worked: seconds of processors until now.
        """
        self._since, self._worked = now, worked

    def seconds(self, now: float, worked: float) -> float:
        """For how long; `worked` becomes less where a process of it has ended."""
        if abs(worked - self._worked) >= _WORK_SECONDS:
            self._since, self._worked = now, worked
        return now - self._since


class Program:
    """One process. Nobody else on the machine has its key."""

    def __init__(self, command: Sequence[str], port: int, key_variable: str):
        """
        Args:
            command: program and arguments, which make it listen on `port`.
            key_variable: of the environment, by which it is told the key that requests need.
        """
        self.command, self._port, self._key = list(command), port, secrets.token_urlsafe(32)
        self._said: collections.deque[str] = collections.deque(maxlen=_LINES)
        self._own = subprocess.Popen(
            children.tied_group(*command),  # vLLM computes in another process, which would outlive it
            env={**os.environ, key_variable: self._key},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """Keep its last lines: they are shown if it does not start, and written nowhere, because they may hold texts."""
        assert self._own.stdout is not None, "it was asked for"
        with self._own.stdout as lines:
            for line in lines:
                self._said.append(line[:500].rstrip())

    @property
    def alive(self) -> bool:
        return self._own.poll() is None

    @property
    def pid(self) -> int:
        return self._own.pid

    def wait(self) -> None:
        """Until it says that it is healthy.

        Raises:
            RunError: it has ended before, or does nothing any more.
        """
        began = said = looked = time.monotonic()
        idle = Idle(began, self._worked())
        while not self._healthy():
            if not self.alive:
                self._listener.join(_STOP_SECONDS)  # its last lines come
                raise self._failed(f"ended with code {self._own.returncode} before it answered")
            now = time.monotonic()
            if now - looked >= _LOOK_SECONDS:
                looked = now
                if idle.seconds(now, self._worked()) >= _IDLE_SECONDS:
                    raise self._failed(
                        f"does not answer, and has computed for less than {_WORK_SECONDS:g} s in the last {_IDLE_SECONDS:g} s"
                    )
            if now - said >= _SAID_EVERY:
                said = now
                console.say("engine", f"is starting, for {now - began:.0f} s")
            time.sleep(0.05)

    def _worked(self) -> float:
        """Seconds that processors have computed for it and what it has started."""
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self._own.pid)
            for one in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    total += one.cpu_times().user + one.cpu_times().system
        return total

    def _failed(self, how: str) -> RunError:
        told = "\n  ".join(personal.masked("\n".join(self._said))[0].splitlines())
        return RunError(
            f"serve.engine: {self.command[0]} {how}. It was started by\n  {' '.join(self.command)}\nand said last\n  {told}"
        )

    def _healthy(self) -> bool:
        try:
            with self._asked("GET", "/health", None, seconds=5) as answer:
                return answer.status == 200
        except (OSError, http.client.HTTPException):
            return False

    @contextlib.contextmanager
    def _asked(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=seconds)
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            yield connection.getresponse()
        finally:
            connection.close()

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What it answers to a request as a whole; without a body, to a GET.

        Raises:
            Refused: an error.
            OSError, http.client.HTTPException: it cannot be reached, or has ended.
        """
        with self._asked("GET" if body is None else "POST", path, body) as answer:
            return _object(_checked(answer).read())

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """What it answers piece by piece, as server-sent events. Who stops reading ends the answer.

        Raises:
            Refused, OSError, http.client.HTTPException: as `ask`.
        """
        with self._asked("POST", path, body) as answer:
            _checked(answer)
            while line := answer.readline(_MOST_LINE):
                head, _, rest = line.partition(b":")
                if head == b"error":
                    raise Refused(500, rest.decode("utf-8", "replace")[:500])
                if head != b"data" or rest.strip() == b"[DONE]":
                    continue
                event = _object(rest)
                if "error" in event:
                    raise Refused(500, json.dumps(event["error"])[:500])
                yield event

    def stop(self) -> None:
        """End it, and what it has started."""
        if self.alive:
            self._own.terminate()
        try:
            self._own.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._own.kill()
            self._own.wait()
        self._listener.join(_STOP_SECONDS)


def _checked(answer: http.client.HTTPResponse) -> http.client.HTTPResponse:
    if answer.status != 200:
        raise Refused(answer.status, answer.read(2000).decode("utf-8", "replace"))
    return answer


def _object(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise Refused(500, "it answered with something that is not JSON") from error
    if not isinstance(found, dict):
        raise Refused(500, "it answered with something that is no JSON object")
    return found


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as own:
        own.bind((HOST, 0))
        port: int = own.getsockname()[1]
    return port
