"""What clients may not do, what they are told, and that they go on afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from lora_lab.errors import ConfigError
from lora_lab.serve import server
from lora_lab.serve.keys import Keys, add
from lora_lab.serve.tinker import wire
from tests.serve.conftest import until
from tests.serve_training.asking import ADAM, ROW, Tinker, client_of, datum, encoded, next_tokens

GOOD = next_tokens(ROW)
BAD = [
    ([], "cross_entropy", None, "0 of them"),
    ([GOOD], "crossentropy", None, "Did you mean|nearest|cross_entropy"),
    ([GOOD], "ppo", None, "ppo needs logprobs"),
    ([GOOD], "cross_entropy", {"clip_low_threshold": 0.5}, "takes none"),
    ([datum([1], [2], logprobs=[0], advantages=[1])], "dro", None, "beta: dro needs it"),
    ([datum([1], [2], logprobs=[0], advantages=[1])], "gspo", None, "sequence_ratio_mask"),
    ([datum([1, 2], [2])], "cross_entropy", None, "shape is"),
    ([datum([1, 2], [2, 3], weights=[1])], "cross_entropy", None, "weights: its shape"),
    ([datum([1, 2], [2, 3], weights=[1, np.nan])], "cross_entropy", None, "NaN"),
    ([datum([1, 300], [2, 3])], "cross_entropy", None, "token 300"),
    ([datum([1, 2], [2, -1])], "cross_entropy", None, "token -1"),
    ([datum([1] * 2049, [1] * 2049)], "cross_entropy", None, "2048 positions"),
    (
        [datum([1, 2], [[2, 2], [3, 3]], logprobs=[[0, 0], [0, 0]], advantages=[[0, 0], [0, 0]])],
        "ppo",
        None,
        "shape is",
    ),
]


def test_bad_requests_are_named_and_harm_nothing(client):
    model = client.model()
    model.learn([GOOD])
    for data, loss, settings, why in BAD:
        answer = client.ask("forward_backward", encoded(model.model_id, model.next_number, data, loss, settings))
        assert answer.status_code == 400
        assert any(part in answer.json()["detail"] for part in why.split("|")), answer.json()
    refused = {"model_id": model.model_id, "seq_id": model.next_number, "adam_params": ADAM | {"learning_rate": "x"}}
    assert client.ask("optim_step", refused).status_code == 400
    assert model.step()["step"] == 1  # their numbers are not waited for


@pytest.mark.parametrize("body", [b"\xff\xff", b"", b"{}"])
def test_a_body_that_is_no_message(client, body):
    assert client.ask("forward_backward", body).status_code in (400, 404)


def test_pictures_and_broken_tensors_are_refused(client):
    model = client.model()
    told = wire.MESSAGES["Request"].FromString(encoded(model.model_id, 1, [GOOD], "cross_entropy"))
    picture, cut, odd, sparse = (wire.MESSAGES["Request"].FromString(told.SerializeToString()) for _ in range(4))
    picture.data[0].model_input[0].image.SetInParent()
    picture.data[0].model_input[0].ClearField("encoded_text")
    cut.data[0].loss_fn_inputs[0].value.dense = b"abc"
    odd.data[0].loss_fn_inputs[0].value.dtype = 77
    sparse.data[0].loss_fn_inputs[0].value.sparse_csr.values = b"12345678"
    for one, why in ((picture, "only encoded text"), (cut, "no whole numbers"), (odd, "dtype=77"), (sparse, "sparse")):
        answer = client.ask("forward_backward", one.SerializeToString())
        assert (answer.status_code, why in answer.json()["detail"]) == (400, True)


def test_what_is_not_there(client):
    missing = f"{client.session}:train:99"
    assert client.ask("get_info", {"model_id": missing}).status_code == 404
    assert client.ask("retrieve_future", {"request_id": "train-00"}).status_code == 404
    for path in (
        "tinker://x/weights/a",
        f"tinker://{missing}/weights/..",
        "/etc/passwd",
        "tinker://a/b",
        "tinker://../../x/weights/a",
    ):
        answer = client.ask(
            "load_weights", {"session_id": client.session, "model_seq_id": 5, "path": path, "optimizer": False}
        )
        assert answer.status_code == 404, path
    told = {"session_id": client.session, "model_seq_id": 5, "base_model": "other/base", "lora_config": {"rank": 4}}
    answer = client.ask("create_model", told)
    assert (answer.status_code, "It is called" in answer.json()["detail"]) == (400, True)
    told = {**told, "base_model": "base", "optimizer_config": {"type": "dimuon"}}
    assert "adamw alone" in client.ask("create_model", told).json()["detail"]


def test_names_of_checkpoints(client):
    model = client.model()
    path = model.save("a")
    for told, why in (({"path": "a"}, "of this name"), ({"path": "../a"}, "named by"), ({"path": "a/b"}, "named by")):
        future = model.later("save_weights", **told)
        answer = client.ask("retrieve_future", {"request_id": future["request_id"]}).json()
        assert (answer["category"], why in answer["error"]) == ("user", True)
    assert model.save("a", overwrite=True) == path
    run = client.http.get(f"/api/v1/training_runs/{model.model_id}/checkpoints").json()
    assert [one["tinker_path"] for one in run["checkpoints"]] == [path]
    assert (
        client.http.put(
            f"/api/v1/training_runs/{model.model_id}/checkpoints/weights/a/ttl", json={"ttl_seconds": 9}
        ).status_code
        == 204
    )
    every = client.http.get("/api/v1/checkpoints").json()["checkpoints"]  # those of other tests among them
    assert [bool(one["expires_at"]) for one in every if one["tinker_path"] == path] == [True]
    assert client.http.delete(f"/api/v1/training_runs/{model.model_id}/checkpoints/weights/a").status_code == 204
    assert client.http.get(f"/api/v1/training_runs/{model.model_id}/checkpoints").json()["checkpoints"] == []


def test_a_client_that_is_gone_frees_its_place(service, http):
    training = service.training
    clock, now = training.clock, training.clock()
    with Tinker(http) as client:
        training.clock = lambda: now  # however long the machine takes
        try:
            gone = Tinker(http)
            model = gone.model()
            before = training.trainer.open_models
            training.clock = lambda: now + 299
            client.post("session_heartbeat", session_id=client.session)
            assert training.trainer.open_models == before
            training.clock = lambda: now + 301
            client.post("session_heartbeat", session_id=client.session)
        finally:
            training.clock = clock
        until(lambda: training.trainer.open_models < before)
        answer = gone.ask("optim_step", {"model_id": model.model_id, "seq_id": 1, "adam_params": ADAM})
        assert answer.status_code == 404
        assert client.model().learn([GOOD]).loss


def test_every_key_has_its_own(service, tmp_path):
    file = tmp_path / "keys.json"
    keys = {name: add(file, name, scopes) for name, scopes in (("a", ["train"]), ("b", ["train"]), ("c", ["use"]))}
    with client_of(service, Keys.read(file)) as http:
        a, b = (Tinker(http, {"x-api-key": f"tml-{keys[name]}"}) for name in "ab")
        model = a.model()
        path = model.save("mine")
        assert b.ask("get_info", {"model_id": model.model_id}).status_code == 404
        assert b.ask("weights_info", {"tinker_path": path}).status_code == 404
        assert b.ask("session_heartbeat", {"session_id": a.session}).status_code == 404
        assert b.ask("optim_step", {"model_id": model.model_id, "seq_id": 2, "adam_params": ADAM}).status_code == 404
        future = model.send([GOOD])
        assert b.ask("retrieve_future", future).status_code == 404
        assert a.ask("retrieve_future", future).status_code == 200
        a.__exit__()
        b.__exit__()
        for route in service.training.routes():
            url, method = route.path.replace("{", "").replace("}", ""), min(route.methods - {"HEAD"})
            assert http.request(method, url).status_code == 401, url
            assert http.request(method, url, headers={"x-api-key": "tml-wrong"}).status_code == 401, url
            assert http.request(method, url, headers={"x-api-key": keys["c"]}).status_code == 403, url


def test_it_needs_a_root(base):
    told = ["model.dtype=float32", "hardware=cpu", "serve.training=true"]
    with pytest.raises(ConfigError, match="needs serve.root"):
        server.check(server.settings(server.base_config(str(base), told), told))


def test_places_are_limited(service, client):
    limit = service.training.config.max_models - service.training.trainer.open_models
    told = {"session_id": client.session, "base_model": "base", "lora_config": {"rank": 1, "train_unembed": False}}
    answers = [client.ask("create_model", {**told, "model_seq_id": number}) for number in range(limit + 1)]
    assert [one.status_code for one in answers] == [200] * limit + [400]
    assert "serve.max_models" in answers[-1].json()["detail"]
