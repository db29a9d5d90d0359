"""What a server writes down. No text and no key is among it; whatever else might be personal is masked all the same."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lora_lab.data import personal
from lora_lab.runtime import console

if TYPE_CHECKING:
    from lora_lab.serve.metrics import Metrics


def say(metrics: Metrics, topic: str, text: object) -> None:
    """A line of the log, as `console.say`."""
    written, counts = personal.masked(str(text))
    metrics.count_masked("log", counts)
    console.say(topic, written)


class Handler(logging.Handler):
    """Says what a library logs; of an error its kind alone, because what it says may hold a text."""

    def __init__(self, metrics: Metrics):
        super().__init__(logging.WARNING)
        self._metrics = metrics

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0] if record.exc_info else None
        said = record.getMessage().partition("\n")[0] if kind is None else f"{record.name}: {kind.__name__}"
        say(self._metrics, "warning", said)


def attach(metrics: Metrics) -> None:
    """Let what uvicorn and asyncio log go through here."""
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [Handler(metrics)], False
