"""How commands are handed over, without a cluster."""

from __future__ import annotations

import signal
import sys

import pytest

from lora_lab.errors import ConfigError
from lora_lab.runtime import signals
from lora_lab.sweep import engines


def test_a_command_runs_in_its_folder_and_says_it_in_its_file(tmp_path):
    log = tmp_path / "ray-0.log"
    for number in (0, 3):
        told = ["-c", f"import os, sys; print(os.getcwd()); sys.exit({number})"]
        assert engines.run_command(told, str(tmp_path), str(log)) == number
    assert log.read_text() == f"{tmp_path}\n" * 2


def test_what_fits_on_no_node_is_refused():
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 64.0, "tpu": 2.0}]
    for told in ({"num_cpus": 4, "num_gpus": 1}, {"num_cpus": 64, "num_gpus": 0, "resources": {"tpu": 2}}):
        engines._find_room(told, nodes)
    for told, named in (
        ({"num_cpus": 5, "num_gpus": 1}, r"num_cpus=5 and num_gpus=1\. Ask for less"),
        ({"num_cpus": 1, "num_gpus": 1, "resources": {"tpu": 1}}, r"num_cpus=1 and num_gpus=1 and resources\.tpu=1\."),
        ({"num_cpus": 1, "num_gpus": 0, "resources": {"other": 1}}, r"num_cpus=1 and resources\.other=1\."),
    ):
        with pytest.raises(ConfigError, match=f"no node of the Ray cluster has {named}"):
            engines._find_room(told, nodes)


def test_engines_that_are_not_there_are_named(tmp_path, monkeypatch):
    for executor, library, extra in (
        ("ray", "ray", "ray"),
        ("slurm", "submitit", "slurm"),
        ("local", "submitit", "slurm"),
    ):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(
            ConfigError, match=rf"cohort_{executor}: needs {library}\. pip install 'lora-lab\[{extra}\]'"
        ):
            engines.engine(executor, {}, tmp_path, False)
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.executor=kubernetes: choose hydra/launcher=cohort_local"):
        engines.engine("kubernetes", {}, tmp_path, False)


def test_signals_are_ours_again_after_a_library_took_them():
    signals.install()
    with signals.kept():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) is signals._handle
