"""The one write path: every file or folder that lora_lab leaves behind appears whole or not at all.

A folder is written under a temporary name beside its place, every file is fsynced and hashed, `manifest.json`
(SHA-256 and size of each file) goes in last, and one rename publishes it. Reading starts by verifying the manifest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_lab.errors import CheckpointError, RunError

MANIFEST = "manifest.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump_json(value: Any) -> str:
    """`value` as indented JSON text."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """`value` with NaN and infinities replaced by None: JSON has none, and other programs must be able to read it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all (temporary file, fsync, rename)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror}). Free space or choose another folder.") from error


@contextlib.contextmanager
def new_folder(path: Path, meta: dict[str, Any] | None = None) -> Iterator[Path]:
    """Write a folder whole or not at all.

    Args:
        path: where the folder appears when the block ends well. An existing folder of that name is replaced.
        meta: what `manifest.json` says beside the files' checksums.

    Yields:
        The temporary folder to write into.

    Raises:
        RunError: the folder cannot be written (read-only, disk full); what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        _seal(temporary, meta or {})
        _replace_folder(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path}: cannot be written ({reason}). Free space or choose another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _seal(folder: Path, meta: dict[str, Any]) -> None:
    files = {}
    umask = os.umask(0)
    os.umask(umask)
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        file.chmod(0o666 & ~umask)  # safetensors writes for the owner only; a deployment may be another user
        _fsync(file)
        files[str(file.relative_to(folder))] = {"sha256": sha256(file), "size": file.stat().st_size}
    manifest = folder / MANIFEST
    content = {**meta, "files": files}
    manifest.write_text(dump_json({**content, "manifest_sha256": _digest(content)}), encoding="utf-8")
    _fsync(manifest)
    _fsync_folder(folder)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(dump_json(content).encode()).hexdigest()


def _replace_folder(temporary: Path, path: Path) -> None:
    if path.exists():
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        os.rename(path, old)
        os.rename(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(temporary, path)
    _fsync_folder(path.parent)


def _fsync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_fsync_folder = _fsync  # a folder is synced through a descriptor just like a file


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder written by `new_folder`, after checking every file against it.

    Raises:
        CheckpointError: a file is missing, has another size or other bytes, or there is no manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        intact = manifest.pop("manifest_sha256") == _digest(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing or unreadable, so the folder is incomplete.") from error
    if not intact:
        raise CheckpointError(f"{folder / MANIFEST}: does not match its own checksum, so the folder cannot be trusted.")
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, although {MANIFEST} lists it.")
        size = file.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{file}: {size} bytes where {MANIFEST} says {expected['size']}: the file is cut.")
        if sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: its SHA-256 differs from {MANIFEST}: the file was changed or damaged.")
    return manifest


def check_safetensors(file: Path) -> None:
    """Check that a safetensors file is as long as its header says, without reading the tensors.

    Raises:
        CheckpointError: the file is cut, padded, or not safetensors at all.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else None
        if length is None or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{file}: not a whole safetensors file ({size} bytes). Copy or download it again.")
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{file}: its safetensors header is damaged. Copy or download it again.") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise CheckpointError(f"{file}: {size} bytes where its header says {expected}: truncated. Copy it again.")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it when the process dies, however it dies.

    Raises:
        RunError: another process holds it.
    """
    try:
        lock = open(folder / ".lock", "w", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}). Choose another run_dir.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"{folder}: another lora-lab process is working in it. Wait for it or stop it.") from error
        yield
