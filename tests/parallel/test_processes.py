"""Several processes are one: what they learn, how they agree, and what becomes of one that is lost."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks.parallel import ROOT, Sources, gaps, train_kind
from lora_lab.runtime import launch

WORKER = Path(__file__).parent / "worker.py"
# float32 sums in another order; the optimizer divides by their size, so that a number whose gradient is about zero may move more
LOSS, ADAPTER = 1e-6, 1e-5


@pytest.fixture
def sources(tmp_path, base) -> Sources:
    (tmp_path / "sources").mkdir()
    return Sources.made(tmp_path / "sources", base)


@pytest.fixture
def run(tmp_path, sources, monkeypatch):
    """Run scenes of the worker in some processes: `run(2, "packed", "unlike")`."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def in_processes(count: int, *scenes: str) -> dict:
        out = tmp_path / f"{count}.json"
        command = [sys.executable, str(WORKER), str(out), str(sources.folder), *scenes]
        launch.run_here(command, count, 60)
        return json.loads(out.read_text())

    return in_processes


def close(found: dict, alone: dict) -> None:
    losses, adapters = gaps(found, alone)
    assert losses < LOSS
    assert adapters < ADAPTER


def test_two_processes_are_one_and_agree(run, sources, tmp_path, capfd):
    kinds = ["packed", "padded", "preference", "cohort of 3"]
    found = run(2, *kinds, "short_of_memory", "unlike", "fails", "dies")
    for kind in kinds:
        close(found[kind], train_kind(kind, sources, tmp_path / kind))
    alone = train_kind("packed, micro-batches of 2", sources, tmp_path / "whole", ["adapter.lora_dropout=0"])
    close(found["short_of_memory"], alone)
    assert "process 1" in found["unlike"]
    assert "has another optim.lr than process 0" in found["unlike"]
    assert "0.2 and 0.1. Start all alike." in found["unlike"]
    assert found["fails"].startswith("TrainingError: process 1")
    assert "a pass that cannot be" in found["fails"]
    assert "process 1" in found["dies"]["said"]
    assert "has ended, so process 0" in found["dies"]["said"]
    assert found["dies"]["saved"] == ["step-2"]  # the last step that all of them made


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3])
def test_each_kind_in_several_processes(run, sources, tmp_path, count):
    kinds = ["packed, micro-batches of 2", "preference, KTO", "NEFTune", "NF4", "NF4, cohort of 3"]
    found = run(count, *kinds)
    for kind in kinds:
        close(found[kind], train_kind(kind, sources, tmp_path / kind))
