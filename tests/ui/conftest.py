"""A folder as it is in use: a sweep, a run that was begun, damaged ones, and ones that somebody made to do harm."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from lora_lab import cli
from lora_lab.verify import parity

HIDDEN = "a secret elsewhere"
HOSTILE = "<img src=x onerror=alert(1)>\u202e'\"&"


@pytest.fixture(scope="session")
def place(base, rows_file, eval_file, tmp_path_factory) -> Path:
    around = tmp_path_factory.mktemp("looked_at")
    folder = around / "runs"
    told = [
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={rows_file}", f"data.eval={eval_file}", "optim.lr=0.01", "train.batch_size=4", "train.max_steps=4",
        "train.eval_steps=2", "task.generate_rows=2", "task.max_new_tokens=4",
    ]  # fmt: skip
    assert cli.main(["train", "-m", *told, "adapter.r=2,4", f"hydra.sweep.dir={folder}/sweep"]) == 0
    assert cli.main(["evaluate", f"run={folder}/sweep/0"]) == 0
    gap = dataclasses.asdict(parity.Gap(0.000123, 1e-9, 1.0, 2.5, 2.5))
    report = {"refused": [], "merged_vs_base_and_adapter": gap, "merged_vs_model_as_trained": gap, "dtype": "float32"}
    (folder / "sweep/0/merge_report.json").write_text(json.dumps(report))
    for name in ("begun", "damaged", "received", "linked"):
        (folder / name).mkdir()
        shutil.copy(folder / "sweep/0/config.yaml", folder / name)
    (folder / "damaged/result.json").write_text("{")
    (folder / "damaged/metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step"')
    (folder / "damaged/predictions.jsonl").write_text('[]\n{"text": "whole", "predicted_label": "a"}\n{')
    (folder / "damaged/merge_report.json").write_text("[]")
    (folder / "other").mkdir()
    (folder / "other/config.yaml").write_text("a: [")
    _received(folder / "received")
    (around / "secret.txt").write_text(HIDDEN)
    (folder / "linked/predictions.jsonl").symlink_to(around / "secret.txt")
    (folder / "sweep/data.html").symlink_to(around / "secret.txt")
    return folder


def _received(run: Path) -> None:
    """Whatever a stranger can write into the files of a run."""
    result = json.loads((run.parent / "sweep/0/result.json").read_text())
    result["tuned"][HOSTILE] = 1.0
    (run / "result.json").write_text(json.dumps(result))
    config = (run / "config.yaml").read_text().replace("name: ", f"name: {json.dumps(HOSTILE)} #", 1)
    (run / "config.yaml").write_text(config)
    row = {HOSTILE: HOSTILE, "predicted_label": HOSTILE, "predicted_expected": HOSTILE, "predicted_of": HOSTILE}
    (run / "predictions.jsonl").write_text(f"{json.dumps({**row, 'predicted_off': 1.0})}\n" * 60)
    report = {"refused": [HOSTILE], "base": HOSTILE, "merged_vs_base_and_adapter": {HOSTILE: HOSTILE}}
    (run / "merge_report.json").write_text(json.dumps(report))
    lines = [{"step": step, "loss": 1.0 / step, f"eval_{HOSTILE}": 0.5 + step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (run / "log.txt").write_text(HOSTILE)
    (run / "evaluation.html").write_text("<script>fetch('https://example.org')</script>")
