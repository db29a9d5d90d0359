"""Folders that are made once and kept: each is verified against its manifest whenever it is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.base import inspect
from lora_lab.errors import CheckpointError
from lora_lab.runtime import console, storage
from lora_lab.runtime.reading import reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def save(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """Write a model as transformers does, also where several processes train one run: in all but the first of them transformers writes
    nothing, and each may have a cache of its own.

    Args:
        options: of `save_pretrained`.

    Raises:
        BaseModelError: nothing was written.
    """
    model.should_save_on_this_rank = lambda is_main_process: True  # type: ignore[method-assign]
    try:
        model.save_pretrained(folder, **options)
    finally:
        del model.should_save_on_this_rank
    inspect.require_config(folder)
