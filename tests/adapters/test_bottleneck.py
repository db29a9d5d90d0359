"""Bottleneck adapters: where they lie in every kind of base, how large they are, and what they compute."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_lab.adapters import files
from lora_lab.adapters.attach import trainable
from lora_lab.adapters.bottleneck import VARIANTS, BottleneckConfig, BottleneckLayer, places
from lora_lab.config import compose
from lora_lab.errors import AdapterError, ConfigError
from lora_lab.run import pipeline
from lora_lab.run.prepared import prepare
from lora_lab.sweep import cohort, jobs
from lora_lab.training import oom
from tests.adapters.test_experts import make_mixture
from tests.conftest import WORDS, write_jsonl
from tests.sweep.test_sweep import assert_same_run
from tests.tasks.test_tasks import make_bert, make_t5

WIDTH, SIZE = 32, 4
_SHAPE = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": WIDTH}
_LLAMA = {**_SHAPE, "num_key_value_heads": 2, "intermediate_size": 64}
_T5 = {
    "vocab_size": 50,
    "num_layers": 1,
    "num_heads": 4,
    "d_model": WIDTH,
    "d_ff": 64,
    "d_kv": 8,
    "decoder_start_token_id": 0,
}
# class, settings; outputs of attentions and of MLPs, and what MLPs read, by their names in a layer
FAMILIES = {
    "llama": ("LlamaForCausalLM", _LLAMA, {"self_attn.o_proj"}, {"mlp.down_proj"}, {"mlp.up_proj"}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_layer": 2, "n_head": 4, "n_embd": WIDTH}, {"attn.c_proj"}, {"mlp.c_proj"}, {"mlp.c_fc"}),
    "opt": ("OPTForCausalLM", {**_SHAPE, "ffn_dim": 64, "word_embed_proj_dim": WIDTH}, {"self_attn.out_proj"}, {"fc2"}, {"fc1"}),
    "bert": ("BertForMaskedLM", {**_SHAPE, "intermediate_size": 64}, {"attention.output.dense"}, {"output.dense"}, {"intermediate.dense"}),
    "albert": ("AlbertForMaskedLM", {**_SHAPE, "intermediate_size": 64, "embedding_size": 16}, {"albert_layers.0.attention.dense"}, {"albert_layers.0.ffn_output"}, {"albert_layers.0.ffn"}),
    "t5": ("T5ForConditionalGeneration", _T5, {"layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"}, {"layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"}, {"layer.1.DenseReluDense.wi", "layer.2.DenseReluDense.wi"}),
    "mixtral": ("MixtralForCausalLM", {**_LLAMA, "num_local_experts": 2}, {"self_attn.o_proj"}, {"mlp"}, {None}),
    # an attention with a gate behind its output, a layer with a bottleneck of its own, and layers without an attention
    "afmoe": ("AfmoeForCausalLM", {**_LLAMA, "head_dim": 8, "num_dense_layers": 1, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}, {"self_attn.o_proj"}, {"mlp.down_proj", "mlp"}, {"mlp.up_proj", None}),
    "lfm2": ("Lfm2ForCausalLM", {**_LLAMA, "block_ff_dim": 64, "layer_types": ["conv", "full_attention"]}, {"self_attn.out_proj"}, {"feed_forward.w2"}, {"feed_forward.w3"}),
}  # fmt: skip


def made(family: str):
    kind = getattr(transformers, FAMILIES[family][0])
    torch.manual_seed(0)
    return kind(kind.config_class(**FAMILIES[family][1])).eval()


def given(model, **more) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 5, 6, 7, 8, 9], [2, 4, 3, 9, 8, 7]])
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}), **more}


def in_layer(name: str | None) -> str | None:
    return (
        name
        if name is None
        else name.split(".", name.split(".").index(next(p for p in name.split(".") if p.isdigit())) + 1)[-1]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_places_are_found_by_structure_and_sizes_are_the_papers(family):
    model = made(family)
    _, _, attentions, mlps, reads = FAMILIES[family]
    found = places(model, "houlsby")
    assert {in_layer(place.name) for place in found if not place.of_mlp} == attentions
    assert {in_layer(place.name) for place in found if place.of_mlp} == mlps
    assert {in_layer(place.reads) for place in found if place.of_mlp} == reads
    assert places(model, "pfeiffer") == places(model, "parallel") == [place for place in found if place.of_mlp]
    with torch.no_grad():
        base = model(**given(model)).logits
    for variant in VARIANTS:
        adapted = get_peft_model(model, BottleneckConfig(variant=variant, bottleneck_size=SIZE, non_linearity="tanh"))
        with torch.no_grad():
            assert torch.equal(adapted(**given(model)).logits, base)
        own = trainable(adapted)
        count = len(places(model, variant))
        assert sum(one.numel() for one in own.values()) == count * (2 * WIDTH * SIZE + WIDTH + SIZE)
        for one in own.values():
            nn.init.normal_(one, std=0.5)
        output = adapted(**given(model)).logits
        assert not torch.allclose(output, base)
        output.square().mean().backward()
        assert all(one.grad is not None and one.grad.any() for one in own.values())
        with pytest.raises(ValueError, match="cannot be merged"):
            adapted.merge_and_unload()
        model = adapted.unload()
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert torch.allclose(model(**given(model)).logits, base, rtol=0, atol=1e-5)


class ByHand:
    """h + 3 up(relu(down(x))), as hooks."""

    def __init__(self, down: nn.Module, up: nn.Module):
        self.down, self.up, self.read = down, up, None

    def reads(self, module: nn.Module, inputs: tuple) -> None:
        self.read = inputs[0]

    def adds(self, module: nn.Module, inputs: tuple, h: torch.Tensor) -> torch.Tensor:
        x = h if self.read is None else self.read
        return h + 3 * self.up(torch.relu(self.down(x)))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_each_variant_computes_what_its_paper_says(family):
    model = made(family)
    for variant in VARIANTS:
        adapted = get_peft_model(
            model, BottleneckConfig(variant=variant, bottleneck_size=SIZE, scaling=3.0, bottleneck_dropout=0.5)
        ).eval()
        for one in trainable(adapted).values():
            nn.init.normal_(one, std=0.5)
        changes = {}
        for place in places(model, variant):
            layer = model.get_submodule(place.name)
            assert isinstance(layer, BottleneckLayer)
            changes[place] = [layer.bottleneck_down["default"], layer.bottleneck_up["default"]]
        with torch.no_grad():
            found = adapted(**given(model)).logits
        model = adapted.unload()
        hooks = []
        for place, parts in changes.items():
            by_hand = ByHand(*parts)
            if variant == "parallel":
                hooks.append(model.get_submodule(place.reads).register_forward_pre_hook(by_hand.reads))
            hooks.append(model.get_submodule(place.name).register_forward_hook(by_hand.adds))
        with torch.no_grad():
            torch.testing.assert_close(model(**given(model)).logits, found)
        for hook in hooks:
            hook.remove()


@pytest.fixture
def config_of(overrides):
    plain = [text for text in overrides if not text.startswith("adapter.")]
    return lambda *more: compose.compose([*plain, *more])


@pytest.mark.parametrize("variant", [*(pytest.param(one, marks=pytest.mark.long) for one in VARIANTS[:2]), VARIANTS[2]])
def test_packed_and_recomputed_rows_have_the_gradients_of_rows_alone(config_of, variant):
    def gradients(*more: str) -> torch.Tensor:
        prepared = prepare(
            config_of("adapter=bottleneck", f"adapter.variant={variant}", "adapter.bottleneck_size=4", *more)
        )
        model = prepared.loaded().model.train()
        if prepared.config.train.gradient_checkpointing:
            oom.recompute(model, 1, offload=False)
        torch.manual_seed(1)
        for one in trainable(model).values():
            nn.init.normal_(one, std=0.1)
        rows = [prepared.train[place][0] for place in (0, 3, 5)]
        with prepared.task.forward.segments(model):
            for batch in prepared.task.step(model, [rows], np.random.default_rng(0)).batches:
                prepared.task.loss(model, batch).loss.backward()
        return torch.cat([one.grad.flatten() for one in trainable(model).values()])

    alone = gradients("train.packing=false", "speed=plain")
    for more in ([], ["train.gradient_checkpointing=true"]):
        gap = (gradients(*more) - alone).norm() / alone.norm()
        assert gap < 1e-4


def test_a_base_without_such_layers_is_refused(config_of):
    with pytest.raises(ConfigError, match=r"adapter.reduction_factor=8: no effect with adapter.bottleneck_size=4"):
        config_of("adapter=bottleneck", "adapter.bottleneck_size=4", "adapter.reduction_factor=8")
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(AdapterError, match="no layers of an attention and an MLP"):
        places(mamba, "pfeiffer")
    with pytest.raises(AdapterError, match=r"adapter.layers_to_transform=9: the model's layers are 0 to 3"):
        prepare(config_of("adapter=bottleneck", "adapter.bottleneck_size=4", "adapter.layers_to_transform=[9]"))
    prepared = prepare(
        config_of("adapter=bottleneck", "adapter.bottleneck_size=4", "adapter.layers_to_transform=[1,3]")
    )
    layers = [name for name, one in prepared.loaded().model.named_modules() if isinstance(one, BottleneckLayer)]
    assert [name.partition("layers.")[2] for name in layers] == ["1.mlp.down_proj", "3.mlp.down_proj"]


@pytest.mark.long
def test_plain_peft_loads_it_after_one_import(config_of, base):
    run = pipeline.train(config_of("adapter=houlsby", "adapter.bottleneck_size=4", "train.max_steps=2"))
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; import lora_lab.adapters.bottleneck; from peft import PeftModel\n"
        "m = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "print(sum(p.numel() for n, p in m.named_parameters() if '.bottleneck_' in n), m(torch.tensor([[1, 5, 6]])).logits.sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code, base, run.adapter], check=False, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    count, total = done.stdout.split()
    assert int(count) == 8 * (2 * 64 * 4 + 64 + 4)
    here = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), run.adapter)
    assert here(torch.tensor([[1, 5, 6]])).logits.sum().item() == pytest.approx(float(total), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", ["classification", "seq2seq", "completion"])
def test_encoders_encoder_decoders_and_mixtures_train(config_of, tmp_path, task, variant):
    text = [" ".join(WORDS[i : i + 4]) for i in range(12)]
    rows = {
        "classification": [{"text": one, "label": "ab"[i % 2]} for i, one in enumerate(text)],
        "seq2seq": [{"source": one, "target": one} for one in text],
        "completion": [{"text": one} for one in text],
    }[task]
    base = {
        "classification": make_bert,
        "seq2seq": make_t5,
        "completion": lambda folder: make_mixture(folder, "Qwen2Moe"),
    }[task]
    folder = tmp_path / "base"
    base(folder)
    config = config_of(
        f"model.path={folder}", f"task={task}", f"data.train={write_jsonl(tmp_path / 'rows.jsonl', rows)}", "data.check=off", "adapter=bottleneck",
        f"adapter.variant={variant}", "adapter.bottleneck_size=4", "train.max_steps=3",
    )  # fmt: skip
    prepared = prepare(config)
    fresh = {name: one.clone() for name, one in files.tensors_of(prepared.loaded().model, "default").items()}
    run = pipeline.train(config)
    saved = load_file(run.adapter / files.WEIGHTS)
    assert saved.keys() == fresh.keys()
    ups = [name for name in fresh if "bottleneck_up" in name]
    assert ups
    assert not [name for name in ups if torch.equal(saved[name], fresh[name])]


@pytest.mark.long
def test_variants_take_turns_on_same_modules(config_of, tmp_path, capsys):
    told = ["adapter=bottleneck", "adapter.bottleneck_size=4", "train.max_steps=3"]
    alone = [
        pipeline.train(config_of(*told, f"adapter.variant={name}", f"run_dir={tmp_path}/{name}")) for name in VARIANTS
    ]
    capsys.readouterr()
    found = jobs.jobs_of(
        [config_of(*told, f"adapter.variant={name}", f"run_dir={tmp_path}/sweep/{name}") for name in VARIANTS]
    )
    cohort.train(found)
    assert "3 runs take turns on one base: " in capsys.readouterr().out
    assert [job.error for job in found] == [None] * 3
    for job, run in zip(found, alone, strict=True):
        assert_same_run(job.run.path, run.path)
