"""The Tinker SDK as it is published, in processes of its own, against a server that listens."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.test_server import Process

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("tinker") is None, reason="the package 'tinker' is not installed"),
]
LOOP = Path(__file__).with_name("loop.py")


class Serving(Process):
    def __init__(self, base: Path, root: Path):
        super().__init__(
            f"base={base}", "model.dtype=float32", "hardware=cpu", "serve.training=true", f"serve.root={root}"
        )
        self.base = base

    def loop(self, rank: int, steps: int, *origin: str) -> subprocess.Popen:
        command = [
            sys.executable,
            str(LOOP),
            f"http://127.0.0.1:{self.port}",
            str(self.base),
            str(rank),
            str(steps),
            *origin,
        ]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def seen(loop: subprocess.Popen) -> dict:
    told, _ = loop.communicate(timeout=200)
    assert loop.returncode == 0
    return json.loads(told.splitlines()[-1])


@pytest.mark.timeout(900)
def test_clients_of_unlike_rank_a_killed_one_and_a_killed_server(base, tmp_path):
    server = Serving(base, tmp_path)
    alone = [seen(server.loop(rank, 6)) for rank in (4, 8, 32)]
    loops = [server.loop(rank, 6) for rank in (4, 8, 32)]
    killed = server.loop(16, 10_000)
    assert killed.stdout.readline() == "begun\n"
    killed.kill()
    killed.communicate()
    for one, loop in zip(alone, loops, strict=True):
        other = seen(loop)
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-4)
        assert other["logprobs"] == pytest.approx(one["logprobs"], rel=1e-3, abs=1e-4)
    first = alone[0]
    assert first["losses"][-1] < first["losses"][0] / 2
    assert first["prompt"][0] is None
    assert first["prompt"][1:] == pytest.approx(first["logprobs"][:7], abs=1e-4)
    assert first["drawn"][0] == first["drawn"][1]
    assert first["drawn"][0][0] != first["drawn"][0][1]
    assert first["custom"][0] == pytest.approx(first["custom"][1], rel=1e-5)
    assert first["many"][0] == pytest.approx(first["many"][1], rel=1e-4)
    assert first["many"][2] == 2100
    kinds = [kind for kind, *_ in first["errors"]]
    assert kinds == ["BadRequestError", "BadRequestError", "RequestFailedError", "RequestFailedError"]
    assert max(seconds for *_, seconds in first["errors"]) < 20  # not tried again for minutes
    assert first["after"] == pytest.approx(first["many"][1], rel=1e-5)
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    server = Serving(base, tmp_path)
    whole, half = seen(server.loop(4, 10)), seen(server.loop(4, 4, first["path"]))
    assert half["losses"] == pytest.approx(whole["losses"][6:], rel=1e-4, abs=1e-4)
    assert server.end() == 128 + signal.SIGTERM
