"""LoRA's own: each beginning leaves the base as it is, resumes, merges, and lies on the published base when it is saved; what trains
beside the factors does so too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_lab import cli
from lora_lab.adapters import files
from lora_lab.adapters.attach import without_adapter
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
                torch.testing.assert_close(
                    torch.linalg.svdvals(weight - product)[: len(values) - 4], values[4:], atol=1e-5, rtol=1e-4
                )
            if name == "eva":
                torch.testing.assert_close(down @ down.T, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.long
@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("name", BEGINNINGS)
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


def test_loftq_takes_back_what_quantizing_took(config_for, monkeypatch):
    told = ["adapter=loftq", "adapter.r=8", "quant=nf4"]
    prepared = prepare(config_for("run", *told))
    published = prepare(config_for("run")).loaded().model.get_base_model()
    with prepared.loaded() as live:
        for place, layer in layers_of(live.model, "default").items():
            weight = weight_of(published.get_submodule(place).get_base_layer())
            seen = weight_of(layer.get_base_layer())
            corrected = seen + layer.get_delta_weight("default")
            assert (weight - corrected).norm() < 0.9 * (weight - seen).norm()
    run = pipeline.train(config_for("run", *told))
    cli.signals.install()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 3)
        pipeline.train(config_for("stopped", *told))
    pipeline.resume(str(run.path.parent / "stopped"), [])
    assert adapter_bytes(run.path.parent / "stopped") == adapter_bytes(run)


@pytest.mark.long
@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize(
    "own", ["adapter.use_rslora=true", "adapter.rank_pattern={q_proj: 2}", "adapter.use_dora=true"]
)
def test_a_beginning_goes_with_other_settings(own, config_for):
    told = ["adapter.init_lora_weights=pissa", own]
    with prepare(config_for("run", *told)).loaded() as live:
        scales = {place: layer.scaling["default"] for place, layer in layers_of(live.model, "default").items()}
    with prepare(config_for("run", own)).loaded() as live:
        assert scales == pytest.approx(
            {place: layer.scaling["default"] for place, layer in layers_of(live.model, "default").items()}
        )
    run = pipeline.train(config_for("run", *told, "export.targets=[hf]"))
    report = json.loads(run.merge_report.read_text())
    assert report["merged_vs_base_and_adapter"]["max_logit_diff"] < 1e-4


BESIDE = {
    "tokens": ["adapter.trainable_token_indices=[5,7,2]"],
    "tokens of a tied head": ["adapter.trainable_token_indices=[5,7,2]", "tied"],
    "norms": ["adapter.modules_to_save=[model.norm,input_layernorm]"],
    "embeddings and head": ["adapter.modules_to_save=[embed_tokens,lm_head]"],
    "tied embeddings": ["adapter.modules_to_save=[embed_tokens]", "adapter.ensure_weight_tying=true", "tied"],
    "a tied head": ["adapter.modules_to_save=[lm_head]", "adapter.ensure_weight_tying=true", "tied"],
    "bfloat16": ["adapter.modules_to_save=[embed_tokens]", "model.dtype=bfloat16", "adapter.trainable_token_indices=null"],
    "tokens, bfloat16": ["adapter.trainable_token_indices=[5,7,2]", "model.dtype=bfloat16"],
    "nf4": ["adapter.modules_to_save=[embed_tokens,k_proj]", "quant=nf4"],
}  # fmt: skip


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("case", later(BESIDE, "tokens of a tied head"))
def test_what_trains_beside_the_factors(case, config_for, tied_base, monkeypatch, base, capsys):
    told = [text for text in BESIDE[case] if text != "tied"]
    told += [f"model.path={tied_base}"] if "tied" in BESIDE[case] else []
    run = pipeline.train(config_for("run", *told, "export.targets=[hf,adapter]"))
    assert "no effect" not in capsys.readouterr().out
    report = json.loads(run.merge_report.read_text())
    assert report["refused"] == []
    if "bfloat16" not in case:
        assert report["merged_vs_base_and_adapter"]["max_logit_diff"] < 1e-4
    saved = load_file(run.adapter / files.WEIGHTS)
    own = [key for key in saved if "lora_" not in key]
    assert own
    prepared = prepare(config_for("run", *told))
    with prepared.loaded() as live:
        fresh = files.tensors_of(live.model, "default")
        assert all(not torch.equal(saved[key], fresh[key].cpu()) for key in own)
        with without_adapter(live.model):
            before = logits(prepared, live.model)
        if case != "nf4" and "bfloat16" not in case:
            assert torch.equal(logits(prepared, live.model), before)
    cli.signals.install()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 3)
        pipeline.train(config_for("stopped", *told))
    pipeline.resume(str(run.path.parent / "stopped"), [])
    assert adapter_bytes(run.path.parent / "stopped") == adapter_bytes(run)


@pytest.mark.long
def test_members_with_modules_of_their_own_take_turns(config_for, capsys):
    told = "adapter.modules_to_save=[model.norm]"
    found = jobs.jobs_of([config_for("sweep/0", told), config_for("sweep/1", told, "optim.lr=0.001")])
    cohort.train(found)
    assert [job.error for job in found] == [None, None]
    assert "2 runs take turns on one base: modules that are trained whole" in capsys.readouterr().out
    assert adapter_bytes(found[0].run) == adapter_bytes(pipeline.train(config_for("alone", told)))
    apart = jobs.jobs_of([config_for("a", told), config_for("b", "adapter.trainable_token_indices=[1]")])
    assert jobs.why_apart(*apart) == "adapter.modules_to_save"


@pytest.mark.parametrize(
    ("told", "says"),
    [
        (["adapter.init_lora_weights=pizza"], "adapter.init_lora_weights"),
        (["adapter.init_lora_weights=false"], "adapter.init_lora_weights"),
        (["adapter=pissa", "adapter.lora_dropout=0.1"], "not with adapter.init_lora_weights=pissa, whose factors hold"),
        (["adapter=loftq"], "begins with what quantizing takes away, and quant=none takes nothing"),
        (["adapter.init_lora_weights=orthogonal", "adapter.r=3"], "shares an even number of vectors out. Use 4."),
        (["adapter.init_rows=5"], "adapter.init_rows=5: no effect with adapter.init_lora_weights=true"),
        (["adapter=eva", "adapter.corda_method=kpm"], "adapter.corda_method=kpm: no effect"),
        (["adapter.modules_to_save=[nrom]"], "nrom matches no module that can be trained whole. Did you mean 'norm'?"),
        (["adapter.modules_to_save=[norm]", "adapter.ensure_weight_tying=true"], "no effect, because no module in"),
        (["adapter.trainable_token_indices=[5,100000]"], "100000: the model's tokens are 0 to"),
        (["adapter.trainable_token_indices=[5,5]"], "5 is there twice"),
        (["adapter.target_parameters=[experts.down_proj]"], "The model has no weights of experts"),
        (["adapter.trainable_token_indices=[5]", "export.targets=[vllm]"], "loads LoRA's factors alone"),
        (["adapter.modules_to_save=[norm]", "export.targets=[gguf_lora]"], "loads LoRA's factors alone"),
        (["adapter.trainable_token_indices=[5]", "speed.prefix_cache=true"], "speed.prefix_cache=true: not with"),
        (
            ["adapter=vera", "optim.loraplus_lr_ratio=4"],
            "no effect with adapter.method=vera, which has no second factor",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_training(told, says, overrides, capsys, tmp_path):
    own = [text for text in overrides if not (text.startswith("adapter.r=") and "vera" in " ".join(told))]
    assert says in " ".join(fails(["train", *own, *told], capsys).split())
    assert not (tmp_path / "run").exists()


def test_a_tied_module_is_not_trained_alone(overrides, tied_base, capsys):
    told = ["adapter.modules_to_save=[embed_tokens]", f"model.path={tied_base}"]
    assert "'model.embed_tokens' shares its weight with another module" in fails(["train", *overrides, *told], capsys)


def test_loraplus_lets_the_second_factor_learn_faster(config_for, monkeypatch):
    told = "optim.loraplus_lr_ratio=8"
    run = pipeline.train(
        config_for("run", told, "optim.schedule=constant", "optim.warmup_steps=0", "train.max_steps=1")
    )
    plain = pipeline.train(config_for("plain", "optim.schedule=constant", "optim.warmup_steps=0", "train.max_steps=1"))
    faster, same = (load_file(one.adapter / files.WEIGHTS) for one in (run, plain))
    for key, value in same.items():
        torch.testing.assert_close(faster[key], 8 * value if "lora_B" in key else value, rtol=1e-4, atol=1e-7)
    whole = pipeline.train(config_for("whole", told))
    assert json.loads((whole.path / "metrics.jsonl").read_text().splitlines()[0])["lr"] <= 0.003
    cli.signals.install()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 3)
        pipeline.train(config_for("stopped", told))
    pipeline.resume(str(run.path.parent / "stopped"), [])
    assert adapter_bytes(run.path.parent / "stopped") == adapter_bytes(whole)
