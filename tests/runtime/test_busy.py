"""Threads sleep while they wait where other programs have the cores."""

import os
import subprocess
import sys

import pytest

from lora_lab.runtime import busy
from lora_lab.runtime.environment import usable_cores

_LOADED = """
import subprocess, sys
from lora_lab.runtime import busy
from lora_lab.runtime.environment import usable_cores
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(usable_cores())]
try:
    watch = busy.Watch()
    while (watch.taken() or 0) < 0.6:  # in their first moments they load Python
        pass
    busy._watch = watch
    busy.choose_waiting()
    import torch
    torch.ones(100_000).add(1)
    print(busy.chosen())
finally:
    for other in others:
        other.kill()
        other.wait()
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or usable_cores() < 2, reason="one thread waits for nobody; GNU's OpenMP"
)
def test_beside_other_programs_threads_sleep_while_they_wait():
    environment = {name: text for name, text in os.environ.items() if name not in (*busy.SAID, "OMP_NUM_THREADS")}
    command = [sys.executable, "-c", _LOADED]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment | {"OMP_DISPLAY_ENV": "TRUE"}
    )
    assert "cores busy, so threads sleep while they wait" in done.stdout
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr  # what OpenMP itself says


class _Taken:
    """Others take so many cores."""

    def __init__(self, cores):
        self.cores = cores

    def taken(self):
        return self.cores


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize(
    ("taken", "cores", "threads", "sleep"),
    [
        (None, 2, None, False),  # too early to say
        (0.4, 2, None, False),
        (1.0, 2, None, True),
        (1.0, 2, "1", False),  # one thread waits for nobody
        (1.0, 16, "8", False),  # there are free cores enough
        (9.0, 16, "8", True),
        (9.0, 16, "8,2", True),
    ],
)
def test_threads_sleep_only_where_they_are_more_than_the_free_cores(
    monkeypatch, taken, cores, threads, sleep, configured
):
    """Told by the configuration or by the environment."""
    for name in (*busy.SAID, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever is done with it here
        monkeypatch.delenv(name)
    own = None
    if threads is not None and configured:
        own = int(threads.partition(",")[0])
    elif threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(busy, "usable_cores", lambda: cores)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(busy, "_watch", _Taken(taken))
    monkeypatch.setattr(busy, "_chosen", None)
    busy.choose_waiting(own)
    assert ("OMP_WAIT_POLICY" in os.environ) is sleep
    assert (busy.chosen() is not None) is sleep


def test_what_the_user_says_of_waiting_holds(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(busy, "_watch", _Taken(float(usable_cores())))
    monkeypatch.setattr(busy, "_chosen", None)
    busy.choose_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert busy.chosen() is None


def test_threads_that_are_there_stay_as_they_are(monkeypatch):
    for name in (*busy.SAID, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "torch", object())
    monkeypatch.setattr(busy, "_watch", _Taken(float(usable_cores())))
    monkeypatch.setattr(busy, "_chosen", None)
    busy.choose_waiting()
    assert "OMP_WAIT_POLICY" not in os.environ
    assert busy.chosen() is None
