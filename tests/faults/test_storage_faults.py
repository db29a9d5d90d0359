"""Full disks, damaged logs and checkpoints, signals, names that no file system takes: nothing is lost, and a sentence says what to do."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lab.config import compose
from lora_lab.errors import Interrupted, RunError
from lora_lab.run import run_dir
from lora_lab.runtime import children, console, signals, storage
from lora_lab.runtime.tracking import MetricsLog
from tests.faults.forks import files_of_at_most, in_fork, skip_if_not_mounted, small_disk

# -- folders and files ------------------------------------------------------------------------------------------------


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    """A temporary is litter when its lock is free, whatever the process number in its name."""
    with storage.new_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("a")
        assert in_fork(lambda: storage.recover(tmp_path)) == "[]"
        assert temporary.is_dir()
    storage.verify(tmp_path / "f")


@pytest.mark.parametrize("kind", ["tmp", "old", "gone"])
def test_only_whole_folders_are_put_back_and_only_where_the_name_is_free(tmp_path, kind):
    own = tmp_path / f".f.{os.getpid()}.{kind}"  # the number of a living process, but not its lock
    with storage.new_folder(tmp_path / "whole", {"step": 1}) as temporary:
        (temporary / "a").write_text("a")
    shutil.copytree(tmp_path / "whole", own)
    (tmp_path / ".g.77.tmp").mkdir()
    (tmp_path / ".h.json.77.tmp").write_text("{")
    (tmp_path / ".hidden.of.the.user").write_text("stays")
    said = storage.recover(tmp_path)
    back = kind != "gone"
    assert (tmp_path / "f").exists() == back
    assert len(said) == back
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden.of.the.user", *(["f"] if back else []), "whole"]
    shutil.copytree(tmp_path / "whole", own)
    (tmp_path / "f").mkdir(exist_ok=True)
    assert storage.recover(tmp_path) == []
    assert not own.exists()


def test_a_run_is_tidied_up_when_it_is_opened(tmp_path, capsys):
    run = run_dir.create(compose.compose(["recipe=demo", f"run_dir={tmp_path}/run"]))
    for litter in (".merged.9.tmp", "checkpoints/.step-8.9.tmp", "export/.gguf.9.old"):
        (run.path / litter).mkdir(parents=True)
    with storage.new_folder(run.path / ".adapter.9.old") as temporary:
        (temporary / "a").write_text("a")
    with run.locked():
        pass
    assert "adapter: complete, but a process died before renaming it; restored" in capsys.readouterr().out
    left = sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*"))
    assert left == [
        ".lock",
        "adapter",
        "adapter/a",
        "adapter/manifest.json",
        "checkpoints",
        "config.yaml",
        "export",
        "log.txt",
    ]


def test_signals_wait_until_both_renames_are_made(tmp_path, monkeypatch):
    signals.install()
    real = os.rename
    monkeypatch.setattr(storage, "_exchange", lambda one, other: False)

    def make(step: int) -> None:
        with storage.new_folder(tmp_path / "f", {"step": step}) as temporary:
            (temporary / "a").write_text("a")

    def interrupted(*names):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        real(*names)

    make(3)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(os, "rename", interrupted)
        make(4)
    assert storage.verify(tmp_path / "f")["step"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]


def test_no_text_file_is_left_half_when_a_signal_arrives(tmp_path, monkeypatch):
    signals.install()
    real = os.fsync

    def interrupted(descriptor):
        os.kill(os.getpid(), signal.SIGINT)
        real(descriptor)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(os, "fsync", interrupted)
        storage.write_text(tmp_path / "a.json", "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "whole"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a" * 256, "File name too long"),
        ("file/run", "a file, not a folder"),
        ("file", "a file of that name exists"),
        ("a\0b", "null"),
        ("dangling", "a file of that name exists"),
    ],
)
def test_run_folders_that_cannot_be(tmp_path, name, reason):
    (tmp_path / "file").write_text("stays")
    (tmp_path / "dangling").symlink_to("nowhere")
    config = compose.compose(["recipe=demo", f"run_dir={tmp_path}/run"])
    config = dataclasses.replace(config, run_dir=f"{tmp_path}/{name}")
    for refused in (run_dir.check_free, run_dir.create):
        with pytest.raises(RunError, match=reason) as error:
            refused(config)
        assert str(error.value).startswith("run_dir=")
    with pytest.raises(RunError):
        run_dir.open_existing(f"{tmp_path}/{name}")
    assert (tmp_path / "file").read_text() == "stays"


def test_home_folders_of_nobody(capsys):
    with pytest.raises(RunError, match="cannot be read"):
        run_dir.open_existing("~nobody-of-this-name/run")


@pytest.mark.parametrize("where", ["f", "f/below"])
def test_a_file_where_a_folder_is_due(tmp_path, where):
    (tmp_path / "f").write_text("stays")
    with pytest.raises(RunError, match="A file is where a folder is expected"), storage.new_folder(tmp_path / where):
        pass
    assert (tmp_path / "f").read_text() == "stays"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_folder_where_a_file_is_due(tmp_path):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(RunError, match="A folder is where a file is expected"):
        storage.write_text(tmp_path / "result.json", "{}")
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_start_that_died_early_does_not_take_the_folder(tmp_path):
    """What it leaves before config.yaml is there: nobody's."""
    config = compose.compose(["recipe=demo", f"run_dir={tmp_path}/run"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()
    (tmp_path / "run/.config.yaml.77.tmp").write_text("schema")
    run = run_dir.create(config)
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "config.yaml", "log.txt"]
    with pytest.raises(RunError, match="exists and is not empty"):
        run_dir.create(config)


def test_the_second_start_is_refused_while_the_first_works(tmp_path):
    one, other = (compose.compose(["recipe=demo", f"run_dir={tmp_path}/run", f"optim.lr={lr}"]) for lr in (0.01, 0.02))
    with run_dir.created(one) as run:
        with pytest.raises(RunError, match="not empty"), run_dir.created(other):
            pass
        (run.path / "config.yaml").rename(tmp_path / "aside")  # as in the moment before it is written
        with pytest.raises(RunError), run_dir.created(other):
            pass
        (tmp_path / "aside").rename(run.path / "config.yaml")
    assert compose.load(run.config) == one


# -- full disks -------------------------------------------------------------------------------------------------------


def test_a_real_disk_that_is_full(tmp_path):
    """Text, folder and log on a file system of 256 KB: a sentence each, what was there stays, nothing is left."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def action():
        small_disk(disk, "256k")
        found = []
        storage.write_text(disk / "a.json", "old")
        with storage.new_folder(disk / "f", {"step": 3}) as temporary:
            (temporary / "a").write_text("a")
        for write in (
            lambda: storage.write_text(disk / "a.json", "x" * 300_000),
            lambda: fill(disk / "f"),
            lambda: fill(disk / "g"),
        ):
            try:
                write()
            except RunError as error:
                found.append(str(error))
        log = MetricsLog(disk / "metrics.jsonl")
        log.write(1, loss=1.0)
        (disk / "filler").write_bytes(b"")
        with open(disk / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(100))
            except OSError:
                pass
        for step in range(2, 400):
            log.write(step, loss=1.0)
        found.append(str(log.problem))
        assert len(found) == 4
        assert all("No space left on device" in said for said in found), found
        assert storage.verify(disk / "f")["step"] == 3
        assert (disk / "a.json").read_text() == "old"
        os.unlink(disk / "filler")
        assert log.sync() == []
        assert [line["step"] for line in log.read()] == list(range(1, 400))
        return sorted(os.listdir(disk))

    said = in_fork(action)
    skip_if_not_mounted(said)
    assert said == "['a.json', 'f', 'metrics.jsonl']"


def fill(folder: Path) -> None:
    with storage.new_folder(folder) as temporary:
        (temporary / "big").write_bytes(bytes(300_000))


def test_another_file_system_below_and_in_place(tmp_path):
    """A run folder may lie on any disk; a disk mounted where a folder is to appear is told of."""

    def action():
        (tmp_path / "run/merged").mkdir(parents=True)
        small_disk(tmp_path / "run/merged", "64k")
        try:
            with storage.new_folder(tmp_path / "run/merged") as temporary:
                (temporary / "a").write_text("a")
        except RunError as error:
            return f"{error} {sorted(os.listdir(tmp_path / 'run'))}"

    said = in_fork(action)
    skip_if_not_mounted(said)
    assert "Another file system is mounted there: mount it one folder higher. ['merged']" in said


def test_a_parent_that_is_read_only(tmp_path):
    config = compose.compose(["recipe=demo", f"run_dir={tmp_path}/disk/runs/one"])
    (tmp_path / "disk").mkdir()

    def action():
        small_disk(tmp_path / "disk", "64k", read_only=True)
        try:
            storage.write_text(tmp_path / "disk/a.json", "")
        except RunError as error:
            told = str(error)
        try:
            run_dir.create(config)
        except RunError as error:
            return f"{told} {error}"

    said = in_fork(action)
    skip_if_not_mounted(said)
    assert "Read-only file system" in said
    assert f"run_dir={tmp_path}/disk/runs/one: {tmp_path}/disk is read-only. Choose another run_dir." in said


FULL = """
import json, sys
from pathlib import Path
from lora_lab import cli
from lora_lab.config import compose
from lora_lab.run import pipeline
from lora_lab.errors import RunError
from tests.faults.forks import resized, small_disk

disk, overrides, names = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])

def ends(folder):
    return {name: (folder / name).read_bytes() for name in names}

def used(folder):
    return sum(-(-file.stat().st_size // 4096) + 1 for file in folder.rglob("*")) * 4

found = []
small_disk(disk, "64m")
whole = pipeline.train(compose.compose([*overrides, f"run_dir={disk}/whole"])).path
expected, most = ends(whole), used(whole)
for share in range(1, 21):
    small_disk(disk, f"{most * share // 20}k")
    folder = disk / "run"
    try:
        pipeline.train(compose.compose([*overrides, f"run_dir={folder}"]))
        found.append([share, "", ends(folder) == expected])
        continue
    except RunError as error:
        said = str(error)
    resized(disk, "64m")
    again = folder / "config.yaml"
    pipeline.resume(str(folder), []) if again.exists() else pipeline.train(compose.compose([*overrides, f"run_dir={folder}"]))
    litter = [str(p) for p in folder.rglob(".*.tmp")] + [str(p) for p in folder.rglob(".*.old")]
    found.append([share, said, ends(folder) == expected and not litter])
print("FOUND" + json.dumps(found))
"""


@pytest.mark.faults
def test_runs_on_disks_that_fill_up_anywhere(overrides, eval_file, tmp_path):
    """Twenty sizes of a disk: a sentence each time, and with more room the same bytes, without litter."""
    (tmp_path / "disk").mkdir()
    some = json.dumps([*overrides, *LONG, f"data.eval={eval_file}"])
    command = [sys.executable, "-c", FULL, f"{tmp_path}/disk", some, json.dumps(ENDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    skip_if_not_mounted(done.stderr.strip().splitlines()[-1].rpartition("forks.")[2] if done.stderr.strip() else "")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("FOUND")[2])
    assert all(same for _, _, same in found), found
    said = [text for _, text, _ in found if text]
    assert len(said) > 10
    assert all("No space left on device" in text for text in said), said


def test_a_full_temporary_folder_is_named_as_such(tmp_path):
    def action():
        files_of_at_most(1000)
        with storage.new_folder(tmp_path / "merged"):
            with storage.scratch(tmp_path) as scratch:
                (scratch / "rows").write_bytes(bytes(2000))

    said = in_fork(action)
    assert said.startswith(f"RunError: {tmp_path}: a temporary file cannot be written there (File too large)")
    assert "TMPDIR" in said
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match="TMPDIR"):
        storage.check_scratch(tmp_path / "s", "SafetensorError: I/O error: No space left on device (os error 28)")
    storage.check_scratch(tmp_path / "s", "ValueError: something else")


def test_a_log_that_no_disk_takes_ends_and_the_run_goes_on(tmp_path):
    def action():
        with console.logged_to(tmp_path / "log.txt"):
            console.say("one", "first")
            files_of_at_most((tmp_path / "log.txt").stat().st_size + 3)
            console.say("two", "second")
            console.say("three", "third")
        return (tmp_path / "log.txt").read_text()

    def heard():
        readable, writable = os.pipe()
        with open(writable, "w") as console.out.file:
            logged = action()
        with open(readable) as stream:
            return logged + "--\n" + stream.read()

    logged, _, heard_there = in_fork(heard).partition("--\n")
    assert logged.startswith("      one  first\n")
    assert "third" not in logged
    assert heard_there.count("log.txt: cannot be written (File too large); the log ends here, the run continues") == 1
    assert "third" in heard_there


# -- metrics ----------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "torn": b'{"step": 2, "lo',
    "no JSON": b"loss 3",
    "not UTF-8": b'{"step": 2, "loss": "\xff"}',
    "a list": b"[2, 1.0]",
    "a number": b"2",
    "no step": b'{"loss": 1.0}',
    "a step that is text": b'{"step": "2", "loss": 1.0}',
    "a step that is true": b'{"step": true, "loss": 1.0}',
    "a loss that is text": b'{"step": 2, "loss": "low"}',
    "deep": b"[" * 100_000,
    "zeros": bytes(40),
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_loses_only_itself(tmp_path, capsys, bad):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.write(step, loss=step / 3)
    lines = log.file.read_bytes().splitlines()
    log.file.write_bytes(b"\n".join([lines[0], bad, *lines[2:], b'{"step": 6, "l']))
    assert [line["step"] for line in log.read()] == [1, 3, 4, 5]
    log.rewind(4)
    said = capsys.readouterr().out
    assert "line 2: damaged; left out" in said
    assert "no losses of step 2" in said
    assert log.file.read_bytes().splitlines() == [lines[0], lines[2], lines[3]]
    log.write(5, loss=1.0)
    assert [line["step"] for line in log.read()] == [1, 3, 4, 5]


def test_metrics_that_are_missing_are_said_to_be(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.read() == []
    log.rewind(8)
    assert "no losses of 8 steps (1, 2, 3, 4, 5, ...), which are done" in capsys.readouterr().out


def test_metrics_are_durable_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), real(descriptor)))
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, loss=1.0)
    assert log.sync() == []
    assert log.file.stat().st_ino in synced


# -- whole runs -------------------------------------------------------------------------------------------------------

LONG = ["train.max_steps=6", "train.epochs=2", "train.save_steps=2", "train.eval_steps=2", "train.keep_checkpoints=5"]


ENDS = [
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "metrics.jsonl",
    "checkpoints/step-6/state.json",
    "checkpoints/step-6/optimizer.safetensors",
]


def ends(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ENDS}


def before_step(monkeypatch, step: int, action) -> None:
    """Do something in the forward pass of a step (of 1 micro-batch)."""
    from lora_lab.tasks.causal_lm.task import CausalLM

    real, seen = CausalLM.loss, {"steps": 0}

    def loss(self, model, batch, *more):
        if model.training:
            seen["steps"] += 1
            if seen["steps"] == step:
                action()
        return real(self, model, batch, *more)

    monkeypatch.setattr(CausalLM, "loss", loss)


def test_steps_survive_metrics_that_cannot_be_written_and_a_closed_terminal(
    config_of, eval_file, tmp_path, monkeypatch
):
    """Stopped by a log that fails in a step that is also evaluated, then by SIGHUP: the same bytes, adapter_config.json as well."""
    from lora_lab.run import pipeline

    def start(name: str) -> Path:
        return pipeline.train(config_of(*LONG, f"data.eval={eval_file}", f"run_dir={tmp_path}/{name}")).path

    expected = ends(start("whole"))
    folder = tmp_path / "stopped"

    def break_metrics():
        (folder / "metrics.jsonl").rename(folder / "aside")
        (folder / "metrics.jsonl").mkdir()

    with monkeypatch.context() as patch, pytest.raises(RunError, match="a regular file is expected") as stopped:
        before_step(patch, 4, break_metrics)
        start("stopped")
    assert f"Step 4 is saved in {folder}/checkpoints/step-4; resume with: lora-lab resume" in str(stopped.value)
    (folder / "metrics.jsonl").rmdir()
    (folder / "aside").rename(folder / "metrics.jsonl")
    signals.install()
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as interrupted:
        before_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        pipeline.resume(str(folder), [])
    assert interrupted.value.exit_code == 129
    assert interrupted.value.run == folder
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as interrupted:  # before anything is trained
        patch.setattr(pipeline, "prepare", lambda config, **_: os.kill(os.getpid(), signal.SIGTERM))
        pipeline.resume(str(folder), [])
    assert interrupted.value.run == folder
    pipeline.resume(str(folder), [])
    assert ends(folder) == expected


def test_a_start_that_is_interrupted_before_the_first_step_can_be_gone_on_with(tmp_path, config_of, monkeypatch):
    from lora_lab.run import pipeline

    signals.install()
    monkeypatch.setattr(run_dir, "write_manifest", lambda *parts: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as interrupted:
        pipeline.train(config_of())
    assert interrupted.value.run == tmp_path / "run"


@pytest.mark.parametrize("others", ["whole", "gone"])
def test_a_lost_best_checkpoint_does_not_end_the_run(config_of, eval_file, tmp_path, monkeypatch, capsys, others):
    """The best (step 2) is damaged while the run rests; the next best that is whole, or the last state, takes its place."""
    from lora_lab.run import pipeline

    rising = iter([1.0, 2.0, 3.0])
    signals.install()
    config = config_of(*LONG, f"data.eval={eval_file}")
    _losses(monkeypatch, rising)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        before_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        pipeline.train(config)
    folder = tmp_path / "run"
    checkpoints = folder / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-2", "step-4", "step-5"]
    weights = checkpoints / "step-2/adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    best = checkpoints / "step-4/adapter_model.safetensors"
    kept = best.read_bytes()
    if others == "gone":
        shutil.rmtree(checkpoints / "step-4")
    pipeline.resume(str(folder), [])
    said = capsys.readouterr().out
    assert "the best checkpoint:" in said
    result = json.loads((folder / "result.json").read_text())
    assert result["best_lost"] == 2
    assert result["best_step"] == (4 if others == "whole" else 6)
    last = checkpoints / "step-6/adapter_model.safetensors"
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == (
        kept if others == "whole" else last.read_bytes()
    )


def _losses(monkeypatch, losses) -> None:
    """Held-out losses in training, in order; the real ones afterwards."""
    from lora_lab.training import loop

    real = loop._evaluate

    class Task:
        def __init__(self, task):
            self.task = task

        def __getattr__(self, name):
            return getattr(self.task, name)

        def measure(self, model, data):
            found = self.task.measure(model, data)
            return dataclasses.replace(found, metrics={**found.metrics, "loss": next(losses)})

    def evaluated(member, inside):
        own, member.task = member.task, Task(member.task)
        try:
            return real(member, inside)
        finally:
            member.task = own

    monkeypatch.setattr(loop, "_evaluate", evaluated)


def test_damaged_newer_checkpoints_do_not_push_out_what_is_saved(config_of, tmp_path):
    from lora_lab.run.pipeline import prepare
    from lora_lab.training import checkpoint
    from lora_lab.training.cohort import Member

    config = config_of("train.keep_checkpoints=1")
    prepared = prepare(config)
    model, run = prepared.loaded().model, run_dir.create(config)
    member = Member("default", config, run, prepared.base, model, prepared.train, prepared.task)
    (run.checkpoints / "step-9").mkdir(parents=True)
    member.state.step = 3
    saved = checkpoint.save(member)
    assert checkpoint.newest_valid(run.checkpoints) == (saved, [])
    for size in sorted({file.stat().st_size for file in saved.iterdir()} - {0}):  # a disk that is full at each file
        member.state.step = 4

        def action(size=size):
            files_of_at_most(size - 1)
            checkpoint.save(member)

        said = in_fork(action)
        assert said.startswith(f"RunError: {run.checkpoints}/step-4: cannot be written"), said
        assert checkpoint.newest_valid(run.checkpoints) == (saved, [])
        assert [p.name for p in run.checkpoints.iterdir()] == ["step-3"]


# -- signals and children ---------------------------------------------------------------------------------------------


def test_a_hangup_that_is_ignored_stays_ignored():
    """nohup lora-lab train"""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.install()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_hangup_does_not_hurry():
    """Shell and kernel both send one when a terminal closes, and a service manager sends one after SIGTERM."""
    signals.install()
    with signals.held() as arrived:
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
            os.kill(os.getpid(), signum)
        assert arrived == [signal.SIGTERM]
    signals.install()
    signal.signal(signal.SIGHUP, signals._handle)
    with signals.held() as arrived:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert arrived == [signal.SIGHUP]


def test_after_a_hangup_output_goes_nowhere(tmp_path):
    def action():
        ours, terminal = os.openpty()
        for descriptor in (1, 2):
            os.dup2(terminal, descriptor)
        os.close(terminal)
        signals.install()
        with signals.held() as arrived:
            os.write(1, b"heard\n")
            os.close(ours)
            os.kill(os.getpid(), signal.SIGHUP)
            os.write(1, b"saving\n")
            return arrived

    assert in_fork(action) == "[1]"


def test_a_child_ends_with_its_parent(tmp_path):
    """The child holds the writing end of a pipe; reading it ends when the child has gone."""
    readable, writable = os.pipe()
    code = f"""
import sys
from lora_lab.runtime import children
wait = "import os, sys, time; os.write({writable}, b'up'); time.sleep(600)"
children.run([sys.executable, "-c", wait], pass_fds=({writable},))
"""
    parent = subprocess.Popen([sys.executable, "-c", code], pass_fds=(writable,))
    os.close(writable)
    assert os.read(readable, 2) == b"up"
    parent.kill()
    parent.wait()
    assert os.read(readable, 2) == b""
    os.close(readable)


def test_a_child_says_what_it_says():
    done = children.run([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "err\n")
    done = children.run(["no-such-program"])
    assert done.returncode == 1
    assert "no-such-program: No such file or directory" in done.stderr


def test_fresh_and_reread_configurations_are_the_same(tmp_path):
    fresh = compose.compose(["recipe=demo", f"run_dir={tmp_path}/run"])
    plain = compose.compose(["model=hub", "model.path=x", "data.train=y", f"run_dir={tmp_path}/run"])
    for config in (fresh, plain):
        storage.write_text(tmp_path / "config.yaml", compose.to_yaml(config))
        assert compose.to_yaml(compose.load(tmp_path / "config.yaml")) == compose.to_yaml(config)
        peft_config = config.adapter.peft_config(None)
        again = compose.load(tmp_path / "config.yaml").adapter.peft_config(None)
        assert json.dumps(peft_config.to_dict(), default=sorted) == json.dumps(again.to_dict(), default=sorted)
