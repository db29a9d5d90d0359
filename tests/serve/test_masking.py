"""Personal data: never in what the server writes, and before no model where that is asked."""

from __future__ import annotations

import logging

import pytest

from lora_lab.serve import logs, presidio
from lora_lab.serve.app import Service
from lora_lab.serve.batch import Batch
from lora_lab.serve.config import ServeConfig
from lora_lab.serve.engine import Engine
from lora_lab.serve.wishes import RequestError
from tests.conftest import fails
from tests.serve.conftest import at_once, client_of, held, said, until

SECRETS = {
    "email": "li.wei@example.com", "phone": "13812345678", "card": "4111 1111 1111 1111", "iban": "DE89370400440532013000",
    "id_number": "11010519491231002X",
}  # fmt: skip
TEXT = f"我是李伟，{SECRETS['email']}，电话{SECRETS['phone']}。Card {SECRETS['card']}, IBAN {SECRETS['iban']}, ID {SECRETS['id_number']}."


def masking(service: Service, *kinds: str) -> Service:
    """The same model behind masks."""
    return Service(service.shelf, service.engine, ServeConfig(mask=list(kinds)), service.metrics)


def count(service: Service, kind: str, where: str) -> float:
    return service.metrics.registry.get_sample_value("lora_lab_masked_total", {"kind": kind, "where": where}) or 0.0


@pytest.fixture
def read(monkeypatch):
    """Prompts that a model has read, as tokens."""
    prompts: list[list[int]] = []
    real = Batch.join

    def join(self, rows):
        prompts.extend(row.prompt for row in rows)
        return real(self, rows)

    monkeypatch.setattr(Batch, "join", join)
    return prompts


def asked(service: Service) -> list[str]:
    """Every route that takes texts, asked with personal data in every place; what was answered."""
    parts = [{"role": "system", "content": TEXT}, *said(TEXT), {"role": "assistant", "content": TEXT}, *said(TEXT)]
    bodies = {
        "chat/completions": [{"model": "0", "messages": parts, "max_tokens": 2, "stream": stream} for stream in (False, True)]
        + [{"model": TEXT[:150], "messages": parts}, {"model": "0", "messages": parts, "stop": "", "user": TEXT}, {TEXT: TEXT}],
        "completions": [{"model": "base", "prompt": [TEXT, TEXT], "max_tokens": 2}],
        "embeddings": [{"model": "base", "input": TEXT}],
        "classify": [{"model": "0", "rows": [{"text": TEXT, TEXT: 1}]}],
        "adapters": [{"path": TEXT, "name": "x"}],
    }  # fmt: skip
    with client_of(service) as client:
        found = [client.post(f"/v1/{route}", json=body) for route, those in bodies.items() for body in those]
        for path in (f"/v1/models/{SECRETS['phone']}", f"/{SECRETS['email']}?{SECRETS['card']}"):
            found.append(client.get(path, headers={"x-api-key": SECRETS["iban"], "user-agent": TEXT.encode()}))
            found.append(client.delete(path))
        found.append(
            client.post("/v1/completions", content=TEXT.encode(), headers={"content-type": "application/json"})
        )
        return [one.text for one in found]


@pytest.mark.parametrize("kinds", [(), tuple(SECRETS)])
def test_nothing_that_the_server_writes_holds_personal_data(service, capfd, monkeypatch, tmp_path, kinds):
    monkeypatch.chdir(tmp_path)
    own = masking(service, *kinds)
    asked(own)

    def broken(self, rows):
        raise ValueError(TEXT)

    with monkeypatch.context() as inside:  # an error that quotes what was asked
        inside.setattr(Batch, "join", broken)
        asked(own)
    written = "".join(capfd.readouterr())
    assert written.count("request") > 25
    assert "ValueError in" in written
    for secret in (*SECRETS.values(), "李伟"):
        assert secret not in written
        assert secret not in service.metrics.text().decode()
    assert list(tmp_path.iterdir()) == []


def test_what_is_masked_is_not_seen_by_a_model(service, read):
    own = masking(service, "email", "phone")
    before = {kind: count(service, kind, "model") for kind in SECRETS}
    with client_of(own) as client:
        found = client.post("/v1/chat/completions", json={"model": "0", "messages": said(TEXT), "max_tokens": 2})
        assert found.status_code == 200
        found = client.post("/v1/completions", json={"model": "base", "prompt": [TEXT, "red"], "max_tokens": 2})
        assert found.status_code == 200
    tokenizer = service.shelf.served["0"].setup.encoder.tokenizer
    texts = [tokenizer.decode(prompt) for prompt in read]
    assert len(texts) == 3
    seen = "".join(texts)
    assert (SECRETS["email"] in seen, SECRETS["phone"] in seen) == (False, False)
    assert (
        seen.count(SECRETS["card"])
        == seen.count(SECRETS["id_number"])
        == seen.count("[EMAIL]")
        == seen.count("[PHONE]")
        == 2
    )
    after = {kind: count(service, kind, "model") - before[kind] for kind in SECRETS}
    assert after == {"email": 2, "phone": 2, "card": 0, "iban": 0, "id_number": 0}


def test_what_presidio_finds_is_masked_too(service, read):
    pytest.importorskip("presidio_analyzer", reason="needs pip install 'lora-lab[presidio]'")
    config = ServeConfig(mask=["email"], presidio=["IP_ADDRESS"])
    found = presidio.finders(config.presidio, config.presidio_model)
    own = Service(service.shelf, service.engine, config, service.metrics, finders=found)
    with client_of(own) as client:
        body = {"model": "0", "messages": said(f"from 10.20.30.40 by {SECRETS['email']}"), "max_tokens": 2}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    seen = service.shelf.served["0"].setup.encoder.tokenizer.decode(read[0])
    assert "from [IP_ADDRESS] by [EMAIL]" in seen
    assert count(service, "IP_ADDRESS", "model") == 1


def test_the_number_of_masks_is_in_the_log(service, capfd):
    with client_of(masking(service, "card")) as client:
        client.post("/v1/chat/completions", json={"model": "0", "messages": said(TEXT), "max_tokens": 1})
    assert '"masked": 1' in capfd.readouterr().out


def test_what_libraries_log_is_masked_and_errors_are_kinds_alone(service, capfd):
    logs.attach(service.metrics)
    before = count(service, "email", "log")
    try:
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).error("lost %s", SECRETS["email"])
            try:
                raise ValueError(TEXT)
            except ValueError:
                logging.getLogger(name).exception("failed: %s", "李伟")
    finally:
        for name in ("uvicorn", "asyncio"):
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True
    written = "".join(capfd.readouterr())
    assert written.count("lost [EMAIL]") == 2
    assert "asyncio: ValueError" in written
    assert not any(secret in written for secret in (*SECRETS.values(), "李伟"))
    assert count(service, "email", "log") - before == 2


def test_a_kind_that_there_is_not_is_refused(sweep, capsys):
    run = f"run={sweep}/0"
    assert "serve.mask" in fails(["serve", run, "serve.mask=[emails]"], capsys)
    assert "serve.presidio" in fails(["serve", run, "serve.presidio=[person]"], capsys)
    assert "no effect without serve.presidio" in fails(["serve", run, "serve.presidio_model=en_core_web_sm"], capsys)


# -- memory -------------------------------------------------------------------------------------------------------------


def test_a_tokens_keys_and_values_are_measured(service):
    group = service.shelf.served["0"].group
    config = group.base.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert group.bytes_per_token == 2 * config.num_hidden_layers * heads * width * 4


@pytest.fixture
def small(service):
    """Memory for the keys and values of 100 tokens."""
    before, service.engine._cache = service.engine._cache, 100 * service.shelf.served["0"].group.bytes_per_token
    yield service
    service.engine._cache = before


def test_answers_that_do_not_fit_together_wait_for_one_another(small, client):
    most: list[int] = []
    ask = {"messages": said("red cat"), "max_tokens": 30}
    alone = {
        name: client.post("/v1/chat/completions", json={"model": name, **ask}).json()["choices"] for name in "0123"
    }

    def watched(name: str) -> list:
        found = client.post("/v1/chat/completions", json={"model": name, **ask}).json()["choices"]
        most.append(small.engine._cached)
        return found

    rows = small.metrics.registry.get_sample_value
    before = rows("lora_lab_batch_rows_bucket", {"le": "2.0"}), rows("lora_lab_batch_rows_count")
    with held(small, 4):
        found = at_once([lambda name=name: watched(name) for name in "0123"])
    assert found == [alone[name] for name in "0123"]
    assert max(most) <= small.engine._cache
    until(lambda: small.engine._cached == 0)
    after = rows("lora_lab_batch_rows_bucket", {"le": "2.0"}), rows("lora_lab_batch_rows_count")
    assert after[0] - before[0] == after[1] - before[1] > 0  # never three at once


def test_an_answer_that_never_fits_is_refused(small, client):
    found = client.post("/v1/chat/completions", json={"model": "0", "messages": said("red"), "max_tokens": 500})
    assert (found.status_code, "serve.cache_gib" in found.text) == (400, True)
    assert client.post("/v1/completions", json={"model": "0", "prompt": "red", "max_tokens": 5}).status_code == 200


def test_the_memory_that_may_be_taken_is_told(service):
    engine = Engine(service.shelf, 4, 4, type(service.metrics)(), 0.5)
    assert engine._cache == 2**29
    assert "lora_lab_cache_limit_bytes 5.36870912e+08" in engine._metrics.text().decode()


def test_what_an_engine_was_to_do_is_refused_once_it_has_stopped(service):
    engine = Engine(service.shelf, 4, 4, type(service.metrics)(), 0.5)
    waiting = engine.do(lambda: 1)  # it was asked before it could begin
    engine.stop(0)
    engine.start()
    with pytest.raises(RequestError, match="stop"):
        waiting.result(timeout=20)
    engine.join(20)
