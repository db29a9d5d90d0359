"""Training in float16: what float32 would learn, up to rounding; a loss whose scale follows the gradients, to the byte after a resume."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lab import cli
from lora_lab.errors import BaseModelError, Interrupted
from lora_lab.run import pipeline
from lora_lab.sweep import cohort as sweep_cohort
from lora_lab.sweep import jobs
from lora_lab.training import cohort
from tests.conftest import make_base
from tests.training.test_invariants import relative_gap, train_once
from tests.training.test_resume import HARD, digests, stop_at

FLOAT16 = "model.dtype=float16"


def losses_of(folder) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(
    "told",
    [
        (),
        pytest.param(("speed=plain",), marks=pytest.mark.long),
        pytest.param(("quant=nf4",), marks=pytest.mark.long),
        pytest.param(("train.gradient_checkpointing=true", "train.micro_batch_size=2"), marks=pytest.mark.long),
        pytest.param(("train.packing=false", "adapter.lora_dropout=0.2"), marks=pytest.mark.long),
        pytest.param(("quant=int8",), marks=pytest.mark.long),
        pytest.param(("adapter=dora",), marks=pytest.mark.long),
        pytest.param(
            ("train.fgm_epsilon=0.5", "train.rdrop_alpha=0.5", "adapter.lora_dropout=0.1"), marks=pytest.mark.long
        ),
        pytest.param(("optim=adamw_8bit", "speed.dequantize=once", "quant=fp4"), marks=pytest.mark.long),
    ],
)
def test_a_run_in_float16_learns_what_float32_does(config_of, tmp_path, told):
    """bfloat16 rounds eight times as coarsely, so it is further off."""
    runs = {
        dtype: train_once(
            config_of("train.max_steps=2", "optim.lr=1e-3", f"model.dtype={dtype}", *told), tmp_path / dtype
        )
        for dtype in ("float32", "float16", "bfloat16")
    }
    (exact, expected), (half, losses), (coarse, _) = runs.values()
    # weights on the border of two codes are quantized otherwise once they are rounded
    assert losses == pytest.approx(expected, rel=5e-2 if any("quant" in text for text in told) else 5e-3)
    assert all(one.dtype == torch.float32 for one in half.values())
    assert relative_gap(half, exact) < relative_gap(coarse, exact)


def test_a_step_whose_gradient_overflows_is_made_again(config_of, tmp_path, monkeypatch, capsys):
    expected, losses = train_once(config_of("train.max_steps=3", FLOAT16), tmp_path / "a")
    capsys.readouterr()
    monkeypatch.setattr(cohort, "_LOSS_SCALE", 2.0**24)
    found, again = train_once(config_of("train.max_steps=3", FLOAT16), tmp_path / "b")
    assert "step 1: a gradient is beyond float16; made again, the loss times" in capsys.readouterr().out
    assert again == pytest.approx(losses, rel=1e-4)
    assert relative_gap(found, expected) < 1e-2


@pytest.mark.long
def test_gradients_that_are_too_small_without_a_scale(config_of, tmp_path, monkeypatch):
    """Of a loss that is far smaller than the numbers which float16 has."""
    told = ("train.max_steps=2", "optim.max_grad_norm=null", "optim.eps=1e-16", "speed=plain")
    as_learned = cohort.Share.as_learned
    gaps = {}
    for scale in (2.0**16, 1.0):
        monkeypatch.setattr(cohort, "_LOSS_SCALE", scale)
        with monkeypatch.context() as patch:
            patch.setattr(cohort.Share, "as_learned", lambda self, loss: as_learned(self, loss) * 2.0**-14)
            exact, _ = train_once(config_of(*told), tmp_path / f"{scale}-a")
            found, _ = train_once(config_of(*told, FLOAT16), tmp_path / f"{scale}-b")
        gaps[scale] = relative_gap(found, exact)
    assert gaps[2.0**16] < gaps[1.0] / 3


@pytest.fixture
def lively(monkeypatch):
    """A scale that is raised often enough to overflow within a few steps."""
    monkeypatch.setattr(cohort, "_STEPS_AT_SCALE", 2)
    monkeypatch.setattr(cohort, "_LOSS_SCALE", 2.0**18)


@pytest.mark.long
@pytest.mark.usefixtures("lively")
def test_resume_is_exact_in_float16(config_of, tmp_path, eval_file, monkeypatch, capsys):
    cli.signals.install()

    def start(name: str):
        return pipeline.train(config_of(*HARD, FLOAT16, f"data.eval={eval_file}", f"run_dir={tmp_path}/{name}"))

    expected = digests(start("whole").path)
    assert "made again" in capsys.readouterr().out
    state = json.loads(next((tmp_path / "whole/checkpoints").glob("step-12/state.json")).read_text())["member"]
    assert state["loss_scale"] >= 1
    assert len(losses_of(tmp_path / "whole")) == 12  # none is skipped
    for micro_batch in (16,):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            stop_at(patch, micro_batch)
            start(f"stopped{micro_batch}")
        pipeline.resume(f"{tmp_path}/stopped{micro_batch}", [])
        assert digests(tmp_path / f"stopped{micro_batch}") == expected


@pytest.mark.long
@pytest.mark.usefixtures("lively")
def test_members_of_a_cohort_scale_their_own_losses(config_of, tmp_path, eval_file, monkeypatch):
    each = (["adapter.r=2", "optim.lr=0.01"], ["adapter.r=4", "seed=3", "train.batch_size=3"])
    told = (FLOAT16, f"data.eval={eval_file}", "train.max_steps=6")
    found = jobs.jobs_of([config_of(*told, *own, f"run_dir={tmp_path}/sweep/{i}") for i, own in enumerate(each)])
    sweep_cohort.train(found)
    assert [job.error for job in found] == [None, None]
    for i, own in enumerate(each):
        alone = pipeline.train(config_of(*told, *own, f"run_dir={tmp_path}/alone/{i}"))
        assert losses_of(tmp_path / f"sweep/{i}") == pytest.approx(losses_of(alone.path), rel=5e-3)


@pytest.mark.long
@pytest.mark.usefixtures("reload_here")
def test_a_run_in_float16_is_merged_and_evaluated(overrides, tmp_path, eval_file, capsys):
    told = [*overrides, FLOAT16, f"data.eval={eval_file}", "train.max_steps=2", "quant=nf4", "export.dtype=float16"]
    assert cli.main(["train", *told]) == 0
    assert cli.main(["merge", f"run={tmp_path}/run"]) == 0, capsys.readouterr().err
    assert cli.main(["evaluate", f"run={tmp_path}/run"]) == 0
    merged = load_file(tmp_path / "run/merged/model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.float16}


def test_weights_beyond_float16_are_refused(config_of, tmp_path):
    base = make_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = 70000
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        BaseModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds numbers beyond .* float16 .*65504"
    ):
        pipeline.train(config_of(f"model.path={base}", FLOAT16))


def test_activations_beyond_float16_are_refused(config_of, tmp_path):
    base = make_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 3e4
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"not finite .* before any training\. .*model\.dtype=float32"):
        pipeline.train(config_of(f"model.path={base}", FLOAT16, "speed=plain"))
