"""Every exact acceleration beside the plain modules that it stands for: loss and gradients, in float32, on several kinds of model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer as AnyLoraLayer
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from lora_lab.adapters.attach import base_of, trainable
from lora_lab.data.dataset import first_examples
from lora_lab.errors import ConfigError
from lora_lab.fast import modules, norm, prefix
from lora_lab.fast.attention import SegmentAttention
from lora_lab.fast.frozen import FrozenWeight, Scratch
from lora_lab.fast.linear import Layout, LoraLinear
from lora_lab.fast.loss import TokenLosses
from lora_lab.run import pipeline
from lora_lab.run import prepared as stages
from lora_lab.run.setup import Live
from lora_lab.runtime import tracking
from lora_lab.training.loop import fit
from tests.conftest import make_tokenizer, write_jsonl
from tests.tasks.test_tasks import make_bert, make_t5
from tests.training.test_invariants import member_of, prepared_and_model, relative_gap

# float32 sums in another order: of the loss, and of the gradient's norm after two layers (measured: at most 2.3e-6)
LOSS, GRADIENT = 1e-6, 3e-6
ACCELERATIONS = (
    "fused_projections",
    "fused_mlp",
    "fused_norms",
    "block_attention",
    "chunked_loss",
    "last_layer_rows",
)  # of decoders


def make_decoder(folder: Path, kind: str) -> Path:
    """A random decoder of 2 layers of a family that transformers knows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    settings = {
        "vocab_size": len(make_tokenizer(folder)), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.05, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "gemma3_text":
        settings["layer_types"] = ["sliding_attention", "full_attention"]
        settings["sliding_window"] = 16
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    for parameter in model.parameters():  # norms and biases start at one or zero, where mistakes do not show
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    found = {kind: make_decoder(folder / kind, kind) for kind in ("llama", "qwen2", "qwen3", "gemma3_text", "mistral")}
    return found | {"bert": make_bert(folder / "bert"), "t5": make_t5(folder / "t5")}


def first_step(
    config, seed: int = 1, rows: int = 4, train: bool = True
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Live]:
    """Loss, and gradients by name, of the first rows, from an adapter that does something."""
    prepared = stages.prepare(config)
    live = prepared.loaded()
    model = live.model
    torch.manual_seed(seed)
    for parameter in trainable(model).values():
        parameter.data.normal_(std=0.05)
    model.train(train)
    batch = prepared.task.collate(first_examples(prepared.train, rows), np.random.default_rng(seed)).to(model.device)
    torch.manual_seed(seed)
    with prepared.accelerator.autocast():
        loss = prepared.task.loss(model, batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainable(model).items()}, live


def assert_same(one, other) -> None:
    (loss, gradients, _), (expected, plain, _) = one, other
    assert abs(loss - expected) <= LOSS * abs(expected)
    assert gradients.keys() == plain.keys()
    found, true = (torch.cat([tensors[name].flatten() for name in plain]) for tensors in (gradients, plain))
    assert true.norm() > 0
    assert (found - true).norm() / true.norm() <= GRADIENT


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text", "mistral"])
def test_a_decoder_learns_what_its_plain_modules_learn(families, config_of, kind):
    model = f"model.path={families[kind]}"
    fast = first_step(config_of(model))
    assert_same(fast, first_step(config_of(model, "speed=plain")))
    fused = [name for name, module in fast[2].model.named_modules() if "forward" in module.__dict__]
    assert sum(name.endswith(".mlp") for name in fused) == 2
    assert sum(name.endswith("q_proj") for name in fused) == 2
    assert sum("norm" in name for name in fused) >= 5
    assert fast[2].setup.task.forward.chunked_head
    assert fast[2].setup.task.forward.wanted_rows == (kind != "gemma3_text")  # Gemma has other norms


@pytest.mark.parametrize("option", ACCELERATIONS)
def test_each_acceleration_can_be_used_alone(families, config_of, option):
    only = ["speed=plain", f"speed.{option}=true", f"model.path={families['llama']}"]
    assert_same(first_step(config_of(*only)), first_step(config_of(*only[::2], "speed=plain")))


@pytest.mark.parametrize(
    "settings",
    [
        ["adapter.lora_dropout=0.3"],
        ["adapter.use_rslora=true", "adapter.rank_pattern={q_proj: 7, down_proj: 2}"],
        ["adapter.target_modules=[q_proj,v_proj,up_proj]"],
        ["adapter.target_modules=[q_proj,down_proj]", "adapter.layers_to_transform=[1]"],
        ["adapter.use_dora=true"],
        ["train.gradient_checkpointing=true"],
        ["task.label_smoothing=0.1"],
        ["task=completion"],
        ["quant=nf4"],
        ["quant=nf4", "speed.dequantize=always", "quant.double_quant=true"],
        ["quant=fp4", "speed.dequantize=once", "adapter.lora_dropout=0.2"],
        ["quant=nf4", "adapter.target_modules=[o_proj]"],
    ],
    ids=lambda settings: ",".join(settings).replace("adapter.", ""),
)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_setting_learns_what_its_plain_modules_learn(families, config_of, tmp_path, settings, seed):
    given = [f"model.path={families['llama']}", *settings]
    if "task=completion" in settings:
        given.append(
            f"data.train={write_jsonl(tmp_path / 'text.jsonl', [{'text': 'red lamp ' * n} for n in range(3, 9)])}"
        )
    plain = [one for one in given if "dequantize" not in one]
    assert_same(first_step(config_of(*given), seed), first_step(config_of(*plain, "speed=plain"), seed))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_an_encoder_learns_what_its_plain_modules_learn(families, config_of, tmp_path, kind):
    rows = [{"text": f"table {colour} lamp", "label": colour} for colour in ("red", "green", "blue", "red")]
    task = "classification"
    if kind == "t5":
        rows, task = [{"source": row["text"], "target": row["label"]} for row in rows], "seq2seq"
    given = [f"model.path={families[kind]}", f"task={task}", f"data.train={write_jsonl(tmp_path / 'rows.jsonl', rows)}"]
    fast = first_step(config_of(*given))
    assert_same(fast, first_step(config_of(*given, "speed=plain")))
    assert sum("forward" in module.__dict__ for module in fast[2].model.modules()) >= 12


def test_a_model_is_measured_and_answers_alike(families, config_of, eval_file):
    common = [
        f"model.path={families['llama']}",
        f"data.eval={eval_file}",
        "task.generate_rows=3",
        "task.max_new_tokens=8",
    ]
    found = []
    for speed in ("fast", "plain"):
        *_, live = first_step(config_of(*common, f"speed={speed}"))
        found.append((live.measure_base(), live.measure("tuned")))
    for one, other in zip(*found, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
        assert one.answers == other.answers


def test_bfloat16_is_as_near_to_float32_as_plain_bfloat16(families, config_of):
    model = f"model.path={families['llama']}"
    _, exact, _ = first_step(config_of(model, "speed=plain"))
    gaps = []
    for speed in ("fast", "plain"):
        _, found, _ = first_step(config_of(model, "model.dtype=bfloat16", f"speed={speed}"))
        whole = torch.cat([(found[name] - exact[name]).flatten() for name in exact])
        gaps.append((whole.norm() / torch.cat([g.flatten() for g in exact.values()]).norm()).item())
    assert gaps[0] <= 1.25 * gaps[1]  # rounding is a matter of chance, so not exactly


def test_members_learn_from_their_own_rows(families):
    """Two members of unlike ranks on slices of the same tokens, one of them without some layers: each as if alone."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, size).requires_grad_(False) for size in (12, 8)]
    weight = FrozenWeight(layers, Scratch())
    x = torch.randn(1, 10, 16, requires_grad=True)
    ranks, rows = [(3, 2), (5, 0)], [slice(0, 4), slice(4, 10)]
    factors = [
        [
            torch.randn(sum(r), 16, requires_grad=True),
            *(torch.randn(n, k, requires_grad=True) for n, k in zip((12, 8), r, strict=True)),
        ]
        for r in ranks
    ]
    layouts = [Layout(part, list(r), [None, None]) for part, r in zip(rows, ranks, strict=True)]
    out = LoraLinear.apply(x, weight, layouts, *(tensor for own in factors for tensor in own))
    every = [tensor for own in factors for tensor in own if tensor.numel()]
    direction = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, *every], direction)
    plain = torch.cat([layer(x) for layer in layers], -1)
    parts = []
    for part, r, (a, *bs) in zip(rows, ranks, factors, strict=True):
        h = (x[:, part] @ a.t()).split(list(r), -1)
        parts.append(plain[:, part] + torch.cat([one @ b.t() for one, b in zip(h, bs, strict=True)], -1))
    expected = torch.cat(parts, 1)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad(expected, [x, *every], direction), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [False, True])
def test_losses_in_chunks_equal_cross_entropy(monkeypatch, smoothing, bias):
    from lora_lab.fast import loss

    monkeypatch.setattr(loss, "_CHUNK_BYTES", 1)  # the smallest chunks, of 64 tokens
    monkeypatch.setattr(loss, "_CACHED_BYTES", 4 * 50 * 7)
    torch.manual_seed(0)
    hidden, weight = torch.randn(150, 8, requires_grad=True), torch.randn(50, 8)
    shift = torch.randn(50) if bias else None
    targets, weights = torch.randint(50, (150,)), torch.rand(150)
    losses, likeliest = TokenLosses.apply(hidden, weight, shift, targets, smoothing)
    logits = torch.nn.functional.linear(hidden, weight, shift)
    expected = cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(likeliest, logits.argmax(1))
    [found] = torch.autograd.grad((losses * weights).square().sum(), hidden)
    [plain] = torch.autograd.grad((expected * weights).square().sum(), hidden)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lengths",
    [[1], [2, 1], [37], [40, 38, 5, 50, 41, 1], [128, 129], [300, 20, 7, 257, 25]],
    ids=str,
)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)])
def test_block_attention_equals_torch(lengths, heads):
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (
        torch.randn(1, total, n, 8, dtype=torch.float64).transpose(1, 2).requires_grad_() for n in (*heads, heads[1])
    )
    found = SegmentAttention.apply(q[0], k[0], v[0], tuple(lengths), 0.3)[None]
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    expected = torch.cat(
        [scaled_dot_product_attention(*part, is_causal=True, scale=0.3, enable_gqa=True) for part in parts], 2
    )
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    for one, other in zip(*(torch.autograd.grad(out, (q, k, v), direction) for out in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_norm_that_computes_something_else_stays_plain():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) + 1

    assert norm.of_module(LlamaRMSNorm(8).requires_grad_(False), torch.randn(4, 8)) is not None
    assert norm.of_module(OtherRMSNorm(8).requires_grad_(False), torch.randn(4, 8)) is None
    assert norm.of_module(LlamaRMSNorm(8), torch.randn(4, 8)) is None  # its weight is trained


def test_an_mlp_that_computes_something_else_stays_plain(families, config_of, monkeypatch, capsys):
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 2 * plain(self, x))
    config = config_of(f"model.path={families['llama']}")
    assert_same(first_step(config), first_step(config_of(f"model.path={families['llama']}", "speed=plain")))
    assert "LlamaMLP computes something else" in capsys.readouterr().out


def test_accelerations_that_change_the_outputs_are_taken_back(families, config_of, monkeypatch, capsys):
    forward = LoraLinear.forward
    monkeypatch.setattr(LoraLinear, "forward", lambda *given: forward(*given) * 1.1)
    fast = first_step(config_of(f"model.path={families['llama']}"))
    assert "no fused_projections: it would change this model's outputs" in capsys.readouterr().out
    monkeypatch.setattr(LoraLinear, "forward", forward)
    assert_same(fast, first_step(config_of(f"model.path={families['llama']}", "speed=plain")))


def test_plain_inside_a_block(families, config_of):
    *_, live = first_step(config_of(f"model.path={families['llama']}"))
    replaced = [module for module in live.model.modules() if "forward" in module.__dict__]
    assert replaced
    with live.setup.task.forward.plain(live.model):
        assert not live.setup.task.forward.wanted_rows
        assert not [module for module in live.model.modules() if "forward" in module.__dict__]
    assert [module for module in live.model.modules() if "forward" in module.__dict__] == replaced


def test_unquantized_weights_are_not_held_twice(families, config_of):
    *_, live = first_step(config_of(f"model.path={families['llama']}"))
    layer = live.model.get_base_model().model.layers[0]
    q, k = (getattr(layer.self_attn, name).base_layer.weight for name in ("q_proj", "k_proj"))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    gate, up = (getattr(layer.mlp, name).base_layer.weight for name in ("gate_proj", "up_proj"))
    assert gate.untyped_storage().data_ptr() == up.untyped_storage().data_ptr()


def test_backward_stops_at_the_lowest_adapted_layer(families, config_of):
    """No gradient is computed for what lies below: the inputs of the first adapted layer need none."""
    prepared = stages.prepare(
        config_of(
            f"model.path={families['llama']}",
            "adapter.target_modules=[q_proj,down_proj]",
            "adapter.layers_to_transform=[1]",
        )
    )
    model = prepared.loaded().model.train()
    needs = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(
            lambda _, inputs, output: needs.append((inputs[0].requires_grad, output.requires_grad))
        )
    batch = prepared.task.collate(first_examples(prepared.train, 2), np.random.default_rng(0))
    prepared.task.loss(model, batch).loss.backward()
    assert needs == [(False, False), (False, True)]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_a_frozen_prefix_is_computed_once(families, config_of, tmp_path, kind):
    """Three epochs in other orders: the same adapter, and from the second epoch on the frozen layers compute nothing."""
    settings = [
        f"model.path={families[kind]}",
        "adapter.layers_to_transform=[1]",
        "train.epochs=3",
        "train.batch_size=4",
    ]
    found, calls = [], []
    for kept in ("false", "true"):
        config = config_of(*settings, f"speed.prefix_cache={kept}", f"run_dir={tmp_path}/{kept}")
        prepared, model = prepared_and_model(config)
        member = member_of(prepared, model, config)
        layer = model.get_base_model().model.layers[0]
        count: list[int] = []
        layer.mlp.register_forward_hook(lambda *_, count=count: count.append(1))
        fit([member], prepared.train, None, prepared.accelerator)
        found.append({name: parameter.detach().clone() for name, parameter in member.parameters.items()})
        calls.append(len(count))
    assert relative_gap(found[1], found[0]) <= 1e-5
    assert calls[0] == 15
    assert calls[1] == 5  # the first epoch


def test_a_prefix_stops_growing_at_its_limit():
    kept = prefix.Prefix([], limit=3 * 4 * 5)
    kept._keep(torch.ones(7, 3), [b"a", b"b"], [4, 3])
    assert kept.num_bytes == 3 * 4 * 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["adapter.layers_to_transform=[0,1]"], "the first layer is adapted"),
        (["train.neftune_alpha=5"], "not with train.neftune_alpha"),
        (["quant=int8"], "not with quant=int8"),
        (["task=masked_lm"], "whose rows are padded"),
    ],
)
def test_a_prefix_that_cannot_be_kept_is_refused(config_of, settings, says):
    with pytest.raises(ConfigError, match=says):
        stages.prepare(config_of("speed.prefix_cache=true", *settings))


_GATED = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_ODD = {  # norms with a gate, layers that return two things, projections that are changed in place
    "Qwen3_5TextConfig": {"head_dim": 16, **_LINEAR},
    "GraniteMoeHybridConfig": {
        "layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 128, **_GATED,
    },
    "BambaConfig": {"attn_layer_indices": [1], "attn_rotary_emb": 16, **_GATED},
    "FalconH1Config": {"mamba_d_ssm": 128, **_GATED},
    "GptOssConfig": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("Qwen3_5TextConfig", "GptOssConfig") else pytest.param(name, marks=pytest.mark.long)
        for name in _ODD
    ],
)
def test_an_acceleration_never_stops_a_run(name, config_of, tmp_path, capsys):
    """What it cannot express is left out, and what is left computes what the plain modules compute."""
    import transformers

    folder = tmp_path / "base"
    tokenizer = make_tokenizer(folder)
    own = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, name)(**own, **_ODD[name])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    losses = {}
    for speed in ("fast", "plain"):
        told = [
            f"model.path={folder}",
            f"speed={speed}",
            "train.packing=false",
            "train.max_steps=2",
            "adapter.target_modules=[o_proj]",
        ]
        done = pipeline.train(config_of(*told, f"run_dir={tmp_path}/{speed}"))
        losses[speed] = [line["loss"] for line in tracking.MetricsLog(done.path / "metrics.jsonl").read()]
    assert losses["fast"] == pytest.approx(losses["plain"], rel=1e-5)


def test_an_acceleration_that_fails_is_left_out_alone(families, config_of, monkeypatch, capsys):
    """The others are kept, and the reason is told."""
    from lora_lab.fast import norm as norms

    monkeypatch.setattr(norms, "forward_of", lambda module, eps, scale: lambda x: x.no_such_thing)
    pipeline.train(config_of(f"model.path={families['llama']}", "train.max_steps=1"))
    said = capsys.readouterr().out
    assert "no fused_norms: AttributeError" in said
    assert "projections fused" in said


def test_an_acceleration_with_another_backward_pass_is_left_out(families, config_of, monkeypatch, capsys):
    from lora_lab.fast.norm import RMSNorm

    backward = RMSNorm.backward
    monkeypatch.setattr(RMSNorm, "backward", staticmethod(lambda ctx, dy: (3 * backward(ctx, dy)[0], None, None, None)))
    pipeline.train(config_of(f"model.path={families['llama']}", "train.max_steps=1"))
    assert "no fused_norms: it would change this model's gradients by" in capsys.readouterr().out


def test_factors_are_made_once_while_answers_are_generated_and_anew_after_learning(families, config_of, monkeypatch):
    *_, live = first_step(config_of(f"model.path={families['llama']}"))
    task, model, made = live.setup.task, live.model, []
    plain = modules.Factors.forward
    monkeypatch.setattr(modules.Factors, "forward", staticmethod(lambda *given: made.append(1) or plain(*given)))
    prompts = ["red green blue", "red"]

    def logits():
        with task.forward.generating(model):
            first = len(made)
            task.generate(model, prompts, max_new_tokens=4)
            return len(made) - first, model(torch.tensor([[5, 6, 7]])).logits

    once, before = logits()
    count = sum(isinstance(part, AnyLoraLayer) for part in model.modules())
    assert 0 < once <= count
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1)
    again, after = logits()
    assert again == once
    assert not torch.equal(before, after)
    with task.forward.plain(model), torch.no_grad():
        torch.testing.assert_close(after, model.eval()(torch.tensor([[5, 6, 7]])).logits, rtol=1e-5, atol=1e-5)


def test_the_output_layer_of_a_frozen_base_multiplies_rows_that_lie_together(families, config_of):
    """Of a view and a frozen weight torch makes a product, and a copy of the weight, for each row."""
    *_, live = first_step(config_of(f"model.path={families['llama']}", "speed=plain"))
    seen = []
    head = base_of(live.model).get_output_embeddings()
    head.register_forward_hook(lambda module, given, out: seen.append((given[0].shape[0], given[0].is_contiguous())))
    live.setup.task.generate(live.model, ["red green blue", "red", "green"], max_new_tokens=3)
    assert (3, True) in seen
    assert all(whole for _, whole in seen)
