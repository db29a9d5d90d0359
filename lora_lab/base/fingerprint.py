"""Know a base model again, so that an adapter never meets a base that it was not trained on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from lora_lab import storage
from lora_lab.base.resolve import cache_dir
from lora_lab.errors import RunError

# Notes that transformers keeps in config.json about where and with what a copy was made.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache")


def fingerprint(folder: Path, weight_files: list[Path]) -> str:
    """Hex SHA-256 over the bytes of the weights and over what `config.json` says of the architecture.

    Names of files and folders do not count.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = json.dumps({key: value for key, value in config.items() if key not in _VOLATILE}, sort_keys=True)
    digests = sorted(remembered_sha256(file) for file in weight_files)
    return hashlib.sha256("\n".join([*digests, architecture]).encode()).hexdigest()


def remembered_sha256(file: Path) -> str:
    """SHA-256 of a large file, remembered by path, size and times of change: hashing runs at about a gigabyte a second."""
    stat = file.stat()
    mark = json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    note = cache_dir() / "sha256" / hashlib.sha256(mark.encode()).hexdigest()
    if note.is_file():
        return note.read_text(encoding="utf-8")
    digest = storage.sha256(file)
    with contextlib.suppress(OSError, RunError):  # a read-only cache costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(note, digest)
    return digest
