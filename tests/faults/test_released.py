"""Runs of every released version: their adapters load with equal outputs, and training them again gives their losses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_lab import cli
from tests.faults.released import GOLDEN, SETTINGS, inside, make

VERSIONS = sorted(path.name for path in GOLDEN.glob("*")) or [
    "this"
]  # before the first release: a run of this very version


@pytest.fixture(params=VERSIONS)
def golden(request, tmp_path) -> Path:
    folder = tmp_path / "golden"
    if request.param == "this":
        make(folder)
    else:
        shutil.copytree(GOLDEN / request.param, folder)
    return folder


def test_a_released_run_is_worth_what_it_was(golden):
    expected = json.loads((golden / "run/result.json").read_text())
    with inside(golden):
        assert cli.main(["evaluate", "run=run"]) == 0
    found = json.loads((golden / "run/evaluation.json").read_text())
    for which in ("base", "tuned"):
        assert found[which]["loss"] == pytest.approx(expected[which]["loss"], rel=1e-5), which


def test_training_it_again_gives_its_losses(golden):
    with inside(golden):
        assert cli.main(["train", *SETTINGS[:-1], "run_dir=again"]) == 0
    before, after = (
        [json.loads(line) for line in (golden / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("run", "again")
    )
    assert [line["step"] for line in after] == [line["step"] for line in before]
    for one, two in zip(before, after, strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-4), f"step {one['step']}: {name}"
