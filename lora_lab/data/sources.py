"""Read rows from JSONL, JSON, CSV and Parquet files, through `datasets`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from lora_lab import storage
from lora_lab.base.resolve import local_path
from lora_lab.errors import DataError

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row as it stands in its file."""

    values: dict[str, Any]
    origin: str  # 'orders.jsonl row 3', counted from 1; for messages to the user
    file: int = 0  # which of the key's files


@dataclasses.dataclass(frozen=True)
class Rows:
    """All rows of one configuration key, in the order of its files."""

    key: str  # data.train or data.eval
    rows: list[Row]
    columns: list[list[str]]  # of each file
    files: dict[str, str]  # file -> SHA-256


def read(key: str, names: str | list[str], limit: int | None = None) -> Rows:
    """Read the files that a configuration key names.

    Args:
        key: `data.train` or `data.eval`, for messages.
        names: one or more paths or `package:` names.
        limit: keep only the first so many rows.

    Raises:
        DataError: a file is missing, of an unknown kind, malformed (with the line), or without rows.
    """
    rows, columns, files = [], [], {}
    for index, name in enumerate([names] if isinstance(names, str) else names):
        file = local_path(name, key, DataError)
        found, file_columns = _read_file(key, file)
        rows += [Row(values, f"{file.name} row {number}", index) for number, values in enumerate(found, start=1)]
        columns.append(file_columns)
        files[str(file)] = storage.sha256(file)
    if not rows:
        raise DataError(f"{key}={names}: no rows. Name a file with at least one row.")
    return Rows(key, rows[:limit], columns, files)


def _read_file(key: str, file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    reader = READERS.get(file.suffix.lower())
    if reader is None or not file.is_file() or not os.access(file, os.R_OK):
        raise DataError(f"{key}={file}: not a data file that can be read. Use one of {', '.join(READERS)}.")
    with open(file, "rb") as stream:
        if not stream.read(4096).strip():
            raise DataError(f"{key}={file}: the file is empty. Name a file with at least one row.")
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what goes wrong is said below, once
    try:
        # A cache of its own: `datasets` would find an older copy again by name and time of change.
        with tempfile.TemporaryDirectory(prefix="lora_lab_") as cache:
            # `datasets` takes names for patterns (`a[1].jsonl`, `a*.jsonl`) and URLs (`a::b.jsonl`); this one is plain.
            link = Path(cache) / f"rows{file.suffix.lower()}"
            link.symlink_to(file.resolve())
            table = datasets.load_dataset(
                reader, data_files=[str(link)], split="train", cache_dir=cache, keep_in_memory=True
            )
            return table.to_list(), table.column_names
    except (DatasetGenerationError, ValueError, OSError, TypeError) as error:
        raise DataError(f"{key}={file}: {_reason(file, error)}") from error


def _reason(file: Path, error: Exception) -> str:
    """The line that cannot be read, where the format lets us find it; else the reader's own words."""
    if file.suffix.lower() == ".jsonl":
        for number, line in enumerate(file.read_bytes().splitlines(), start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f'line {number} is not a JSON object. Every line must be one, such as {{"prompt": ...}}.'
            except UnicodeDecodeError:
                return f"line {number} is not valid UTF-8. Save the file as UTF-8."
            except ValueError as problem:
                return f"line {number} is not valid JSON ({problem}). Every line must be one JSON object."
    cause = error.__cause__ or error
    return f"cannot be read ({str(cause).strip().partition(chr(10))[0]})."
