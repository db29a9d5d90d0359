"""The `openai` client as it is published, against the application."""

from __future__ import annotations

import pytest

openai = pytest.importorskip("openai", reason="the openai client is not installed here")

from tests.serve.conftest import client_of, said  # noqa: E402


@pytest.fixture
def own(service):
    with client_of(service) as http:
        yield openai.OpenAI(api_key="none", base_url="http://localhost/v1", http_client=http, max_retries=0)


def test_chat_and_models(own, service):
    assert {one.id for one in own.models.list()} == set(service.shelf.served)
    found = own.chat.completions.create(
        model="3", messages=said("red cat"), max_tokens=6, temperature=0, logprobs=True, top_logprobs=2, seed=1
    )
    assert found.choices[0].finish_reason == "length"
    assert len(found.choices[0].logprobs.content) == found.usage.completion_tokens == 6
    assert found.model_extra["lora_lab"]["adapter"] == service.shelf.served["3"].opened.digest


def test_streaming(own):
    whole = own.chat.completions.create(model="3", messages=said("red cat")).choices[0].message.content
    with own.chat.completions.create(
        model="3", messages=said("red cat"), stream=True, stream_options={"include_usage": True}
    ) as pieces:
        chunks = list(pieces)
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == whole
    assert chunks[-1].usage.completion_tokens > 0


def test_completions(own):
    found = own.completions.create(model="base", prompt=["red", "table lamp"], max_tokens=4, logprobs=1)
    assert [len(choice.logprobs.tokens) for choice in found.choices] == [4, 4]


def test_errors_are_the_clients_own(own):
    with pytest.raises(openai.NotFoundError, match="not served here"):
        own.chat.completions.create(model="nobody", messages=said("a"))
    with pytest.raises(openai.BadRequestError, match="at least 1"):
        own.chat.completions.create(model="0", messages=said("a"), max_tokens=0)


def test_embeddings(vectors):
    service, expected = vectors
    with client_of(service) as http:
        client = openai.OpenAI(api_key="none", base_url="http://localhost/v1", http_client=http, max_retries=0)
        found = client.embeddings.create(model="base", input=["red cat", "three blue birds"])  # as base64
        assert [one.embedding for one in found.data] == [pytest.approx(one, abs=1e-6) for one in expected]
