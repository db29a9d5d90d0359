"""Files and folders appear whole or not at all, and damage is always noticed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from lora_lab.errors import CheckpointError, LoraLabError, RunError
from lora_lab.runtime import storage


def make_folder(path):
    with storage.new_folder(path, {"step": 3}) as temporary:
        save_file({"a": torch.arange(40.0)}, temporary / "a.safetensors")
        (temporary / "b.json").write_text('{"x": 1}\n')
    return path


def test_round_trip_and_permissions(tmp_path):
    folder = make_folder(tmp_path / "f")
    assert storage.verify(folder)["step"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]
    modes = {file.stat().st_mode & 0o777 for file in folder.iterdir() if file.name != storage.MANIFEST}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_an_error_inside_leaves_what_was_there(tmp_path):
    folder = make_folder(tmp_path / "f")
    with pytest.raises(ZeroDivisionError), storage.new_folder(folder) as temporary:
        (temporary / "half").write_text(str(1 / 0))
    assert storage.verify(folder)["step"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]


def test_every_damaged_byte_is_noticed(tmp_path):
    """Flip, cut or zero any file of the folder: never a silent load."""
    folder = make_folder(tmp_path / "f")
    manifest = storage.verify(folder)
    draw = random.Random(0)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for position in {0, len(whole) - 1, *draw.choices(range(len(whole)), k=40)}:
            flipped = bytearray(whole)
            flipped[position] ^= 1 << draw.randrange(8)
            for damaged in (bytes(flipped), whole[:position], bytes(len(whole))):
                file.write_bytes(damaged)
                try:
                    assert storage.verify(folder) == manifest  # white space of the manifest itself may change
                except CheckpointError:
                    continue
                assert file.name == storage.MANIFEST
        file.write_bytes(whole)
    storage.verify(folder)


def test_every_cut_of_a_safetensors_file_is_noticed(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.arange(8.0), "b": torch.zeros(2, 3)}, file)
    storage.check_safetensors(file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            storage.check_safetensors(file)
    for damaged in (whole + b"x", b"\xff" * 8 + whole[8:], b"PK\x03\x04" + whole):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            storage.check_safetensors(file)


@pytest.mark.parametrize(
    "write",
    [
        "(temporary / 'big').write_bytes(bytes(5000))",
        "import numpy, safetensors.numpy; safetensors.numpy.save_file({'a': numpy.zeros(5000)}, temporary / 'big')",
    ],
    ids=["file", "safetensors"],
)
def test_full_disk_keeps_the_old_folder(tmp_path, write):
    """A limit on file size stands in for a full disk: the write fails midway, the old folder stays."""
    folder = make_folder(tmp_path / "f")
    code = f"""
        import resource, signal
        from pathlib import Path
        from lora_lab.runtime import storage
        from lora_lab.errors import RunError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            with storage.new_folder(Path({str(folder)!r})) as temporary:
                {write}
        except RunError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "cannot be written (" in done.stdout
    assert "too large" in done.stdout
    assert storage.verify(folder)["step"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]


def test_text_files(tmp_path):
    storage.write_text(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").read_text() == "{}"
    with pytest.raises(RunError, match="cannot be written"):
        storage.write_text(tmp_path / "none/a.json", "{}")
    assert (
        storage.dump_json({"loss": [float("nan"), 1.5, -float("inf")]}).split()
        == '{ "loss": [ null, 1.5, null ] }'.split()
    )


def test_lock_is_for_one(tmp_path):
    with storage.locked(tmp_path), pytest.raises(RunError, match="another lora-lab process"), storage.locked(tmp_path):
        pass
    with storage.locked(tmp_path):
        pass


def test_all_errors_are_for_users():
    for kind in LoraLabError.__subclasses__():
        assert kind.exit_code in (2, 3, 4)
