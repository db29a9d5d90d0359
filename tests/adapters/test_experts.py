"""Mixtures of experts: what is adapted is what is said, it trains, resumes and merges exactly, or it is refused before training."""

from __future__ import annotations

import json

import pytest
import torch

from lora_lab import cli
from lora_lab.adapters.layers import expert_weights, linear_layers
from lora_lab.base import load
from lora_lab.errors import Interrupted
from lora_lab.run import pipeline
from tests.conftest import make_tokenizer
from tests.training.test_resume import stop_at

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {  # whether peft reaches into the experts, weights of experts and routers in two layers, settings
    "Mixtral": (True, 6, _LOCAL),
    "Qwen3Moe": (True, 6, {"head_dim": 16, **_MOE}),
    "Olmoe": (True, 6, {"num_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2Moe": (False, 6, {"shared_expert_intermediate_size": 32, **_MOE}),
    "GraniteMoe": (False, 6, _LOCAL),
    "Llama4Text": (False, 6, {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 64}),
}  # fmt: skip


def make_mixture(folder, name: str):
    import transformers

    size = len(make_tokenizer(folder))
    shape = {
        "vocab_size": size, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**shape, **FAMILIES[name][2]})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize(
    "name",
    [
        "Mixtral",
        *(
            pytest.param(n, marks=pytest.mark.long)
            for n in ("GraniteMoe", "Llama4Text", "Qwen3Moe", "Olmoe", "Qwen2Moe")
        ),
    ],
)
def test_a_mixture_trains_resumes_and_merges(name, config_of, tmp_path, eval_file, monkeypatch, capsys):
    reaches, count, _ = FAMILIES[name]
    base = make_mixture(tmp_path / "base", name)
    told = [
        f"model.path={base}", f"data.eval={eval_file}", "train.max_steps=4", "train.save_steps=1", "export=merged", "export.dtype=float32"
    ]  # fmt: skip
    done = pipeline.train(config_of(*told))
    said = capsys.readouterr().out
    experts = count if reaches else 0
    assert f"and {experts} of {count} weights of experts and routers adapted" in said
    result = json.loads(done.result.read_text())
    layers = linear_layers(load.skeleton(base, load.ModelKind()))
    assert (
        result["coverage"]["matched"] == result["coverage"]["linear_layers"] - 1 == len(layers) - 1
    )  # the output head is left out
    assert result["merge"]["refused"] == []
    assert result["merge"]["merged_vs_model_as_trained"]["max_logit_diff"] < 1e-3
    assert cli.main(["evaluate", f"run={done.path}"]) == 0
    evaluated = json.loads((done.path / "evaluation.json").read_text())["tuned"]["loss"]
    assert evaluated == pytest.approx(result["tuned"]["loss"], rel=1e-6)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 2)
        pipeline.train(config_of(*told, f"run_dir={tmp_path}/again"))
    pipeline.resume(f"{tmp_path}/again", [])
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (done.path / weights).read_bytes()


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (["adapter.lora_dropout=0.1"], "adapter.lora_dropout: not defined for the weights of experts"),
        (["adapter=dora"], "adapter.use_dora: not defined for the weights of experts"),
        (["adapter=pissa"], "adapter.init_lora_weights: not defined for the weights of experts"),
        (
            ["adapter.target_parameters=[expertz.down_proj]"],
            "expertz.down_proj matches no weight of an expert or router. Did you mean",
        ),
        (["export.targets=[vllm]"], "vllm: the adapter reaches into experts"),
        (["export.targets=[gguf_lora]"], "gguf_lora: the adapter reaches into experts"),
    ],
)
def test_what_experts_cannot_do_is_refused_before_training(told, says, overrides, tmp_path, capsys):
    base = make_mixture(tmp_path / "base", "Mixtral")
    assert cli.main(["train", *overrides, f"model.path={base}", *told]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_attention_alone_leaves_the_experts_as_they_are(overrides, tmp_path, capsys):
    base = make_mixture(tmp_path / "base", "Mixtral")
    told = ["adapter.target_modules=[q_proj,v_proj]", "adapter.lora_dropout=0.1", "train.max_steps=1"]
    assert cli.main(["train", *overrides, f"model.path={base}", *told]) == 0
    assert "4 of 9 linear layers and 0 of 6 weights of experts and routers adapted" in capsys.readouterr().out


def test_experts_that_stay_unquantized_are_told(overrides, tmp_path, capsys):
    base = make_mixture(tmp_path / "base", "GraniteMoe")
    assert cli.main(["plan", *overrides, f"model.path={base}", "quant=nf4"]) == 0
    said = capsys.readouterr().out
    experts = [one for one in expert_weights(load.skeleton(base, load.ModelKind())).values() if one.dim() == 3]
    assert f"{len(experts)} weights of experts" in said
    assert "stay unquantized" in said


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize(
    ("name", "told", "layers", "experts"),
    [
        ("GraniteMoe", ["adapter.target_parameters=[experts.down_proj]"], 8, 2),
        pytest.param("Qwen2Moe", ["adapter.target_parameters=[experts.gate_up_proj,experts.down_proj,gate.weight]"], None, 6, marks=pytest.mark.long),
        pytest.param("Llama4Text", ["adapter.target_parameters=[experts.down_proj]"], None, 2, marks=pytest.mark.long),
        pytest.param("Mixtral", ["adapter.target_modules=[]", "adapter.target_parameters=[experts.down_proj]"], 0, 2, marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_weights_of_experts_are_adapted_by_their_own_names(
    name, told, layers, experts, config_of, tmp_path, eval_file, monkeypatch
):
    base = make_mixture(tmp_path / "base", name)
    told = [
        f"model.path={base}",
        f"data.eval={eval_file}",
        "train.max_steps=3",
        "train.save_steps=1",
        "export.dtype=float32",
        *told,
    ]
    done = pipeline.train(config_of(*told, "export=merged"))
    result = json.loads(done.result.read_text())
    assert result["coverage"]["matched_experts"] == experts
    if layers is not None:
        assert result["coverage"]["matched"] == layers
    assert result["merge"]["merged_vs_base_and_adapter"]["max_logit_diff"] < 1e-4
    cli.signals.install()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 2)
        pipeline.train(config_of(*told, f"run_dir={tmp_path}/again"))
    pipeline.resume(f"{tmp_path}/again", [])
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (done.path / weights).read_bytes()
