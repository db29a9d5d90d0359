"""An example's own columns between Python and an Arrow file: what each type is in Python, and how it is kept.

| Arrow type | in an example |
|---|---|
| list of integers | [n] int64 array, however few bits a file has for each |
| list of floats | [n] array of this type |
| JSON | a nested document, which is parsed whenever it is asked for: never in `collate` |
| any other, such as a number, a text, a list of texts, a struct | as pyarrow gives it |

Any of them may be None.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

JSON = pa.json_()
TOKENS = pa.list_(pa.int32())  # token ids, or places of tokens
TEXTS = pa.list_(pa.string())
WEIGHTS = pa.list_(pa.float32())


def typed(value: Any, kind: pa.DataType) -> Any:
    """A value that an encoder gave, as a file would give it back: an integer for a column of floats is a float."""
    if value is None or kind == JSON:
        return value
    numbers = _numbers(kind)
    return pa.scalar(value, kind).as_py() if numbers is None else np.asarray(value, dtype=numbers)


def kept(value: Any, kind: pa.DataType) -> Any:
    """A value as pyarrow takes it."""
    return json.dumps(value, ensure_ascii=False) if kind == JSON and value is not None else value


class Column:
    """A column of a table whose values are read one at a time, as `typed` gave them."""

    __slots__ = ("_column", "_json", "_numbers")

    def __init__(self, column: pa.ChunkedArray):
        self._column, self._json, self._numbers = column, column.type == JSON, _numbers(column.type)

    def __getitem__(self, index: int) -> Any:
        scalar = self._column[index]
        if self._numbers is not None and scalar.is_valid:
            return scalar.values.to_numpy().astype(self._numbers)
        value = scalar.as_py()
        return json.loads(value) if self._json and value is not None else value


class Own(Mapping[str, Any]):
    """The own values of one line of a table, each read when it is asked for."""

    __slots__ = ("_columns", "_index")

    def __init__(self, columns: dict[str, Column], index: int):
        self._columns, self._index = columns, index

    def __getitem__(self, name: str) -> Any:
        return self._columns[name][self._index]

    def __contains__(self, name: object) -> bool:
        return name in self._columns  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def _numbers(kind: pa.DataType) -> np.dtype | None:
    """The type of the array that a list of numbers is; None: it is no such list."""
    if not pa.types.is_list(kind):
        return None
    if pa.types.is_integer(kind.value_type):
        return np.dtype(np.int64)
    return np.dtype(kind.value_type.to_pandas_dtype()) if pa.types.is_floating(kind.value_type) else None
