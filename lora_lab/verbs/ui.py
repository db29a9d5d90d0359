"""`lora-lab ui`: the runs as pages in a browser."""

from __future__ import annotations

import os
from pathlib import Path

from lora_lab.errors import ConfigError, RunError
from lora_lab.verbs.base import Told, Verb, Word
from lora_lab.verbs.runs import FOLDER

_PORT = 8765
_NEEDED = ("starlette", "uvicorn")

_EXAMPLES = """\
  lora-lab ui                     the runs below runs/: open the link that is shown in a browser of this machine
  lora-lab ui my/runs port=9000   those of another folder, on another port (0: one that is free)

Runs and sweeps as tables; curves, configuration, merge report, held-out rows with what was said of them; runs compared; a base and runs on it
asked side by side. Nothing is changed,
no script runs, and nothing is loaded from elsewhere. The link counts once: who has opened it may look, and others of this machine may not.
"""


def _run(told: Told) -> int:
    if told.overrides:
        raise ConfigError(f"{told.overrides[0]}: no effect on ui. Runs are filtered on its page; say at most port=N.")
    folder, port = told.word("in") or FOLDER, told.word("port") or str(_PORT)
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535):
        raise ConfigError(f"port={port}: must be a number from 0 to 65535.")
    if not os.path.isdir(folder):
        raise RunError(f"{folder}: no folder. Name one that holds runs: lora-lab ui FOLDER")
    from lora_lab.serve import server

    server.check_extra("ui", _NEEDED)
    from lora_lab.ui import listen

    listen.serve(Path(folder), int(port))
    return 0


VERB = Verb(
    summary="show runs as pages in a browser",
    examples=_EXAMPLES,
    run=_run,
    arguments=(Word("in"), Word("port")),
    filters=True,
    bare="in",
    others=("web", "dashboard", "page", "view", "browse", "tensorboard"),
)
