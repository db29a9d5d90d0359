"""What `lora-lab plan` says of a card is what a run takes there: both on a card that does not exist, the run by its own loop."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from transformers import LlamaConfig

from lora_lab import cli
from lora_lab.base import load, quantized
from lora_lab.config import compose
from lora_lab.plan import memory, on_card, plan
from lora_lab.plan.card import PRODUCTS_BYTES
from lora_lab.run import prepared
from tests.conftest import make_base, make_tokenizer, write_jsonl
from tests.no_card.dry import loaded
from tests.no_card.dry import on_card as made_ready

_PHASES = {"load": "load", "trial": "trial", "train": "step 2", "evaluation": "evaluation"}
_ALL = {**_PHASES, "generation": "generation", "merge": "merge"}
_SIZE = 24 * 2**30


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """Large enough that activations count, and not only blocks."""
    folder = tmp_path_factory.mktemp("models") / "middle"
    return make_base(folder, hidden_size=256, intermediate_size=640, num_hidden_layers=3, vocab_size=2048)


@pytest.fixture
def config_on(tmp_path, middle):
    def compose_it(*more):
        row = {"prompt": "red green blue " * 60, "completion": "one two three " * 30}
        train, held_out = (write_jsonl(tmp_path / f"{name}.jsonl", [row] * 8) for name in ("train", "eval"))
        return compose.compose(
            [
                "model=hub", f"model.path={middle}", "model.dtype=bfloat16", "quant=nf4", "tracker=none", "hardware=cpu",
                f"data.train={train}", f"data.eval={held_out}", "data.check=off", "data.duplicates=keep", "train.batch_size=4",
                f"run_dir={tmp_path}/run", *more,
            ]
        )  # fmt: skip

    return compose_it


def _equal(config, *others):
    """
    Args:
        others: members of its cohort, who share passes.
    """
    found = _planned(config, 1 + len(others))
    with loaded(config, *others) as dry:
        dry.live.setup.task.forward.members = 1 + len(others)
        dry.train(steps=2)
        dry.measure()
    planned = {name: found.phases[name] - PRODUCTS_BYTES for name in _PHASES}
    expected = {name: dry.peaks[own] - PRODUCTS_BYTES for name, own in _PHASES.items()}
    assert planned == pytest.approx(
        expected, rel=0.03, abs=2**17
    )  # loading takes less than the products' own memory here


def test_the_plan_is_what_a_run_takes(config_on):
    _equal(config_on("train.gradient_checkpointing=true", "train.micro_batch_size=2"))


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["quant=none"],
        ["quant=int8"],
        ["model.dtype=float32", "quant=none"],
        ["speed=plain"],
        ["speed.dequantize=always"],
        ["adapter=dora"],
        ["train.micro_batch_size=1"],
        ["train.micro_batch_tokens=300"],
        ["model.dtype=float16"],
        ["adapter=adalora", "train.epochs=8"],
        ["hardware=auto", "hardware.offload_embeddings=true"],
        ["data.streaming=true", "train.micro_batch_size=2"],
    ],
    ids=" ".join,
)
def test_the_plan_is_what_a_run_takes_with(config_on, more):
    _equal(config_on(*more))


@pytest.mark.long
def test_the_plan_of_members_is_what_their_shared_pass_takes(config_on, tmp_path):
    first, *others = (
        config_on("train.batch_size=2", f"seed={seed}", f"run_dir={tmp_path}/{seed}") for seed in range(4)
    )
    _equal(first, *others)


def described(folder, **shape):
    """A base that is known by its `config.json` and its tokenizer alone."""
    tokenizer = make_tokenizer(folder)
    config = LlamaConfig(**shape, dtype="bfloat16", bos_token_id=1, eos_token_id=tokenizer.eos_token_id)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def of_tokens(tmp_path, base, rows, tokens, more):
    """The configuration of a run whose rows have so many tokens each, answers of 16 among them."""
    told = [
        "model=hub", f"model.path={base}", "model.dtype=bfloat16", "quant=nf4", "tracker=none", "hardware=cpu", "adapter.r=16",
        "adapter.target_modules=all-linear", f"data.train={tmp_path}/rows.jsonl", f"data.eval={tmp_path}/rows.jsonl",
        "data.check=off", "data.duplicates=keep", "data.max_tokens=16384", f"train.batch_size={rows}", "train.epochs=2", "task.generate_rows=2",
        "task.max_new_tokens=6", "export=merged", f"run_dir={tmp_path}/run", *more,
    ]  # fmt: skip

    def of(words):
        row = {"prompt": "red" + " red" * words, "completion": "blue " * 8}
        write_jsonl(tmp_path / "rows.jsonl", [row] * rows)
        config = compose.compose(told)
        return config, int(made_ready(config).training_rows().lengths.max())

    (_, least), (_, more_words) = of(0), of(100)  # the template adds some
    config, found = of(100 * (tokens - least) // (more_words - least))
    assert tokens - 2 < found <= tokens
    return config


SHAPES = {
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "14B": {
        "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
}  # fmt: skip
_CHECKPOINTED = "train.gradient_checkpointing=true"


@pytest.mark.long
@pytest.mark.timeout(900)  # one minute of a core that is free
@pytest.mark.parametrize(
    ("shape", "rows", "tokens", "more"),
    [
        ("8B", 2, 2048, [_CHECKPOINTED]),
        ("8B", 8, 512, []),
        ("8B", 1, 8192, [_CHECKPOINTED]),
        ("14B", 1, 2048, [_CHECKPOINTED]),
    ],
    ids=str,
)
def test_a_large_model_is_planned_from_its_description(tmp_path, shape, rows, tokens, more):
    """Every phase; nothing is computed, so it is a matter of seconds."""
    config = of_tokens(tmp_path, described(tmp_path / "base", **SHAPES[shape]), rows, tokens, more)
    began = time.process_time()
    found = _planned(config)
    assert time.process_time() - began < 60
    with loaded(config) as dry:
        dry.train(steps=2)
        dry.measure()
        dry.merge()
    assert found.phases == pytest.approx({name: dry.peaks[own] for name, own in _ALL.items()}, rel=0.03)


@pytest.mark.long
def test_offloaded_embeddings_take_no_room(config_on, middle):
    """But while they are loaded."""
    here, there = (
        _planned(config_on("hardware=auto", f"hardware.offload_embeddings={on}")) for on in ("false", "true")
    )
    table = 2048 * 256 * 2  # bfloat16
    assert here.phases["load"] - there.phases["load"] < table
    assert here.base - there.base == table
    for phase in ("train", "evaluation"):
        assert here.phases[phase] - there.phases[phase] == pytest.approx(table, rel=0.1), phase


def _planned(config, members=1):
    setup = made_ready(config)
    work = plan.foresee(config, setup.task, setup.training_rows(), setup.held_out)
    return on_card.of_setup(setup, work.largest, work.evaluation, _SIZE, members)


@pytest.mark.long
def test_what_an_adapter_remembers_is_counted(config_on):
    """AdaLoRA keeps two sums for each of its numbers, and which ranks are left."""
    config = config_on("adapter=adalora", "train.epochs=8")
    found = _planned(config)
    assert found.adapter > 2.9 * found.gradients
    setup = prepared.prepare(config)
    work = plan.foresee(config, setup.task, setup.training_rows(), setup.held_out)
    on_cpu = memory.estimate(config, setup.base, setup.kind, setup.task, work.largest, work.evaluation)
    assert (on_cpu.adapter, on_cpu.gradients) == pytest.approx((found.adapter, found.gradients), rel=1e-3)


@pytest.fixture
def hub(middle, monkeypatch, tmp_path):
    """A hub with one model, which hands over what is asked for by name, and no weights."""
    asked = []

    def download(name, revision, allow_patterns):
        assert (name, revision) == ("somebody/middle", None)
        asked.extend(allow_patterns)
        folder = tmp_path / "hub"
        folder.mkdir(exist_ok=True)
        for file in middle.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                assert file.suffix != ".safetensors", "weights were asked for"
                shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


@pytest.mark.long
def test_a_model_of_the_hub_is_planned_from_its_description(hub, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "red cat", "completion": "one two"}] * 3)
    told = [
        "model=hub",
        "model.path=somebody/middle",
        "quant=nf4",
        "hardware=cpu",
        "tracker=none",
        f"run_dir={tmp_path}/run",
    ]
    assert cli.main(["plan", *told, f"data.train={rows}", "data.check=off", "data.duplicates=keep"]) == 0
    printed = capsys.readouterr().out
    assert "its weights are not here: planned from config.json" in printed
    assert "8 GiB yes" in printed
    assert hub
    assert not any("safetensors" in pattern for pattern in hub)


@pytest.mark.long
def test_a_kept_base_is_as_large_as_what_is_written(config_on, middle):
    """With embeddings and output layer, which are not quantized."""
    config = config_on("hardware=cpu", f"model.path={shutil.copytree(middle, middle.parent / 'copied')}")
    planned = plan.plan(config).disk["quantized base (cache folder)"]
    setup = prepared.prepare(config)
    load.load_model(setup.base, setup.kind, "bfloat16", config.quant, setup.device, 0)
    kept = quantized.folder_of(setup.base, setup.kind, "bfloat16", config.quant, "cpu")
    written = sum(file.stat().st_size for file in kept.glob("*.safetensors"))
    assert planned == pytest.approx(written, rel=0.03)
    assert written > 2 * 2048 * 256 * 2


@pytest.mark.long
def test_dora_on_four_bits_and_without_weights(config_on, middle, tmp_path, capsys):
    """Before anything large is downloaded."""
    described = tmp_path / "described"
    shutil.copytree(middle, described, ignore=shutil.ignore_patterns("*.safetensors*"))
    written = json.loads((described / "config.json").read_text())
    told = ["model=hub", f"model.path={described}", "model.dtype=bfloat16", "quant=nf4", "hardware=cpu", "tracker=none"]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "red cat", "completion": "one two"}] * 3)
    told += [f"data.train={rows}", "data.check=off", "data.duplicates=keep", f"run_dir={tmp_path}/run", "adapter=dora"]
    assert written["vocab_size"] == 2048
    assert cli.main(["plan", *told]) == 0
    printed = capsys.readouterr().out
    assert "its weights are not here: planned from config.json" in printed
    assert "cannot be estimated" not in printed
    assert "8 GiB yes" in printed
