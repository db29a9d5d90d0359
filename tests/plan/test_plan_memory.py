"""The estimate against real small models: exact where bytes can be counted, ordered where they cannot."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from lora_lab.adapters.attach import attach, trainable
from lora_lab.base import load
from lora_lab.base.layers import layers_of
from lora_lab.plan import memory, on_card, skeletons
from lora_lab.plan.memory import Shape
from lora_lab.run import prepared as stages
from lora_lab.tasks.base import StepBatches
from lora_lab.tasks.causal_lm.task import CausalLM
from lora_lab.training.cohort import Share, learn
from lora_lab.training.optim import build_optimizer

SHORT, LONG = Shape((20, 12), 10), Shape((20, 12, 40), 30)


def _estimate(config, train=LONG, evaluation=None, device="cpu"):
    found, task = stages.with_task(config, stages.find_base(config), {})
    measured = None if evaluation is None else memory.blank(evaluation)
    estimate = memory.estimate if device == "cpu" else on_card.estimate
    return estimate(config, found.base, found.kind, task, memory.blank(train), measured)


def _real(config):
    kind = load.ModelKind()
    files, device = load.find(config.model), torch.device("cpu")
    base = load.load_model(files, kind, config.model.dtype, config.quant, device, config.seed)
    return attach(base, config.adapter, "default", kind, config.seed)


@pytest.mark.parametrize(
    "quant",
    [
        ["quant=none"],
        ["quant=nf4", "quant.double_quant=false"],
        ["quant=nf4", "quant.double_quant=true"],
        ["quant=fp4"],
        ["quant=int8"],
    ],
)
def test_weights_gradients_and_optimizer_are_exact(config_of, quant):
    config = config_of(*quant)
    found, model = _estimate(config, device="cuda"), _real(config)
    base = sum(skeletons.nbytes(tensor) for tensor in skeletons.tensors(model) if not tensor.requires_grad)
    adapter = sum(skeletons.nbytes(parameter) for parameter in trainable(model).values())
    assert (found.base, found.adapter, found.gradients) == (base, adapter, adapter)

    optimizer = build_optimizer(config.optim, trainable(model))
    for parameter in trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
    assert found.optimizer == sum(map(skeletons.nbytes, moments))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_simulated_step_takes_what_a_real_one_takes(config_of, dtype):
    config = config_of(f"model.dtype={dtype}")
    found, prepared = _estimate(config), stages.prepare(config)
    member = SimpleNamespace(config=config, model=prepared.loaded().model.train(), task=prepared.task)
    batch, usage = memory.blank(LONG), memory._Usage(memory._MAPPED)
    share = Share(member, [], StepBatches([batch], batch.weight), batch.weight, None)
    with usage, prepared.task.forward.segments(member.model):
        usage.ignore(skeletons.tensors(member.model))
        learn([share], 0, prepared.accelerator)
    # a few tables that the real step makes, such as the positions of a rotary embedding, may or may not be cached
    assert found.activations == pytest.approx(usage.heap_peak, rel=0.01)


def test_more_of_anything_never_takes_less(config_of):
    config = config_of()
    small = _estimate(config, SHORT).peak
    assert small < _estimate(config, LONG).peak
    assert small < _estimate(config, dataclasses.replace(SHORT, supervised=30)).peak
    assert small < _estimate(config_of("adapter.r=32"), SHORT).peak
    assert small < _estimate(config, Shape(SHORT.lengths * 2, 20)).peak


def test_checkpointing_needs_less_and_evaluation_too(config_of):
    plain = _estimate(config_of(), LONG, evaluation=LONG, device="cuda")
    saving = _estimate(config_of("train.gradient_checkpointing=true"), LONG, device="cuda")
    assert saving.activations < 0.7 * plain.activations
    assert plain.phases["evaluation"] < plain.phases["train"] == plain.peak
    assert plain.peak_phase == "train"


@pytest.mark.parametrize(("quant", "count"), [pytest.param("none", 2, marks=pytest.mark.long), ("nf4", 4)])
def test_a_process_holds_its_part_of_a_sharded_base(config_of, quant, count):
    told = ["speed=plain", f"quant={quant}"]
    sharded = config_of(*told, "hardware.shard=true", f"hardware.processes={count}")
    whole, found = (_estimate(one, device="cuda") for one in (config_of(*told), sharded))
    model = _real(config_of(*told)).get_base_model()
    layers = [
        sum(skeletons.nbytes(one) for name, one in layer.named_parameters() if "lora_" not in name)
        for layer in layers_of(model)
    ]
    elsewhere = sum(layers) * (count - 1) // count
    assert found.base == whole.base - elsewhere
    assert found.gathered == 2 * max(layers)
    assert found.phases["train"] == whole.phases["train"] - elsewhere + found.gathered
    on_cpu = _estimate(sharded)
    assert on_cpu.base + on_cpu.mapped_file == found.base
    assert on_cpu.phases["load"] > on_cpu.base + elsewhere  # each process reads all of it


def test_phases_are_those_that_the_run_has(config_of):
    assert set(_estimate(config_of(), SHORT).phases) == {"load", "train"}
    assert set(_estimate(config_of("export.targets=[hf]"), SHORT, SHORT).phases) == {
        "load",
        "train",
        "evaluation",
        "merge",
    }


def test_no_weights_are_needed_or_allocated(config_of, tmp_path):
    """A model of 8 billion weights from its config.json alone."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    config = config_of("model.dtype=bfloat16", "quant=nf4", "quant.double_quant=false")
    task = CausalLM(config, SimpleNamespace(tokenizer=None), {}, None)
    batch = memory.blank(Shape((512,), 128))
    files = load.BaseFiles("big", tmp_path, "")
    found = on_card.estimate(config, files, load.ModelKind(), task, batch, None)
    linear = 4 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * (2 * 128256 * 4096 + (2 * 4 + 1) * 4096)  # embedding, head and norms in bfloat16
    assert found.base == linear // 2 + 4 * linear // 64 + rest


def test_the_largest_row_bounds_every_row():
    assert memory.largest([Shape((5, 5), 3), Shape((8,), 7)]) == Shape((5, 5), 7)
