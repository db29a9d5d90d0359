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
from bitsandbytes.functional import has_avx512bf16
from safetensors.torch import load_file

from benchmarks.parallel import ROOT, SHARDED, Sources, gaps, train_kind
from lora_lab import cli
from lora_lab.runtime import launch
from tests.conftest import fails

WORKER = Path(__file__).parent / "worker.py"
# float32 sums in another order; the optimizer divides by their size, so that a number whose gradient is about zero may move more
LOSS, ADAPTER = 1e-5, 2e-6
SHARDED_ADAPTER = 1e-5  # one process has accelerations that a sharded base goes without, and they round otherwise
SHARDED_4BIT = 1e-6  # which are fewer on 4 bits
SHARDS = hasattr(torch.distributed, "all_gather_single")  # see `shard.check_torch`


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


def close(found: dict, alone: dict, adapter: float = ADAPTER) -> None:
    losses, adapters = gaps(found, alone)
    assert losses < LOSS
    assert adapters < adapter


def test_two_processes_are_one_and_agree(run, sources, tmp_path, capfd):
    kinds = ["cohort of 3"]
    # once a base is sharded, processes keep step, and so they do when one of them dies
    found = run(2, *kinds, "short_of_memory", "unlike", "fails", *(("sharded", "unguarded") if SHARDS else ()), "dies")
    for kind in kinds:
        close(found[kind], train_kind(kind, sources, tmp_path / kind))
    alone = train_kind("packed, micro-batches of 2", sources, tmp_path / "whole", ["adapter.lora_dropout=0"])
    close(found["short_of_memory"], alone)
    if SHARDS:
        close(found["sharded"], train_kind("NF4", sources, tmp_path / "nf4"))
    if SHARDS and has_avx512bf16():  # elsewhere nothing is repacked
        assert "hardware.shard=true: a sharded layer of this base is not what it was before" in found["unguarded"]
    assert "process 1" in found["unlike"]
    assert "has another optim.lr than process 0" in found["unlike"]
    assert "0.2 and 0.1. Start all alike." in found["unlike"]
    assert found["fails"].startswith("TrainingError: process 1")
    assert "a pass that cannot be" in found["fails"]
    assert "process 1" in found["dies"]["said"]
    assert "has ended, so process 0" in found["dies"]["said"]
    assert found["dies"]["saved"] == ["step-2"]  # the last step that all of them made


def test_a_torch_that_cannot_share_a_base_is_told(overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.delattr(torch.distributed, "all_gather_single", raising=False)
    said = fails(["train", *overrides, "hardware.processes=2", "hardware.shard=true"], capsys)
    assert f"hardware.shard=true: torch {torch.__version__} is too old" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [2, 3])
def test_each_kind_in_several_processes(run, sources, tmp_path, count):
    kinds = [
        "packed",
        "packed, micro-batches of 2",
        "preference",
        "preference, KTO",
        "NEFTune",
        "distillation, cohort of 3",
        "float16",
        "bfloat16",
        "NF4",
        "NF4, cohort of 3",
    ]
    found = run(count, *kinds)
    for place, kind in enumerate(kinds):
        close(found[kind], train_kind(kind, sources, tmp_path / str(place)))


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [2, 3])
def test_each_kind_on_a_sharded_base(run, sources, tmp_path, count):
    found = run(count, *(f"{kind}: sharded" for kind in SHARDED))
    for place, kind in enumerate(SHARDED):
        limit = SHARDED_4BIT if "NF4" in kind else SHARDED_ADAPTER
        close(found[f"{kind}: sharded"], train_kind(kind, sources, tmp_path / str(place)), limit)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["NF4", "bfloat16"])
def test_a_sharded_base_is_the_whole_one_over_many_steps(run, kind):
    whole, sharded = run(2, f"{kind}: longer", f"{kind}: longer, sharded").values()
    assert len(whole["losses"][0]) == 25
    losses, adapters = gaps(sharded, whole)
    assert losses <= 1e-6
    assert adapters <= 1e-6


# -- through the command line ---------------------------------------------------------------------------------------------

DYING = Path(__file__).parent / "dying.py"
ADAPTER_FILE = "adapter/adapter_model.safetensors"


@pytest.fixture
def command(sources) -> list[str]:
    return command_of(sources)


def command_of(sources: Sources) -> list[str]:
    return [
        "train", "model=hub", f"model.path={sources.base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={sources.rows('completions')}", f"data.eval={sources.rows('completions', 'eval')}", "adapter.lora_dropout=0.1",
        "train.batch_size=4", "train.micro_batch_size=1", "train.max_steps=5", "train.save_steps=2", "hardware.timeout=20",
    ]  # fmt: skip


def adapter(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / ADAPTER_FILE)
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_process_that_hangs_ends_the_run_in_time(command, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    hanging = [sys.executable, str(DYING), "step", "5", "1", "STOP", *command, f"run_dir={tmp_path}/run"]
    assert launch.run_here(hanging, 2, 5) != 0
    said = capfd.readouterr().err
    assert re.search(r"process 1 \(.*\): did not come within hardware.timeout=20 s, so process 0", said)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-2"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_run_of_two_goes_on_with_one_or_three(command, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    whole = tmp_path / "whole"
    assert cli.main([*command, f"run_dir={whole}"]) == 0
    for count in (1, 3):
        folder = tmp_path / str(count)
        dying = [sys.executable, str(DYING), "step", "5", "1", "TERM", *command, f"run_dir={folder}"]
        assert launch.run_here(dying, 2, 20) == 128 + signal.SIGTERM
        assert cli.main(["resume", f"run={folder}", f"hardware.processes={count}"]) == 0
        assert (adapter(folder) - adapter(whole)).abs().max() < ADAPTER


@pytest.mark.long
@pytest.mark.timeout(900)
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


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sharded_run_ends_as_any_other(command, tmp_path, monkeypatch):
    """Its adapter is that of a whole base; it is merged; a stopped one goes on in one process, which has the whole base."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    merging = [
        "export=merged",
        "merge.max_loss_increase=9",
        "merge.max_kl=9",
        "merge.min_top1_agreement=0.01",
        "merge.max_logit_diff=9",
    ]
    nf4 = [*(text for text in command if text != "quant=none"), "quant=nf4", "speed=plain", *merging]
    ways = {"whole": ["hardware.processes=2"], "sharded": ["hardware.processes=2", "hardware.shard=true"]}
    for way, told in ways.items():
        assert cli.main([*nf4, *told, f"run_dir={tmp_path}/{way}"]) == 0
    assert torch.equal(adapter(tmp_path / "sharded"), adapter(tmp_path / "whole"))
    one, other = (json.loads((tmp_path / way / "result.json").read_text()) for way in ways)
    assert (tmp_path / "sharded/merged").is_dir()
    assert one["tuned"] == other["tuned"]
    assert one["coverage"] == other["coverage"]
    stopped = tmp_path / "stopped"
    dying = [sys.executable, str(DYING), "step", "5", "1", "TERM", *nf4, "hardware.shard=true", f"run_dir={stopped}"]
    assert launch.run_here(dying, 2, 20) == 128 + signal.SIGTERM
    assert cli.main(["resume", f"run={stopped}", "hardware.shard=false", "hardware.processes=1"]) == 0
    assert (adapter(stopped) - adapter(tmp_path / "whole")).abs().max() < ADAPTER
