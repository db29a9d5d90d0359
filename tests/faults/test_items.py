"""The list of bad inputs and faults (`tests/faults/items.py`): that every item has its test, and those tests that stand nowhere
else. What is asserted is the message: key or file, value, way out."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_lab import cli
from lora_lab.errors import Interrupted
from lora_lab.run import pipeline, run_dir
from lora_lab.runtime import storage
from lora_lab.training import checkpoint
from tests.conftest import fails
from tests.faults.items import ITEMS
from tests.faults.programme import folder_digests, make_small_base
from tests.training.test_resume import stop_at

ROOT = Path(__file__).parents[2]


def test_every_item_has_a_test_that_exists():
    assert list(ITEMS) == list(range(1, 72))
    functions: dict[str, set[str]] = {}
    for node in {node for item in ITEMS.values() for node in item.tests}:
        file, _, name = node.partition("[")[0].partition("::")
        if file not in functions:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            functions[file] = {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}
        assert not name or name in functions[file], node


@pytest.mark.faults
def test_every_node_is_collected():
    files = {node.partition("::")[0] for item in ITEMS.values() for node in item.tests}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "faults or not faults", *sorted(files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = set(done.stdout.splitlines())
    plain = {node.partition("[")[0] for node in found} | {node.partition("::")[0] for node in found}
    missing = [node for item in ITEMS.values() for node in item.tests if node not in found | plain]
    assert not missing


@pytest.fixture
def small(overrides, tmp_path, eval_file) -> list[str]:
    """A run of a few steps on a small base of its own."""
    base = make_small_base(tmp_path / "base")
    return [*overrides, f"model.path={base}", f"data.eval={eval_file}", "train.max_steps=3", "train.save_steps=1"]


@pytest.fixture
def finished(small, tmp_path, capsys) -> Path:
    assert cli.main(["train", *small]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def refused(capsys, *argv: str, code: int = 2) -> str:
    return fails(list(argv), capsys, code)


# -- configuration ------------------------------------------------------------------------------------------------------


def test_a_point_twice_is_said(config_of, tmp_path, capsys):
    from lora_lab.sweep.jobs import jobs_of

    jobs = jobs_of(
        [
            config_of(f"run_dir={tmp_path}/{name}", f"optim.lr={lr}")
            for name, lr in (("a", 0.01), ("b", 0.01), ("c", 0.02))
        ]
    )
    assert [job.run.path.name for job in jobs] == ["a", "c"]
    assert f"{tmp_path}/b would repeat {tmp_path}/a: left out" in capsys.readouterr().out


def test_a_sweep_of_nothing(small, capsys):
    message = refused(capsys, "train", "-m", *small[:-3], "adapter.r=choice()")
    assert "adapter.r" in message


# -- adapters -------------------------------------------------------------------------------------------------------------


def test_another_quantization_is_said(finished, capsys):
    code = cli.main(["evaluate", f"run={finished}", "quant=nf4"])
    captured = capsys.readouterr()
    said = [line for line in (captured.out + captured.err).splitlines() if "quant" in line and "trained" in line]
    assert said, "an adapter that was trained without quantization was measured on another base without a word"
    assert code in (0, 2)


def test_tensors_of_other_names_are_refused(finished, capsys):
    """The folder itself is whole: it was written so."""
    state = load_file(finished / "adapter/adapter_model.safetensors")
    first = next(iter(state))
    for name, other in {
        "missing": {key: value for key, value in state.items() if key != first},
        "extra": {**state, "base_model.model.extra.weight": torch.zeros(2)},
        "renamed": {key.replace("q_proj", "query"): value for key, value in state.items()},
    }.items():
        _rewrite(
            finished / "adapter", lambda folder, other=other: save_file(other, folder / "adapter_model.safetensors")
        )
        message = refused(capsys, "evaluate", f"run={finished}")
        assert "adapter_model.safetensors" in message, name
        assert "does not fit" in message


def _rewrite(folder: Path, change) -> None:
    """Write a folder again, with another file in it and a manifest that fits."""
    with storage.new_folder(folder) as temporary:
        for file in folder.iterdir():
            if file.name != storage.MANIFEST:
                shutil.copy(file, temporary)
        change(temporary)


@pytest.mark.parametrize(
    "more",
    [{"tomorrow": 1}, {"auto_mapping": {"parent_library": "os", "base_model_class": "x"}}],
    ids=["newer", "auto_mapping"],
)
def test_an_edited_adapter_config_is_refused(more, finished, capsys):
    file = finished / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    for verb in ("evaluate", "merge"):
        assert "adapter_config.json" in refused(capsys, verb, f"run={finished}")


def test_a_name_that_is_a_path_writes_nothing_outside(small, tmp_path, capsys, monkeypatch):
    inside = tmp_path / "in/side"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    before = {path for path in tmp_path.rglob("*") if inside not in path.parents}
    code = cli.main(["train", *[text for text in small if not text.startswith("run_dir=")], "name=../../x"])
    message = capsys.readouterr().err
    after = {path for path in tmp_path.rglob("*") if inside not in path.parents}
    assert code == 0 or (message.startswith("lora-lab: name=") and "../../x" in message)
    assert after == before


def test_merging_twice_gives_the_same_bytes(finished, tmp_path, reload_here):
    base = folder_digests(tmp_path / "base")
    found = []
    for _ in range(2):
        assert cli.main(["merge", f"run={finished}"]) == 0
        found.append(folder_digests(finished / "merged"))
    assert found[0] == found[1]
    assert folder_digests(tmp_path / "base") == base


# -- files ----------------------------------------------------------------------------------------------------------------

_TWO = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}
HEADERS = {
    "length of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "length above the limit": struct.pack("<Q", 200_000_000) + b"{}",
    "not JSON": b"{" + bytes(16),
    "deep": b'{"a":' + b"[" * 50_000 + bytes(16),
    "overlap": json.dumps({**_TWO, "b": {**_TWO["b"], "data_offsets": [4, 16]}}).encode() + bytes(16),
    "hole": json.dumps({**_TWO, "a": {**_TWO["a"], "shape": [1], "data_offsets": [0, 4]}}).encode() + bytes(16),
    "twice": json.dumps(_TWO).replace('"b"', '"a"').encode() + bytes(16),
    "negative": json.dumps({"a": {**_TWO["a"], "data_offsets": [-8, 0]}}).encode() + bytes(16),
    "shape": json.dumps({"a": {**_TWO["a"], "shape": [1 << 60, 1 << 60], "data_offsets": [0, 16]}}).encode()
    + bytes(16),
    "a list": b"[1, 2]" + bytes(16),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_refused(name, small, tmp_path, capsys):
    content = HEADERS[name]
    if not name.startswith("length"):
        header = content[:-16]
        content = struct.pack("<Q", len(header)) + content
    (tmp_path / "base/model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(capsys, "train", *small)


def test_a_missing_shard_is_named(small, tmp_path, capsys):
    folder = tmp_path / "base"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first, second = dict(list(state.items())[:3]), dict(list(state.items())[3:])
    names = {f"model-0000{i}-of-00002.safetensors": part for i, part in enumerate((first, second), start=1)}
    index = {name: file for file, part in names.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    save_file(first, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    assert "model-00002-of-00002.safetensors" in refused(capsys, "train", *small)


def test_a_pickle_of_another_name_is_refused(small, tmp_path, capsys):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    torch.save({"a": torch.zeros(2)}, tmp_path / "base/model.safetensors")
    assert "model.safetensors" in refused(capsys, "train", *small)
    (tmp_path / "base/model.safetensors").write_bytes(pickle.dumps(Hostile()))
    assert "model.safetensors" in refused(capsys, "train", *small)
    assert not (tmp_path / "harmed").exists()


def test_saving_onto_what_is_being_read(tmp_path):
    """Tensors that are mapped from a file are whole after they were saved in its place."""
    save = {"a": torch.arange(5000.0)}
    with storage.new_folder(tmp_path / "f") as temporary:
        save_file(save, temporary / "a.safetensors")
    mapped = load_file(tmp_path / "f/a.safetensors")
    with storage.new_folder(tmp_path / "f") as temporary:
        save_file(mapped, temporary / "a.safetensors")
    storage.verify(tmp_path / "f")
    assert torch.equal(mapped["a"], save["a"])
    assert torch.equal(load_file(tmp_path / "f/a.safetensors")["a"], save["a"])


def test_a_folder_name_of_256_letters(small, tmp_path, capsys):
    message = refused(capsys, "train", *small, f"run_dir={tmp_path}/{'x' * 256}")
    assert "run_dir" in message


def test_order_is_by_step_not_by_time_or_name(small, tmp_path):
    """The clock jumped back: step 9 seems to be written after step 10, and comes after it in the alphabet as well."""
    assert cli.main(["train", *small, "train.epochs=2", "train.max_steps=10", "train.keep_checkpoints=3"]) == 0
    checkpoints = tmp_path / "run/checkpoints"
    for step in (9, 10):
        os.utime(checkpoints / f"step-{step}", (10**9 - step, 10**9 - step))
    assert checkpoint.newest_valid(checkpoints)[0].name == "step-10"


# -- the machine -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(small, capsys):
    message = refused(capsys, "train", *[text for text in small if text != "hardware=cpu"], "hardware.device=cuda")
    assert "hardware.device=cuda" in message


@pytest.fixture
def stopped(small, tmp_path, monkeypatch, config_of, capsys) -> Path:
    """A run that was stopped after its first step."""
    cli.signals.install()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, 1, signal.SIGTERM)
        pipeline.train(config_of(*small))
    capsys.readouterr()
    return tmp_path / "run"


def test_another_library_version_is_said(stopped, monkeypatch, capsys):
    real = run_dir.versions()
    monkeypatch.setattr(run_dir, "versions", lambda: {**real, "torch": "99.0"})
    assert cli.main(["resume", f"run={stopped}"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "torch" in line and real["torch"] in line]
    assert told, "the run went on with another torch without a word"
    assert "99.0" in told[0]


def test_edited_settings_are_named_and_refused(stopped, capsys):
    file = stopped / "config.yaml"
    text = file.read_text(encoding="utf-8")
    assert "lr: 0.01" in text
    file.write_text(text.replace("lr: 0.01", "lr: 0.02"), encoding="utf-8")
    message = refused(capsys, "resume", f"run={stopped}")
    assert "optim.lr" in message or "config.yaml" in message


@pytest.mark.faults
def test_processes_that_hash_otherwise_end_with_the_same_bytes(small, tmp_path):
    """Python orders sets of texts otherwise in each process; no file may show it."""
    found = []
    for seed in "12":
        settings = [*small, f"run_dir={tmp_path}/{seed}"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-m", "lora_lab", "train", *settings],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        found.append(folder_digests(tmp_path / seed / "adapter"))
    assert found[0] == found[1]


# -- sweeps -------------------------------------------------------------------------------------------------------------


def test_what_is_not_finite_never_wins(finished, config_of, tmp_path):
    from lora_lab.sweep import ranking
    from lora_lab.sweep.jobs import jobs_of

    values = {"0": float("nan"), "1": 3.0, "2": float("-inf"), "3": None}
    result = json.loads((finished / "result.json").read_text())
    for name, value in values.items():
        (tmp_path / "s" / name).mkdir(parents=True)
        result["tuned"]["loss"] = value
        (tmp_path / "s" / name / "result.json").write_text(storage.dump_json(result))
    jobs = jobs_of([config_of(f"run_dir={tmp_path}/s/{name}", f"optim.lr=0.0{int(name) + 1}") for name in values])
    assert [ranking.outcome(job).score for job in jobs] == [None, 3.0, None, None]


def test_a_metric_with_a_typo_is_refused_at_once(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lora_lab.base.load.load_model", lambda *_: pytest.fail("weights were loaded"))
    points = [text for text in small if not text.startswith("run_dir=")]
    message = refused(
        capsys, "train", "-m", *points, "adapter.r=2,4", "sweep.metric=los", f"hydra.sweep.dir={tmp_path}/sweep"
    )
    assert "sweep.metric=los" in message
    assert "loss" in message
    assert not list(tmp_path.glob("sweep/*/config.yaml"))
