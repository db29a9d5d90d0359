"""AdaLoRA: the loop allocates as peft's own recipe does, and what it remembers is resumed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lora_lab import cli
from lora_lab.adapters import files
from lora_lab.config import compose
from lora_lab.errors import Interrupted
from lora_lab.run import pipeline
from lora_lab.run.prepared import prepare
from lora_lab.sweep import cohort, jobs
from lora_lab.training.batches import plan_of
from tests.adapters.test_adapters import adapter_bytes
from tests.conftest import fails
from tests.training.test_resume import stop_at

STEPS = 10
TOLD = [
    "adapter=adalora", "adapter.init_r=6", "adapter.target_r=2", "adapter.tinit=2", "adapter.tfinal=3", "adapter.deltaT=2",
    f"train.max_steps={STEPS}", "train.epochs=2", "train.save_steps=3", "train.micro_batch_size=2", "optim.schedule=constant",
    "optim.warmup_steps=0", "optim.max_grad_norm=null", "speed=plain",
]  # fmt: skip


@pytest.fixture
def config_for(overrides, tmp_path):
    plain = [text for text in overrides if not text.startswith("adapter.")]
    return lambda name, *more: compose.compose([*plain, *TOLD, *more, f"run_dir={tmp_path}/{name}"])


def ranks(tensors) -> list[int]:
    return [int((tensors[key] != 0).sum()) for key in sorted(tensors) if "lora_E" in key]


def as_peft_does(config) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The adapter by peft's own recipe (its orthogonality term inside the loss), and the losses of the rows alone."""
    prepared = prepare(config)
    model, task, plan = prepared.loaded().model, prepared.task, plan_of(config, prepared.train)
    settings = model.peft_config["default"]
    settings.tinit, settings.tfinal, settings.total_step = 2, 3, STEPS
    tuner = model.base_model
    tuner.rankallocator = type(tuner.rankallocator)(tuner.model, settings, "default")
    own = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=config.optim.lr, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        parts = [[example for i in part for example in prepared.train[int(i)]] for part in plan.step(step)]
        batches = task.step(model.train(), parts, np.random.default_rng(0))
        rows = sum(task.loss(model, batch).loss for batch in batches.batches) / batches.weight
        term = 0.0
        factors = [(name, one) for name, one in tuner.model.named_parameters() if "lora_A" in name or "lora_B" in name]
        for name, one in factors:
            moment = one @ one.T if "lora_A" in name else one.T @ one
            term = term + torch.norm(moment - torch.eye(len(moment)))
        (rows + settings.orth_reg_weight * term / len(factors)).backward()
        optimizer.step()
        tuner.update_and_allocate(step + 1)
        optimizer.zero_grad()
        losses.append(rows.item())
    settings.rank_pattern = None
    return files.tensors_of(model, "default"), losses


def test_it_is_what_peft_does_and_its_loss_is_that_of_the_rows(config_for):
    run = pipeline.train(config_for("run"))
    expected, losses = as_peft_does(config_for("other"))
    found = load_file(run.adapter / files.WEIGHTS)
    assert ranks(found) == ranks(expected)
    assert sum(ranks(found)) == 2 * len(ranks(found))
    assert len(set(ranks(found))) > 1
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "stops"),
    [("adamw", (13,)), *(pytest.param(name, (7, 13, 17), marks=pytest.mark.long) for name in ("adamw", "adamw_8bit"))],
)
def test_an_interrupted_run_remembers_what_matters(optimizer, stops, config_for, monkeypatch):
    told = f"optim.name={optimizer}"
    alone = pipeline.train(config_for("alone", told))
    cli.signals.install()
    for place, step in enumerate(stops):
        name = f"stopped{place}"
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            stop_at(patch, step)
            pipeline.train(config_for(name, told))
        pipeline.resume(str(alone.path.parent / name), [])
        assert adapter_bytes(alone.path.parent / name) == adapter_bytes(alone)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (["adapter.target_r=6"], "must be below adapter.init_r=6"),
        (["adapter.tinit=0.5", "adapter.tfinal=0.5"], "no step is left in which ranks fall"),
        (["adapter.tinit=8"], "of the run's 10 steps none is left in which ranks fall"),
    ],
)
def test_a_schedule_that_leaves_nothing_is_refused(told, says, overrides, capsys, tmp_path):
    plain = [text for text in overrides if not text.startswith("adapter.")]
    assert says in " ".join(fails(["train", *plain, *TOLD, *told], capsys).split())
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_sweep_over_its_rates_is_each_alone(config_for):
    """peft trains one, and there are three."""
    rates = ("optim.lr=0.01", "optim.lr=0.002", "optim.lr=0.005")
    found = jobs.jobs_of([config_for(f"sweep/{place}", rate) for place, rate in enumerate(rates)])
    cohort.train(found)
    for place, (job, rate) in enumerate(zip(found, rates, strict=True)):
        assert job.error is None
        alone = pipeline.train(config_for(f"alone{place}", rate))
        assert adapter_bytes(job.run) == adapter_bytes(alone)
