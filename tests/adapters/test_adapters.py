"""Every adapter method, as it answers for itself: what it says is done or refused before training. Only `FITTING` names methods."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file

from lora_lab import cli
from lora_lab.adapters import ADAPTERS, NOT_TRAINED, files
from lora_lab.adapters.attach import attach_trained, base_of, trainable, without_adapter
from lora_lab.adapters.methods.lora import LoraAdapter
from lora_lab.base import load
from lora_lab.config import compose, hydra_app
from lora_lab.config.run import all_keys
from lora_lab.errors import ConfigError, Interrupted, TrainingError
from lora_lab.export.targets import TARGETS, reason_against
from lora_lab.plan.methods import formats
from lora_lab.run import pipeline, run_dir
from lora_lab.run.prepared import prepare
from lora_lab.sweep import cohort, jobs
from lora_lab.tasks import TASKS
from lora_lab.training.cohort import Member
from lora_lab.training.loop import fit
from tests.conftest import fails, make_base
from tests.export.test_export import make_llama_base
from tests.sweep.test_sweep import assert_same_run
from tests.training.test_resume import stop_at

CONF = Path(__file__).parents[2] / "conf/adapter"
STEPS = 4
FITTING = {  # settings for the tiny bases of these tests, whose narrowest layers are 64 to 32
    "c3a": ["adapter.block_size=32"],
    "road": ["adapter.group_size=32"],
    "shira": ["adapter.r=8"],
    "vblora": ["adapter.vector_length=32"],
    "trainable_tokens": [f"adapter.token_indices={list(range(5, 80))}".replace(" ", "")],
    "waveft": ["adapter.n_frequency=512"],
}
BIASED = ("beft",)  # sit on layers with a bias
BIASES = {"attention_bias": True, "mlp_bias": True}
DAILY = ("lora", "bottleneck")  # one of each make; all others in the long tier
CHEAP = ("adapter", "vllm")  # of the targets; hf is the merge itself


@pytest.fixture(params=[pytest.param(name, marks=[] if name in DAILY else pytest.mark.long) for name in ADAPTERS])
def method(request) -> str:
    return request.param


@pytest.fixture
def told(method, overrides, eval_file):
    """A small float32 run of the method with its own defaults; in a folder of this name."""
    plain = [text for text in overrides if not text.startswith(("adapter.", "optim.lr=", "run_dir="))]
    folder = Path(next(text for text in overrides if text.startswith("run_dir=")).partition("=")[2]).parent
    if method in BIASED:
        biased = make_base(folder / "biased", **BIASES)
        plain = [f"model.path={biased}" if text.startswith("model.path=") else text for text in plain]
    shared = [*plain, "optim.lr=0.003", f"data.eval={eval_file}", f"train.max_steps={STEPS}", "train.save_steps=2"]
    own = [f"adapter={method}", *FITTING.get(method, [])]

    def overrides_of(name: str, *more: str) -> list[str]:
        chosen = [] if any(text.startswith("adapter=") for text in more) else own
        return [*shared, *chosen, "export.dtype=float32", *more, f"run_dir={folder}/{name}"]

    return overrides_of


@pytest.fixture
def config_for(told):
    return lambda name, *more: compose.compose(told(name, *more))


def adapter_bytes(run: run_dir.RunDir | Path) -> bytes:
    return (getattr(run, "path", run) / "adapter/adapter_model.safetensors").read_bytes()


def logits(prepared, model) -> torch.Tensor:
    rows = [prepared.train[0][0], prepared.train[1][0]]
    batches = prepared.task.step(model, [rows], np.random.default_rng(0)).batches
    with torch.no_grad():
        return torch.cat([prepared.task.logits(model.eval(), batch) for batch in batches])


def test_a_fresh_one_is_the_base_and_it_alone_trains_and_is_loaded_as_it_was_saved(config_for, tmp_path):
    config = config_for("run")
    prepared = prepare(config)
    model = prepared.loaded().model
    with without_adapter(model):
        base = logits(prepared, model)
    differs = float((logits(prepared, model) - base).abs().max())
    assert (
        differs > 1e-4 if config.adapter.fresh_differs else differs < 1e-4
    )  # rounding, of methods that rebuild weights

    own = {one.data_ptr() for one in trainable(model).values()}  # some layers share one
    frozen = {name: one.clone() for name, one in model.state_dict().items() if one.data_ptr() not in own}
    before = {name: one.detach().clone() for name, one in trainable(model).items()}
    member = Member("default", config, run_dir.create(config), prepared.base, model, prepared.train, prepared.task)
    fit([member], prepared.train, prepared.held_out, prepared.accelerator)
    assert any(not torch.equal(one, before[name]) for name, one in trainable(model).items())
    assert all(one.dtype == torch.float32 for one in trainable(model).values())
    assert all(torch.equal(model.state_dict()[name], one) for name, one in frozen.items())
    with without_adapter(model):
        assert torch.equal(logits(prepared, model), base)

    files.write(tmp_path, model, "default", config, prepared.base, {})
    plain = load.load_model(prepared.base, prepared.kind, "float32", config.quant, prepared.device, 0)
    again = attach_trained(plain, tmp_path, "default")
    torch.testing.assert_close(logits(prepare(config), again), logits(prepared, model), rtol=1e-5, atol=1e-5)
    assert all(
        torch.equal(one, dict(model.named_parameters())[name])
        for name, one in again.named_parameters()
        if name in before
    )


def test_an_interrupted_run_and_a_member_of_a_sweep_are_the_run_alone(config_for, method, monkeypatch, capsys):
    alone = pipeline.train(config_for("alone"))
    cli.signals.install()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, STEPS - 1)
        pipeline.train(config_for("stopped"))
    stopped = alone.path.parent / "stopped"
    assert not (stopped / "adapter").exists()
    pipeline.resume(str(stopped), [])
    assert adapter_bytes(stopped) == adapter_bytes(alone)

    capsys.readouterr()
    found = jobs.jobs_of([config_for("sweep/0"), config_for("sweep/1", "optim.lr=0.002")])
    cohort.train(found)
    said = capsys.readouterr().out
    assert [job.error for job in found] == [None, None]
    assert adapter_bytes(found[1].run) != adapter_bytes(alone)
    assert_same_run(found[0].run.path, alone.path)
    assert ("in each pass" in said) == ADAPTERS[method].shares_passes
    if "in each pass" not in said:
        assert "2 runs take turns on one base: " in said
        assert adapter_bytes(found[0].run) == adapter_bytes(alone)


def test_it_is_merged_and_exported_or_refused_before_training(told, config_for, capsys, reload_here):
    section, possible = config_for("run").adapter, []
    for name in ("hf", *CHEAP):
        reason = reason_against(section, name)
        if not reason:
            possible.append(name)
            continue
        assert reason in " ".join(fails(["train", *told("run", f"export.targets=[{name}]")], capsys).split())
    run = pipeline.train(config_for("run", f"export.targets=[{','.join(possible)}]"))
    assert {name for name in possible if name != "hf"} == {file.name for file in (run.path / "export").iterdir()}
    for name in {*CHEAP} - {*possible}:
        assert reason_against(section, name) in fails(["export", f"run={run.path}", f"export.targets=[{name}]"], capsys)
    if section.against_merging:
        assert section.against_merging in fails(["merge", f"run={run.path}"], capsys)
    if "hf" in possible:
        report = json.loads(run.merge_report.read_text())
        assert report["merged_vs_base_and_adapter"]["max_logit_diff"] < 3e-4  # rounding, of logits up to 30
        assert report["written"] == (
            f"from memory: {section.against_delta}" if section.against_delta else "file by file"
        )
    card = (run.path / "export/adapter/README.md").read_text()
    assert f"- adapter: {section.label}, {section.describe()}\n" in card
    assert ("peft loads it after" in card) == bool(section.registered_by)


def method_of(config_for) -> str:
    return config_for("run").adapter.method


@pytest.mark.long
def test_it_shrinks_and_is_combined_with_another_or_is_refused(config_for, method, tmp_path, capsys):
    section = ADAPTERS[method]()
    run = pipeline.train(config_for("run"))
    other = pipeline.train(config_for("other", "adapter=lora", "adapter.r=2", "seed=3"))
    verbs = (
        ["shrink", f"run={run.path}", "shrink.tolerance=99", "shrink.ranks=[2]"],
        ["merge", f"merge.adapters=[{run.path},{other.path}]", f"run_dir={tmp_path}/both", "merge.max_loss_increase=9"],
    )
    if section.against_delta:
        assert all(section.against_delta in fails(verb, capsys) for verb in verbs)
        return
    assert [cli.main(verb) for verb in verbs] == [0, 0]
    assert compose.load(run.path / "shrunk/config.yaml").adapter.r == 2
    assert compose.load(tmp_path / "both/config.yaml").adapter.method == "lora"
    assert cli.main(["merge", f"run={run.path}/shrunk"]) == 0
    alone = json.loads((tmp_path / "both/combination.json").read_text())["held_out"][str(run.path)]["alone"]
    assert alone["loss"] == pytest.approx(json.loads(run.result.read_text())["tuned"]["loss"], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("target", sorted(TARGETS.keys() - {"hf", *CHEAP}))
def test_every_other_target_is_made_or_refused_before_training(method, told, target, tmp_path, capsys):
    model = []
    if target != "quantized":  # llama.cpp's conversion must know the tokenizer
        base = make_llama_base(tmp_path / "llama", **(BIASES if method in BIASED else {}))
        model = [f"model.path={base}"]
    # what 4 bits cost a base of random weights says nothing
    words = ["train", *told("run", *model, f"export={target}", "merge.max_loss_increase=1")]
    reason = reason_against(compose.compose(words[1:]).adapter, target)
    if reason:
        assert reason in fails(words, capsys)
        return
    assert cli.main(words) == 0
    folder = compose.compose(words[1:]).run_dir
    assert (Path(folder) / "export" / target).is_dir()


LATER = [pytest.param(name, marks=pytest.mark.long) for name in ("fp4", "int8", "torchao_int8")]


@pytest.mark.parametrize("quant", ["nf4", *LATER])
def test_it_trains_on_a_quantized_base_or_is_refused_before_training(config_for, quant):
    config = config_for("run", f"quant={quant}")
    reason = config.adapter.against_quant(quant)
    if reason:
        with pytest.raises(ConfigError, match=f"quant.method={quant}: .*{reason}"):
            pipeline.train(config)
        assert not Path(config.run_dir).exists()
        return
    prepared = prepare(config)
    model = prepared.loaded().model
    own = {one.data_ptr() for one in trainable(model).values()}
    fresh = {name: one.clone() for name, one in files.tensors_of(model, "default").items() if one.data_ptr() in own}
    saved = load_file(pipeline.train(config).adapter / files.WEIGHTS)
    assert fresh
    assert fresh.keys() <= saved.keys()
    assert not [name for name, one in fresh.items() if torch.equal(one, saved[name])]


def test_its_keys_are_described_known_and_corrected(told, method, capsys):
    section = ADAPTERS[method]
    for field in dataclasses.fields(section):
        assert section.__pydantic_fields__[field.name].description
        assert all_keys()[f"adapter.{field.name}"].description
    assert all(name in {field.name for field in dataclasses.fields(section)} for name in section.settings())
    for field in dataclasses.fields(section)[1:]:
        message = fails(["config", *told("run", f"adapter.{field.name}z=3")], capsys)
        assert f"unknown key. Did you mean 'adapter.{field.name}'?" in message
    assert "Did you mean 'adapter.r'?" in fails(["config", *told("run", "adapter.rnak=3")], capsys)
    assert cli.main(["config", *told("run")]) == 0
    assert f"adapter.method={method}" in capsys.readouterr().out


def test_every_method_has_a_group_and_every_group_a_method():
    told = {file.stem: file.read_text(encoding="utf-8") for file in CONF.glob("*.yaml")}
    assert ADAPTERS.keys() <= told.keys()
    for name, section in ADAPTERS.items():
        assert section().method == name
        assert f"method: {name}" in told[name]
    assert all(any(f"method: {name}\n" in text for name in ADAPTERS) for text in told.values())


def test_each_of_pefts_types_is_trained_or_said_why_not():
    trained = {section.peft_type for section in ADAPTERS.values()}
    assert trained.isdisjoint(NOT_TRAINED)
    assert trained | {*NOT_TRAINED} >= {kind.value for kind in peft.PeftType}


def test_the_documented_table_is_what_the_methods_say():
    """`docs/methods.md` is made of these measurements: a method that promises more, or less, than was measured shows here."""
    from benchmarks.methods import MODELS, OTHER_TASKS, works

    measured = json.loads((CONF.parents[1] / "benchmarks/results/methods.json").read_text())["methods"]
    assert measured.keys() == ADAPTERS.keys()
    for name, section in ADAPTERS.items():
        own = section()
        tasks = {model: TASKS[task]() for model, (task, _) in MODELS.items() if not own.against_task(TASKS[task]())}
        for quant in formats():
            plain = [model for model in tasks if works(measured[name][f"{model} none"], own)]
            cells = [found for model in plain if (found := measured[name].get(f"{model} {quant}"))]
            shown = [works(found, own) for found in cells]
            if not own.against_quant(quant):
                assert all(shown), (name, quant, cells)
            elif len(cells) == len(MODELS):
                assert not all(shown), f"adapter={name} could be trained on {quant}"
        for task, model in OTHER_TASKS.items():
            works_there, works_so = (works(measured[name][f"{one} none"], own) for one in (model, task))
            assert works_so or own.against_task(TASKS[task]()) or not works_there, (name, task)
            assert not (works_so and own.against_task(TASKS[task]())), (name, task)
    for name, section in ADAPTERS.items():
        row, plain = measured[name], measured[name]["decoder none"]
        assert (plain["fresh"] > 1e-4) == bool(section().fresh_differs), name
        merged = plain["merged"]["full_precision"]
        assert (isinstance(merged, float) and merged <= 1e-4) == (not section().against_merging), name
        assert row["run"]["in a sweep"] == ("passes" if section().shares_passes else "turns"), name
        assert row["run"]["resumed"] == 0, name


def test_a_method_that_no_gradient_reaches_is_an_error(config_of, overrides, monkeypatch):
    """Uni-LoRA on 4 bits: peft runs it, and its vector would stay as it is without a word."""
    monkeypatch.setattr(ADAPTERS["unilora"], "quantized", ("nf4",))
    plain = [text for text in overrides if not text.startswith("adapter.")]
    with pytest.raises(TrainingError, match="Step 1: the gradient is zero, so nothing would ever be learned"):
        pipeline.train(compose.compose([*plain, "adapter=unilora", "quant=nf4"]))


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (
            "c3a",
            [],
            "adapter.block_size=64: does not divide the 32 outputs of model.layers.0.self_attn.k_proj. 32 divides",
        ),
        ("road", ["adapter.group_size=48"], "adapter.group_size=48: does not divide the 64 outputs"),
        ("shira", [], "adapter.r=32: model.layers.0.self_attn.k_proj (64 inputs, 32 outputs) can have 21 at most"),
        ("gralora", ["adapter.r=33"], "adapter.r=33: adapter.gralora_k=2 does not divide it"),
        ("beft", [], "adapter.method=beft: model.layers.0.self_attn.q_proj has no bias, as 28 of 28 layers"),
        ("trainable_tokens", [], "adapter.token_indices=[]: no token would train"),
        (
            "trainable_tokens",
            ["adapter.token_indices=[99999]"],
            "adapter.token_indices: 99999 is no token of this base",
        ),
    ],
)
def test_what_does_not_fit_the_base_is_refused_before_the_run(overrides, capsys, tmp_path, method, settings, said):
    plain = [text for text in overrides if not text.startswith("adapter.")]
    assert said in " ".join(fails(["train", *plain, f"adapter={method}", *settings], capsys).split())
    assert not (tmp_path / "run").exists()


def test_methods_are_listed_and_explained(capsys):
    assert cli.main(["methods"]) == 0
    said = capsys.readouterr().out
    assert all(section().label in said for section in ADAPTERS.values())
    assert cli.main(["methods", "adapter=loha"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "arXiv:2108.06098" in said
    assert "adapter.alpha=8" in said
    assert "Did you mean 'loha'?" in fails(["methods", "adapter=lohaa"], capsys)
    assert "no effect here" in fails(["methods", "seed=3"], capsys)


def test_methods_load_no_torch():
    code = "import sys, lora_lab.adapters; sys.exit(bool({'torch', 'peft'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_method_says_against_something_is_asked_before_training(config_of, tmp_path, monkeypatch, capsys):
    done = pipeline.train(config_of("train.max_steps=1", f"run_dir={tmp_path}/done"))
    for name, answer in (
        ("against_quant", lambda self, method: "it adds to whole weights"),
        ("against_merging", property(lambda self: "it changes the input of a layer")),
        ("against_delta", "its change is no sum"),
        ("against_target", lambda self, target: "is not written by it" if target == "adapter" else ""),
    ):
        monkeypatch.setattr(LoraAdapter, name, answer)
    for settings, said in (
        (
            ["quant=nf4"],
            "quant.method=nf4: LoRA is not trained on it, because it adds to whole weights. Set quant=none",
        ),
        (["export=merged"], "hf: cannot be made of LoRA, because it changes the input of a layer. Export adapter"),
        (["export=gguf"], "gguf: cannot be made of LoRA, because it changes the input of a layer"),
        (["export=vllm"], "vllm: cannot be made of LoRA, because its change is no sum. Export adapter"),
        (["export.targets=[adapter]"], "adapter: is not written by it"),
    ):
        with pytest.raises(ConfigError) as error:
            pipeline.train(config_of(*settings))
        assert said in str(error.value)
        assert not (tmp_path / "run").exists()
    message = fails(["merge", f"run={done.path}"], capsys)
    assert "LoRA cannot be merged, because it changes the input of a layer. Use the adapter as it is" in message


def test_a_method_that_the_base_does_not_allow_leaves_the_others_alone(overrides, eval_file, tmp_path):
    plain = [text for text in overrides if not text.startswith("adapter.")]
    told = [*plain, f"data.eval={eval_file}", "train.max_steps=1", "quant=nf4"]
    found = jobs.jobs_of(
        [compose.compose([*told, f"adapter={name}", f"run_dir={tmp_path}/{name}"]) for name in ("loha", "vera")]
    )
    cohort.train(found)
    assert "LoHa is not trained on it" in str(found[0].error)
    assert found[1].error is None
    assert found[1].result["steps"] == 1


def test_a_recipes_keys_of_another_method_go_in_a_sweep_and_typed_ones_do_not(tmp_path, capsys):
    seen: list = []

    def launch(configs, nodes):
        seen.extend(configs)
        return [jobs.Outcome(None) for _ in configs]

    told = ["recipe=demo", "adapter=vera,lora,oft", f"hydra.sweep.dir={tmp_path}"]
    assert hydra_app.multirun(told, None, launch) == []
    assert [(one.adapter.method, getattr(one.adapter, "lora_alpha", None)) for one in seen] == [
        ("vera", None), ("lora", 32), ("oft", None),
    ]  # fmt: skip
    found = jobs.jobs_of(seen)
    assert [job.values for job in found] == [{"adapter.method": name} for name in ("vera", "lora", "oft")]
    with pytest.raises(ConfigError, match="adapter.lora_alpha=8: no effect with adapter=vera"):
        hydra_app.multirun([*told, "adapter.lora_alpha=8"], None, launch)


def test_adapters_that_cannot_lie_on_the_same_modules_are_parts_of_a_group(config_of, monkeypatch):
    found = jobs.jobs_of([config_of(f"adapter.r={r}", f"run_dir=r{r}") for r in (2, 4)])
    assert len(jobs.groups(found)) == len(jobs.by_method(found)) == 1
    monkeypatch.setattr(LoraAdapter, "on_same_modules", dataclasses.asdict)
    assert len(jobs.groups(found)) == 1
    assert jobs.by_method(found) == [[found[0]], [found[1]]]


METHODS = (
    ["adapter=lora", "adapter.r=2"],
    ["adapter=vera"],
    ["adapter=lora", "adapter.r=3", "seed=1"],
    ["adapter=oft", "optim.lr=0.001"],
)


@pytest.mark.parametrize("quant", ["none", *(pytest.param(name, marks=pytest.mark.long) for name in ("nf4", "int8"))])
def test_a_sweep_over_methods_is_one_cohort_on_one_base(overrides, eval_file, tmp_path, capsys, monkeypatch, quant):
    plain = [text for text in overrides if not text.startswith("adapter.")]
    shared = [*plain, f"data.eval={eval_file}", f"train.max_steps={STEPS}", f"quant={quant}"]

    def configs(folder: str):
        return [compose.compose([*shared, *own, f"run_dir={tmp_path}/{folder}/{i}"]) for i, own in enumerate(METHODS)]

    seen, plain_fit = [], cohort.fit

    def watched(members, *more):
        seen.extend(members)
        return plain_fit(members, *more)

    monkeypatch.setattr(cohort, "fit", watched)
    found = jobs.jobs_of(configs("sweep"))
    cohort.train(found)
    assert [job.error for job in found] == [None] * 4
    said = capsys.readouterr().out
    assert "LoRA, VeRA, OFT take turns on one base, because they cannot lie on the same modules" in said
    together = "2 runs on one base, 2 in each pass" in said
    assert together == (quant != "int8")
    weights = [
        [one.data_ptr() for one in base_of(member.model).parameters() if not one.requires_grad] for member in seen
    ]
    assert all({*base} & {*weights[0]} for base in weights)
    for place, config in enumerate(configs("alone")):
        run = pipeline.train(config).path
        if together and place in (0, 2):
            assert_same_run(found[place].run.path, run)
        else:
            assert adapter_bytes(found[place].run) == adapter_bytes(run)
