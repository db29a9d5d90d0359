"""LoRA's beginnings: each leaves the base as it is, resumes, merges, and lies on the published base when it is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_lab import cli
from lora_lab.adapters import files
from lora_lab.adapters.attach import trainable, without_adapter
from lora_lab.adapters.beginnings import layers_of, weight_of
from lora_lab.errors import Interrupted
from lora_lab.run import pipeline
from lora_lab.run.prepared import prepare
from lora_lab.sweep import cohort, jobs
from tests.adapters.test_adapters import adapter_bytes, logits
from tests.conftest import fails, make_base
from tests.training.test_resume import stop_at

BEGINNINGS = ("orthogonal", "pissa", "pissa_niter_4", "olora", "eva", "corda", "lora_ga")
RESIDUAL = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")


def later(names, first: str):
    """Cases of which only one is in the default tier."""
    return [name if name == first else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """As everywhere, but with logits of a common size: what float32 rounds away grows with them."""
    return make_base(tmp_path_factory.mktemp("models") / "calm", initializer_range=0.1)


@pytest.fixture
def told(overrides, eval_file, tmp_path):
    def overrides_of(name: str, *more: str) -> list[str]:
        own = ["adapter.r=4", "adapter.lora_alpha=6", "export.dtype=float32", "train.max_steps=4", "train.save_steps=2"]
        return [*overrides, *own, "optim.lr=0.003", f"data.eval={eval_file}", *more, f"run_dir={tmp_path}/{name}"]

    return overrides_of


@pytest.fixture
def config_for(told):
    from lora_lab.config import compose

    return lambda name, *more: compose.compose(told(name, *more))


def plain_logits(folder: Path, adapter: Path, prepared) -> torch.Tensor:
    """What plain peft makes of an adapter folder on the published base."""
    import transformers
    from peft import PeftModel

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return logits(prepared, PeftModel.from_pretrained(base, adapter))


@pytest.mark.parametrize("quant", ["none", pytest.param("nf4", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", later(BEGINNINGS, "pissa"))
def test_a_beginning_changes_nothing_and_trains_from_where_it_says(name, quant, config_for):
    prepared = prepare(config_for("run", f"adapter.init_lora_weights={name}", f"quant={quant}"))
    with prepared.loaded() as live:
        model = live.model
        with without_adapter(model):
            base = logits(prepared, model)
        found = logits(prepared, model)
        assert torch.equal(found, base) or (name == "orthogonal" and (found - base).norm() < 1e-5 * base.norm())
        for layer in layers_of(model, "default").values():
            down, up = (factor["default"] for factor in (layer.lora_A, layer.lora_B))
            if name in RESIDUAL:
                assert len(down.weight) == 8
                assert not down.change.any()
                assert not up.change.any()
                down, up = down.initial, up.initial
            else:
                down, up = down.weight, up.weight
            assert layer.scaling["default"] == 1.5
            weight, product = weight_of(layer.get_base_layer()), 1.5 * up @ down
            if name == "pissa":
                values = torch.linalg.svdvals(weight)
                torch.testing.assert_close(torch.linalg.svdvals(product)[:4], values[:4])
                torch.testing.assert_close(torch.linalg.svdvals(weight - product)[: len(values) - 4], values[4:], atol=1e-5, rtol=1e-4)
            if name == "eva":
                torch.testing.assert_close(down @ down.T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("name", later(BEGINNINGS, "olora"))
def test_it_resumes_merges_and_lies_on_the_published_base(name, told, config_for, monkeypatch, base):
    own = f"adapter.init_lora_weights={name}"
    run = pipeline.train(config_for("run", own, "export.targets=[hf,adapter,vllm]"))
    report = json.loads(run.merge_report.read_text())
    assert report["written"] == "file by file"
    assert report["merged_vs_base_and_adapter"]["max_logit_diff"] < 1e-4
    assert report["merged_vs_model_as_trained"]["max_logit_diff"] < 1e-3

    prepared = prepare(config_for("run", own))
    saved = load_file(run.adapter / files.WEIGHTS)
    settings = files.settings(run.adapter)
    assert settings.init_lora_weights is True
    assert settings.r == (8 if name in RESIDUAL else 4)
    with prepared.loaded({"default": run.adapter}) as live:
        trained = logits(prepared, live.model)
        torch.testing.assert_close(plain_logits(base, run.adapter, prepared), trained, rtol=1e-4, atol=1e-4)
    with prepare(config_for("run", own)).loaded() as live:  # the same beginning again
        fresh = files.tensors_of(live.model, "default")
        for key, value in saved.items():
            assert not torch.equal(value, fresh[key])
            if name in RESIDUAL:
                if "lora_B" in key:
                    assert torch.equal(value.chunk(2, 1)[1], fresh[key].chunk(2, 1)[1])
                else:
                    first, change = value.chunk(2, 0)
                    torch.testing.assert_close(first - change, fresh[key].chunk(2, 0)[0], rtol=0, atol=1e-5)

    cli.signals.install()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 3)
        pipeline.train(config_for("stopped", own))
    stopped = run.path.parent / "stopped"
    pipeline.resume(str(stopped), [])
    assert adapter_bytes(stopped) == adapter_bytes(run)


@pytest.mark.long
@pytest.mark.parametrize("execution", ["auto", "interleaved"])
def test_beginnings_share_one_base_in_a_sweep(execution, config_for, capsys):
    names = ("true", *BEGINNINGS)
    told = [f"sweep.execution={execution}"] if execution != "auto" else []
    found = jobs.jobs_of([config_for(f"sweep/{name}", f"adapter.init_lora_weights={name}", *told) for name in names])
    assert len(jobs.groups(found)) == 1
    cohort.train(found)
    said = capsys.readouterr().out
    assert [job.error for job in found] == [None] * len(names)
    assert ("in each pass" in said) == (execution == "auto")
    for job, name in zip(found, names, strict=True):
        alone = pipeline.train(config_for(f"alone/{name}", f"adapter.init_lora_weights={name}"))
        shared, own = (load_file(run.adapter / files.WEIGHTS) for run in (job.run, alone))
        for key in own:
            torch.testing.assert_close(shared[key], own[key], rtol=1e-3, atol=1e-4)
