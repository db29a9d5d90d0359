"""Several processes are one: what they learn, how they agree, and what becomes of one that is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.parallel import ROOT, Sources, gaps, train_kind
from lora_lab import cli
from lora_lab.runtime import launch

WORKER = Path(__file__).parent / "worker.py"
# float32 sums in another order; the optimizer divides by their size, so that a number whose gradient is about zero may move more
LOSS, ADAPTER = 1e-5, 2e-6


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
    kinds = ["cohort of 3"]
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
    kinds = [
        "packed",
        "packed, micro-batches of 2",
        "preference",
        "preference, KTO",
        "NEFTune",
        "distillation, cohort of 3",
        "NF4",
        "NF4, cohort of 3",
    ]
    found = run(count, *kinds)
    for place, kind in enumerate(kinds):
        close(found[kind], train_kind(kind, sources, tmp_path / str(place)))


# -- through the command line ---------------------------------------------------------------------------------------------

DYING = Path(__file__).parent / "dying.py"
FILES = ("adapter/adapter_model.safetensors", "metrics.jsonl")


@pytest.fixture
def command(sources) -> list[str]:
    return command_of(sources)


def command_of(sources: Sources) -> list[str]:
    return [
        "train", "model=hub", f"model.path={sources.base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={sources.rows('completions')}", f"data.eval={sources.rows('completions', 'eval')}", "adapter.lora_dropout=0.1",
        "train.batch_size=4", "train.micro_batch_size=1", "train.max_steps=5", "train.save_steps=2", "hardware.timeout=20",
    ]  # fmt: skip


def of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def adapter(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / FILES[0])
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, base) -> Path:
    """A run of two processes that nobody disturbed, and its sources beside it."""
    folder = tmp_path_factory.mktemp("left_alone")
    (folder / "sources").mkdir()
    told = command_of(Sources.made(folder / "sources", base))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        assert cli.main([*told, f"run_dir={folder}/run", "hardware.processes=2"]) == 0
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("where", "rank"),
    [
        ("step", 0), ("step", 1), ("exchange", 1), ("sum", 0), ("sum", 1), ("update", 0), ("save", 0), ("save", 1),
        ("measure", 0), ("measure", 1),
    ],
)  # fmt: skip
def test_a_killed_process_ends_the_run_which_resumes_to_the_same_bytes(
    left_alone, tmp_path, monkeypatch, capfd, rank, where
):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    killed, told = tmp_path / "killed", command_of(Sources(left_alone / "sources"))
    dying = [sys.executable, str(DYING), where, str(rank), "KILL", *told, f"run_dir={killed}"]
    assert launch.run_here(dying, 2, 20) == 3
    assert not (killed / "result.json").exists()
    said = capfd.readouterr().err
    assert f"process {rank} was ended by SIGKILL" in said
    if rank == 1:
        assert re.search(r"process 1 \(.*\): has ended, so process 0 .* ends too.* lora-lab resume run=", said)
    assert cli.main(["resume", f"run={killed}", "hardware.processes=2"]) == 0
    assert of(killed) == of(left_alone / "run")


@pytest.mark.long
def test_a_process_that_hangs_ends_the_run_in_time(command, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    hanging = [sys.executable, str(DYING), "step", "1", "STOP", *command, f"run_dir={tmp_path}/run"]
    assert launch.run_here(hanging, 2, 5) != 0
    said = capfd.readouterr().err
    assert re.search(r"process 1 \(.*\): did not come within hardware.timeout=20 s, so process 0", said)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-2"]


@pytest.mark.long
def test_a_run_of_two_goes_on_with_one_or_three(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    whole = tmp_path / "whole"
    assert cli.main([*command, f"run_dir={whole}"]) == 0
    for count in (1, 3):
        folder = tmp_path / str(count)
        dying = [sys.executable, str(DYING), "step", "1", "TERM", *command, f"run_dir={folder}"]
        assert launch.run_here(dying, 2, 20) == 128 + signal.SIGTERM
        assert cli.main(["resume", f"run={folder}", f"hardware.processes={count}"]) == 0
        assert (adapter(folder) - adapter(whole)).abs().max() < ADAPTER


@pytest.mark.long
def test_a_sweep_in_two_processes_is_ranked_as_in_one(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    points = ["-m", "optim.lr=0.001,0.0001,0.002"]  # larger rates enlarge the rounding of gradients near zero
    for count in (1, 2):
        told = [*points, f"hydra.sweep.dir={tmp_path}/{count}", f"hardware.processes={count}"]
        assert cli.main([command[0], *told[:1], *command[1:], *told[1:]]) == 0
    one, two = (json.loads((tmp_path / str(count) / "ranking.json").read_text()) for count in (1, 2))
    assert [place["name"] for place in one["ranking"]] == [place["name"] for place in two["ranking"]]
    for mine, theirs in zip(one["ranking"], two["ranking"], strict=True):
        assert mine["metric"] == pytest.approx(theirs["metric"], rel=1e-5)
