"""uvicorn's server, which says where it listens, and tells who answers that it is to stop; and an address for several of them."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from lora_lab.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

QUIET: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}  # of uvicorn's `Config`
_BACKLOG = 2048  # connections that nobody has taken yet; uvicorn's


class Server(uvicorn.Server):
    """Of one application."""

    def __init__(
        self,
        config: uvicorn.Config,
        listens: Callable[[int], None],
        stopping: Callable[[signal.Signals, bool], None],
    ):
        """See `listen`."""
        super().__init__(config)
        self._listens, self._stopping = listens, stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal lets open answers end; a second one does not wait."""
        self._stopping(signal.Signals(sig), self.should_exit)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: Any = None) -> None:
        """As uvicorn's, and say where it listens."""
        await super().startup(sockets)
        if self.started:
            self._listens(self.servers[0].sockets[0].getsockname()[1])


def listen(
    app: ASGIApp,
    host: str,
    port: int,
    listens: Callable[[int], None],
    stopping: Callable[[signal.Signals, bool], None],
    *,
    key: str,
    stop_seconds: int,
    **options: Any,
) -> None:
    """Answer until a signal comes.

    Args:
        port: 0: one that is free.
        listens: called with the port once it listens.
        stopping: called with each signal, and whether it is not the first.
        key: of the port, for the message.
        stop_seconds: how long open answers may go on.
        options: further ones of uvicorn's `Config`.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        timeout_graceful_shutdown=stop_seconds,
        **QUIET,
        **options,
    )
    try:
        Server(config, listens, stopping).run()
    except SystemExit as error:  # uvicorn's way to say that it could not begin
        raise _taken(host, port, key) from error


def bound(host: str, port: int, key: str) -> socket.socket:
    """A socket that listens, for several processes to answer at. Who connects before one of them does waits.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise _taken(host, port, key) from error


def _taken(host: str, port: int, key: str) -> ConfigError:
    return ConfigError(f"{key}={port}: {host} cannot be listened on there. Choose another port.")
