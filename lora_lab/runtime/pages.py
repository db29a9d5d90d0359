"""Memory that nobody uses any more and that the process holds nonetheless: pages of mapped files, and what the heap keeps."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lab.runtime.memory import is_out_of_memory

READ = 2**28  # bytes that are read before pages are given back
_LARGE = 2**20  # bytes of a tensor that counts as read
_DONTNEED = 4  # of madvise(2)
_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+\s*(.*)")
_OWN = ("Anonymous:", "Swap:")  # of /proc/self/smaps: what was written to, and so is in no file


def trim() -> None:
    """Give memory back to the system that is free inside this process (glibc; elsewhere nothing)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def give_back(files: Iterable[Path]) -> None:
    """Give back the pages of mapped files; they are read from the file again when they are needed (Linux; elsewhere nothing).

    What was written to a mapping stays.
    """
    wanted = {str(file.resolve()) for file in files}
    library = ctypes.CDLL(None)
    for start, end, name, own in _mappings():
        if name in wanted and not own:
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _mappings() -> Iterator[tuple[int, int, str, int]]:
    """Start, end, file and KiB that are in no file, of each mapping of this process."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return
    found, own = None, 0
    for line in lines:
        if line.startswith(_OWN):
            own += int(line.split()[1])
        elif (begins := _RANGE.match(line)) is not None:
            if found is not None:
                yield (*found, own)
            found, own = (int(begins[1], 16), int(begins[2], 16), begins[3]), 0
    if found is not None:
        yield (*found, own)


class Reading(TorchDispatchMode):
    """Inside the block weights are made of those in files. Pages that were read for that are given back on the way, and free memory after it.

    Else all of a file would stay as long as one of its tensors is used as it lies there, such as a norm's weight. Sees what the block's
    own thread computes.

    `lacked` is the first failed allocation, which transformers turns into a remark on the weights.
    """

    lacked: Exception | None = None

    def __init__(self, files: Iterable[Path]) -> None:
        super().__init__()
        self._files, self._read = list(files), 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            result = func(*args, **(kwargs or {}))
        except Exception as error:
            if self.lacked is None and is_out_of_memory(error):
                self.lacked = error
            raise
        sizes = [one.nbytes for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        largest = max(sizes, default=0)
        self._read += largest if largest >= _LARGE else 0
        if self._read >= READ:
            self._read = 0
            give_back(self._files)
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        give_back(self._files)
        trim()
