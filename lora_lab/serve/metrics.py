"""What is counted while serving, as Prometheus reads it. No text, no key: names of keys, routes and adapters only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Of one server, which may be several processes."""

    def __init__(self, folder: Path | None = None):
        """
        Args:
            folder: where all processes of the server count, PROMETHEUS_MULTIPROC_DIR since this one began; None: it is the only one.
        """
        own = self.registry = CollectorRegistry()
        self._folder = folder
        self._watched: list[tuple[Gauge, Callable[[], float]]] = []
        self.requests = Counter("lora_lab_requests", "Requests that were answered", ("route", "status"), registry=own)
        self.seconds = Histogram(
            "lora_lab_request_seconds", "Until a request was answered", ("route",), buckets=_SECONDS, registry=own
        )
        self.first_token = Histogram(
            "lora_lab_first_token_seconds", "Until an answer began", buckets=_SECONDS, registry=own
        )
        self.tokens = Counter("lora_lab_tokens", "Tokens that were read and written", ("model", "kind"), registry=own)
        self.rows = Histogram(
            "lora_lab_batch_rows", "Answers in a pass", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), registry=own
        )
        self.passes = Counter("lora_lab_passes", "Passes that wrote tokens", registry=own)
        self.refusals = Counter("lora_lab_refusals", "Requests that were refused", ("reason", "key"), registry=own)
        self.failures = Counter("lora_lab_failures", "Errors of the server itself", ("kind",), registry=own)
        self.masked = Counter("lora_lab_masked", "Personal data that was masked", ("kind", "where"), registry=own)
        self._gauge("lora_lab_memory_bytes", "Memory of the process", lambda: psutil.Process().memory_info().rss)

    def _gauge(
        self, name: str, meaning: str, value: Callable[[], float], together: Literal["livesum", "livemax"] = "livesum"
    ) -> None:
        """
        Args:
            together: what it is of several processes.
        """
        self._watched.append((Gauge(name, meaning, registry=self.registry, multiprocess_mode=together), value))

    def look(self) -> None:
        """Let what is watched be told as it is now."""
        for gauge, value in self._watched:
            gauge.set(value())

    def count_masked(self, where: str, counts: Mapping[str, int]) -> None:
        """`where`: log, or model."""
        for kind, count in counts.items():
            self.masked.labels(kind, where).inc(count)

    def watch(
        self,
        waiting: Callable[[], int],
        writing: Callable[[], int],
        adapters: Callable[[], int],
        cached: Callable[[], int],
        cache: int,
    ) -> None:
        """Show how many requests wait, how many answers are being written, how many adapters there are, and the bytes that are
        reserved for keys and values, of all that may be."""
        self._gauge("lora_lab_cache_bytes", "Reserved for keys and values of open answers", cached)
        self._gauge("lora_lab_cache_limit_bytes", "That may be reserved for keys and values", lambda: cache)
        self._gauge("lora_lab_waiting", "Requests that wait", waiting)
        self._gauge("lora_lab_writing", "Answers that are being written", writing)
        self._gauge("lora_lab_adapters", "Adapters that are served", adapters, "livemax")

    def text(self) -> bytes:
        """In Prometheus's format. Of other processes, what is watched is as they told it last (`look`)."""
        self.look()
        if self._folder is None:
            return generate_latest(self.registry)
        every = CollectorRegistry()
        MultiProcessCollector(every, str(self._folder))
        return generate_latest(every)
