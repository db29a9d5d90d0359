"""What `lora-lab plan` says of a card is what a run takes there: both on a card that does not exist, the run by its own loop."""

from __future__ import annotations

import json
import shutil

import pytest

from lora_lab import cli
from lora_lab.config import compose
from lora_lab.plan import on_card, plan
from lora_lab.plan.card import PRODUCTS_BYTES
from lora_lab.run import prepared
from tests.conftest import make_base, write_jsonl
from tests.no_card.dry import loaded

_PHASES = {"trial": "trial", "train": "step 2", "evaluation": "evaluation"}
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


def _equal(config):
    setup = prepared.prepare(config)
    work = plan.foresee(config, setup.task, setup.training_rows(), setup.held_out)
    found = on_card.of_setup(setup, work.largest, work.evaluation, _SIZE)
    with loaded(config) as dry:
        dry.train(steps=2)
        dry.measure()
    planned = {name: found.phases[name] - PRODUCTS_BYTES for name in _PHASES}
    assert planned == pytest.approx({name: dry.peaks[own] - PRODUCTS_BYTES for name, own in _PHASES.items()}, rel=0.03)


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
    ],
    ids=" ".join,
)
def test_the_plan_is_what_a_run_takes_with(config_on, more):
    _equal(config_on(*more))


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
