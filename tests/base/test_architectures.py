"""Families of models: each trains, merges and says of its loss what plain transformers compute, or is refused before training."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json

import pytest
import torch
from peft import get_peft_model_state_dict

from lora_lab import cli
from lora_lab.adapters import files
from lora_lab.adapters.attach import attach, coverage
from lora_lab.adapters.layers import linear_layers, towers
from lora_lab.adapters.methods.lora import LoraAdapter
from lora_lab.base import load
from lora_lab.base.tokenizer import load_tokenizer
from lora_lab.errors import BaseModelError, ConfigError
from lora_lab.run import pipeline
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
        targeted = LoraAdapter(target_modules=named).targets(model)
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
    targeted = LoraAdapter(target_modules="all-linear").targets(load.skeleton(base, load.ModelKind()))
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
    targeted = LoraAdapter(target_modules="all-linear").targets(model)
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
        done = pipeline.train(config_of(*told))
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
    pipeline.train(config_of(*told, "data.check=warn"))
    assert "rows one by one: " in capsys.readouterr().out


def test_every_zero_weight_of_a_tiny_model_is_drawn(tmp_path):
    """Else routers would choose among equals, and what gives nothing would hide faults."""
    import transformers

    families.make("completion", "qwen2", tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(one.any() for one in model.parameters() if one.dim() > 1)


def test_rows_that_padding_changes_get_a_pass_each(tmp_path):
    """ConvBERT's convolutions see what is beside a row: its loss is that of each row alone."""
    found = families.attempt("classification", "convbert", tmp_path / "family")
    assert not found.fault, found.fault
    assert found.rows == "one by one"
    assert "padding changes this model's outputs" in found.said


def on(base, task, rows) -> list[str]:
    """Overrides of a run on a base and rows, which are held out as well."""
    return [f"model.path={base}", f"task={task}", f"data.train={rows}", f"data.eval={rows}", "data.check=warn"]


def test_an_answer_that_padding_changes_cannot_be_compared(tmp_path, config_of):
    """A reward needs two answers in one pass."""
    base = tmp_path / "base"
    base.mkdir()
    families.make("classification", "convbert", base)
    judged = [{"prompt": "cat", "chosen": "dog " * (i + 4), "rejected": "bird"} for i in range(8)]
    rows = families.write_jsonl(tmp_path / "rows.jsonl", judged)
    with pytest.raises(ConfigError, match="padding changes this model's outputs.*Choose another base"):
        pipeline.train(config_of(*on(base, "reward", rows)))
    assert not (tmp_path / "run").exists()


def test_every_tensor_of_an_adapter_is_read_back(tmp_path):
    """Laguna's names of today are also what transformers' renaming for checkpoints of old makes of them, once more."""
    base = tmp_path / "base"
    base.mkdir()
    families.make("completion", "laguna", base)
    config = LoraAdapter(r=2)
    model, other = (attach(load_plain(base), config, "default", load.ModelKind(), seed) for seed in (0, 1))
    written = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    assert any("shared_experts" in name for name in written)
    files.put(other, "default", written)
    assert all(torch.equal(written[name], tensor) for name, tensor in get_peft_model_state_dict(other).items())


def test_logits_of_all_positions_are_cut_to_the_wanted_ones(tmp_path):
    """Some decoders do not know `logits_to_keep`."""
    found = families.attempt("completion", "trocr", tmp_path / "family")
    assert found.trained
    assert not found.fault, found.fault


@pytest.mark.parametrize(
    ("task", "family", "sentence"),
    [
        ("completion", "reformer", "exactly 128 tokens alone (axial_pos_shape [8, 16]"),
        ("classification", "canine", "canine has no table of embeddings"),
    ],
)
def test_what_a_family_lacks_is_said_before_training(task, family, sentence, tmp_path):
    assert sentence in families.attempt(task, family, tmp_path / "family").refused


def test_a_router_that_is_a_linear_layer_counts_once(tmp_path):
    families.make("completion", "afmoe", tmp_path)
    found = coverage(attach(load_plain(tmp_path), LoraAdapter(r=2), "default", load.ModelKind(), 0), "default")
    assert found.matched_experts == found.experts == 2
    assert found.matched <= found.linear_layers


def test_rows_that_the_base_cannot_be_run_on_are_refused_before_training(tmp_path, config_of):
    """BART's classifier reads the last end mark of a text, and here the tokenizer writes another one."""
    base = tmp_path / "base"
    base.mkdir()
    families.make("classification", "bart", base)
    labelled = [{"text": f"cat dog {i}", "label": "ab"[i % 2]} for i in range(8)]
    tokenizer = load_tokenizer(base, chat=False)
    used = {number for row in labelled for number in tokenizer(row["text"])["input_ids"]}
    config = json.loads((base / "config.json").read_text())
    config["eos_token_id"] = next(number for number in range(5, len(tokenizer)) if number not in used)
    (base / "config.json").write_text(json.dumps(config))
    rows = families.write_jsonl(tmp_path / "rows.jsonl", labelled)
    with pytest.raises(BaseModelError, match="bart cannot be run on these rows .*<eos> token"):
        pipeline.train(config_of(*on(base, "classification", rows)))
    assert not (tmp_path / "run").exists()


def load_plain(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_results_of_other_sources_are_not_mixed_with_new_ones(tmp_path, monkeypatch, capsys):
    from benchmarks import architectures

    kept, page = tmp_path / "kept.json", tmp_path / "page.md"
    monkeypatch.setattr(architectures, "_RESULTS", kept)
    monkeypatch.setattr(architectures, "_DOCUMENT", page)
    old = {"completion:gone": dataclasses.asdict(families.Outcome("completion", "gone", refused="a sentence"))}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    kept.write_text(json.dumps({"versions": versions, "sources": "another", "families": old}))
    before = kept.read_text()
    monkeypatch.setattr("sys.argv", ["architectures", "--only", "emu3"])  # refused, so nothing is trained
    with pytest.raises(SystemExit) as ended:
        architectures.main()
    assert not ended.value.code
    assert "completion:emu3 refused" in capsys.readouterr().out
    assert kept.read_text() == before
    assert not page.exists()
    monkeypatch.setattr("sys.argv", ["architectures"])
    monkeypatch.setattr(architectures, "families", lambda: [("completion", "emu3")])
    with pytest.raises(SystemExit):
        architectures.main()
    found = json.loads(kept.read_text())
    assert set(found["families"]) == {"completion:emu3"}
    assert found["sources"] == architectures.sources()
    assert found["sources"] in page.read_text()
