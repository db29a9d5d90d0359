"""Of which state of the sources results are, and when they were made. Imports nothing but Python's own."""

from __future__ import annotations

import datetime
import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("lora_lab/**/*.py", "conf/**/*.yaml", "tests/families.py")  # what decides a result of any family


def sources(*more: str) -> str:
    """A digest of everything of ours that decides a result.

    Args:
        more: patterns of files beside `OURS`, from the repository's root.
    """
    found = hashlib.sha256()
    for file in sorted({file for pattern in (*OURS, *more) for file in ROOT.glob(pattern)}):
        found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def commit() -> str:
    """The commit that is checked out; empty where there is no repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git
        return ""
    return done.stdout.strip()


def now() -> str:
    """The time, to the minute."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
