"""Processes that are started end with whoever started them, and so do their own."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from lora_lab.runtime import children

# a process that starts another one, tells both numbers, and does not end by itself; told to end, it ends alone
FAMILY = """
import os, signal, subprocess, sys
other = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('there', flush=True); signal.pause()"],
                         stdout=subprocess.PIPE)
other.stdout.readline()
print(os.getpid(), other.pid, flush=True)
signal.pause()
"""
STARTER = f"""
import subprocess, sys
from lora_lab.runtime import children
subprocess.Popen(children.tied_group(sys.executable, "-c", {FAMILY!r})).wait()
"""


def gone(*numbers: int) -> bool:
    left = [psutil.Process(number) for number in numbers if psutil.pid_exists(number)]
    return not psutil.wait_procs([one for one in left if one.status() != psutil.STATUS_ZOMBIE], timeout=30)[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a parent's death is told on Linux alone")
def test_a_group_ends_with_a_starter_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True) as starter:
        numbers = [int(word) for word in starter.stdout.readline().split()]
        assert all(psutil.pid_exists(number) for number in numbers)
        starter.kill()
    assert gone(*numbers)


def test_a_group_ends_when_it_is_told_to():
    command = children.tied_group(sys.executable, "-c", FAMILY)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as leader:
        numbers = [int(word) for word in leader.stdout.readline().split()]
        leader.terminate()
        assert leader.wait(30) == 128 + signal.SIGTERM
    assert gone(*numbers)


def test_a_groups_code_is_its_commands():
    assert subprocess.run(children.tied_group(sys.executable, "-c", "raise SystemExit(7)"), check=False).returncode == 7
    done = subprocess.run(children.tied_group("no-such-program"), capture_output=True, text=True, check=False)
    assert (done.returncode, "no-such-program: No such file" in done.stderr) == (1, True)
