"""What a teacher says of encoded rows, in the cache: parts of some rows each, as Arrow files that are mapped into memory.

A part's name is a digest of everything that decides its content: the teacher, what is kept of it, and the rows' tokens. So a sweep finds
what its first run made, an interruption loses one part, and rows that are added later cost themselves alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lora_lab.base import cache
from lora_lab.base.resolve import cache_dir
from lora_lab.data.dataset import Dataset
from lora_lab.data.encode import Example
from lora_lab.errors import DataError
from lora_lab.runtime import storage

_FILE = "targets.arrow"
_ITEMS = 4096  # supervised tokens of a part, and so what an interruption may lose
_NUMBERS = 2**22  # that are kept in a part, at most, unless one row has more


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows, and where in the cache lies what a teacher says of them."""

    folder: Path
    data: Dataset
    items: range

    @property
    def examples(self) -> list[Example]:
        return [example for item in self.items for example in self.data[item]]

    @property
    def made(self) -> bool:
        """Whether it is there, whole."""
        return cache.usable(self.folder)

    def make(self, say: Callable[[list[Example]], Mapping[str, Sequence[np.ndarray]]]) -> None:
        """Write it, unless another process has done so.

        Args:
            say: what is kept of the teacher's word, by column: an array for each example.

        Raises:
            DataError: the cache cannot be written.
        """
        with cache.entry(self.folder, DataError) as there:
            if there:
                return
            table = pa.table({name: _lists(arrays) for name, arrays in say(self.examples).items()})
            with (
                storage.new_folder(self.folder, {"rows": len(self.items)}) as temporary,
                pa.OSFile(str(temporary / _FILE), "wb") as sink,
                pa.ipc.new_file(sink, table.schema) as writer,
            ):
                writer.write_table(table)

    def read(self) -> pa.Table:
        """A line for each example, mapped."""
        return pa.ipc.open_file(pa.memory_map(str(self.folder / _FILE))).read_all()


def parts(data: Dataset, made_of: Mapping[str, Any], kept: int) -> list[Part]:
    """Some rows in parts, one after another.

    Args:
        made_of: what decides a teacher's word beside the rows, as plain values.
        kept: numbers that are kept of each supervised token.
    """
    most = max(1, min(_ITEMS, _NUMBERS // kept))
    starts, room = [0], most
    for item, items in enumerate(data.supervised):
        if items > room and item > starts[-1]:
            starts.append(item)
            room = most
        room -= int(items)
    found = (range(start, end) for start, end in itertools.pairwise([*starts, len(data)]))
    return [Part(_folder(data, items, made_of), data, items) for items in found]


def _folder(data: Dataset, items: range, made_of: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    for example in (example for item in items for example in data[item]):
        for array in (np.array([len(example.input_ids)]), example.input_ids, example.supervised):
            digest.update(array.tobytes())
    return cache_dir() / "soft_targets" / digest.hexdigest()[:40]


def added(data: Dataset, tables: Sequence[pa.Table]) -> Dataset:
    """The rows with further columns of their own.

    Args:
        tables: one after another a line for each example of `data`, in order.
    """
    table = data.table
    if not np.array_equal(data.chosen, np.arange(len(table))):
        table = table.take(pa.array(data.chosen))
    more = pa.concat_tables(tables)
    for name in more.column_names:
        table = table.append_column(name, more.column(name))
    return dataclasses.replace(data, table=table, chosen=np.arange(len(table)))


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """A column of one flat list for each example."""
    offsets = np.cumsum([0, *(array.size for array in arrays)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([one.reshape(-1) for one in arrays])))
