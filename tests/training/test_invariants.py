"""What must hold for every change: the mathematics of the loop, on a small real model in float32."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from lora_lab.adapters.attach import attach, coverage, trainable
from lora_lab.base import load
from lora_lab.config.model import QuantConfig
from lora_lab.data.collate import pack
from lora_lab.data.dataset import first_examples
from lora_lab.fast import isolation, segments
from lora_lab.fast.forward import Forward
from lora_lab.run import prepared as stages
from lora_lab.run import run_dir
from lora_lab.run.setup import Live
from lora_lab.training.batches import plan_of
from lora_lab.training.cohort import Member
from lora_lab.training.loop import fit
from tests.conftest import make_base


def prepared_and_model(config):
    prepared = stages.prepare(config)
    return prepared, prepared.loaded().model


def member_of(prepared, model, config, run: run_dir.RunDir | None = None) -> Member:
    """The model's only member, in a fresh folder unless `run` is given."""
    run, task = run or run_dir.create(config), prepared.task
    return Member("default", config, run, prepared.base, model, prepared.train, task)


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def train_once(config, tmp_path):
    """Train in a fresh folder; the adapter and the losses of each step."""
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    fit([member], prepared.train, prepared.held_out, prepared.accelerator)
    return adapter_of(model), [line["loss"] for line in member.log.read() if "loss" in line]


def gradients(config) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient of the first optimizer step, as the loop accumulates it, from an adapter that does something."""
    prepared, model = prepared_and_model(config)
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data.normal_(std=0.1)
    plan = plan_of(config, prepared.train)
    chosen = [[prepared.train[i][0] for i in part] for part in plan.step(0)]
    total = sum(int(example.supervised.sum()) for part in chosen for example in part)
    loss = 0.0
    batches = prepared.task.step(model, chosen, np.random.default_rng(0)).batches
    assert len(batches) == (sum(map(len, chosen)) if config.train.packing is False else len(chosen))
    for batch in batches:
        out = prepared.task.loss(model, batch)
        (out.loss / total).backward()
        loss += out.loss.item()
    return {name: parameter.grad for name, parameter in trainable(model).items()}, loss / total


def relative_gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    flat = [torch.cat([tensors[name].flatten() for name in one]) for tensors in (one, other)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


# float32 sums in another order: 1e-6 relative for one loss, a few times that for a gradient through four layers
LOSS, GRADIENT = 1e-6, 5e-6


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_packed_equals_unpacked(config_of, seed):
    packed, packed_loss = gradients(config_of(f"seed={seed}", "train.batch_size=8"))
    plain, plain_loss = gradients(config_of(f"seed={seed}", "train.batch_size=8", "train.packing=false"))
    assert packed_loss == pytest.approx(plain_loss, rel=LOSS)
    assert relative_gap(packed, plain) <= GRADIENT


@pytest.mark.parametrize("micro", [1, 3])
def test_any_split_of_a_step_is_the_same_step(config_of, micro):
    whole, whole_loss = gradients(config_of("train.batch_size=8"))
    split, split_loss = gradients(config_of("train.batch_size=8", f"train.micro_batch_size={micro}"))
    assert split_loss == pytest.approx(whole_loss, rel=LOSS)
    assert relative_gap(split, whole) <= GRADIENT


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_changes_nothing(config_of, tmp_path, every):
    plain, plain_losses = train_once(config_of("train.max_steps=3"), tmp_path / "a")
    settings = ["train.gradient_checkpointing=true", f"train.recompute_every={every}"]
    checked, losses = train_once(config_of("train.max_steps=3", *settings), tmp_path / "b")
    assert losses == pytest.approx(plain_losses, rel=LOSS)
    assert relative_gap(checked, plain) <= 1e-5


def test_supervised_logits_equal_full_logits(config_of):
    prepared, model = prepared_and_model(config_of())
    batch = pack(prepared.train[0])
    full = model(input_ids=batch.input_ids).logits[0, batch.logit_positions]
    torch.testing.assert_close(Forward().logits(model, batch), full, rtol=1e-6, atol=1e-6)


def test_sliding_window_is_kept_when_packed(tmp_path):
    """Segments longer than the window see as far back as they would alone."""
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(**shape, num_key_value_heads=2, vocab_size=100, sliding_window=5, initializer_range=0.3)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    rows = [torch.randint(0, 100, (length,)) for length in (12, 3, 9)]
    alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
    model.set_attn_implementation(segments.IMPLEMENTATION)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    together = model(
        input_ids=torch.cat(rows)[None],
        position_ids=positions,
        segment_lengths=[len(row) for row in rows],
        use_cache=False,
    ).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_isolation_check_catches_a_leak(config_of, monkeypatch):
    from transformers import AttentionInterface

    from lora_lab.errors import TrainingError

    prepared, model = prepared_and_model(config_of())
    isolation.check_isolation(model, first_examples(prepared.train, 2))

    def leaky(module, query, key, value, mask, segment_lengths, **kwargs):
        return segments._segment_attention(module, query, key, value, mask, [sum(segment_lengths)], **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, segments.IMPLEMENTATION, leaky)
    with pytest.raises(TrainingError, match="rows would see each other"):
        isolation.check_isolation(model, first_examples(prepared.train, 2))


def reference_losses(config, steps: int) -> list[float]:
    """A plain transformers + peft loop: padded rows, full logits, labels of -100, the library's own loss."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, get_scheduler

    prepared = stages.prepare(config)
    model = AutoModelForCausalLM.from_pretrained(prepared.base.folder, dtype=torch.float32)
    torch.manual_seed(config.seed)
    model = get_peft_model(model, config.adapter.peft_config("CAUSAL_LM")).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.optim.lr, weight_decay=config.optim.weight_decay)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=round(0.03 * steps), num_training_steps=steps)
    plan = plan_of(config, prepared.train)
    losses = []
    for step in range(steps):
        rows = [prepared.train[i][0] for part in plan.step(step) for i in part]
        width = max(len(row.input_ids) for row in rows)
        ids, mask, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width), None
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            ids[i, :length], mask[i, :length] = torch.from_numpy(row.input_ids), 1
            labels[i, :length] = torch.where(torch.from_numpy(row.supervised), ids[i, :length], -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_steps_equal_a_plain_reference_loop(config_of, tmp_path, seed):
    config = config_of(
        "train.max_steps=20", "train.epochs=10", "train.micro_batch_size=2", f"seed={seed}", "optim.lr=1e-3"
    )
    _, losses = train_once(config, tmp_path)
    expected = reference_losses(config, 20)
    assert len(losses) == 20
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["none", "nf4", "fp4", "int8"])
def test_fresh_adapter_changes_nothing_and_covers_all_layers(base, config_of, method):
    files = load.find(config_of().model)
    quant = QuantConfig(method=method, double_quant=method in ("nf4", "fp4"))
    model = load.load_model(files, load.ModelKind(), "float32", quant, torch.device("cpu"), 0)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model = attach(model, config_of().adapter, "default", load.ModelKind(), 0).eval()
        after = model(input_ids=ids).logits
    assert torch.equal(before, after)
    where = coverage(model, "default")
    assert (where.matched, where.linear_layers) == (28, 29)
    assert where.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = load.load_model(files, load.ModelKind(), "float32", QuantConfig(), torch.device("cpu"), 0)
    assert where.base_parameters == sum(parameter.numel() for parameter in plain.parameters())


@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_quantized_base_is_frozen_to_the_byte(config_of, tmp_path, eval_file, method):
    config = config_of(
        f"quant={method}", "model.dtype=bfloat16", "train.max_steps=3", f"data.eval={eval_file}", "train.eval_steps=1"
    )
    config = dataclasses.replace(config, run_dir=str(tmp_path / "r"))
    prepared, model = prepared_and_model(config)
    frozen = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    assert any(tensor.dtype in (torch.uint8, torch.int8) for tensor in frozen.values())
    start = adapter_of(model)
    member = member_of(prepared, model, config)
    fit([member], prepared.train, prepared.held_out, prepared.accelerator)
    after = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert relative_gap(adapter_of(model), start) > 0


def test_members_of_a_cohort_train_as_if_alone(config_of, tmp_path, eval_file):
    """Two members of unlike rank, learning rate, seed and dropout, in turns on one base: bit-equal to solo runs."""
    settings = [
        ("adapter.r=2", "optim.lr=0.003", "seed=3", "adapter.lora_dropout=0.1"),
        ("adapter.r=8", "optim.lr=0.01", "seed=4", "train.batch_size=8", "adapter.target_modules=[q_proj,v_proj]"),
    ]
    common = (f"data.eval={eval_file}", "train.epochs=2", "train.eval_steps=3")
    configs = [config_of(*common, *own, f"run_dir={tmp_path}/joint{i}") for i, own in enumerate(settings)]
    prepared = stages.prepare(configs[0])
    model = load.load_model(prepared.base, prepared.kind, "float32", QuantConfig(), torch.device("cpu"), 0)
    members = []
    for i, config in enumerate(configs):
        model = attach(model, config.adapter, f"member{i}", prepared.kind, config.seed)
        run = run_dir.create(config)
        members.append(Member(f"member{i}", config, run, prepared.base, model, prepared.train, prepared.task))
    Live(prepared, model).accelerate()
    fit(members, prepared.train, prepared.held_out, prepared.accelerator)
    for i, (config, member) in enumerate(zip(configs, members, strict=True)):
        alone, losses = train_once(config, tmp_path / f"solo{i}")
        assert [line["loss"] for line in member.log.read() if "loss" in line] == losses
        with member.active():
            together = adapter_of(model)
        assert [t.tolist() for t in together.values()] == [t.tolist() for t in alone.values()]


def test_early_stopping_and_best_adapter(config_of, tmp_path, eval_file):
    """A learning rate that spoils the adapter: training stops early, and the best adapter is the one that is kept."""
    config = config_of(
        f"data.eval={eval_file}", "train.epochs=20", "train.eval_steps=1", "train.early_stopping_patience=3",
        "optim.lr=0.1", "optim.schedule=constant", "optim.max_grad_norm=null", f"run_dir={tmp_path}/r", "optim.warmup_steps=0",
    )  # fmt: skip
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    fit([member], prepared.train, prepared.held_out, prepared.accelerator)
    evals = {line["step"]: line["eval_loss"] for line in member.log.read() if "eval_loss" in line}
    assert member.state.stopped_early
    assert member.state.step == member.state.best_step + 3 < member.total_steps
    assert member.state.best_loss == min(evals.values()) == evals[member.state.best_step]
    assert prepared.task.measure(model.eval(), prepared.held_out).metrics["loss"] == pytest.approx(
        member.state.best_loss, rel=1e-6
    )


def test_a_damaged_best_checkpoint_is_not_loaded(config_of, tmp_path, eval_file):
    from lora_lab.errors import CheckpointError
    from lora_lab.training.loop import _load_best

    config = config_of(f"data.eval={eval_file}", "train.max_steps=3", "train.eval_steps=1", f"run_dir={tmp_path}/r")
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    fit([member], prepared.train, prepared.held_out, prepared.accelerator)
    member.state.best_step, member.state.step = member.state.step, 99
    weights = member.run.checkpoints / f"step-{member.state.best_step}" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        _load_best(member)


def test_non_finite_loss_stops_before_the_update(config_of, tmp_path, monkeypatch):
    from lora_lab.errors import TrainingError
    from lora_lab.training import checkpoint

    config = config_of(f"run_dir={tmp_path}/r", "train.max_steps=4")
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    real, seen = prepared.task.loss, []

    def poisoned(model, batch, *more):
        seen.append(adapter_of(model))
        out = real(model, batch, *more)
        return dataclasses.replace(out, loss=out.loss * float("nan")) if len(seen) == 3 else out

    monkeypatch.setattr(prepared.task, "loss", poisoned)
    with pytest.raises(TrainingError, match=r"Step 3: loss nan.*Rows of the step: train\.jsonl row \d+"):
        fit([member], prepared.train, None, prepared.accelerator)
    assert relative_gap(adapter_of(model), seen[-1]) == 0
    assert checkpoint.newest_valid(member.run.checkpoints)[0].name == "step-2"


def test_the_first_module_that_is_not_finite_is_named(config_of, tmp_path):
    """An overflow in the middle of the model, as half-precision weights have them."""
    from lora_lab.errors import TrainingError

    config = config_of(
        f"run_dir={tmp_path}/r", "train.max_steps=1", "train.packing=false", "adapter.target_modules=[q_proj]"
    )
    prepared, model = prepared_and_model(config)
    model.get_base_model().model.layers[2].mlp.up_proj.weight.data.fill_(1e38)
    member = member_of(prepared, model, config)
    with pytest.raises(
        TrainingError, match=r"First not finite: the output of model\.layers\.2\.mlp\.\w+ \(float32\) in train"
    ):
        fit([member], prepared.train, None, prepared.accelerator)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore")  # bitsandbytes says that paged memory is ordinary memory on a CPU
def test_8bit_optimizers_learn_and_resume(config_of, tmp_path, name):
    from lora_lab.training import checkpoint

    config = config_of(
        f"optim={name}", "train.max_steps=5", f"run_dir={tmp_path}/r", "train.save_steps=2", "adapter.r=64"
    )
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    fit([member], prepared.train, None, prepared.accelerator)
    finished = adapter_of(model)
    prepared, model = prepared_and_model(config)
    again = member_of(prepared, model, config, member.run)
    checkpoint.restore(again, member.run.checkpoints / "step-4")
    fit([again], prepared.train, None, prepared.accelerator)
    assert relative_gap(adapter_of(model), finished) == 0


def test_8bit_updates_are_the_librarys_to_the_byte():
    """Without its wait for each tensor: states in 8 bits, in 32 (small tensors), and none where there is no gradient."""
    import bitsandbytes

    from lora_lab.training.adamw_8bit import AdamW8bit

    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((64, 96), (8, 8), (4, 4))]
    twins = [[torch.nn.Parameter(one.clone()) for one in start] for _ in range(2)]
    kinds = (bitsandbytes.optim.AdamW8bit, AdamW8bit)
    plain, own = (kind(params, lr=0.01, weight_decay=0.1) for kind, params in zip(kinds, twins, strict=True))
    for _ in range(4):
        for one, other in zip(*(params[:2] for params in twins), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        plain.step()
        own.step()
    assert all(map(torch.equal, *twins))
    assert [len(own.state[one]) for one in twins[1]] == [len(plain.state[one]) for one in twins[0]]
    assert own.state[twins[1][0]]["state1"].dtype == torch.uint8
    assert own.step(lambda: 2.5) == 2.5


def test_unpackable_architecture_is_refused_or_runs_unpacked(tmp_path, config_of, capsys):
    """Soft-capped attention (Gemma 2) is not done per segment: rows go one by one then, and to demand packing is refused."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from lora_lab.errors import ConfigError

    folder = make_base(tmp_path / "gemma")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(**shape, num_key_value_heads=2, head_dim=16, vocab_size=size, pad_token_id=0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    told = f"model.path={folder}", "train.max_steps=1"
    with pytest.raises(ConfigError, match=r"cannot be packed \(attention with soft capping.*Set train.packing=false"):
        train_once(config_of(*told, "train.packing=true"), tmp_path / "a")
    _, losses = train_once(config_of(*told), tmp_path / "b")
    assert "rows one by one: this model cannot be packed" in capsys.readouterr().out
    _, apart = train_once(config_of(*told, "train.packing=false"), tmp_path / "c")
    assert losses == apart


@pytest.mark.parametrize("method", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_a_kept_quantized_base_is_the_one_that_was_quantized(tmp_path, cache, method, double):
    """The same bytes, loaded without quantizing; damaged, it is made again."""
    import shutil

    from lora_lab.base import quantized
    from lora_lab.base.cache import usable
    from lora_lab.config.model import ModelConfig

    shutil.rmtree(cache / "quantized", ignore_errors=True)
    base = make_base(tmp_path / "base")
    files, kind, quant = (
        load.find(ModelConfig(path=str(base))),
        load.ModelKind(),
        QuantConfig(method=method, double_quant=double),
    )

    def tensors() -> dict[str, torch.Tensor]:
        model = load.load_model(files, kind, "bfloat16", quant, torch.device("cpu"), 0)
        found = {}
        for name, parameter in model.named_parameters():
            assert not parameter.requires_grad
            found[name] = parameter.data
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                found |= {f"{name}.{key}": value for key, value in state.as_dict().items() if torch.is_tensor(value)}
        return found

    first = tensors()
    folder = quantized.folder_of(files, kind, "bfloat16", quant, "cpu")
    assert usable(folder)
    again = tensors()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(tensor.dtype == torch.uint8 for tensor in first.values())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert all(torch.equal(first[name], tensor) for name, tensor in tensors().items())
    assert usable(folder)
    other = QuantConfig(method=method, double_quant=not double)
    assert quantized.folder_of(files, kind, "bfloat16", other, "cpu") != folder
    assert quantized.folder_of(files, kind, "bfloat16", QuantConfig(method=method, cache=False), "cpu") is None
