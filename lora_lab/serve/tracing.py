"""A span for each request, by OpenTelemetry's own API, where somebody collects them.

Without the package `opentelemetry-api` nothing happens here, and without a provider that its environment sets up
(`opentelemetry-instrument lora-lab serve ...`, by the standard `OTEL_` variables) its spans go nowhere. A span holds what the log does: no
text and no key. Names are those of OpenTelemetry's conventions for HTTP and for generative models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

try:
    from opentelemetry import propagate, trace
except ImportError:
    propagate = trace = None

_NOTES = {  # of a request, by what is noted of it
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "answer_tokens": "gen_ai.usage.output_tokens",
    "key": "enduser.id",
    "refused": "error.type",
    "error": "error.type",
}


class Span:
    """One request's; nothing where nobody collects."""

    def __init__(self, own: Any = None):
        self._own = own

    def end(self, line: Mapping[str, Any]) -> None:
        """Say what the log says of it: method, route, status and notes."""
        if self._own is None or not self._own.is_recording():
            return
        route, status = line["route"], line["status"]
        self._own.update_name(f"{line['method']} {route}")
        told = {"http.request.method": line["method"], "http.route": route, "http.response.status_code": status}
        self._own.set_attributes(told | {name: line[note] for note, name in _NOTES.items() if note in line})
        if status >= 500:
            self._own.set_status(trace.StatusCode.ERROR)


@contextlib.contextmanager
def span(headers: Mapping[str, str] | None) -> Iterator[Span]:
    """Inside the block a span is open, below the one that a request's headers name (`traceparent`). None: there is none."""
    if trace is None or headers is None:
        yield Span()
        return
    tracer = trace.get_tracer("lora_lab.serve")
    with tracer.start_as_current_span(
        "request", context=propagate.extract(headers), kind=trace.SpanKind.SERVER, record_exception=False
    ) as own:
        yield Span(own)
