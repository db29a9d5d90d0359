"""The benchmark of LoRA beside full fine-tuning: both must learn from the same loss."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benchmarks import regret
from lora_lab.run import prepared, run_dir
from lora_lab.training.cohort import Member, learn, learning, share


def test_full_fine_tuning_has_the_loss_and_the_gradient_of_the_product(config_of):
    """A fresh LoRA's B has the gradient scale * G A^T, where G is what the weight itself would get."""
    config = config_of("train.micro_batch_size=2", "adapter.target_modules=all-linear")
    setup = prepared.prepare(config)
    train = setup.training_rows()
    with setup.loaded() as live:
        member = Member("default", config, run_dir.create(config), setup.base, live.model, train, setup.task)
        parts = [[example for place in part for example in train[int(place)]] for part in member.plan.step(0)]
        with learning([member]):
            one = share(member, parts, 0, setup.accelerator, alone=True)
            for place in range(len(parts)):
                learn([one], place, setup.accelerator)
        own = {name: (parameter.detach().clone(), parameter.grad) for name, parameter in member.parameters.items()}
    [base] = setup.bases()
    model, task = regret.Whole(base), setup.for_other(config).task
    loss = regret.backward(model, task, parts, 0, setup.accelerator)
    assert loss == pytest.approx(one.mean_loss(), rel=1e-6)
    compared = 0
    for name, (_, gradient) in own.items():
        if "lora_B" not in name:
            continue
        layer = name.removeprefix("base_model.model.").partition(".lora_B")[0]
        down, _ = own[name.replace("lora_B", "lora_A")]
        scale = config.adapter.lora_alpha / config.adapter.r
        expected = scale * base.get_submodule(layer).weight.grad @ down.T
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        compared += 1
    assert compared == 7 * 4
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_full_fine_tuning_trains_every_weight(config_of):
    setup = prepared.prepare(config := config_of("train.max_steps=2"))
    [base] = setup.bases()
    before = [one.detach().clone() for one in base.parameters()]
    regret.fine_tune(regret.Whole(base), setup.for_other(config).task, config, setup.training_rows(), setup.accelerator)
    assert not any(torch.equal(*pair) for pair in zip(before, base.parameters(), strict=True))


def test_learning_rates_are_added_until_the_best_has_neighbours():
    arm, losses = regret.Arm(), regret.Losses()
    dev = lambda place: (place + 9.7) ** 2  # noqa: E731
    while runs := regret.wanted(arm, 0, losses):
        losses |= {run: {"dev": dev(run.place)} for run in runs}
    assert sorted(run.place for run in losses) == [-11, -10, -9, -8, -7]
    assert regret.optimum(arm, 0, losses) == pytest.approx(-9.7 / 3)
    [first] = {run.place for run in regret.wanted(arm, 1, losses)} - {
        -11,
        -9,
    }  # other seeds begin where the first was best
    assert first == -10


def test_a_claim_is_judged_by_the_interval_alone():
    assert regret.Estimate([1.0, 1.01, 0.99]).verdict(math.log10(5), math.log10(20)) == "confirmed"
    assert regret.Estimate([0.1, 0.11, 0.09]).verdict(math.log10(5), math.log10(20)) == "refuted"
    assert regret.Estimate([1.0, 0.5]).verdict(math.log10(5), math.log10(20)) == "not told apart"
    assert regret.Estimate([1.0]).verdict(0, 2) == "not told apart"
    assert dataclasses.astuple(regret.FULL) == ("full", "all", 0, 8)
