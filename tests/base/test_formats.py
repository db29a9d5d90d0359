"""A base in few bits computes, learns, resumes and merges as the weights that it stands for: torchao's 8 bits, and GGUF files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_lab import cli
from lora_lab.run import pipeline
from tests.conftest import fails, write_jsonl
from tests.fast.test_fast import assert_same, first_step, make_decoder
from tests.faults.test_base_files import make_gguf

QUANT = "quant=torchao_int8"
here = pytest.mark.skipif("not __import__('importlib').util.find_spec('torchao')", reason="torchao is not installed")


def layer_and_twin(dtype=torch.float32, bias=True):
    """A layer as torchao keeps it, and one with the weight that it stands for."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    from lora_lab.base import weight_only

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(48, 32, bias=bias, dtype=dtype)).requires_grad_(False)
    quantize_(layer, Int8WeightOnlyConfig())
    weight_only.own_products(layer)
    twin = nn.Linear(48, 32, bias=bias, dtype=dtype).requires_grad_(False)
    twin.weight.copy_(layer[0].weight.dequantize())
    if bias:
        twin.bias.copy_(layer[0].bias)
    return layer[0], twin


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_is_its_dequantized_twin(dtype, autocast):
    layer, twin = layer_and_twin(dtype)
    found = []
    for module in (layer, twin, layer):  # again, after a pass without gradients
        x = torch.randn(2, 5, 48, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                measured = module(x)
            y = module(x)
        (y * torch.arange(32)).sum().backward()
        found.append((y.detach(), x.grad, measured))
    assert found[1][1].norm() > 0
    for one in (found[0], found[2]):
        for own, other in zip(one, found[1], strict=True):
            assert own.dtype == other.dtype
            assert torch.equal(own, other)


@here
def test_nothing_of_a_weight_s_size_is_kept_for_backward():
    layer, _ = layer_and_twin()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        layer(torch.randn(3, 48, requires_grad=True))
    assert max(kept, default=0) < 32 * 48


def stored(model) -> dict[str, torch.Tensor]:
    """Every number of the quantized layers, as it lies in memory."""
    from lora_lab.base.weight_only import Int8Linear

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            parts, _ = module.weight.__tensor_flatten__()
            found |= {f"{name}.{part}": getattr(module.weight, part).clone() for part in parts}
    return found


@here
@pytest.mark.usefixtures("reload_here")
def test_it_is_trained_on_merged_and_measured_again(config_of, eval_file):
    given = [QUANT, f"data.eval={eval_file}", "train.max_steps=8", "export=merged", "export.dtype=float32"]
    done = pipeline.train(config_of(*given, "merge.max_loss_increase=9"))
    report = json.loads((done.path / "merge_report.json").read_text())
    losses = {name: gap["loss"] for name, gap in report["bases"].items()}
    assert set(losses) == {"full_precision", "dequantized"}
    assert report["base"] == min(losses, key=losses.get)
    assert report["bases"]["dequantized"]["max_logit_diff"] < 1e-4 < report["bases"]["full_precision"]["max_logit_diff"]
    assert json.loads((done.adapter / "lora_lab.json").read_text())["base"]["method"] == "torchao_int8"
    assert "torchao" in json.loads(done.manifest.read_text())["versions"]
    result = json.loads(done.result.read_text())
    assert cli.main(["evaluate", f"run={done.path}"]) == 0
    evaluated = json.loads((done.path / "evaluation.json").read_text())["tuned"]["loss"]
    assert evaluated == pytest.approx(result["tuned"]["loss"], rel=1e-6)


@here
def test_it_is_frozen_to_the_byte(config_of, eval_file):
    from lora_lab.training.loop import fit
    from tests.training.test_invariants import adapter_of, member_of, prepared_and_model, relative_gap

    config = config_of(
        QUANT, "model.dtype=bfloat16", "train.max_steps=3", f"data.eval={eval_file}", "train.eval_steps=1"
    )
    prepared, model = prepared_and_model(config)
    before, start = stored(model), adapter_of(model)
    fit([member_of(prepared, model, config)], prepared.train, prepared.held_out, prepared.accelerator)
    after = stored(model)
    assert len(before) == 3 * 28
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert relative_gap(adapter_of(model), start) > 0


@here
@pytest.mark.parametrize(
    "settings",
    [
        ["speed.dequantize=once"],
        pytest.param(["speed.dequantize=always", "adapter.lora_dropout=0.2"], marks=pytest.mark.long),
        pytest.param(["adapter.target_modules=[o_proj]"], marks=pytest.mark.long),
        pytest.param(["adapter.use_dora=true"], marks=pytest.mark.long),
        pytest.param(["adapter=vera"], marks=pytest.mark.long),
        pytest.param(["train.gradient_checkpointing=true"], marks=pytest.mark.long),
        pytest.param(["quant.skip_modules=[lm_head,mlp]"], marks=pytest.mark.long),
    ],
    ids=lambda settings: ",".join(settings),
)
def test_accelerations_change_nothing(tmp_path, config_of, settings):
    given = [f"model.path={make_decoder(tmp_path / 'llama', 'llama')}", QUANT, *settings]
    fast = first_step(config_of(*given))
    plain = [one for one in given if "dequantize" not in one]
    assert_same(fast, first_step(config_of(*plain, "speed=plain")))
    if settings == ["speed.dequantize=once"]:
        names = [name for name, module in fast[2].model.named_modules() if "forward" in module.__dict__]
        assert sum(name.endswith("q_proj") for name in names) == 2
        assert sum(name.endswith(".mlp") for name in names) == 2
        assert fast[2].setup.task.forward.unshareable == ""


@pytest.mark.long
@here
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_memory_is_foreseen(config_of, dtype):
    from lora_lab.adapters.attach import trainable
    from lora_lab.plan import skeletons
    from tests.plan.test_plan_memory import _estimate, _real

    found, model = (
        make(config_of(QUANT, f"model.dtype={dtype}")) for make in (lambda c: _estimate(c, device="cuda"), _real)
    )
    frozen = {id(p) for p in trainable(model).values()}
    assert found.base == sum(skeletons.nbytes(one) for one in skeletons.tensors(model) if id(one) not in frozen)
    plain = _estimate(config_of(f"model.dtype={dtype}"), device="cuda")
    assert found.base < plain.base
    assert (
        found.activations - plain.activations < (plain.base - found.base) / 2
    )  # one weight at a time, not all of them


def test_a_missing_library_names_the_extra(overrides, monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else real(name, *rest)
    )
    assert "pip install 'lora-lab[torchao]'" in fails(["plan", *overrides, QUANT], capsys)


@here
def test_layers_that_would_stay_as_they_are_refuse_it(overrides, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer(tmp_path / "gpt2")
    own = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(own).save_pretrained(tmp_path / "gpt2")
    said = fails(["train", *overrides, QUANT, f"model.path={tmp_path}/gpt2"], capsys)
    assert "Conv1D (the first: transformer.h.0.attn.c_attn)" in said
    assert "quant=nf4" in said


@here
@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_resumes_to_the_same_bytes(config_of, tmp_path, eval_file, monkeypatch, dtype):
    from lora_lab.errors import Interrupted
    from tests.training.test_resume import HARD, digests, stop_at

    def start(name: str):
        own = [QUANT, f"model.dtype={dtype}", f"data.eval={eval_file}", "train.eval_steps=3"]
        return pipeline.train(config_of(*HARD, *own, f"run_dir={tmp_path}/{name}"))

    whole = digests(start("whole").path)
    cli.signals.install()
    for micro_batch in (0, 7, 16):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            stop_at(patch, micro_batch)
            start(f"stopped{micro_batch}")
        pipeline.resume(str(tmp_path / f"stopped{micro_batch}"), [])
        assert digests(tmp_path / f"stopped{micro_batch}") == whole


@here
@pytest.mark.long
@pytest.mark.parametrize("execution", ["batched", "interleaved"])
def test_members_share_it_and_train_as_alone(config_of, tmp_path, eval_file, execution, capsys):
    from lora_lab.sweep import cohort, jobs
    from tests.sweep.test_sweep import UNLIKE, assert_same_run

    common = [QUANT, f"data.eval={eval_file}", "train.epochs=2", f"sweep.execution={execution}"]
    found = jobs.jobs_of([config_of(*common, *own, f"run_dir={tmp_path}/{i}") for i, own in enumerate(UNLIKE)])
    cohort.train(found)
    assert [job.error for job in found] == [None] * len(UNLIKE)
    assert capsys.readouterr().out.count("quant torchao_int8") == 1
    for own, job in zip(UNLIKE, found, strict=True):
        alone = pipeline.train(
            config_of(*common[:-1], *own, f"run_dir={tmp_path}/alone{len(list(tmp_path.iterdir()))}")
        )
        assert_same_run(job.run.path, alone.path)


def numbers_of(path, reader, dtype="float32") -> dict[str, torch.Tensor]:
    """A base's weights as a run gets them."""
    from lora_lab.base import load
    from lora_lab.config.model import ModelConfig, QuantConfig

    files = load.find(ModelConfig(path=str(path), dtype=dtype), reader)
    model = load.load_model(files, load.ModelKind(), dtype, QuantConfig(), torch.device("cpu"), 0)
    return model.state_dict()


@pytest.mark.parametrize(
    "kind", ["Q4_0", pytest.param("Q8_0", marks=pytest.mark.long), pytest.param("F16", marks=pytest.mark.long)]
)
def test_a_gguf_file_s_numbers_are_trained_on_as_they_are(base, tmp_path, kind):
    from gguf import GGUFReader, dequantize

    file = make_gguf(tmp_path / "base.gguf", base, kind)
    exact, rounded = numbers_of(file, 3), numbers_of(file, 3, "bfloat16")
    older = numbers_of(file, 2)
    tensors = {one.name: one for one in GGUFReader(file).tensors}
    for name, own in (("mlp.up_proj", "blk.3.ffn_up"), ("input_layernorm", "blk.3.attn_norm")):
        whole = f"model.layers.3.{name}.weight"
        written = torch.from_numpy(
            dequantize(tensors[f"{own}.weight"].data, tensors[f"{own}.weight"].tensor_type).copy()
        )
        assert torch.equal(exact[whole], written.float())
    for name, one in exact.items():
        assert torch.equal(one.bfloat16(), rounded[name])
        assert torch.equal(
            older[name], rounded[name].float()
        )  # a run of an earlier version keeps what it was trained on
    assert any(not torch.equal(one, older[name]) for name, one in exact.items())


@pytest.mark.usefixtures("reload_here")
@pytest.mark.long
def test_a_gguf_base_is_merged_into_its_own_numbers(base, tmp_path, config_of, eval_file):
    file = make_gguf(tmp_path / "base.gguf", base, "Q4_0")
    given = [
        f"model.path={file}",
        f"data.eval={eval_file}",
        "train.max_steps=4",
        "export=merged",
        "export.dtype=float32",
    ]
    done = pipeline.train(config_of(*given))
    report = json.loads((done.path / "merge_report.json").read_text())
    assert report["merged_vs_model_as_trained"]["max_logit_diff"] < 1e-3  # of logits around 30
    assert report["merged_vs_model_as_trained"]["kl"] < 1e-6


@here
@pytest.mark.long
@pytest.mark.usefixtures("reload_here")
def test_a_head_of_its_own_stays_whole(tmp_path, config_of):
    """Trained whole beside the quantized layers, merged, and left whole by the export in torchao's 8 bits."""
    rows = [{"text": f"cat {i}", "label": ["red", "blue"][i % 2]} for i in range(12)]
    told = ["task=classification", f"data.train={write_jsonl(tmp_path / 'rows.jsonl', rows)}", "data.eval_ratio=0.3"]
    export = ["export.targets=[hf,quantized]", "export.quantization=torchao_int8", "export.dtype=float32"]
    done = pipeline.train(config_of(QUANT, *told, *export, "train.max_steps=2", "merge.max_loss_increase=9"))
    assert json.loads(done.result.read_text())["merge"]["refused"] == []
    saved = load_file(done.path / "export/quantized/model.safetensors")
    assert saved["score.weight"].is_floating_point()
    assert any(one.dtype == torch.int8 for one in saved.values())


@here
@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text", "bert", "t5", "mixtral"])
def test_every_kind_of_model_learns_alike(tmp_path, config_of, kind):
    """As its plain modules, and with 8 bits near what it learns without."""
    from tests.tasks.test_tasks import make_bert, make_t5

    own = {"bert": make_bert, "t5": make_t5}.get(kind, lambda folder: make_decoder(folder, kind))(tmp_path / kind)
    rows = [{"text": f"table {colour} lamp", "label": colour} for colour in ("red", "green", "blue", "red")]
    task = {"bert": "classification", "t5": "seq2seq"}.get(kind)
    if kind == "t5":
        rows = [{"source": row["text"], "target": row["label"]} for row in rows]
    told = [f"task={task}", f"data.train={write_jsonl(tmp_path / 'rows.jsonl', rows)}"] if task else []
    given = [f"model.path={own}", *told]
    fast = first_step(config_of(*given, QUANT))
    assert len(stored(fast[2].model)) >= 3 * 8
    assert_same(fast, first_step(config_of(*given, QUANT, "speed=plain")))
    assert float(fast[0]) == pytest.approx(float(first_step(config_of(*given))[0]), rel=0.05)
