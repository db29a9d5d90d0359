"""Answers that are drawn from snapshots: what they are, how likely, where they stop, and that they stay as they were."""

from __future__ import annotations

import numpy as np
import pytest

from lora_lab.serve.tinker import routes, wire
from tests.serve.conftest import halted
from tests.serve_training.asking import ROW, Failed, logprobs_of, next_tokens, tokens_of

STOP, LENGTH = wire.STOP, wire.LENGTH


@pytest.fixture
def taught(client):
    """A model that has learned a row by heart."""
    model = client.model(4, 3)
    for _ in range(12):
        model.learn([next_tokens(ROW)])
        model.step(weight_decay=0)
    return model


def snapshot(model, number: int) -> str:
    """As `save_weights_and_get_sampling_client` makes one."""
    found = model.client.result(model.later("save_weights_for_sampler", sampling_session_seq_id=number))
    return found["sampling_session_id"]


def test_what_is_drawn(service, client, taught):
    told = taught.learn([next_tokens(ROW)], forward_only=True).logprobs[0]
    sampler = snapshot(taught, 100)
    answer = client.sample(
        sampler, ROW[:3], count=2, max_tokens=5, temperature=0,
        told={"prompt_logprobs": True, "topk_prompt_logprobs": 2, "topk_sample_logprobs": 3},
    )  # fmt: skip
    assert [tokens_of(one) for one in answer.sequences] == [ROW[3:]] * 2
    assert answer.sequences[0].stop_reason == LENGTH
    np.testing.assert_allclose(logprobs_of(answer.sequences[0]), told[2:], atol=1e-4)
    prompt = np.frombuffer(answer.prompt_logprobs, np.float32)
    assert np.isnan(prompt[0])
    np.testing.assert_allclose(prompt[1:], told[:2], atol=1e-4)
    best = answer.topk_prompt_logprobs
    ids = np.frombuffer(best.token_ids, np.int32).reshape(best.length, best.k)
    assert (best.k, best.length, ids[0].tolist(), ids[1, 0], ids[2, 0]) == (2, 3, [0, 0], ROW[1], ROW[2])
    assert answer.sequences[0].topk_sampled_logprobs.k == 3
    last = client.sample(sampler, ROW, 2, max_tokens=1, told={"prompt_logprobs": True, "prompt_logprobs_last_n": 2})
    assert np.isnan(np.frombuffer(last.prompt_logprobs, np.float32)).tolist() == [True] * 6 + [False] * 2
    for _ in range(3):  # the snapshot stays as it was
        taught.learn([next_tokens(ROW[::-1])])
        taught.step(learning_rate=0.1)
    again = client.sample(sampler, ROW[:3], 3, max_tokens=5, temperature=0)
    assert tokens_of(again.sequences[0]) == ROW[3:]
    named = client.result(taught.later("save_weights_for_sampler", path="later"))["path"]
    other = client.sample(client.sampler(model_path=named), ROW[:3], max_tokens=5, temperature=0)
    assert tokens_of(other.sequences[0]) != ROW[3:]


def test_seeds(client, taught):
    sampler = snapshot(taught, 100)
    drawn = [
        [
            tokens_of(one)
            for one in client.sample(sampler, [7], number, 3, max_tokens=8, seed=seed, temperature=3.0).sequences
        ]
        for number, seed in ((1, 4), (2, 4), (3, 5))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]
    likeliest = client.sample(sampler, ROW[:3], 4, max_tokens=5, temperature=3.0, top_k=1)
    assert tokens_of(likeliest.sequences[0]) == ROW[3:]


def test_stops_stay_in_the_answer(service, client, taught):
    tokenizer = service.training._opened.setup.encoder.tokenizer
    sampler, eos = snapshot(taught, 100), tokenizer.eos_token_id
    text = tokenizer.decode([ROW[5]])

    def asked(number: int, **params):
        [one] = client.sample(sampler, ROW[:3], number, max_tokens=5, temperature=0, **params).sequences
        return tokens_of(one), one.stop_reason

    assert asked(1, stop=[ROW[4]]) == (ROW[3:5], STOP)
    assert asked(2, stop=text) == (ROW[3:6], STOP)
    assert asked(3, stop=[text]) == (ROW[3:6], STOP)
    for _ in range(12):
        taught.learn([next_tokens([*ROW[:4], eos, 30])])
        taught.step(weight_decay=0)
    sampler = snapshot(taught, 101)
    assert asked(4) == ([ROW[3], eos], STOP)
    assert asked(5, stop=[3]) == ([ROW[3], eos], STOP)
    assert asked(6, stop=[])[1] == LENGTH


def test_the_base_and_training_paths_are_sampled_too(client, taught):
    base = client.sampler(base_model="base")
    assert len(tokens_of(client.sample(base, ROW[:3], max_tokens=4, stop=[]).sequences[0])) == 4
    path = taught.save("x")
    sampler = client.sampler(model_path=path)
    assert tokens_of(client.sample(sampler, ROW[:3], max_tokens=5, temperature=0).sequences[0]) == ROW[3:]
    assert client.http.get(f"/api/v1/samplers/{sampler}").json()["model_path"] == path


def test_a_checkpoint_that_is_written_anew_is_sampled_as_it_is_now(client, taught):
    sampler = client.sampler(model_path=taught.save("x"))
    assert tokens_of(client.sample(sampler, ROW[:3], 1, max_tokens=5, temperature=0).sequences[0]) == ROW[3:]
    for _ in range(3):
        taught.learn([next_tokens(ROW[::-1])])
        taught.step(learning_rate=0.1)
    taught.save("x", overwrite=True)
    assert tokens_of(client.sample(sampler, ROW[:3], 2, max_tokens=5, temperature=0).sequences[0]) != ROW[3:]


def test_the_last_snapshots_without_a_name_are_kept(client, taught, monkeypatch):
    monkeypatch.setattr(routes, "_KEPT_UNNAMED", 1)
    first, second = snapshot(taught, 100), snapshot(taught, 101)
    told = {"prompt": {"chunks": [{"type": "encoded_text", "tokens": ROW[:3]}]}, "seq_id": 1}
    answer = client.ask("asample", {"sampling_session_id": first, **told})
    assert (answer.status_code, "no such checkpoint" in answer.json()["detail"]) == (404, True)
    assert client.sample(second, ROW[:3], max_tokens=1).sequences


def test_a_repeated_request_has_the_first_answer_and_may_be_cancelled(service, client, taught):
    sampler = snapshot(taught, 100)
    told = {
        "sampling_session_id": sampler, "seq_id": 1, "num_samples": 2, "sampling_params": {"max_tokens": 4},
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": ROW[:3]}]},
    }  # fmt: skip
    assert client.post("asample", **told) == client.post("asample", **told)
    with halted(service):
        future = client.post("asample", **{**told, "seq_id": 2})
        assert client.ask("cancel_future", {"request_id": future["request_id"]}).status_code == 204
    with pytest.raises(Failed, match="cancelled"):
        client.result(future)


@pytest.mark.parametrize(
    ("params", "tokens", "why"),
    [
        ({"max_tokens": 10**6}, ROW, "there is room for"),
        ({"temperature": -1}, ROW, "temperature"),
        ({"stop": ["", "x"]}, ROW, "stop"),
        ({}, [10**6], "token 1000000"),
        ({}, [], "has no tokens"),
        ({}, [1] * 3000, "room for 0 more"),
    ],
)
def test_refusals(client, params, tokens, why):
    sampler = client.sampler(base_model="base")
    told = {"sampling_params": params, "prompt": {"chunks": [{"type": "encoded_text", "tokens": tokens}]}}
    answer = client.ask("asample", {"sampling_session_id": sampler, "seq_id": 1, **told})
    assert answer.status_code == 400
    assert why in answer.json()["detail"]
