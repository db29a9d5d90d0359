"""What is said of rows, and vectors of texts."""

from __future__ import annotations

import math

import pytest

import lora_lab
from lora_lab import cli
from tests.conftest import make_rows, write_jsonl
from tests.serve.conftest import at_once, client_of, held, serving, stop

LABELS = ("cat", "dog")


def trained(base, folder, name: str, task: str, rows: list[dict], *more: str):
    """A run of two steps."""
    file = write_jsonl(folder / f"{name}.jsonl", rows)
    told = [
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"task={task}", f"data.train={file}", "train.batch_size=4", "train.max_steps=2", "adapter.r=2", "optim.lr=0.01",
        f"run_dir={folder}/{name}", *more,
    ]  # fmt: skip
    assert cli.main(["train", *told]) == 0
    return folder / name


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Two classifiers of unlike classes on one base, a regression and a reward model."""
    folder = tmp_path_factory.mktemp("heads")
    rows = make_rows(12)
    texts = [{"text": row["prompt"], "label": LABELS[place % 2]} for place, row in enumerate(rows)]
    three = [{**row, "label": ("red", "green", "blue")[place % 3]} for place, row in enumerate(texts)]
    numbers = [{**row, "label": place / 10} for place, row in enumerate(texts)]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in rows]
    made = {"two": ("classification", texts), "three": ("classification", three)}
    made |= {"numbers": ("regression", numbers), "rewards": ("reward", pairs)}
    for name, (task, own) in made.items():
        trained(base, folder, name, task, own)
    return folder


ASKED = {
    "two": ("classify", [{"text": "red cat"}, {"text": "table lamp Oslo Graz one two three"}]),
    "three": ("classify", [{"text": "red cat"}, {"text": "bird"}]),
    "numbers": ("classify", [{"text": "red cat"}, {"text": "bird"}]),
    "rewards": ("rewards", [{"prompt": "red cat", "completion": "dog"}, {"prompt": "one", "completion": "two three"}]),
}


@pytest.mark.long
def test_heads_of_many_kinds_on_one_base(runs):
    service = serving([runs / name for name in ASKED])
    try:
        expected = {name: lora_lab.open_run(runs / name).predict(rows) for name, (_, rows) in ASKED.items()}
        with client_of(service) as client:
            names = list(ASKED) * 3
            with held(service, len(names)):
                found = at_once(
                    [
                        lambda name=name: client.post(
                            f"/v1/{ASKED[name][0]}", json={"model": name, "rows": ASKED[name][1]}
                        )
                        for name in names
                    ]
                )
            for name, one in zip(names, found, strict=True):
                assert one.status_code == 200, one.text
                for said, alone in zip(one.json()["data"], expected[name], strict=True):
                    assert said.keys() == alone.keys()
                    for key, value in alone.items():
                        assert said[key] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)
                assert one.json()["lora_lab"]["adapter"] == service.shelf.served[name].opened.digest
            wrong = client.post("/v1/classify", json={"model": "two", "rows": [{"text": "a"}, {"words": "b"}]})
            assert (wrong.status_code, "rows row 2" in wrong.text) == (400, True)
            assert client.post("/v1/rewards", json={"model": "two", "rows": [{"text": "a"}]}).status_code == 400
            answers = {one["id"]: one["passes"] for one in client.get("/v1/models").json()["data"]}
            assert answers["two"] == "rows of this adapter share passes, adapter by adapter"
            assert client.delete("/v1/adapters/two").status_code == 200
            assert client.post("/v1/classify", json={"model": "three", "rows": ASKED["three"][1]}).status_code == 200
        weights = {
            id(one) for group in service.shelf._groups for one in group[2].base.parameters() if one.shape == (128, 64)
        }
        assert len(weights) == 8  # gate and up of four layers, once for all kinds of models
    finally:
        stop(service)


@pytest.mark.long
@pytest.mark.parametrize(
    "more", [(), ("task.score=yes_no", "task.yes_word=y", "task.no_word=n")], ids=["head", "yes_no"]
)
def test_documents_come_in_the_order_of_a_rerankers_scores(more, base, tmp_path):
    """As `predict` scores them; fields as clients of other rerankers know them."""
    candidates = [
        {"query": row["prompt"], "positive": row["completion"], "negatives": ["table lamp"]} for row in make_rows(8)
    ]
    run = trained(base, tmp_path, "reranks", "reranker", candidates, *more)
    documents = ["red cat", {"text": "table lamp Oslo Graz"}, "one two"]
    service = serving([run])
    try:
        rows = [{"query": "three", "document": text} for text in ("red cat", "table lamp Oslo Graz", "one two")]
        scores = [one["score"] for one in lora_lab.open_run(run).predict(rows)]
        asked = {"model": "reranks", "query": "three", "documents": documents}
        with client_of(service) as client:
            found = client.post("/v1/rerank", json=asked).json()
            best = client.post("/v1/rerank", json={**asked, "top_n": 1, "return_documents": True}).json()
            wrong = client.post("/v1/rerank", json={**asked, "documents": [{"title": "a"}]})
            elsewhere = client.post("/v1/classify", json={"model": "reranks", "rows": rows})
        order = sorted(range(3), key=lambda place: -scores[place])
        assert [one["index"] for one in found["results"]] == order
        expected = [1 / (1 + math.exp(-scores[place])) for place in order]
        assert [one["relevance_score"] for one in found["results"]] == pytest.approx(expected, abs=1e-5)
        assert found["usage"]["total_tokens"] > 0
        assert [one["index"] for one in best["results"]] == order[:1]
        text = documents[order[0]]
        assert best["results"][0]["document"] == {"text": text if isinstance(text, str) else text["text"]}
        assert "document" not in found["results"][0]
        assert wrong.status_code == 400
        routes = (
            "/v1/completions, /v1/rerank" if more else "/v1/rerank"
        )  # one that answers yes or no is a language model
        assert f"is not asked at /v1/classify but at {routes}" in elsewhere.json()["error"]["message"]
    finally:
        stop(service)


def test_vectors_are_the_pooled_states(vectors):
    service, expected = vectors
    with client_of(service) as client:
        found = client.post("/v1/embeddings", json={"model": "base", "input": ["red cat", "three blue birds"]}).json()
        assert [one["embedding"] for one in found["data"]] == [pytest.approx(one, abs=1e-6) for one in expected]
        assert found["lora_lab"]["adapter"] is None
        one = client.post("/v1/embeddings", json={"model": "base", "input": "red cat"}).json()
        assert one["data"][0]["embedding"] == pytest.approx(expected[0], abs=1e-6)
        chat = client.post(
            "/v1/chat/completions", json={"model": "base", "messages": [{"role": "user", "content": "a"}]}
        )
        assert "is not asked at /v1/chat/completions but at nowhere" in chat.json()["error"]["message"]
