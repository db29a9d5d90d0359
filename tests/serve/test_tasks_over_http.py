"""Entities, answers and texts made of texts: what the server says is what the run says, however many ask at once."""

from __future__ import annotations

import pytest

import lora_lab
from lora_lab import cli
from tests.conftest import write_jsonl
from tests.serve.conftest import at_once, client_of, held, serving, stop
from tests.tasks.test_tasks import make_bert, make_t5

pytestmark = pytest.mark.long

TAGGED = [
    {"tokens": ["a", "red", "cat", "in", "Oslo"], "tags": ["O", "B-colour", "B-animal", "O", "O"]},
    {"tokens": ["green", "dog"], "tags": ["B-colour", "B-animal"]},
]
SPANS = [
    {"question": "which animal", "context": "a red cat on a table", "answers": {"text": ["cat"], "answer_start": [6]}},
    {"question": "which colour", "context": "one green dog", "answers": {"text": ["green"], "answer_start": [4]}},
]
PAIRS = [{"source": "red cat", "target": "blue bird"}, {"source": "table lamp Oslo", "target": "dog"}]


def runs(folder, base, task: str, rows: list[dict], *more: str):
    """Two runs of a task on one base."""
    file = write_jsonl(folder / f"{task}.jsonl", rows * 6)
    for seed in (0, 1):
        told = [
            "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
            f"task={task}", f"data.train={file}", "train.batch_size=4", "train.max_steps=4", "adapter.r=2", "optim.lr=0.05",
            f"seed={seed}", f"run_dir={folder}/{task}{seed}", *more,
        ]  # fmt: skip
        assert cli.main(["train", *told]) == 0
    return [folder / f"{task}{seed}" for seed in (0, 1)]


def all_said(service, route: str, asked: dict[str, list[dict]], times: int = 3) -> dict[str, list]:
    names = list(asked) * times
    with client_of(service) as client:
        with held(service, len(names)):
            calls = [
                lambda name=name: client.post(f"/v1/{route}", json={"model": name, "rows": asked[name]})
                for name in names
            ]
            found = at_once(calls)
        assert [one.status_code for one in found] == [200] * len(names), found[0].text
        for name, one in zip(names, found, strict=True):
            assert one.json()["data"] == found[list(asked).index(name)].json()["data"]
            assert one.json()["lora_lab"]["adapter"] == service.shelf.served[name].opened.digest
            assert one.json()["usage"]["prompt_tokens"] > 0
    return {name: one.json()["data"] for name, one in zip(asked, found, strict=False)}


def equal(one, other) -> bool:
    """Numbers up to rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == pytest.approx(other, abs=1e-5) if isinstance(one, float) else one == other


@pytest.mark.parametrize(
    ("task", "route", "rows", "asked"),
    [
        ("token_classification", "tokens", TAGGED,
         [{"tokens": ["blue", "bird", "Graz"]}, {"text": "a red cat, and one green dog"}, {"tokens": ["cat"]}]),
        ("question_answering", "answer", SPANS,
         [{"question": "which animal", "context": "the blue bird in Oslo"}, {"question": "which", "context": "red " * 40 + "lamp"}]),
    ],
)  # fmt: skip
def test_what_is_said_of_rows(task, route, rows, asked, tmp_path):
    own = runs(
        tmp_path,
        make_bert(tmp_path / "base"),
        task,
        rows,
        "data.max_tokens=32",
        *(["task.stride=4"] * (task[0] == "q")),
    )
    expected = {path.name: lora_lab.open_run(path).predict(asked) for path in own}
    service = serving(own)
    try:
        found = all_said(service, route, {path.name: asked for path in own})
        assert equal(found, expected), (found, expected)
        name = own[0].name
        with client_of(service) as client:
            models = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
            assert models[name]["routes"] == [route]
            wrong = client.post(f"/v1/{route}", json={"model": name, "rows": [{"nothing": 1}]})
            assert (wrong.status_code, "rows row 1" in wrong.text) == (400, True)
            other = client.post("/v1/classify", json={"model": name, "rows": asked})
            assert f"but at /v1/{route}" in other.json()["error"]["message"]
    finally:
        stop(service)


def test_personal_data_in_rows_is_masked_where_it_stands(tmp_path):
    from lora_lab.serve.app import Service
    from lora_lab.serve.config import ServeConfig

    [run, _] = runs(tmp_path, make_bert(tmp_path / "base"), "token_classification", TAGGED, "data.max_tokens=64")
    service = serving([run])
    try:
        masking = Service(service.shelf, service.engine, ServeConfig(mask=["phone"]), service.metrics)
        [found] = all_said(masking, "tokens", {run.name: [{"text": "red cat 13812345678, Oslo"}]}, 1)[run.name]
        assert "".join(found["words"]) == "redcat[PHONE],Oslo"
    finally:
        stop(service)


def test_texts_made_of_texts(tmp_path):
    own = runs(tmp_path, make_t5(tmp_path / "base"), "seq2seq", PAIRS, "task.max_new_tokens=8")
    prompts = ["red cat", "three blue birds", "lamp"]
    expected = {path.name: lora_lab.open_run(path).generate(prompts) for path in own}
    service = serving(own)
    try:
        with client_of(service) as client:
            for name, texts in expected.items():
                found = client.post("/v1/completions", json={"model": name, "prompt": prompts}).json()
                assert [one["text"] for one in found["choices"]] == texts
                assert found["usage"]["completion_tokens"] > 0
                streamed = client.post("/v1/completions", json={"model": name, "prompt": "red cat", "stream": True})
                assert streamed.text.endswith("data: [DONE]\n\n")
                refused = client.post("/v1/completions", json={"model": name, "prompt": "red cat", "logprobs": 1})
                assert "answers come as a whole" in refused.json()["error"]["message"]
            names = list(expected) * 4
            calls = [
                lambda name=name: client.post("/v1/completions", json={"model": name, "prompt": prompts}).json()
                for name in names
            ]
            for name, one in zip(names, at_once(calls), strict=True):
                assert [choice["text"] for choice in one["choices"]] == expected[name]
            assert client.get("/v1/models").json()["data"][1]["routes"] == ["completions"]
    finally:
        stop(service)
