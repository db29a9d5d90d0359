"""Know a base model again: a hash of its weights' bytes, so that an adapter never meets a base it was not trained on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lora_lab import storage
from lora_lab.base.resolve import cache_dir


def fingerprint(files: list[Path]) -> str:
    """Hex SHA-256 over the SHA-256 of each weight file. Names do not count, bytes do.

    Hashing runs at about a gigabyte a second, so results are remembered by path, size and time of change.
    """
    digests = sorted(_remembered_sha256(file) for file in files)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _remembered_sha256(file: Path) -> str:
    stat = file.stat()
    mark = json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
    note = cache_dir() / "sha256" / hashlib.sha256(mark.encode()).hexdigest()
    if note.is_file():
        return note.read_text(encoding="utf-8")
    digest = storage.sha256(file)
    note.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(note, digest)
    return digest
