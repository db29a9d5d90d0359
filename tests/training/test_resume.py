"""A run that was interrupted anywhere ends with the same bytes as one that never was."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lab import cli
from lora_lab.errors import CheckpointError, Interrupted, ProcessError, RunError
from lora_lab.run import pipeline
from lora_lab.run.prepared import prepare
from lora_lab.runtime import ranks
from lora_lab.runtime.tracking import MetricsLog
from lora_lab.tasks.causal_lm.task import CausalLM
from lora_lab.training import checkpoint
from tests.conftest import make_rows, write_jsonl

STEPS = 12  # 20 rows, 4 a step: 2.4 epochs of 5 steps, in 2 micro-batches each
HARD = [
    "adapter.lora_dropout=0.2",
    "train.epochs=3",
    f"train.max_steps={STEPS}",
    "train.micro_batch_size=2",
    "train.save_steps=5",
]


def digests(folder: Path) -> dict[str, str]:
    """What a run ends with: the adapter, the optimizer, and every logged loss."""
    newest = folder / "checkpoints" / f"step-{STEPS}"
    files = [
        folder / "adapter/adapter_model.safetensors",
        newest / "optimizer.safetensors",
        newest / "state.json",
        folder / "metrics.jsonl",
    ]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def whole(config_of, tmp_path, eval_file):
    """An uninterrupted run, and how to start the same run elsewhere."""

    def start(name: str):
        return pipeline.train(config_of(*HARD, f"data.eval={eval_file}", f"run_dir={tmp_path}/{name}"))

    return digests(start("whole").path), start


def stop_at(monkeypatch, micro_batch: int, signum: int = signal.SIGTERM) -> None:
    """Send this process a signal during the forward pass of a micro-batch (counted from 0 over the whole run)."""
    count = {"seen": -1}
    real = CausalLM.loss

    def loss(self, model, batch, *more):
        if model.training:
            count["seen"] += 1
            if count["seen"] == micro_batch:
                os.kill(os.getpid(), signum)
        return real(self, model, batch, *more)

    monkeypatch.setattr(CausalLM, "loss", loss)


def interrupted_everywhere(whole, tmp_path, monkeypatch, micro_batches) -> None:
    expected, start = whole
    cli.signals.install()
    for micro_batch in micro_batches:
        name = f"stopped{micro_batch}"
        with monkeypatch.context() as patch:
            stop_at(patch, micro_batch)
            with pytest.raises(Interrupted) as stopped:
                start(name)
        assert stopped.value.exit_code == 143
        folder = tmp_path / name
        saved, _ = checkpoint.newest_valid(folder / "checkpoints")
        # an interrupted step is done again; a signal in its last micro-batch still lets it finish
        assert saved.name == f"step-{(micro_batch + 1) // 2}"
        pipeline.resume(str(folder), [])
        assert digests(folder) == expected, f"stopped in micro-batch {micro_batch}"


def test_resume_is_exact_after_interruptions(whole, tmp_path, monkeypatch):
    """In the first step, mid-accumulation, at an epoch's end, mid-epoch, in the last step."""
    interrupted_everywhere(whole, tmp_path, monkeypatch, [0, 5, 9, 16, 23])


@pytest.mark.long
def test_resume_is_exact_after_every_interruption(whole, tmp_path, monkeypatch):
    interrupted_everywhere(whole, tmp_path, monkeypatch, range(2 * STEPS))


def test_resume_falls_back_to_the_newest_valid_checkpoint(whole, tmp_path, monkeypatch, capsys):
    expected, start = whole
    cli.signals.install()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 14)
        start("damaged")
    folder = tmp_path / "damaged"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-5", "step-7"]
    weights = folder / "checkpoints/step-7/optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (folder / "checkpoints/.step-8.123.tmp").mkdir()  # what a kill in the middle of a save leaves behind
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 8, "lo')  # a line torn by a power cut
    pipeline.resume(str(folder), [])
    assert "optimizer.safetensors" in capsys.readouterr().out
    assert digests(folder) == expected


def test_an_evaluation_in_which_another_process_was_lost_is_made_after_all(whole, tmp_path, monkeypatch):
    expected, start = whole

    def lose(*_):
        raise ProcessError("process 1: has ended")

    with monkeypatch.context() as patch, pytest.raises(ProcessError):
        patch.setattr(CausalLM, "measure", lose)
        patch.setattr(ranks, "lost", lambda: True)
        start("lost")
    folder = tmp_path / "lost"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-5"]
    pipeline.resume(str(folder), [])
    assert digests(folder) == expected


def test_resume_of_a_finished_run_does_nothing(whole, tmp_path, capsys):
    expected, _ = whole
    before = {
        file: file.stat().st_mtime_ns
        for file in (tmp_path / "whole").rglob("*")
        if file.name not in (".lock", "log.txt")
    }
    pipeline.resume(str(tmp_path / "whole"), [])
    assert "finished; nothing to do" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert digests(tmp_path / "whole") == expected


def test_resume_without_checkpoint_starts_over(whole, tmp_path):
    expected, start = whole
    folder = start("early").path
    shutil.rmtree(folder / "checkpoints")
    (folder / "result.json").unlink()
    pipeline.resume(str(folder), [])
    assert digests(folder) == expected


def test_resume_refuses_changed_data_and_overrides(config_of, tmp_path, monkeypatch, capsys):
    file = write_jsonl(tmp_path / "rows.jsonl", make_rows(8))
    cli.signals.install()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 1)
        pipeline.train(config_of(f"data.train={file}"))
    write_jsonl(file, make_rows(8, seed=9))
    with pytest.raises(RunError, match=r"the files of data\.train changed since the start"):
        pipeline.resume(f"{tmp_path}/run", [])
    assert cli.main(["resume", f"run={tmp_path}/run", "optim.lr=1"]) == 2
    assert "resume takes no overrides" in capsys.readouterr().err


def test_checkpoint_of_another_base_is_refused(config_of, tmp_path, monkeypatch):
    from lora_lab.errors import AdapterError
    from tests.conftest import make_base

    base = make_base(tmp_path / "base")
    cli.signals.install()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 2)
        pipeline.train(config_of(f"model.path={base}"))
    make_base(base, seed=7)
    with pytest.raises((RunError, AdapterError), match="other weights"):
        pipeline.resume(f"{tmp_path}/run", [])


def test_tensors_that_do_not_fit_are_refused(whole, tmp_path, config_of):
    from lora_lab.adapters import files
    from lora_lab.base.load import find
    from lora_lab.errors import AdapterError
    from lora_lab.runtime import storage

    folder = tmp_path / "whole/adapter"
    prepared = prepare(config_of("adapter.r=8"))
    with pytest.raises(AdapterError, match="does not fit the adapter's settings"):
        files.read_into(folder, prepared.loaded().model, "default")
    model = prepare(config_of(*HARD)).loaded().model
    next(p for p in model.parameters() if p.requires_grad).data[0, 0] = float("nan")
    with storage.new_folder(tmp_path / "nan") as temporary:
        files.write(temporary, model, "default", config_of(), find(config_of().model), {})
    with pytest.raises(AdapterError, match="NaN or infinity"):
        files.read_into(tmp_path / "nan", model, "default")
    (tmp_path / "nan/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        files.check_base(tmp_path / "nan", find(config_of().model))


def spawn(arguments: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "lora_lab", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run has logged a step; ends by itself when the process does."""
    metrics = folder / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and any(
            json.loads(line)["step"] >= step for line in metrics.read_text().splitlines() if line.endswith("}")
        ):
            return
        os.sched_yield()


@pytest.mark.long
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_exit_with_their_code(signum, code, overrides, tmp_path):
    long = [*overrides, "train.epochs=10000", "train.save_steps=100000"]
    process = spawn(["train", *long])
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert re.search(rf"stopped at step \d+ of 50000; .*lora-lab resume run={tmp_path}/run", stderr), stderr
    assert "Traceback" not in stderr
    saved, skipped = checkpoint.newest_valid(tmp_path / "run/checkpoints")
    assert saved is not None
    assert not skipped


@pytest.mark.long
def test_kill_9_at_random_moments(whole, overrides, tmp_path, eval_file):
    """Killed again and again, saves included: always resumable, at most one save interval lost, the same bytes."""
    expected, _ = whole
    draw, folder = random.Random(0), tmp_path / "killed"
    often = [*HARD[:-1], "train.save_steps=1", f"data.eval={eval_file}", f"run_dir={folder}"]
    kills = 0
    while True:
        started = (folder / "config.yaml").exists()
        saved, _ = checkpoint.newest_valid(folder / "checkpoints")
        step = int(saved.name.removeprefix("step-")) if saved else 0
        if step == STEPS:
            break
        MetricsLog(folder / "metrics.jsonl").rewind(step) if started else None  # what is logged now is new
        process = spawn(["resume", f"run={folder}"] if started else ["train", *overrides, *often])
        wait_for_step(folder, step + 1, process)
        for _ in range(draw.randrange(20_000)):  # somewhere in the evaluation, the save or the next steps
            os.sched_yield()
        process.kill()
        _, stderr = process.communicate()
        assert process.returncode == -signal.SIGKILL, stderr
        kills += 1
        logged = max(line["step"] for line in MetricsLog(folder / "metrics.jsonl").read())
        saved, _ = checkpoint.newest_valid(folder / "checkpoints")
        assert (int(saved.name.removeprefix("step-")) if saved else 0) >= logged - 1, "more than one save interval lost"
    assert kills >= 4
    pipeline.resume(str(folder), [])
    assert digests(folder) == expected
