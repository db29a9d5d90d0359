"""The one write path: every file or folder that lora_lab leaves behind appears whole or not at all.

A folder is written under a temporary name beside its place, every file is fsynced and hashed, `manifest.json`
(SHA-256 and size of each file) goes in last, and one rename publishes it; where a folder of that name is there already, the two
are exchanged in one step. Reading starts by verifying the manifest.

What a killed process leaves is `.NAME.OWNER.tmp`, `.NAME.OWNER.old` or `.NAME.OWNER.gone` (OWNER: process number and random
letters). Its owner holds a lock (flock) on it, which the kernel frees however the owner dies: a temporary whose lock is free
belongs to nobody, whatever process has that number now. Folders are only written by who holds the lock of the run or the cache
entry, which is a file's and so holds between the machines of a shared disk too; `recover` is called under that lock.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from lora_lab.errors import CheckpointError, LoraLabError, RunError
from lora_lab.runtime import reading, signals

MANIFEST = "manifest.json"
LOCK = ".lock"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_TEMPORARY = re.compile(r"^\.(?P<name>.+)\.\d+(-[0-9a-f]{8})?\.(?P<kind>tmp|old|gone)$", re.DOTALL)
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # of an older kernel or a file system without it
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)
_WAYS_OUT = {
    errno.EACCES: "Allow writing there, or choose another folder.",
    errno.EPERM: "Allow writing there, or choose another folder.",
    errno.EROFS: "The file system is read-only: choose another folder.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EISDIR: "A folder is where a file is expected: move it away.",
    errno.ENOTDIR: "A file is where a folder is expected: move it away.",
    errno.EEXIST: "A file is where a folder is expected: move it away.",
    errno.ELOOP: "A link is there: replace it by what it names.",
    errno.EBUSY: "Another file system is mounted there: mount it one folder higher.",
    errno.EXDEV: "Another file system is mounted there: mount it one folder higher.",
}


def cannot_be_written(what: object, error: BaseException) -> RunError:
    """The error of whatever could not be written, with its reason and the way out."""
    reason = getattr(error, "strerror", None) or error
    way_out = _WAYS_OUT.get(getattr(error, "errno", None) or 0, "Free space or choose another folder.")
    return RunError(f"{what}: cannot be written ({reason}). {way_out}")


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


# -- files ------------------------------------------------------------------------------------------------------------


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a file of ours inside a run folder, made if `flags` has `O_CREAT`. No link is followed, a named pipe is not
    waited for, nothing is cut.

    Raises:
        OSError: it cannot be opened.
        RunError: something other than a regular file stands there.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _not_regular(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return descriptor


def _not_regular(path: Path) -> RunError:
    return RunError(
        f"{path}: a link, a folder or a device where a regular file is expected; it was not touched. Remove it."
    )


def write_all(descriptor: int, content: bytes) -> None:
    """Write every byte; what the disk takes only in part is tried again, so that the reason is raised.

    Raises:
        OSError: such as a full disk.
    """
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def append_whole(descriptor: int, content: bytes) -> None:
    """Append all of it or nothing.

    Raises:
        OSError: it cannot be written.
    """
    size = os.fstat(descriptor).st_size
    try:
        write_all(descriptor, content)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all (temporary file, fsync, rename). Signals are delivered after it.

    Raises:
        RunError: it cannot be written; what was there before is untouched.
    """
    with signals.deferred(), new_file(path) as file:
        file.write(text.encode("utf-8"))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file whole or not at all: it has its name when the block ends well. An existing file of that name is replaced.

    Raises:
        RunError: it cannot be written; what was there before is untouched.
    """
    temporary = descriptor = None
    try:
        recover(path.parent, path.name)
        temporary, descriptor = _temporary_file(path)
        with open(descriptor, "wb", closefd=False) as file:
            yield file
        os.fsync(descriptor)
        os.replace(temporary, path)
        _fsync(path.parent)
    except (OSError, ValueError) as error:
        raise cannot_be_written(path, error) from error
    finally:
        if temporary is not None and descriptor is not None:
            with contextlib.suppress(OSError):  # it was renamed, or a full disk has nothing to lose here
                os.unlink(temporary)
            os.close(descriptor)


def _temporary_file(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, and its descriptor with the lock that says it belongs to a living process."""
    while True:
        temporary = _temporary(path, "tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        if _own(descriptor):
            return temporary, descriptor
        os.close(descriptor)


def _temporary(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.{kind}")


def _own(descriptor: int) -> bool:
    """Take the lock that says that a temporary has a living owner; False if somebody has just cleaned it away."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return os.fstat(descriptor).st_nlink > 0


@contextlib.contextmanager
def scratch(where: Path | None = None) -> Iterator[Path]:
    """A folder for the moment, in the system's temporary folder (TMPDIR), or in `where`: there it has a name and a lock by which
    `recover` removes what a process that died has left.

    Raises:
        RunError: there is no room in it, with its name.
    """
    descriptor = None
    try:
        if where is None:
            folder = Path(tempfile.mkdtemp(prefix="lora_lab_"))
        else:
            folder = _temporary(where / "scratch", "tmp")
            folder.mkdir()
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            _own(descriptor)
    except OSError as error:
        raise _no_scratch(where or Path(os.environ.get("TMPDIR", "the system's temporary folder")), error) from error
    place = folder.parent
    try:
        yield folder
    except (OSError, SafetensorError) as error:
        raise _no_scratch(place, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def check_scratch(folder: Path, said: str) -> None:
    """Raise if what a process said of its failure is that it found no room in its scratch folder.

    Raises:
        RunError: as `scratch`.
    """
    if os.strerror(errno.ENOSPC) in said:
        raise _no_scratch(folder.parent, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _no_scratch(place: Path, error: BaseException) -> RunError:
    reason = getattr(error, "strerror", None) or error
    return RunError(f"{place}: a temporary file cannot be written there ({reason}). Free space, or set TMPDIR.")


# -- folders ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(path: Path, meta: dict[str, Any] | None = None) -> Iterator[Path]:
    """Write a folder whole or not at all. The caller holds the lock of the run or the cache entry that it belongs to.

    Args:
        path: where the folder appears when the block ends well. An existing folder of that name is replaced.
        meta: what `manifest.json` says beside the files' checksums.

    Yields:
        The temporary folder to write into.

    Raises:
        RunError: the folder cannot be written (read-only, disk full); what was there before is untouched.
    """
    temporary, descriptor = _temporary(path, "tmp"), None
    try:
        make_folders(path.parent)
        recover(path.parent, path.name)
        if os.path.lexists(path) and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        _own(descriptor)
        yield temporary
        _seal(temporary, meta or {})
        with signals.deferred():
            _publish(temporary, path)
    except (OSError, SafetensorError) as error:
        raise _failed(path, error) from error
    finally:
        with signals.deferred():
            _discard(temporary)
            if descriptor is not None:
                os.close(descriptor)


def _failed(path: Path, error: OSError | SafetensorError) -> RunError:
    """What went wrong while a folder was written, which may be a file elsewhere that was read for it."""
    named = getattr(error, "filename", None)
    if isinstance(named, str) and not Path(named).absolute().is_relative_to(path.absolute().parent):
        return RunError(
            f"{named}: {getattr(error, 'strerror', error)}, so {path} could not be written; what was there is untouched."
        )
    return cannot_be_written(path, error)


def make_folders(path: Path) -> None:
    """Make a folder and those above it, as durable as what will be written into it.

    Raises:
        OSError: they cannot be made.
    """
    if path.is_dir():
        return
    make_folders(path.parent)
    path.mkdir(exist_ok=True)
    _fsync(path.parent)


def is_temporary(name: str) -> bool:
    """Whether a name is one of those that unfinished files and folders have."""
    return _TEMPORARY.match(name) is not None


def remove(path: Path) -> None:
    """Remove a folder in one step: what is left when that is cut short is no longer under its name, and goes the next time.

    Raises:
        RunError: it cannot be removed.
    """
    gone = _temporary(path, "gone")
    try:
        os.rename(path, gone)
    except OSError as error:
        raise RunError(f"{path}: cannot be removed ({error.strerror}). Remove it by hand.") from error
    _discard(gone)


def _discard(path: Path) -> None:
    """Remove what only we know of. What cannot be removed now is tried again by the next `recover`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def recover(folder: Path, name: str | None = None) -> list[str]:
    """Tidy up after processes that died while they wrote into `folder`: a whole folder whose name is free is put back, everything
    else that has no living owner is removed.

    Called by who holds the lock of the run or cache entry; `new_folder` and `write_text` call it for the name that they write.

    Args:
        name: only what belongs to this name.

    Returns:
        A sentence about each folder that was put back.
    """
    found = [(match, folder / entry) for entry in _entries(folder) if (match := _TEMPORARY.match(entry))]
    back: list[str] = []
    for match, path in sorted(found, key=lambda pair: pair[0]["kind"], reverse=True):  # the newer one is .tmp
        if name in (None, match["name"]):
            back += _recover_one(path, folder / match["name"], match["kind"])
    return back


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # not there yet, or not for us to read: whoever writes there next is told why
        return []


def _recover_one(path: Path, place: Path, kind: str) -> list[str]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # a link of that name, or another process was quicker
        return []
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with signals.deferred():
            if kind != "gone" and not os.path.lexists(place) and _sealed(path):
                os.rename(path, place)
                _fsync(place.parent)
                return [f"{place}: complete, but a process died before renaming it; restored"]
            _discard(path)
    except OSError:  # it has a living owner, or locks and renames fail here: it stays
        return []
    finally:
        os.close(descriptor)
    return []


def _sealed(path: Path) -> bool:
    try:
        return path.is_dir() and bool(verify(path))
    except CheckpointError:
        return False


def _seal(folder: Path, meta: dict[str, Any]) -> None:
    files = {}
    umask = os.umask(0)
    os.umask(umask)
    inside = sorted(folder.rglob("*"))
    for file in (path for path in inside if path.is_file()):
        file.chmod(0o666 & ~umask)  # safetensors writes for the owner only; a deployment may be another user
        _fsync(file)
        files[str(file.relative_to(folder))] = {"sha256": sha256(file), "size": file.stat().st_size}
    for below in (path for path in inside if path.is_dir()):
        _fsync(below)
    manifest = folder / MANIFEST
    content = {**meta, "files": files}
    manifest.write_text(dump_json({**content, "manifest_sha256": digest(content)}), encoding="utf-8")
    _fsync(manifest)
    _fsync(folder)


def digest(content: dict[str, Any]) -> str:
    """Hex SHA-256 of what a JSON file says."""
    return hashlib.sha256(dump_json(content).encode()).hexdigest()


def _publish(temporary: Path, path: Path) -> None:
    """Give a sealed folder its name. What had the name before has the temporary one, or is removed."""
    if not os.path.lexists(path):
        os.rename(temporary, path)
    elif not _exchange(temporary, path):
        old = _temporary(path, "old")  # killed in between, `recover` finds both whole and puts the new one in its place
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(old, path)
            raise
        _fsync(path.parent)
        _discard(old)
    _fsync(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change their names in one step; False where kernel or file system cannot.

    Raises:
        OSError: it can, and does not, such as on a mount point.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading ----------------------------------------------------------------------------------------------------------


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder written by `new_folder`, after checking every file against it.

    Raises:
        CheckpointError: a file is missing, has another size or other bytes, there is no manifest, or it is not one of ours.
    """
    try:
        manifest = reading.read_json(folder / MANIFEST, CheckpointError)
        intact = manifest.pop("manifest_sha256") == digest(manifest)
    except (LoraLabError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing or unreadable, so the folder is incomplete.") from error
    if not intact:
        raise CheckpointError(f"{folder / MANIFEST}: does not match its own checksum, so the folder cannot be trusted.")
    with reading.reading(folder, CheckpointError):  # a disk may fail to give a file back
        _check_files(folder, _files_of(folder, manifest))
    return manifest


def _check_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    root = os.path.realpath(folder)
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing, although {MANIFEST} lists it.")
        if not Path(os.path.realpath(file)).is_relative_to(root):
            raise CheckpointError(
                f"{file}: a link that leaves the folder, which lora-lab never writes. It is not trusted."
            )
        size = file.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(
                f"{file}: {size} bytes where {MANIFEST} says {expected['size']}: the file is truncated."
            )
        if sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: its SHA-256 differs from {MANIFEST}: the file was changed or damaged.")


def _files_of(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a manifest says of the folder's files.

    Raises:
        CheckpointError: it is not of the shape that `new_folder` writes, or names a file outside the folder.
    """
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST}: lists no files, so the folder cannot be trusted.")
    for name, expected in files.items():
        path = Path(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise CheckpointError(f"{folder / MANIFEST}: names {name!r}, which is not a file inside the folder.")
        known = isinstance(expected, dict) and {"size", "sha256"} <= expected.keys()
        if not known or type(expected["size"]) is not int or not isinstance(expected["sha256"], str):
            raise CheckpointError(f"{folder / MANIFEST}: gives no size and SHA-256 of {name!r}.")
    return files


def check_safetensors(file: Path) -> None:
    """Check that a safetensors file is as long as its header says, without reading the tensors.

    Raises:
        CheckpointError: the file is cut, padded, or not safetensors at all.
    """
    with reading.reading(file, CheckpointError):
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would be waited for
    with open(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        size = found.st_size
        head = stream.read(8) if stat.S_ISREG(found.st_mode) else b""
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else None
        if length is None or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{file}: not a whole safetensors file ({size} bytes). Copy or download it again.")
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{file}: its safetensors header is damaged. Copy or download it again.") from error
    if size != expected:
        raise CheckpointError(f"{file}: {size} bytes where its header says {expected}: truncated. Copy it again.")


# -- locks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it when the process dies, however it dies.

    Raises:
        RunError: another process holds it, or there can be none.
    """
    try:
        lock = open_own(folder / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror}). Choose another run_dir.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise RunError(f"{folder}: another lora-lab process is working in it. Wait for it or stop it.") from error
    except OSError as error:
        os.close(lock)
        raise RunError(f"{folder}: its file system has no locks ({error.strerror}). Choose another run_dir.") from error
    try:
        yield
    finally:
        os.close(lock)
