"""Spans of requests, as OpenTelemetry's own SDK collects them."""

from __future__ import annotations

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the package opentelemetry-sdk is not installed")

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lora_lab.serve import tracing
from tests.serve.conftest import said

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing.trace, "get_tracer", provider.get_tracer)
    yield exporter.get_finished_spans
    provider.shutdown()


def test_a_request_is_a_span_below_the_clients_own(client, spans):
    body = {"model": "3", "messages": said("write to ann@example.org"), "max_tokens": 4}
    assert client.post("/v1/chat/completions", json=body, headers={"traceparent": PARENT}).status_code == 200
    [one] = spans()
    assert (one.name, one.kind) == ("POST /v1/chat/completions", trace.SpanKind.SERVER)
    assert f"{one.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{one.parent.span_id:016x}" == PARENT.split("-")[2]
    told = dict(one.attributes)
    assert told["http.response.status_code"] == 200
    assert told["gen_ai.request.model"] == "3"
    assert (told["gen_ai.usage.output_tokens"], told["enduser.id"]) == (4, "local")
    assert "ann@example.org" not in one.to_json()


def test_a_refusal_is_one_too_and_a_look_whether_it_lives_is_none(client, spans):
    assert client.post("/v1/chat/completions", json={"model": "nobody", "messages": said("a")}).status_code == 404
    assert client.get("/healthz").status_code == 200
    [one] = spans()
    assert one.attributes["http.response.status_code"] == 404
    assert one.status.is_unset
