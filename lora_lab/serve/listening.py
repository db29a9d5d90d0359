"""uvicorn's server, which tells the thread that answers when it is to stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from lora_lab.runtime import console

if TYPE_CHECKING:
    from lora_lab.serve.app import Service
    from lora_lab.serve.config import ServeConfig


class Server(uvicorn.Server):
    """Of one service."""

    def __init__(self, config: uvicorn.Config, service: Service, told: ServeConfig):
        super().__init__(config)
        self._service, self._told = service, told

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal lets open answers end; a second one does not wait."""
        seconds = 0 if self.should_exit else self._told.stop_seconds
        console.say("stopping", f"by {signal.Signals(sig).name}: open answers may go on for {seconds:g} s")
        self._service.engine.stop(seconds)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: Any = None) -> None:
        """As uvicorn's, and say where it listens."""
        await super().startup(sockets)
        if self.started:
            scheme = "http" if self._told.certificate is None else "https"
            port = self.servers[0].sockets[0].getsockname()[1]
            console.say("serving", f"{scheme}://{self._told.host}:{port}")
