"""Methods, bases and settings of other kinds: whatever way their rows go, the answer is the one that the run gives alone."""

from __future__ import annotations

import json
import shutil

import pytest

import lora_lab
from lora_lab import cli
from tests.conftest import make_base, make_rows, write_jsonl
from tests.serve.conftest import at_once, client_of, held, said, serving, stop

pytestmark = pytest.mark.long

PROMPTS = ("red cat", "three blue birds table lamp Oslo", "one")


def train(folder, base, rows, *more) -> None:
    told = [
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={rows}", "train.batch_size=4", "train.max_steps=3", "optim.lr=0.03", "task.max_new_tokens=10",
        f"run_dir={folder}", *more,
    ]  # fmt: skip
    assert cli.main(["train", *told]) == 0


def answers(service, names, prompts=PROMPTS, **more) -> dict[str, list[str]]:
    """What each says, all asked at once."""
    asked = [(name, prompt) for name in names for prompt in prompts]
    with client_of(service) as client, held(service, len(asked)):
        found = at_once(
            [
                lambda name=name, prompt=prompt: client.post(
                    "/v1/chat/completions", json={"model": name, "messages": said(prompt), **more}
                )
                for name, prompt in asked
            ]
        )
    assert [one.status_code for one in found] == [200] * len(found), found[0].text
    texts = iter(one.json()["choices"][0]["message"]["content"] for one in found)
    return {name: [next(texts) for _ in prompts] for name in names}


METHODS = {
    "lora": ["adapter.r=4"],
    "other": ["adapter.r=2", "adapter.target_modules=[q_proj,down_proj]", "seed=3"],
    "dora": ["adapter=dora", "adapter.r=4"],
    "vera": ["adapter=vera", "adapter.r=8"],
    "ia3": ["adapter=ia3"],
    "prefix": ["adapter=prefix_tuning", "adapter.num_virtual_tokens=4"],
    "prefix2": ["adapter=prefix_tuning", "adapter.num_virtual_tokens=6", "seed=2"],
    "prompt": ["adapter=prompt_tuning", "adapter.num_virtual_tokens=4"],
    "houlsby": ["adapter=houlsby"],
}
HOW = {
    "lora": "shares passes", "other": "shares passes", "dora": "adapter by adapter", "vera": "adapter by adapter",
    "ia3": "adapter by adapter", "houlsby": "adapter by adapter",
}  # fmt: skip


def test_methods_of_all_kinds_on_one_base(base, rows_file, tmp_path):
    for name, more in METHODS.items():
        train(tmp_path / name, base, rows_file, *more)
    expected = {name: lora_lab.open_run(tmp_path / name).generate(list(PROMPTS)) for name in METHODS}
    service = serving([tmp_path / name for name in METHODS], f"serve.root={tmp_path}")
    try:
        with client_of(service) as client:
            models = {one["id"]: one for one in client.get("/v1/models").json()["data"]}
        for name, how in HOW.items():
            assert models[name]["passes"].startswith(how), (name, models[name]["passes"])
        assert answers(service, METHODS) == expected
        with client_of(service) as client:
            for name in ("dora", "prefix", "lora"):
                assert client.delete(f"/v1/adapters/{name}").status_code == 200
                assert client.post("/v1/adapters", json={"path": name}).status_code == 201
        assert answers(service, METHODS) == expected
    finally:
        stop(service)


def test_a_bases_own_generation_settings_count(tmp_path, rows_file):
    base = make_base(tmp_path / "base", seed=2)
    settings = {"eos_token_id": 2, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": True, "top_k": 20}
    (base / "generation_config.json").write_text(json.dumps({**settings, "transformers_version": "5"}))
    train(tmp_path / "run", base, rows_file, "adapter.r=4", "task.max_new_tokens=24")
    train(tmp_path / "beams", base, rows_file, "adapter.r=4", "task.num_beams=3")
    expected = {name: lora_lab.open_run(tmp_path / name).generate(list(PROMPTS)) for name in ("run", "beams")}
    service = serving([tmp_path / "run", tmp_path / "beams"])
    try:
        with client_of(service) as client:
            for name, texts in expected.items():
                for prompt, text in zip(PROMPTS, texts, strict=True):
                    found = client.post("/v1/chat/completions", json={"model": name, "messages": said(prompt)}).json()
                    assert found["choices"][0]["message"]["content"] == text
            refused = client.post(
                "/v1/chat/completions", json={"model": "beams", "messages": said("a"), "logprobs": True}
            )
            assert "answers come as a whole" in refused.json()["error"]["message"]
            streamed = client.post(
                "/v1/chat/completions", json={"model": "beams", "messages": said("one"), "stream": True}
            )
            assert streamed.text.endswith("data: [DONE]\n\n")
    finally:
        stop(service)


def test_a_quantized_base(base, rows_file, tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        train(tmp_path / name, base, rows_file, "quant=nf4", "adapter.r=4", f"seed={seed}")
    expected = {name: lora_lab.open_run(tmp_path / name).generate(list(PROMPTS)) for name in ("one", "two")}
    service = serving([tmp_path / "one", tmp_path / "two"], f"serve.root={tmp_path}")
    try:
        assert answers(service, expected) == expected
        train(tmp_path / "plain", base, rows_file, "adapter.r=4")
        with client_of(service) as client:
            found = client.post("/v1/adapters", json={"path": "plain"})
        assert "trained with quant.method=none, and this server's base has nf4" in found.json()["error"]["message"]
    finally:
        stop(service)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "mamba", "bloom"])
def test_models_that_keep_other_things(family, tmp_path):
    from tests import families
    from tests.conftest import CHATML, make_tokenizer

    (tmp_path / "base").mkdir()
    families.make("completion", family, tmp_path / "base", make_tokenizer(tmp_path, CHATML))
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(12))
    for name in ("one", "two"):
        train(tmp_path / name, tmp_path / "base", rows, "adapter.r=2", f"seed={len(name)}")
    expected = {name: lora_lab.open_run(tmp_path / name).generate(list(PROMPTS)) for name in ("one", "two")}
    service = serving([tmp_path / "one", tmp_path / "two"])
    try:
        with client_of(service) as client:
            for name, texts in expected.items():
                found = at_once(
                    [
                        lambda name=name, prompt=prompt: client.post(
                            "/v1/chat/completions", json={"model": name, "messages": said(prompt)}
                        )
                        for prompt in PROMPTS
                    ]
                )
                assert [one.json()["choices"][0]["message"]["content"] for one in found] == texts
    finally:
        stop(service)
        shutil.rmtree(tmp_path / "base")
