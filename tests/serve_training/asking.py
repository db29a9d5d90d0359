"""A server that clients train over, and a client that speaks as the Tinker SDK does."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from starlette.testclient import TestClient

from lora_lab.serve import server
from lora_lab.serve.app import Service, build
from lora_lab.serve.tinker import wire
from tests.serve.conftest import stop

ROW = [5, 9, 12, 40, 41, 7, 33, 20]
ADAM = {
    "learning_rate": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_clip_norm": 0.5,
}  # fmt: skip


def serving(base: Path, root: Path, *overrides: str) -> Service:
    told = ["model.dtype=float32", "hardware=cpu", "serve.training=true", f"serve.root={root}", *overrides]
    config = server.base_config(str(base), told)
    return server.prepared([], config, told, server.settings(config, told))


def end(service: Service) -> None:
    stop(service)
    service.training.close()


def client_of(service: Service, keys=None) -> TestClient:
    return TestClient(build(service, keys), base_url="http://localhost", raise_server_exceptions=False)


def datum(tokens: Sequence[int], targets, **inputs) -> tuple[list[int], dict[str, np.ndarray]]:
    arrays = {"target_tokens": np.asarray(targets, np.int64)}
    return list(tokens), arrays | {name: np.asarray(value, np.float32) for name, value in inputs.items()}


def next_tokens(row: Sequence[int], weights: Sequence[float] | None = None):
    """Cross-entropy of what follows each token."""
    weights = [1.0] * (len(row) - 1) if weights is None else weights
    return datum(row[:-1], row[1:], weights=weights)


def encoded(model_id: str, number: int, data, loss: str, settings=None, forward_only: bool = False) -> bytes:
    """A request as the SDK writes it."""
    told = wire.MESSAGES["Request"](model_id=model_id, seq_id=number, loss_fn=loss, forward_only=forward_only)
    for tokens, inputs in data:
        one = told.data.add()
        one.model_input.add().encoded_text.tokens = np.array(tokens, np.int32).tobytes()
        for name, value in inputs.items():
            tensor = one.loss_fn_inputs.add(key=name).value
            tensor.dtype = 2 if value.dtype == np.int64 else 1
            tensor.shape.extend(value.shape)
            tensor.dense = value.tobytes()
    for name, value in (settings or {}).items():
        told.loss_fn_config_v2.add(key=name).value.number = value
    return told.SerializeToString()


class Failed(Exception):
    """What a future says of a failure."""


@dataclasses.dataclass(frozen=True)
class Learned:
    """A decoded result."""

    metrics: dict[str, float]
    logprobs: list[np.ndarray]

    @property
    def loss(self) -> float:
        return self.metrics["loss:sum"]


def decoded(content: bytes) -> Learned:
    told = wire.MESSAGES["Output"].FromString(content)
    found = []
    for record in told.loss_fn_outputs:
        field = record.fields[0].value
        offsets = np.frombuffer(field.offsets, np.int64)
        for start, stop_at in itertools.pairwise(offsets):
            found.append(np.frombuffer(field.data[start:stop_at], np.float32).reshape(-1, *field.trailing_shape))
    return Learned({one.key: one.value for one in told.metrics}, found)


class Tinker:
    """A client with a session."""

    def __init__(self, http: TestClient, headers: dict[str, str] | None = None):
        self.http, self.headers = http, headers or {}
        self.session = self.post("create_session", tags=[], user_metadata=None, sdk_version="0")["session_id"]
        self.numbers = itertools.count()

    def __enter__(self) -> Tinker:
        return self

    def __exit__(self, *_: object) -> None:
        self.ask(f"sessions/{self.session}/finish", {"reason": {"type": "success"}})

    def ask(self, route: str, told):
        content = {"content": told, "headers": {"content-type": wire.PROTOBUF, **self.headers}}
        how = content if isinstance(told, bytes) else {"json": told, "headers": self.headers}
        return self.http.post(f"/api/v1/{route}", **how)

    def post(self, route: str, **told):
        answer = self.ask(route, told)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def result(self, future: dict):
        for _ in range(20):
            answer = self.ask("retrieve_future", {"request_id": future["request_id"], "allow_metadata_only": True})
            if answer.status_code != 408:
                break
        assert answer.status_code == 200, answer.text
        if answer.headers["content-type"] == wire.PROTOBUF:
            return answer.content
        if "error" in answer.json():
            raise Failed(answer.json()["category"], answer.json()["error"])
        return answer.json()

    def model(self, rank: int = 4, seed: int = 1, **lora) -> Model:
        flags = {"train_unembed": False, **lora}
        future = self.post(
            "create_model", session_id=self.session, model_seq_id=next(self.numbers), base_model="base",
            lora_config={"rank": rank, "seed": seed, **flags}, optimizer_config={"type": "adamw"},
        )  # fmt: skip
        return Model(self, self.result(future)["model_id"])

    def load(self, path: str, optimizer: bool) -> Model:
        future = self.post(
            "load_weights", session_id=self.session, model_seq_id=next(self.numbers), path=path, optimizer=optimizer
        )
        return Model(self, self.result(future)["model_id"])

    def sampler(self, **told) -> str:
        number = next(self.numbers)
        made = self.post("create_sampling_session", session_id=self.session, sampling_session_seq_id=number, **told)
        return made["sampling_session_id"]

    def sample(self, sampler: str, tokens: Sequence[int], number: int = 1, count: int = 1, told=None, **params):
        future = self.post(
            "asample", sampling_session_id=sampler, seq_id=number, num_samples=count, sampling_params=params,
            prompt={"chunks": [{"type": "encoded_text", "tokens": list(tokens)}]}, **(told or {}),
        )  # fmt: skip
        assert len(future["sample_sequence_ids"]) == count
        return wire.MESSAGES["Sample"].FromString(self.result(future))


class Model:
    """A client's model."""

    def __init__(self, client: Tinker, model_id: str):
        self.client, self.model_id, self._numbers = client, model_id, itertools.count(1)

    @property
    def next_number(self) -> int:
        return next(self._numbers)

    def send(self, data, loss: str = "cross_entropy", settings=None, forward_only: bool = False) -> dict:
        body = encoded(self.model_id, self.next_number, data, loss, settings, forward_only)
        answer = self.client.ask("forward_backward", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def learn(self, data, loss: str = "cross_entropy", settings=None, forward_only: bool = False) -> Learned:
        return decoded(self.client.result(self.send(data, loss, settings, forward_only)))

    def later(self, route: str, **told) -> dict:
        return self.client.post(route, model_id=self.model_id, seq_id=self.next_number, **told)

    def step(self, **adam):
        return self.client.result(self.later("optim_step", adam_params=ADAM | adam))["metrics"]

    def save(self, name: str | None, **told) -> str:
        return self.client.result(self.later("save_weights", path=name, **told))["path"]


def tokens_of(sequence) -> list[int]:
    return np.frombuffer(sequence.tokens, np.int32).tolist()


def logprobs_of(sequence) -> np.ndarray:
    return np.frombuffer(sequence.logprobs, np.float32)
