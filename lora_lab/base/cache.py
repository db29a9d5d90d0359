"""Folders that are made once and kept: each is verified against its manifest whenever it is used."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from lora_lab.base import inspect
from lora_lab.errors import CheckpointError, LoraLabError
from lora_lab.runtime import console, storage
from lora_lab.runtime.reading import reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def entry(folder: Path, error: type[LoraLabError]) -> Iterator[bool]:
    """Inside the block nobody else makes this kept folder; gives whether it is `usable`. Whoever makes it does so inside the block.

    Raises:
        error: the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as problem:
        raise error(
            f"{folder.parent}: cannot be written ({problem.strerror}). Set LORA_LAB_CACHE to a folder that can be written."
        ) from problem
    try:
        storage.recover(folder.parent, folder.name)
        yield usable(folder)
    finally:
        lock.release()


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
