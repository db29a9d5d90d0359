"""A run folder that somebody else made harms nothing: no link in it is followed, no manifest is believed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lora_lab import cli
from lora_lab.config import compose
from lora_lab.errors import CheckpointError, LoraLabError, RunError
from lora_lab.run import run_dir
from lora_lab.run.run_dir import RunDir
from lora_lab.runtime import storage
from lora_lab.runtime.tracking import MetricsLog, read_lines
from lora_lab.training import checkpoint


@pytest.fixture
def received(tmp_path) -> Path:
    """A run folder as `create` makes it."""
    return run_dir.create(compose.compose(["recipe=demo", f"run_dir={tmp_path}/run"])).path


def picture(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


FILES = [".lock", "log.txt", "metrics.jsonl", "manifest.json", "result.json", "evaluation.json", "failed.json"]
FOLDERS = ["checkpoints", "adapter", "merged", "export", "tensorboard", "checkpoints/step-1", "export/gguf"]


@pytest.mark.parametrize("name", FILES + FOLDERS)
def test_links_that_leave_it_are_refused(received, tmp_path, capsys, name):
    outside = tmp_path / "outside"
    (outside / "step-1").mkdir(parents=True)
    (outside / "step-2").mkdir()
    (outside / "canary").write_text("canary")
    (outside / "step-1/canary").write_text("canary")
    before = picture(outside)
    place = received / name
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(outside / "canary" if name in FILES else outside)
    assert cli.main(["resume", f"run={received}"]) == 2
    said = capsys.readouterr().err
    assert f"holds the link {name} -> {outside}" in said
    assert "Traceback" not in said
    with pytest.raises(RunError, match="leaves the run folder"), RunDir(received).locked():  # as sweeps open their runs
        pass
    assert picture(outside) == before


@pytest.mark.parametrize("verb", ["resume", "evaluate", "merge", "export", "shrink", "chat"])
def test_no_verb_follows_them(received, tmp_path, capsys, verb):
    (received / "adapter").symlink_to(tmp_path)
    assert cli.main([verb, f"run={received}"]) == 2
    assert "leaves the run folder" in capsys.readouterr().err


def test_the_run_folder_itself_may_be_a_link_and_links_may_stay_inside(received, tmp_path):
    (tmp_path / "link").symlink_to(received)
    (received / "newest").symlink_to("checkpoints")
    run = run_dir.open_existing(f"{tmp_path}/link")
    with run.locked():
        pass
    assert run.path.name == "link"


@pytest.mark.parametrize("name", [".lock", "log.txt", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_regular_files_are_written(received, name, kind):
    """Also a link that stays inside is not followed, and a named pipe is not waited for."""
    place, config = received / name, (received / "config.yaml").read_bytes()
    place.unlink(missing_ok=True)
    {
        "link": lambda: place.symlink_to("config.yaml"),
        "pipe": lambda: os.mkfifo(place),
        "folder": lambda: place.mkdir(),
    }[kind]()
    if name == "metrics.jsonl":
        log = MetricsLog(place)
        log.write(1, loss=1.0)
        assert "a regular file is expected" in str(log.problem)
    else:
        with pytest.raises(RunError, match="a regular file is expected"), RunDir(received).locked():
            pass
    assert (received / "config.yaml").read_bytes() == config


def test_a_lock_is_not_emptied(received):
    (received / ".lock").write_text("whatever")
    with storage.locked(received):
        pass
    assert (received / ".lock").read_text() == "whatever"


def test_metrics_are_read_from_regular_files_only(received):
    (received / "metrics.jsonl").unlink(missing_ok=True)
    os.mkfifo(received / "metrics.jsonl")
    with pytest.raises(RunError, match="not a regular file"):
        read_lines(received / "metrics.jsonl")


def sealed(folder: Path, content: dict) -> Path:
    """A folder whose manifest matches its own checksum, whatever it says."""
    folder.mkdir(parents=True)
    (folder / "a").write_text("a")
    text = storage.dump_json({**content, "manifest_sha256": storage.digest(content)})
    (folder / storage.MANIFEST).write_text(text)
    return folder


A = {"size": 1, "sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}
MANIFESTS = {
    "parent": {"files": {"../outside": A}},
    "deep parent": {"files": {"b/../../outside": A}},
    "absolute": {"files": {"/etc/hostname": A}},
    "empty name": {"files": {"": A}},
    "the folder": {"files": {".": A}},
    "NUL": {"files": {"a\0b": A}},
    "no files": {"step": 1},
    "files a list": {"files": ["a"]},
    "files null": {"files": None},
    "no entry": {"files": {"a": None}},
    "entry a text": {"files": {"a": "sha256"}},
    "no size": {"files": {"a": {"sha256": A["sha256"]}}},
    "size a text": {"files": {"a": {**A, "size": "1"}}},
    "size true": {"files": {"a": {**A, "size": True}}},
    "sum a number": {"files": {"a": {**A, "sha256": 1}}},
    "too long a name": {"files": {"a" * 300: A}},
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_are_not_believed(tmp_path, content):
    (tmp_path / "outside").write_text("a")
    with pytest.raises(CheckpointError):
        storage.verify(sealed(tmp_path / "checkpoints/step-1", content))
    found, skipped = checkpoint.newest_valid(tmp_path / "checkpoints")
    assert found is None
    assert len(skipped) == 1


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b'{"a": "\xff"}', b"[" * 10_000, b'{"manifest_sha256": 1}', b'"\\ud800"']
)
def test_manifests_that_are_none(tmp_path, text):
    (tmp_path / "f").mkdir()
    (tmp_path / "f/manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError):
        storage.verify(tmp_path / "f")


def test_a_listed_file_is_no_link_that_leaves_the_folder(tmp_path):
    (tmp_path / "outside").write_text("a")
    folder = sealed(tmp_path / "f", {"files": {"a": A}})
    assert storage.verify(folder)
    (folder / "a").unlink()
    (folder / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        storage.verify(folder)


MEMBER = {
    "step": 3, "tokens": 1, "supervised_tokens": 1, "best_loss": 1.5, "best_step": 2, "worse_evaluations": 0,
    "stopped_early": False, "micro_batch_size": None, "checkpointing": False, "offloading": False,
}  # fmt: skip
STATE = {"member": MEMBER, "schedule": {"last_epoch": 3}, "optimizer": [[["state", 0, "step"], 3.0]]}


def checkpoint_folder(folder: Path, state: object, leave_out: str | None = None) -> Path:
    import torch
    from safetensors.torch import save_file

    with storage.new_folder(folder) as temporary:
        save_file({"w": torch.zeros(1)}, temporary / "adapter_model.safetensors")
        save_file({'["state", 0, "exp_avg"]': torch.zeros(1)}, temporary / "optimizer.safetensors")
        (temporary / "lora_lab.json").write_text("{}")
        (temporary / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
        if leave_out:
            (temporary / leave_out).unlink()
    return folder


STATES = {
    "a list": [],
    "cut": '{"member"',
    "no member": {**STATE, "member": None},
    "no schedule": {key: value for key, value in STATE.items() if key != "schedule"},
    "no optimizer": {key: value for key, value in STATE.items() if key != "optimizer"},
    "optimizer a number": {**STATE, "optimizer": 3},
    "optimizer without paths": {**STATE, "optimizer": [[[], 3.0]]},
    "optimizer of other pairs": {**STATE, "optimizer": ["abc"]},
    "an unknown field": {**STATE, "member": {**MEMBER, "momentum": 1}},
    "a missing field": {**STATE, "member": {key: value for key, value in MEMBER.items() if key != "tokens"}},
    "a step that is text": {**STATE, "member": {**MEMBER, "step": "3"}},
    "a step that is true": {**STATE, "member": {**MEMBER, "step": True}},
    "another step": {**STATE, "member": {**MEMBER, "step": 4}},
    "lines that are none": {**STATE, "unwritten_metrics": [1]},
    "nested": '{"member":' * 200 + "1" + "}" * 200,
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_states_of_another_shape_are_damaged_and_the_older_checkpoint_is_taken(tmp_path, state):
    older = checkpoint_folder(tmp_path / "step-2", {**STATE, "member": {**MEMBER, "step": 2}})
    checkpoint_folder(tmp_path / "step-3", state)
    found, skipped = checkpoint.newest_valid(tmp_path)
    assert found == older
    assert len(skipped) == 1
    assert "step-3" in skipped[0]


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "adapter_model.safetensors", "lora_lab.json"])
def test_checkpoints_that_do_not_list_what_they_need(tmp_path, name):
    with pytest.raises(LoraLabError, match=rf"does not list {name}"):
        checkpoint.check(checkpoint_folder(tmp_path / "step-3", STATE, leave_out=name))


def test_checkpoints_of_earlier_versions_are_read(tmp_path):
    for state in (STATE, {**STATE, "member": {**MEMBER, "best_lost": 1}}):
        folder = checkpoint_folder(tmp_path / "step-3", state)
        checkpoint.check(folder)
        assert checkpoint.newest_valid(tmp_path) == (folder, [])


SAFETENSORS = [b"[" * 5000, b"[]", b'{"a": 1}', b'{"a": {"data_offsets": [0, "4"]}}', b'{"a": {"data_offsets": 4}}', b'{"a": {"data_offsets": [0, null]}}']  # fmt: skip


@pytest.mark.parametrize("header", SAFETENSORS)
def test_safetensors_headers_of_another_shape(tmp_path, header):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError):
        storage.check_safetensors(file)


def test_no_tensors_are_read_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        storage.check_safetensors(tmp_path / "a.safetensors")
