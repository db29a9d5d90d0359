"""`lora-lab ARGUMENTS` in one of several processes, of which one gets a signal from itself: `python dying.py WHERE RANK SIGNAL ARGUMENTS`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from lora_lab import cli
from lora_lab.runtime import ranks
from lora_lab.tasks.base import Task
from lora_lab.training import checkpoint, loop

PLACES: dict[str, tuple[Any, str, int]] = {  # what is called, and the call in which the process dies
    "step": (loop, "learn", 5),  # of the third step, as each has two micro-batches here
    "exchange": (ranks, "exchange", 9),
    "sum": (ranks, "sum_flat", 4),
    "update": (loop, "_update", 3),
    "save": (checkpoint, "_digest", 2),
    "measure": (Task, "_measured", 2),
}


def main(where: str, rank: str, name: str, *arguments: str) -> int:
    owner, method, last = PLACES[where]
    as_it_is, calls = getattr(owner, method), []

    def dying(*given: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == last and ranks.rank() == int(rank):
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        return as_it_is(*given, **named)

    setattr(owner, method, dying)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
