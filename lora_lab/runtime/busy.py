"""What other programs take of the cores, and how torch's threads wait for each other beside them.

OpenMP's threads wait by spinning: they are there at once for the next of the thousands of small operations of a step. Where
another program wants the same core, a spinning thread takes it from the very thread that it waits for. On 2 cores of which one
is taken, training of SmolLM2-135M falls to a third that way (`benchmarks/busy.py`). Threads that sleep while they wait do not
lose there, but do on a quiet machine, so which of the two holds is decided when a command starts. OpenMP reads it once, when
torch is loaded. No number of a run depends on it.
"""

from __future__ import annotations

import os
import sys
import time

from lora_lab.runtime.environment import usable_cores

SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # how a user tells OpenMP the same
_LEAST = 0.1  # seconds; the system counts in hundredths
_TAKEN = 0.5  # of a core; what takes less is a program that is looked at now and then


class Watch:
    """What other programs take of the cores of this process, from now on."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._then = _busy(), _own()

    def taken(self) -> float | None:
        """How many cores others have kept busy on average; None before that can be said."""
        seconds = time.monotonic() - self._start
        if seconds < _LEAST:
            return None
        others = _busy() - self._then[0] - (_own() - self._then[1])
        return max(0.0, others / seconds)


_watch: Watch | None = None
_chosen: str | None = None


def begin() -> None:
    """Begin to look, at the start of a command."""
    global _watch
    _watch = Watch()


def choose_waiting(threads: int | None = None) -> None:
    """Let the threads of a torch that is loaded later sleep while they wait, if there are fewer free cores than threads.

    Args:
        threads: that it is told to compute with; None: as many as the environment says.
    """
    global _chosen
    taken, cores = _watch.taken() if _watch else None, usable_cores()
    if "torch" in sys.modules:  # a program that has loaded it, so that its threads are there
        return
    if taken is None or taken < _TAKEN or any(name in os.environ for name in SAID):
        return
    if (threads or _threads(cores)) <= cores - taken:
        return
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    _chosen = (
        f"other programs keep {taken:.1f} of {cores} cores busy, so threads sleep while they wait. This is slower once the machine is "
        "quiet; OMP_WAIT_POLICY=ACTIVE keeps them awake"
    )


def chosen() -> str | None:
    """A sentence for the user where threads sleep because of others; None otherwise."""
    return _chosen


def _threads(cores: int) -> int:
    """Those that torch starts by what the environment says."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(said) if said.isdigit() else cores


def _busy() -> float:
    """Seconds that the cores of this process have worked for anybody, but for programs of a lower priority, which make way."""
    import psutil  # not on the way to --help

    cores = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):
        cores = [cores[index] for index in os.sched_getaffinity(0) if index < len(cores)]
    lower = hasattr(os, "nice") and os.nice(0) == 0
    return sum(one.user + one.system + (0.0 if lower else getattr(one, "nice", 0.0)) for one in cores)


def _own() -> float:
    """Seconds that this process and children of it that have ended have worked."""
    return sum(os.times()[:4])
