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
    """A value that an encoder gave, as a file would give it back; lists become arrays."""
    numbers = None if value is None else _numbers(kind)
    return value if numbers is None else np.asarray(value, dtype=numbers)


def kept(value: Any, kind: pa.DataType) -> Any:
    """A value as pyarrow takes it."""
    return json.dumps(value, ensure_ascii=False) if kind == JSON and value is not None else value


class Own(Mapping[str, Any]):
    """The own values of one line of a table, each read when it is asked for."""

    __slots__ = ("_index", "_names", "_table")

    def __init__(self, table: pa.Table, index: int, names: tuple[str, ...]):
        self._table, self._index, self._names = table, index, names

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return _read(self._table.column(name)[self._index])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _read(scalar: pa.Scalar) -> Any:
    """What `typed` gave, of a table."""
    if not scalar.is_valid:
        return None
    if scalar.type == JSON:
        return json.loads(scalar.as_py())
    numbers = _numbers(scalar.type)
    return scalar.as_py() if numbers is None else scalar.values.to_numpy().astype(numbers)


def _numbers(kind: pa.DataType) -> np.dtype | None:
    """The type of the array that a list of numbers is; None: it is no such list."""
    if not pa.types.is_list(kind):
        return None
    if pa.types.is_integer(kind.value_type):
        return np.dtype(np.int64)
    return np.dtype(kind.value_type.to_pandas_dtype()) if pa.types.is_floating(kind.value_type) else None
