"""`lora-lab ARGUMENTS` in one of several processes, of which one gets a signal from itself: `python dying.py WHERE CALL RANK SIGNAL ARGUMENTS`,
before it calls that for the so-manieth time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from lora_lab import cli
from lora_lab.base import shard
from lora_lab.runtime import ranks
from lora_lab.tasks.base import Task
from lora_lab.training import checkpoint, loop

PLACES: dict[str, tuple[Any, str]] = {
    "step": (loop, "learn"),
    "exchange": (ranks, "exchange"),
    "sum": (ranks, "sum_flat"),
    "update": (loop, "_update"),
    "save": (checkpoint, "_digest"),
    "measure": (Task, "_measured"),
    "gather": (shard._Gather, "__call__"),  # of a sharded layer
}


def main(told: Sequence[str]) -> int:
    where, last, rank, name, *arguments = told
    owner, method = PLACES[where]
    as_it_is, calls = getattr(owner, method), []

    def dying(*given: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == int(last) and ranks.rank() == int(rank):
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        return as_it_is(*given, **named)

    setattr(owner, method, dying)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
