"""Killed with SIGKILL at every call into the system: the old or the new is there, whole, and nothing else is left."""

from __future__ import annotations

import shutil

import pytest
import torch

from lora_lab.run import run_dir
from lora_lab.run.run_dir import RunDir
from lora_lab.runtime import storage
from lora_lab.training import checkpoint
from tests.faults.forks import killed_at_every_call


def make(path, step: int) -> None:
    with storage.new_folder(path, {"step": step}) as temporary:
        (temporary / "a.txt").write_text(f"{step}" * 100)
        (temporary / "below").mkdir()
        (temporary / "below/b.txt").write_text("b")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_file(tmp_path):
    file = tmp_path / "result.json"

    def check():
        assert file.read_text() in ("old", "new")
        storage.write_text(tmp_path / "other.json", "")
        storage.recover(tmp_path)
        assert names(tmp_path) == ["other.json", "result.json"]

    calls = killed_at_every_call(
        lambda: storage.write_text(file, "new"), lambda: storage.write_text(file, "old"), check
    )
    assert calls > 5
    assert file.read_text() == "new"


def test_a_text_file_written_again_takes_its_litter_along(tmp_path):
    def check():
        storage.write_text(tmp_path / "a.json", "again")
        assert names(tmp_path) == ["a.json"]

    killed_at_every_call(lambda: storage.write_text(tmp_path / "a.json", "new"), lambda: None, check)


def test_a_new_folder(tmp_path):
    place, folder = tmp_path / "place", tmp_path / "place/f"

    def check():
        storage.recover(place)
        if folder.exists():
            assert storage.verify(folder)["step"] == 4
        assert not place.exists() or names(place) in ([], ["f"])

    calls = killed_at_every_call(lambda: make(folder, 4), lambda: shutil.rmtree(place, ignore_errors=True), check)
    assert calls > 20
    assert folder.exists()


@pytest.mark.parametrize(
    "exchange", [True, pytest.param(False, marks=pytest.mark.long)], ids=["exchange", "two renames"]
)
def test_a_folder_that_replaces_another(tmp_path, monkeypatch, exchange):
    folder, seen = tmp_path / "f", set()
    if not exchange:
        monkeypatch.setattr(storage, "_exchange", lambda one, other: False)

    def check():
        if exchange:  # there is no moment without it
            storage.verify(folder)
        storage.recover(tmp_path)
        seen.add(storage.verify(folder)["step"])
        assert names(tmp_path) == ["f"]

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        make(folder, 3)

    killed_at_every_call(lambda: make(folder, 4), prepare, check)
    assert seen == {3, 4}


def test_a_folder_that_is_removed(tmp_path):
    folder = tmp_path / "f"

    def check():
        storage.recover(tmp_path)
        if folder.exists():
            storage.verify(folder)
        assert names(tmp_path) in ([], ["f"])

    def prepare():
        if not folder.exists():
            make(folder, 3)

    killed_at_every_call(lambda: storage.remove(folder), prepare, check)
    assert not folder.exists()


@pytest.fixture
def member(config_of, tmp_path):
    """A member that has made a step, with an optimizer that holds something."""
    from lora_lab.run.pipeline import prepare
    from lora_lab.training.cohort import Member

    config = config_of("train.keep_checkpoints=2")
    prepared = prepare(config)
    model = prepared.loaded().model
    run = run_dir.create(config)
    made = Member("default", config, run, prepared.base, model, prepared.train, prepared.task)
    for parameter in made.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    made.optimizer.step()
    return made


def save(member, step: int) -> None:
    member.state.step = step
    checkpoint.save(member)


@pytest.mark.long
def test_a_checkpoint_and_the_purge_of_older_ones(member):
    checkpoints = member.run.checkpoints

    def check():
        with member.run.locked():
            found, skipped = checkpoint.newest_valid(checkpoints)
            assert found.name in ("step-2", "step-3")
            assert not skipped
            for folder in checkpoints.iterdir():
                checkpoint.check(folder)

    def prepare():
        for step in (1, 2, 3):
            shutil.rmtree(checkpoints / f"step-{step}", ignore_errors=True)
        for step in (1, 2):
            save(member, step)

    killed_at_every_call(lambda: save(member, 3), prepare, check)
    assert names(checkpoints) == ["step-2", "step-3"]


def test_two_starts_on_one_folder_in_the_same_moment(tmp_path):
    """One makes the run, the other is refused, and config.yaml is the winner's."""
    import os

    from lora_lab.config import compose

    rounds = 10
    configs = [compose.compose(["recipe=demo", f"run_dir={tmp_path}/run", f"optim.lr={lr}"]) for lr in (0.01, 0.02)]
    for _ in range(rounds):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        ready, go = os.pipe()
        children = [_start(config, ready, go) for config in configs]
        os.close(ready)
        os.close(go)  # both begin
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == [0, 2]
        assert compose.load(RunDir(tmp_path / "run").config) == configs[codes.index(0)]


def _start(config, ready: int, go: int) -> int:
    import os

    from lora_lab.errors import RunError
    from tests.faults.forks import fork

    child = fork()
    if child:
        return child
    code = 1
    try:
        os.close(go)
        os.read(ready, 1)
        with run_dir.created(config):
            code = 0
    except RunError:
        code = 2
    finally:
        os._exit(code)
