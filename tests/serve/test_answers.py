"""What is answered: each row as its adapter alone would, whoever it shares passes with."""

from __future__ import annotations

import json

import pytest
import torch

from lora_lab import cli
from lora_lab.serve.words import Text
from tests.conftest import WORDS
from tests.serve.conftest import NAMES, at_once, held, said

PROMPTS = [" ".join(WORDS[: 1 + 2 * place]) for place in range(9)]


@pytest.fixture(scope="module")
def alone(sweep, base):
    """The answer of one adapter alone, by plain transformers and peft: tokens, and the log-probability of each."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)

    @torch.no_grad()
    def answer(name: str, prompt: str, count: int) -> tuple[list[int], list[float]]:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        if name != "base":
            model = PeftModel.from_pretrained(model, sweep / name / "adapter").eval()
        text = tokenizer.apply_chat_template(said(prompt), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        done = model.generate(ids, do_sample=False, max_new_tokens=count, eos_token_id=2, pad_token_id=0)
        shares = model(done).logits[0].log_softmax(-1)
        new = done[0, ids.shape[1] :].tolist()
        return new, [float(shares[ids.shape[1] - 1 + place, token]) for place, token in enumerate(new)]

    return answer, tokenizer


def asked(client, model: str, prompt: str, **more):
    found = client.post("/v1/chat/completions", json={"model": model, "messages": said(prompt), **more})
    assert found.status_code == 200, found.text
    return found


def test_eight_adapters_and_the_base_in_one_batch_each_as_alone(client, service, alone):
    names = [*NAMES, "base"]
    with held(service, len(names)):
        found = at_once(
            [
                lambda name=name, prompt=prompt: asked(
                    client, name, prompt, logprobs=True, max_tokens=6 + 2 * len(prompt) % 7
                )
                for name, prompt in zip(names, PROMPTS, strict=True)
            ]
        )
    answer, tokenizer = alone
    texts, worst = set(), 0.0
    for name, prompt, one in zip(names, PROMPTS, found, strict=True):
        tokens, shares = answer(name, prompt, 6 + 2 * len(prompt) % 7)
        choice = one.json()["choices"][0]
        assert choice["message"]["content"] == tokenizer.decode(tokens, skip_special_tokens=True), name
        told = [part["logprob"] for part in choice["logprobs"]["content"]]
        assert told == pytest.approx(shares, abs=5e-5), name  # peft's own products come in another order
        by_itself = asked(client, name, prompt, logprobs=True, max_tokens=len(told)).json()["choices"][0]
        assert by_itself["message"] == choice["message"]
        own = [part["logprob"] for part in by_itself["logprobs"]["content"]]
        worst = max(worst, *(abs(one - other) for one, other in zip(own, told, strict=True)))
        texts.add(choice["message"]["content"])
        assert one.headers["x-lora-lab-base"] == service.shelf.base.fingerprint
        digest = service.shelf.served[name].opened.digest
        assert one.headers["x-lora-lab-adapter"] == (digest or "none")
        assert one.json()["lora_lab"] == {"model": name, "adapter": digest, "base": service.shelf.base.fingerprint}
    assert worst < 1e-5, worst
    assert len(texts) > 6  # the adapters do say different things
    few = service.metrics.registry.get_sample_value("lora_lab_batch_rows_bucket", {"le": "8.0"})
    assert service.metrics.registry.get_sample_value("lora_lab_batch_rows_count") > few  # some had more than eight rows


def test_a_row_that_comes_later_changes_nothing(service):
    """Rows of unlike length join and leave between tokens; scores are those of whole passes of each alone."""
    group = service.shelf.served["0"].group
    gaps = service.engine.do(lambda: group._gap(["served0", "served5", "served3"], beside=True)).result()
    assert gaps < 1e-5


def test_chat_says_what_the_verb_says(client, sweep, capsys):
    for prompt in ("red cat", "你好 table"):
        assert cli.main(["chat", f"run={sweep}/2", f"prompt={prompt}"]) == 0
        shown = capsys.readouterr().out
        text = asked(client, "2", prompt).json()["choices"][0]["message"]["content"]
        from lora_lab.runtime.console import shown as safe

        assert shown.endswith(safe(text) + "\n")


def test_a_stream_is_the_answer_in_pieces(client):
    whole = asked(client, "1", "three birds").json()
    found = asked(client, "1", "three birds", stream=True, stream_options={"include_usage": True})
    assert found.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["lora_lab"] == whole["lora_lab"] for chunk in chunks)
    deltas = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(one["delta"].get("content", "") for one in deltas) == whole["choices"][0]["message"]["content"]
    assert [one["finish_reason"] for one in deltas][-1] == whole["choices"][0]["finish_reason"]
    assert sum(one["finish_reason"] is not None for one in deltas) == 1


def test_a_stop_ends_the_answer_before_it(client):
    text = asked(client, "1", "three birds").json()["choices"][0]["message"]["content"]
    stop = text[4:6]
    for stream in (False, True):
        found = asked(client, "1", "three birds", stop=[stop, "never there"], stream=stream)
        if stream:
            parts = [json.loads(line[6:]) for line in found.text.split("\n\n")[:-2]]
            said_of = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
            reason = parts[-1]["choices"][0]["finish_reason"]
        else:
            [choice] = found.json()["choices"]
            said_of, reason = choice["message"]["content"], choice["finish_reason"]
        assert (said_of, reason) == (text[: text.index(stop)], "stop")


def test_what_is_drawn_follows_from_the_seed_alone(client, service):
    told = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 10}
    one = asked(client, "4", "dog", seed=7, **told).json()["choices"][0]["message"]["content"]
    with held(service, 4):
        beside = at_once(
            [lambda n=n: asked(client, "4" if n == 7 else "5", "dog", seed=n, **told).json() for n in (7, 8, 9, 10)]
        )
    assert beside[0]["choices"][0]["message"]["content"] == one
    assert asked(client, "4", "dog", seed=8, **told).json()["choices"][0]["message"]["content"] != one
    nearly = asked(client, "4", "dog", seed=1, temperature=1e-4, max_tokens=8).json()
    assert nearly["choices"] == asked(client, "4", "dog", max_tokens=8).json()["choices"]
    assert (
        asked(client, "4", "dog", seed=1, temperature=2, top_p=1e-6, max_tokens=8).json()["choices"]
        == nearly["choices"]
    )


def test_completions_go_on_with_texts(client):
    found = client.post(
        "/v1/completions", json={"model": "0", "prompt": ["red cat", "table"], "max_tokens": 5, "logprobs": 2}
    ).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1]
    for choice in found["choices"]:
        assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) == 5
    one = client.post("/v1/completions", json={"model": "0", "prompt": "table", "max_tokens": 5}).json()
    assert one["choices"][0]["text"] == found["choices"][1]["text"]
    assert found["usage"]["completion_tokens"] == 10


def test_fifty_callers_at_once(client):
    alone_of = {name: asked(client, name, "blue bird", max_tokens=4).json()["choices"] for name in NAMES}
    names = [NAMES[place % 8] for place in range(50)]
    found = at_once(
        [lambda name=name: asked(client, name, "blue bird", max_tokens=4).json()["choices"] for name in names]
    )
    assert all(one == alone_of[name] for name, one in zip(names, found, strict=True))


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "nobody", "messages": said("a")}, 404, "not served here"),
        ({"model": "7x", "messages": said("a")}, 404, "Did you mean '7'?"),
        ({"messages": said("a")}, 400, "model: must be set"),
        ({"model": "0", "messages": []}, 400, "messages"),
        ({"model": "0", "messages": said("a"), "max_tokens": 0}, 400, "max_tokens=0: must be an integer, at least 1"),
        ({"model": "0", "messages": said("a"), "max_tokens": 10**6}, 400, "at most 4096 here"),
        ({"model": "0", "messages": said("a"), "temprature": 1}, 400, "unknown field. Did you mean 'temperature'?"),
        ({"model": "0", "messages": said("a"), "n": 2}, 400, "n=2"),
        ({"model": "0", "messages": said("a"), "top_logprobs": 2}, 400, "no effect without logprobs"),
        ({"model": "0", "messages": said("a"), "stop": ["a"] * 5}, 400, "at most 4 texts"),
        ({"model": "0", "messages": [{"role": "robot"}]}, 400, "cannot be rendered"),
        ({"model": "0", "messages": said("cat " * 3000)}, 400, "the model has 2048 positions"),
        ([], 400, "must be a JSON object"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told_in_openais_shape(client, body, status, words):
    found = client.post("/v1/chat/completions", json=body)
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert words in error["message"]


def test_a_route_that_is_for_another_task_is_refused_by_name(client):
    found = client.post("/v1/classify", json={"model": "0", "rows": [{"text": "a"}]})
    assert found.status_code == 400
    assert "model=0: is not asked at /v1/classify but at /v1/chat/completions" in found.json()["error"]["message"]
    found = client.post("/v1/embeddings", json={"model": "base", "input": "a"})
    assert "published without modules.json" in found.json()["error"]["message"]
    assert client.post("/v1/embeddings", json={"model": "0", "input": "a"}).status_code == 400


def test_models_say_what_they_are(client, service, sweep):
    found = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
    assert set(found) == {"base", *NAMES}
    assert found["3"]["passes"] == "shares passes with rows of other adapters"
    assert found["3"]["probes"].startswith("4 rows as at the end of training")
    assert client.get("/v1/models/3").json() == found["3"]
    assert client.get("/v1/models/nobody").status_code == 404


def test_metrics_count_and_name_no_text(client):
    asked(client, "6", "a secret bird")
    text = client.get("/metrics").text
    for name in ("requests_total", "tokens_total", "request_seconds_bucket", "waiting", "batch_rows_bucket", "adapters 8.0",
                 "memory_bytes"):  # fmt: skip
        assert f"lora_lab_{name}" in text
    assert 'lora_lab_tokens_total{kind="answer",model="6"}' in text
    assert "secret" not in text


# -- texts --------------------------------------------------------------------------------------------------------------


class Letters:
    """Each token is a byte."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("text", "stops", "left"),
    [
        ("hello world", (), "hello world"),
        ("hello world", ("wor",), "hello "),
        ("aab aaab", ("aaab",), "aab "),
        ("你好 é!", (), "你好 é!"),
        ("你好 é!", ("好",), "你"),
        ("one two three", ("three", "two"), "one "),
        ("ends with th", ("three",), "ends with th"),
    ],
)
def test_pieces_are_the_text_up_to_a_stop(text, stops, left):
    for streams in (True, False):
        own, pieces = Text(Letters(), stops, streams), []
        for token in text.encode():
            pieces.append(own.add(token))
            assert not any(stop in "".join(pieces) for stop in stops)
            if own.stopped:
                break
        assert "".join(pieces) + own.end() == left
        assert "\ufffd" not in "".join(pieces)
