"""Runs on a card, with content: packed as alone, resumed to the byte, and taken to a machine without a card. The same on a CPU, in the
long tier, shows that these tests can pass."""

from __future__ import annotations

import pytest
import torch

from lora_lab import cli
from lora_lab.data.dataset import first_examples
from lora_lab.errors import Interrupted
from lora_lab.run import pipeline, prepared, run_dir
from lora_lab.run.setup import ADAPTER
from lora_lab.training.cohort import Member, learn, learning, share
from tests.training.test_resume import HARD, digests, stop_at

DEVICES = [pytest.param("cpu", marks=pytest.mark.long), pytest.param("cuda", marks=pytest.mark.gpu)]


def gradient(config, rows: int = 4) -> torch.Tensor:
    """Of the first rows, packed or each by itself, from an adapter that does something."""
    setup = prepared.prepare(config)
    with setup.loaded() as live:
        member = Member(
            ADAPTER, config, run_dir.create(config), setup.base, live.model, setup.training_rows(), setup.task
        )
        torch.manual_seed(0)
        for parameter in member.parameters.values():
            parameter.data.copy_(torch.randn(parameter.shape) * 0.05)
        examples = first_examples(setup.training_rows(), rows)
        parts = [[one] for one in examples] if config.train.packing is False else [examples]
        with learning([member]):
            own = share(member, parts, 0, setup.accelerator, alone=True)
            for place in range(len(own.batches.batches)):
                learn([own], place, setup.accelerator)
        return torch.cat([one.grad.flatten().cpu() for one in member.parameters.values()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_packed_rows_learn_what_each_learns_alone(config_of, tmp_path, device, quant):
    """In float32 up to rounding; in bfloat16 as near to float32 as rows alone come."""

    def found(dtype: str, packing: bool) -> torch.Tensor:
        given = [f"hardware={device}", f"model.dtype={dtype}", f"quant={quant}", f"train.packing={packing}".lower()]
        return gradient(config_of(*given, f"run_dir={tmp_path}/{dtype}_{packing}"))

    exact = found("float32", False)
    assert (found("float32", True) - exact).norm() <= 1e-5 * exact.norm()
    packed, alone = ((found("bfloat16", packing) - exact).norm() for packing in (True, False))
    assert packed <= 1.5 * alone


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("more", [[], ["quant=nf4", "model.dtype=bfloat16"]], ids=" ".join)
def test_a_resumed_run_is_the_run_to_the_byte(config_of, tmp_path, eval_file, monkeypatch, device, more):
    def start(name: str):
        settings = [*HARD, f"data.eval={eval_file}", f"hardware={device}", *more]
        return pipeline.train(config_of(*settings, f"run_dir={tmp_path}/{name}"))

    expected = digests(start("whole").path)
    assert digests(start("again").path) == expected
    cli.signals.install()
    with monkeypatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(Interrupted):
            start("stopped")
    pipeline.resume(f"{tmp_path}/stopped", [])
    assert digests(tmp_path / "stopped") == expected


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_is_evaluated_and_merged_on_a_machine_without_a_card(config_of, tmp_path, eval_file, reload_here, device):
    config = config_of(f"hardware={device}", f"data.eval={eval_file}", "train.max_steps=5", f"run_dir={tmp_path}/run")
    trained = pipeline.train(config)
    there, _ = run_dir.read_result(trained)
    here = pipeline.evaluate(str(trained.path), ["hardware=cpu"])
    assert here["tuned"]["loss"] == pytest.approx(there["tuned"]["loss"], rel=1e-4)
    assert here["base"]["loss"] == pytest.approx(there["base"]["loss"], rel=1e-4)
    pipeline.merge(str(trained.path), ["hardware=cpu"])
    assert (trained.merged / "config.json").is_file()
