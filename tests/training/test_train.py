"""The loop's small parts: which rows a step sees, learning rates, metrics log, signals."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest
import torch

from lora_lab.config.train import OptimConfig, TrackerConfig
from lora_lab.errors import ConfigError, Interrupted
from lora_lab.runtime import signals
from lora_lab.runtime.tracking import MetricsLog, tracker_name
from lora_lab.training.batches import BatchPlan
from lora_lab.training.optim import build_optimizer, build_schedule


@pytest.mark.parametrize(("size", "batch", "micro"), [(20, 4, 2), (21, 4, 3), (5, 8, 8), (1, 1, 1), (16, 5, 2)])
def test_each_epoch_sees_every_row_once(size, batch, micro):
    plan = BatchPlan(size, batch, micro, seed=3)
    for epoch in range(3):
        steps = [plan.step(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]
        rows = [row for step in steps for part in step for row in part]
        assert sorted(rows) == list(range(size))
        assert all(len(part) <= micro for step in steps for part in step)
        assert all(sum(map(len, step)) == batch for step in steps[:-1])


@pytest.mark.parametrize(("size", "batch"), [(20, 4), (21, 4), (23, 6), (5, 8), (64, 8)])
def test_examples_of_one_group_come_into_different_steps(size, batch):
    """As many as there are steps but one, which may be smaller; and every example once in an epoch, in an order of its own."""
    groups = np.random.default_rng(0).permutation(np.arange(size) // max(1, math.ceil(size / batch) - 1))
    plan = BatchPlan(size, batch, batch, seed=3, groups=groups)
    epochs = []
    for epoch in range(3):
        steps = [plan.step(epoch * plan.steps_per_epoch + step)[0] for step in range(plan.steps_per_epoch)]
        assert sorted(np.concatenate(steps)) == list(range(size))
        assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
        assert all(len(set(groups[step])) == len(step) for step in steps)
        epochs.append(np.concatenate(steps).tolist())
    assert len({*map(tuple, epochs)}) == 3
    again = BatchPlan(size, batch, batch, seed=3, groups=groups)
    assert np.concatenate(again.step(plan.steps_per_epoch)).tolist() == epochs[1][: min(batch, size)]


def test_order_depends_on_seed_and_epoch_only():
    first, again, other = (BatchPlan(50, 5, 5, seed) for seed in (1, 1, 2))
    rows = [
        [int(row) for step in range(20) for part in plan.step(step) for row in part] for plan in (first, again, other)
    ]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0][:50] != rows[0][50:]
    seeds = {plan.dropout_seed(step) for plan in (first, other) for step in range(100)}
    assert len(seeds) == 200


def test_total_steps():
    plan = BatchPlan(20, 8, 8, 0)
    assert [plan.total_steps(2, None), plan.total_steps(2, 4), plan.total_steps(2, 100)] == [6, 4, 6]


def learning_rates(steps: int, **options) -> list[float]:
    config = OptimConfig(lr=0.1, **options)
    optimizer = build_optimizer(config, {"one": torch.nn.Parameter(torch.zeros(2))})
    schedule = build_schedule(config, optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


def test_schedules():
    assert learning_rates(4, schedule="constant", warmup_steps=0) == [0.1] * 4
    assert learning_rates(4, schedule="constant", warmup_steps=2) == pytest.approx([0, 0.05, 0.1, 0.1])
    assert learning_rates(4, schedule="linear", warmup_steps=0) == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert learning_rates(10, schedule="linear", warmup_steps=0.2)[:3] == pytest.approx([0, 0.05, 0.1])
    cosine = learning_rates(100, schedule="cosine", warmup_steps=0)
    assert cosine == pytest.approx([0.05 * (1 + np.cos(np.pi * step / 100)) for step in range(100)])
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps=5: must be at most the run's 4 steps"):
        learning_rates(4, warmup_steps=5)


def test_metrics_log_rewinds_and_survives_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.write(step, loss=1.0 / step)
    with open(log.file, "a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in log.read()] == [1, 2, 3, 4, 5]
    log.rewind(3)
    log.write(4, loss=9.0)
    assert [(line["step"], line["loss"]) for line in log.read()] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]
    log.write(5, loss=float("nan"))
    assert log.read()[-1] == {"step": 5, "loss": None}


def test_named_tracker_must_be_installed():
    assert tracker_name(TrackerConfig(name="none")) is None
    assert tracker_name(TrackerConfig(name="auto")) == "tensorboard"
    with pytest.raises(ConfigError, match=r"tracker\.name=comet_ml: not installed\. pip install comet-ml"):
        tracker_name(TrackerConfig(name="comet_ml"))


def test_first_signal_is_held_back_the_second_is_not():
    signals.install()
    with signals.held() as arrived:
        os.kill(os.getpid(), signal.SIGTERM)
        assert arrived == [signal.SIGTERM]
        with pytest.raises(Interrupted) as second:
            os.kill(os.getpid(), signal.SIGINT)
    assert second.value.exit_code == 130
    with pytest.raises(Interrupted) as outside:
        os.kill(os.getpid(), signal.SIGTERM)
    assert outside.value.exit_code == 143
