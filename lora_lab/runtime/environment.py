"""What the environment says: cores, what torch reads when it starts, and secrets, of which none may
stand in a configuration, because configurations are shown and saved with the run."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from typing import Any

_SHORTEST = 8  # characters; what is shorter is found in harmless text by chance
_WORDS = frozenset(
    "token tokens secret secrets password passwords passwd passphrase passcode pwd pat auth authorization bearer "
    "credential credentials apikey apikeys accesskey secretkey privatekey signingkey".split()
)
_BEFORE_KEY = frozenset("api access secret private signing encryption deploy account master auth license".split())
_PLACES = frozenset("path paths file files dir dirs folder home sock socket".split())  # a place, not what lies there
_NOT_SECRET = frozenset(("PWD", "OLDPWD"))
WAY_OUT = (
    "Configurations are saved with the run. Remove it; libraries read HF_TOKEN, WANDB_API_KEY and the like from the "
    "environment themselves."
)


def usable_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def secret_name(name: str) -> bool:
    """Whether an environment variable of this name holds a secret, judged by the words of the name."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    if name in _NOT_SECRET or not words or words[-1] in _PLACES:
        return False
    keys = itertools.pairwise(words)
    return not _WORDS.isdisjoint(words) or any(a in _BEFORE_KEY and b in ("key", "keys") for a, b in keys)


def secrets() -> dict[str, str]:
    """The variables that hold secrets: content -> name."""
    return {
        value.strip(): name
        for name, value in os.environ.items()
        if len(value.strip()) >= _SHORTEST and secret_name(name)
    }


def leaking(values: Iterable[tuple[str, Any]]) -> list[str]:
    """A sentence for each key whose value holds a secret; it names key and variable, never the content.

    Args:
        values: key and value; names inside of values count as well.
    """
    known = secrets()
    found = {key: known[content] for key, value in values for content in known if content in f"{key}={value}"}
    return [
        f"{_without(key, known)}: holds the secret of the environment variable {name}. {WAY_OUT}"
        for key, name in found.items()
    ]


def without_secrets(text: str) -> str:
    """A message, with the name of the variable in place of its content."""
    return _without(text, secrets())


def _without(text: str, known: dict[str, str]) -> str:
    for content in sorted(known, key=len, reverse=True):
        text = text.replace(content, f"${known[content]}")
    return text


# What tells torch's allocator about its blocks; from torch 2.9 on the first name, which is for every device
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


# How many of the kernels that oneDNN makes for each shape of a product a CPU keeps, and the same of torch's bridge to it. Both keep 1,024,
# and each has 0.3 MB: as rows have ever other lengths, a run in bfloat16 would grow by 33 MB with each step.
_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_KEPT_KERNELS = "128"


def before_torch() -> None:
    """Say to torch, before it starts, what suits rows of many lengths: blocks of GPU memory that grow, instead of new ones beside
    those that are a little too small, and few kernels that are kept for lengths that do not come again. What the user says of the
    allocator, or of these, holds instead."""
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
    for name in _KERNELS:
        os.environ.setdefault(name, _KEPT_KERNELS)
