"""What the base scores is kept, and used where it would be the same: nowhere else."""

from __future__ import annotations

import json
import shutil

import pytest

from lora_lab.run import base_scores, prepared
from tests.conftest import write_jsonl

KEPT = "its scores on these rows were measured before"


@pytest.fixture
def measured(config_of, eval_file, monkeypatch, tmp_path):
    """The base as a run measures it; later overrides of the same key win."""
    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "cache"))

    def measure(*more: str):
        setup = prepared.prepare(config_of(f"data.eval={eval_file}", "task.generate_rows=2", "task.max_new_tokens=4", *more))  # fmt: skip
        with setup.loaded() as live:
            return live.measure_base(), base_scores.folder_of(setup)

    return measure


def test_a_later_run_takes_them_whatever_its_adapter(measured, capsys):
    first, folder = measured()
    assert KEPT not in capsys.readouterr().out
    again, other = measured("adapter.r=2", "seed=5", "optim.lr=0.05", "train.batch_size=2")
    assert (again, other) == (first, folder)
    assert first.answers
    assert KEPT in capsys.readouterr().out


def test_damaged_ones_are_measured_again_and_said_so(measured, capsys):
    first, folder = measured()
    file = folder / "scores.json"
    file.write_text(file.read_text().replace(f"{first.metrics['loss']}", "0.25"))
    capsys.readouterr()
    assert measured()[0] == first
    printed = capsys.readouterr().out
    assert "It is made again" in printed
    assert KEPT not in printed
    assert json.loads(file.read_text())["metrics"] == first.metrics


def test_what_is_no_number_is_not_kept(measured, tmp_path, monkeypatch):
    _, folder = measured()
    shutil.rmtree(folder)
    base_scores._keep(folder, {"metrics": {"loss": float("nan")}, "answers": [], "details": {}})
    assert not folder.exists()


def test_whatever_decides_a_score_decides_the_entry(config_of, eval_file, tmp_path, rows_file, base, monkeypatch):
    def folder(*more: str, change=None):
        setup = prepared.prepare(config_of(f"data.eval={eval_file}", *more))
        if change is not None:
            change(setup)
        return base_scores.folder_of(setup)

    rows = [json.loads(line) for line in eval_file.read_text().splitlines()]
    turned = write_jsonl(tmp_path / "turned.jsonl", rows[::-1])
    other = shutil.copytree(base, tmp_path / "other")
    settings = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.3}))
    found = [
        folder(),
        folder(f"data.eval={turned}"),
        folder(f"data.eval={rows_file}"),
        folder("quant=nf4"),
        folder("model.dtype=bfloat16"),
        folder("speed=plain"),
        folder("task.generate_rows=1"),
        folder("task.max_new_tokens=9"),
        folder(f"model.path={other}"),
        folder(change=lambda setup: setup.task.forward.part_rows()),
    ]
    assert len(set(found)) == len(found)
    assert folder("adapter.r=2", "seed=7", "optim.lr=0.03", f"data.train={eval_file}", "data.shared=keep") == found[0]
    monkeypatch.setattr(base_scores, "_code_version", lambda: "another")
    assert folder() not in found
