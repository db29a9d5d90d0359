"""Families of models: each trains, merges and says of its loss what plain transformers compute, or is refused before training."""

from __future__ import annotations

import json

import pytest
import torch

from lora_lab import cli, run
from lora_lab.adapters.attach import check_targets, linear_layers, towers
from lora_lab.adapters.lora import LoraAdapter
from lora_lab.base import load
from tests import families

_QUICK = {  # a dozen, each of another make; the others take minutes
    ("completion", "qwen2"), ("completion", "gemma2"), ("completion", "bloom"), ("completion", "falcon"), ("completion", "mamba"),
    ("completion", "lfm2"), ("completion", "camembert"), ("completion", "gemma3"), ("masked_lm", "bert"), ("masked_lm", "distilbert"),
    ("seq2seq", "bart"), ("classification", "llama"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "family"),
    [one if one in _QUICK else pytest.param(*one, marks=pytest.mark.long) for one in families.families()],
)
def test_a_family_trains_and_merges_or_is_refused(task, family, tmp_path, monkeypatch):
    found = families.attempt(task, family, tmp_path / "family")
    if found.not_built:
        pytest.skip(f"transformers builds none that is tiny: {found.not_built}")
    assert not found.fault, found.fault
    assert found.refused or (found.trained and found.own_gap <= 1e-5)
    if (task, family) in _QUICK:
        assert found.trained
    if family == "gemma2":  # small logits hardly change by the cap, so that a trial alone would not show it
        assert "whole logits (the model caps them" in found.speed


def test_towers_get_no_adapter(overrides, tmp_path, capsys):
    """A base that also sees: texts never reach what reads pictures."""
    base = tmp_path / "base"
    base.mkdir()
    families.make("completion", "gemma3", base)
    model = load.skeleton(base, load.ModelKind())
    assert towers(model) == ["model.vision_tower", "model.multi_modal_projector"]
    for named in ("all-linear", ["q_proj", "v_proj"]):
        targeted = check_targets(model, LoraAdapter(target_modules=named))
        assert targeted
        assert not [name for name in targeted if "vision" in name]
    assert any("vision_tower" in name for name in linear_layers(model))
    told = [f"model.path={base}", "task=completion", "train.max_steps=1", "data.check=warn"]
    rows = families.write_jsonl(tmp_path / "rows.jsonl", [{"text": f"cat dog {i}"} for i in range(8)])
    assert cli.main(["train", *overrides, *told, f"data.train={rows}", "adapter.target_modules=[q_proj,v_proj]"]) == 0
    said = capsys.readouterr().out
    assert "model.vision_tower, model.multi_modal_projector: not adapted" in said
    assert "4 of " in said


def test_what_kernels_read_past_the_module_is_not_adapted(overrides, tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    families.make("completion", "mamba2", base)
    targeted = check_targets(load.skeleton(base, load.ModelKind()), LoraAdapter(target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name in targeted} == {"in_proj"}
    assert cli.main(["train", *overrides, f"model.path={base}", "adapter.target_modules=[out_proj]"]) == 2
    assert "read its weight past the module" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_shared_weights_get_no_adapter(overrides, tmp_path, capsys):
    """Else a merge would change both layers by what one of them learned."""
    base = tmp_path / "base"
    base.mkdir()
    families.make("masked_lm", "neomme", base)
    model = load.skeleton(base, load.ModelKind("AutoModelForMaskedLM", None, "missing"))
    targeted = check_targets(model, LoraAdapter(target_modules="all-linear"))
    assert "unembedding_projection" not in targeted
    assert "model.layers.0.self_attn.q_proj" in targeted
    told = [f"model.path={base}", "task=masked_lm", "adapter.target_modules=[unembedding_projection]"]
    assert cli.main(["train", *overrides, *told]) == 2
    assert "shares its weights with another module" in capsys.readouterr().err


def test_short_texts_in_one_item_train_one_by_one(config_of, tmp_path):
    """With rows alone the loss is what it is packed."""
    rows = families.write_jsonl(tmp_path / "rows.jsonl", [{"text": f"cat dog red {i} bird"} for i in range(12)])
    losses = []
    for packing in ("true", "false"):
        told = [f"data.train={rows}", f"data.eval={rows}", "task=completion", "data.max_tokens=64", "data.check=warn"]
        told += [
            "train.max_steps=2",
            f"train.packing={packing}",
            "data.duplicates=keep",
            f"run_dir={tmp_path}/{packing}",
        ]
        done = run.train(config_of(*told))
        losses.append(json.loads(done.result.read_text())["tuned"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_single_held_out_row_still_proves_packing(tmp_path, config_of, capsys):
    """Two copies of it are enough to see whether rows see each other."""
    base = tmp_path / "base"
    base.mkdir()
    families.make("completion", "lfm2", base)
    rows = families.write_jsonl(tmp_path / "rows.jsonl", [{"text": f"cat dog red {i} bird"} for i in range(12)])
    one = families.write_jsonl(tmp_path / "one.jsonl", [{"text": "a table and a lamp in Graz"}])
    told = [f"model.path={base}", f"data.train={rows}", f"data.eval={one}", "task=completion", "train.max_steps=1"]
    run.train(config_of(*told, "data.check=warn"))
    assert "rows one by one: " in capsys.readouterr().out


def test_every_zero_weight_of_a_tiny_model_is_drawn(tmp_path):
    """Else routers would choose among equals, and what gives nothing would hide faults."""
    import transformers

    families.make("completion", "qwen2", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(one.any() for one in model.parameters() if one.dim() > 1)
