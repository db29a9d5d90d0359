"""Cohorts on a Ray cluster: what becomes of those of a lost node."""

from __future__ import annotations

import _socket
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from lora_lab import cli
from lora_lab.errors import ConfigError
from lora_lab.sweep import engines

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]
ray = pytest.importorskip("ray", reason="pip install 'lora-lab[ray]'")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here_only(monkeypatch):
    """Ray's own processes talk to each other."""
    own = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}

    def connect(self, address):
        if isinstance(address, tuple) and address[0] not in {*own, "localhost"}:
            raise OSError(errno.ENETUNREACH, "only this machine")
        return _socket.socket.connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.fixture
def cluster(here_only):
    """A head that trains nothing, and two nodes with room for one cohort each."""
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        found.add_node(num_cpus=1, resources={"room": 1})
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.fixture
def command(overrides, eval_file):
    """Of a sweep of two cohorts with two members each."""
    points = [text for text in overrides if not text.startswith("run_dir=")]
    return [
        "train", "-m", *points, f"data.eval={eval_file}", "train.max_steps=40", "train.epochs=40", "train.save_steps=1",
        "train.eval_steps=40", "adapter.r=2,4", "quant=none,nf4",
    ]  # fmt: skip


def on(cluster) -> list[str]:
    return [
        "hydra/launcher=cohort_ray",
        "hydra.launcher.workers=2",
        f"hydra.launcher.parameters.address={cluster.address}",
        "hydra.launcher.parameters.resources.room=1",
    ]


def training(run: Path) -> psutil.Process:
    """The process that trains a run, once there is a checkpoint of it."""
    while not any(run.glob("checkpoints/step-*/manifest.json")):
        time.sleep(0.02)
    for process in psutil.process_iter(["cmdline"]):
        for text in process.info["cmdline"] or []:
            if text.startswith("members=") and run.name in text.partition("=")[2].split(","):
                return process
    raise AssertionError(f"{run} is trained by nobody")


def lose_the_node_of(run: Path, lost: list[int]) -> None:
    """Kill Ray's own process of the node that trains this run, and the worker in it."""
    process = training(run)
    worker = process.parent()
    node = worker.parent()
    lost.append(process.pid)
    for one in (node, worker):
        one.kill()


def assert_same(here: Path, there: Path) -> None:
    """Same ranking, same adapters."""
    one, other = (json.loads((folder / "ranking.json").read_text())["ranking"] for folder in (here, there))
    assert [(place["name"], place["metric"]) for place in one] == [(place["name"], place["metric"]) for place in other]
    for name in "0123":
        file = "adapter/adapter_model.safetensors"
        assert (here / name / file).read_bytes() == (there / name / file).read_bytes()


def test_the_cohorts_of_a_lost_node_go_on_elsewhere(cluster, command, tmp_path):
    assert cli.main([*command, f"hydra.sweep.dir={tmp_path}/here"]) == 0
    lost: list[int] = []
    watching = threading.Thread(target=lose_the_node_of, args=(tmp_path / "nodes/0", lost), daemon=True)
    watching.start()
    assert cli.main([*command, *on(cluster), f"hydra.sweep.dir={tmp_path}/nodes"]) == 0
    assert len(lost) == 1
    assert not psutil.pid_exists(lost[0])
    assert re.search(r"resume  0 .* from .*/checkpoints/step-\d+", (tmp_path / "nodes/nodes/ray-0.log").read_text())
    assert_same(tmp_path / "here", tmp_path / "nodes")


def test_a_stopped_sweep_leaves_nobody_behind_and_is_resumed_here(cluster, command, tmp_path):
    assert cli.main([*command, f"hydra.sweep.dir={tmp_path}/here"]) == 0
    there = tmp_path / "nodes"
    told = [sys.executable, "-m", "lora_lab", *command, *on(cluster), f"hydra.sweep.dir={there}"]
    with subprocess.Popen(told, stderr=subprocess.PIPE, text=True) as started:
        trains = training(there / "0")
        started.send_signal(signal.SIGTERM)
        said = started.communicate()[1]
    assert started.returncode == 128 + signal.SIGTERM
    assert f"lora-lab resume sweep={there}" in said
    trains.wait(60)
    assert cli.main(["resume", f"sweep={there}"]) == 0
    assert_same(tmp_path / "here", there)


def test_what_ray_cannot_do_is_refused(cluster, tmp_path):
    here = {"address": cluster.address}
    for told, cards, sentence in (
        ({"timeout_min": 3}, False, r"hydra\.launcher\.parameters\.timeout_min: Ray is told address"),
        (here, True, r"no node of the Ray cluster has num_cpus=1 and num_gpus=1\."),
        (here | {"resources": {"room": 2}}, False, r"num_cpus=1 and resources\.room=2\."),
        (here | {"num_cpus": -1}, False, "num_cpus"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            engines.engine("ray", told, tmp_path, cards)
    ray.shutdown()
    with pytest.raises(ConfigError, match=r"refused.*address=127\.0\.0\.1:1\)\. Start a cluster with ray start --head"):
        engines.engine("ray", {"address": "127.0.0.1:1"}, tmp_path, False)
