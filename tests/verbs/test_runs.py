"""`lora-lab runs`: what lies below a folder, as the folders themselves say it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lab
from lora_lab import cli
from tests.conftest import fails


@pytest.fixture(scope="module")
def place(base, rows_file, eval_file, tmp_path_factory) -> Path:
    """Two runs, a begun one, a damaged one, and a folder that is none."""
    folder = tmp_path_factory.mktemp("listed")
    for name, rank in (("one", 2), ("deep/er/two", 4)):
        lora_lab.train(lora_lab.load_config(
            "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
            f"data.train={rows_file}", f"data.eval={eval_file}", "optim.lr=0.01", f"adapter.r={rank}", "train.batch_size=4",
            "train.max_steps=2", "task.generate_rows=0", "export.targets=[]", f"run_dir={folder}/{name}",
        ))  # fmt: skip
    for name in ("begun", "damaged"):
        (folder / name).mkdir()
        shutil.copy(folder / "one/config.yaml", folder / name)
    (folder / "damaged/result.json").write_text("{")
    (folder / "other").mkdir()
    (folder / "other/config.yaml").write_text("a: [")
    return folder


def listed(capsys, *told: object) -> list[dict]:
    capsys.readouterr()
    assert cli.main(["runs", *map(str, told), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_run_is_listed_with_how_far_it_is(place, capsys):
    runs = {Path(run["path"]).name: run for run in listed(capsys, place)}
    assert {name: run["state"] for name, run in runs.items()} == {
        "one": "done", "two": "done", "begun": "begun", "damaged": "damaged"
    }  # fmt: skip
    assert runs["two"]["tuned"] == lora_lab.open_run(place / "deep/er/two").result["tuned"]
    assert (runs["two"]["steps"], runs["two"]["config"]["adapter.r"]) == (2, 4)
    capsys.readouterr()
    assert cli.main(["runs", str(place)]) == 0
    said = capsys.readouterr().out
    assert "4 runs in" in said
    assert "lora r=4" in said
    assert f"{place}/other" in said  # cannot be read, with the reason


def test_values_and_groups_choose_and_a_metric_sorts(place, capsys):
    assert [Path(run["path"]).name for run in listed(capsys, place, "adapter.r=4")] == ["two"]
    assert len(listed(capsys, place, "adapter=lora", "adapter.r=2", "quant=none")) == 3
    assert listed(capsys, place, "adapter=dora") == []
    by_loss = [run["tuned"].get("loss", float("inf")) for run in listed(capsys, place, "sort=loss")]
    assert by_loss == sorted(by_loss)
    by_accuracy = [run["tuned"].get("token_accuracy", -1) for run in listed(capsys, place, "sort=token_accuracy")]
    assert by_accuracy == sorted(by_accuracy, reverse=True)


@pytest.mark.parametrize("metric", ["loss", pytest.param("token_accuracy", marks=pytest.mark.long)])
def test_a_process_that_loaded_no_task_sorts(metric, place):
    """Which way a task's metric is better stands beside its code."""
    line = [sys.executable, "-m", "lora_lab", "runs", str(place), f"sort={metric}", "--json"]
    found = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    assert {Path(run["path"]).name for run in found[:2]} == {"one", "two"}


def test_two_runs_are_compared(place, capsys):
    assert cli.main(["runs", f"compare={place}/one,{place}/deep/er/two"]) == 0
    said = capsys.readouterr().out
    assert "adapter.r" in said
    assert "token_accuracy" in said
    assert "optim.lr" not in said


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (["{place}/absent"], "{place}/absent: no folder"),
        (["{place}", "adapter.rr=4"], "adapter.rr: unknown key. Did you mean 'adapter.r'?"),
        (["{place}", "sort=f2"], "sort=f2: no run has this metric"),
        (["compare={place}/one"], "two runs are compared"),
        (["compare={place}/one,{place}/absent"], "absent: no run there"),
    ],
)
def test_mistakes_are_sentences(told, sentence, place, capsys):
    assert sentence.format(place=place) in fails(["runs", *(text.format(place=place) for text in told)], capsys)
