"""Folders that are made once and kept: each is verified against its manifest whenever it is used."""

from __future__ import annotations

import shutil
from pathlib import Path

from lora_lab.errors import CheckpointError
from lora_lab.runtime import console, storage
from lora_lab.runtime.reading import reading


def usable(folder: Path) -> bool:
    """Whether a kept folder is there and is what was written. A damaged one is removed, and said so, to be made again."""
    if not folder.exists():
        return False
    try:
        with reading(folder, CheckpointError):
            storage.verify(folder)
    except CheckpointError as error:
        console.say("cache", f"{error} It is made again.")
        shutil.rmtree(folder, ignore_errors=True)
        return False
    return True
