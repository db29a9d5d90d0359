"""`lora-lab ui`: from a command line to pages in a browser, and to their end."""

from __future__ import annotations

import signal
from pathlib import Path

from lora_lab.runtime import console
from lora_lab.serve.listening import listen
from lora_lab.ui import app
from lora_lab.ui.door import ENTER
from lora_lab.ui.talk import Talk

_HOST = "127.0.0.1"
_STOP_SECONDS = (
    2  # a page and an answer that are being made are finished; a base that is being loaded is not waited for
)


def serve(root: Path, port: int) -> None:
    """Show the runs below a folder until a signal comes.

    Args:
        port: 0: one that is free.

    Raises:
        ConfigError: the port cannot be listened on.
    """
    address = ""

    def listens(chosen: int) -> None:
        nonlocal address
        address = f"http://{_HOST}:{chosen}"
        console.say("open", f"{address}{ENTER}?token={door.token}")
        console.say(
            "ui", f"the runs below {root}, for this machine alone, to look at; the link counts once. Ctrl-C ends"
        )

    def stopping(number: signal.Signals, again: bool) -> None:
        console.say("stopping", f"by {number.name}")
        talk.stop(0 if again else _STOP_SECONDS)

    talk = Talk()
    door = app.build(root, lambda path: console.say("opened", f"for another browser: {address}{path}"), talk)
    try:
        listen(door, _HOST, port, listens, stopping, key="port", stop_seconds=_STOP_SECONDS)
    finally:
        talk.close()
