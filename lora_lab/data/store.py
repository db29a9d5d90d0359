"""Encoded rows on disk: Arrow files for each data file and way of encoding it, mapped into memory, never copied.

The entry's name is a digest of everything that decides its content: the file's bytes, the template, the tokenizer, the
options, the versions of the libraries and the code of this package. What has changed is not found; nothing is ever stale.
A large file is kept in parts of some ten thousand rows, so that an interrupted preparation goes on where it was.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lora_lab.base import cache
from lora_lab.base.resolve import cache_dir
from lora_lab.config.data import DataConfig
from lora_lab.data import chunks, formats, hints, sources
from lora_lab.data.chunks import Report, columns_of
from lora_lab.data.columns import Column, Own
from lora_lab.data.encode import TOO_LONG, Encoder, Example
from lora_lab.data.sources import DataFile, HubData
from lora_lab.errors import DataError
from lora_lab.runtime import console, storage

_LOOK_ROWS = 100  # whose columns decide the format
_EXAMPLES, _REPORT = "examples.arrow", "report.json"
_FIELDS = ("input_ids", "spans", "origin", "own_tokens", "own_items", "copy")  # of an example, in every table
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "pyarrow")
# Options that choose among encoded rows, or decide what is said of them, and so do not change an encoded row.
_NOT_ENCODING = (
    "train", "eval", "eval_ratio", "split_seed", "unusable", "duplicates", "shared", "check", "streaming",
    "max_train_rows", "max_eval_rows", "format", "columns", "processes",
)  # fmt: skip
_PART_CHUNKS = 100  # of rows, that are kept as soon as they are encoded: what an interruption may lose
_PART_ROWS = _PART_CHUNKS * chunks.CHUNK_ROWS


@dataclasses.dataclass(frozen=True)
class Entry:
    """The encoded rows of one file."""

    table: pa.Table  # one line for each example; mapped, not in memory
    report: Report
    digest: str  # of the file's bytes
    cached: bool  # it was there already


def format_of(file: DataFile | HubData, encoder: Encoder) -> str:
    """The format of a file's rows, by the columns of the first of them.

    Raises:
        DataError: no rows at all, columns that fit no format, or `data.columns` names one that is not there.
    """
    config = encoder.config
    first = list(itertools.islice(file.rows(), _LOOK_ROWS))
    if not first:
        raise DataError(f"{file.key}={file.path}: no rows. Name a file with at least one row.")
    readable = [row for row in first if row.problem is None]
    if not readable:
        raise DataError(f"{file.key}: {file.name} row {first[0].number}: {first[0].problem}")
    mapping = columns_of(file, config)
    columns = list(dict.fromkeys(column for row in readable for column in row.values))
    _check_mapping(f"{file.key}={file.path}", mapping or {}, columns, config.stratify)
    renamed = [sources.renamed(row, mapping) for row in readable]
    columns = list(dict.fromkeys(column for row in renamed for column in row.values))
    if config.stratify is not None and config.stratify not in columns:
        raise DataError(
            f"{file.key}={file.path}: data.stratify={config.stratify}: no such column. The file has {', '.join(columns)}."
            f"{formats.nearest(config.stratify, columns)}"
        )
    asked = file.source.format or config.format
    try:
        return formats.detect(f"{file.key}={file.path}", columns, asked, encoder.task.formats, mapping)
    except DataError as error:
        raise DataError(f"{error}{sources.lists_in(file, readable)}") from error


def _check_mapping(place: str, mapping: dict[str, str], columns: list[str], stratify: str | None) -> None:
    """Refuse a mapping that names no column of the file, or none of ours.

    Raises:
        DataError: naming the entry; one that is the wrong way round with the option that works.
    """
    known = {*formats.known_columns(), *([stratify] if stratify else ())}
    for ours, theirs in mapping.items():
        if theirs not in columns:
            turned = hints.turned(mapping, columns, known)
            if turned is not None:
                raise DataError(
                    f"{place}: data.columns.{ours}={theirs}: the file has '{ours}', and '{theirs}' is our name: ours comes first. "
                    f"Write {hints.option(turned)}."
                )
            raise DataError(
                f"{place}: data.columns.{ours}={theirs}: no such column. The file has {', '.join(columns)}."
                f"{formats.nearest(theirs, columns)}"
            )
    for ours in mapping:
        if ours not in known:
            raise DataError(
                f"{place}: data.columns.{ours}: no format reads a column of this name, so it has no effect."
                f"{formats.nearest(ours, known)}"
            )


def open_entry(file: DataFile | HubData, encoder: Encoder, limit: int | None = None, refuse: bool = True) -> Entry:
    """The encoded rows of a file, from the cache or encoded now.

    Args:
        limit: rows to read, from the first on; null: all.
        refuse: stop at the first rows that the policies call errors, without reading the rest.

    Raises:
        DataError: the file as a whole cannot be used, or with `refuse`, a row.
    """
    format_name = format_of(file, encoder)
    if separator := sources.separator_of(file):
        console.say("data", f"{file.name}: its columns are separated by {separator}")
    digest = file.digest()
    folder = cache_dir() / "tokens" / _key(file, digest, format_name, encoder, limit)
    with cache.entry(folder, DataError) as there:  # another process may be encoding the same file
        making = _Making(folder, file, format_name, encoder, limit, refuse)
        parts = making.parts(there)
    table = pa.concat_tables(_examples(part) for part in parts)
    return Entry(table, making.report, digest, cached=not making.written)


def _key(file: DataFile | HubData, digest: str, format_name: str, encoder: Encoder, limit: int | None) -> str:
    kind: Any = type(encoder)
    parts = {
        "file": digest,
        "name": file.name,  # it is part of every origin
        "kind": getattr(file, "kind", "hub"),
        "format": format_name,
        "columns": columns_of(file, encoder.config),
        "limit": limit,
        "own": {name: str(kind) for name, kind in encoder.columns.items()},
        "options": encoding_options(encoder.config),
        "task": {name: getattr(encoder.task, name) for name in encoder.task_options},
        "vocab_size": encoder.vocab_size,
        "template": encoder.tokenizer.chat_template,
        "day": encoder.day,
        "tokenizer": tokenizer_digest(encoder.tokenizer),
        "augmentation": encoder.augmenter.digest() if encoder.augmenter else None,
        "encoder": kind.__qualname__,
        "code": code_version(kind),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def encoding_options(config: DataConfig) -> dict[str, Any]:
    """The options that decide what a row becomes."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_ENCODING}


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of everything that decides how a text is tokenized."""
    parts = [tokenizer.backend_tokenizer.to_str(), str(sorted(tokenizer.special_tokens_map.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def code_version(encoder: type[Encoder]) -> str:
    """Digest of the code and the libraries that turn rows into tokens."""
    package = Path(__file__).parents[1]  # an encoder may ask another task's
    own = {*package.glob("data/*.py"), *package.glob("tasks/*/task.py")}
    files = own | {Path(inspect.getfile(kind)) for kind in encoder.__mro__[:-1]}
    code = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)]
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES]
    return hashlib.sha256("\n".join([*code, *libraries]).encode()).hexdigest()


class _Making:
    """Parts of a file's rows, which are one folder each: those that are not there are written, in the order of the rows."""

    def __init__(
        self,
        folder: Path,
        file: DataFile | HubData,
        format_name: str,
        encoder: Encoder,
        limit: int | None,
        refuse: bool,
    ):
        """`folder`: of the first part."""
        self._folder, self._file, self._format, self._encoder = folder, file, format_name, encoder
        self._limit, self._refuse = limit, refuse
        self.report = Report(file.name, format_name)  # of all parts until now
        self.written = 0

    def parts(self, there: bool) -> list[Path]:
        """The folders of all parts, whole.

        Args:
            there: the first one is.

        Raises:
            DataError: a row that the policies call an error; parts before it stay.
        """
        found: list[Path] = []
        encoded: Iterator[tuple[pa.RecordBatch, Report]] | None = None
        while self.report.rows == len(found) * _PART_ROWS:  # what is no whole part was the last
            part = self._folder.with_name(f"{self._folder.name}-{len(found)}") if found else self._folder
            if cache.usable(part) if found else there:
                encoded = None  # goes on behind this part, if it must
                self.report.absorb(_report(part))
            else:
                if encoded is None:
                    begun = len(found) * _PART_ROWS
                    encoded = chunks.encoded(self._file, self._format, self._encoder, self._limit, begun)
                self._write(part, itertools.islice(encoded, _PART_CHUNKS))
            found.append(part)
        return found

    def _write(self, part: Path, encoded: Iterator[tuple[pa.RecordBatch, Report]]) -> None:
        own, schema = Report(self._file.name, self._format), chunks.schema_of(self._encoder)
        with storage.new_folder(part, {"source": self._file.name}) as folder:
            with pa.OSFile(str(folder / _EXAMPLES), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch, report in encoded:
                    own.absorb(report)
                    self.report.absorb(report)
                    if self._refuse:
                        refuse_rows(self._file.key, self.report, self._encoder.config)
                    writer.write_batch(batch)
            (folder / _REPORT).write_text(storage.dump_json(dataclasses.asdict(own)), encoding="utf-8")
        self.written += 1


def refuse_rows(key: str, report: Report, config: DataConfig) -> None:
    """Raise if there are rows that the policies call errors.

    Raises:
        DataError: naming the first row of a kind, and how many there are.
    """
    for kind, sentences in report.sentences.items():
        more = report.dropped[kind] - 1
        others = f" ({more} more like it among the first {report.rows} rows.)" if more else ""
        check_policy(config, kind, f"{key}: {sentences[0]}{others}")


def check_policy(config: DataConfig, kind: str, sentence: str) -> None:
    """Raise unless `data.too_long` or `data.unusable` says to drop a row with this kind of problem.

    Raises:
        DataError: with the sentence and the way out.
    """
    if is_error(config, kind):
        hint = "" if kind == TOO_LONG else " To leave such rows out and count them: data.unusable=drop."
        raise DataError(f"{sentence}{hint}")


def is_error(config: DataConfig, kind: str) -> bool:
    """Whether the policies call rows with this kind of problem an error."""
    return config.too_long != "drop" if kind == TOO_LONG else config.unusable == "error"


def _examples(part: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(part / _EXAMPLES))).read_all()


def _report(part: Path) -> Report:
    return Report(**json.loads((part / _REPORT).read_text(encoding="utf-8")))


class Examples:
    """The lines of a table as examples. A task's own values stay in the table until they are asked for."""

    def __init__(self, table: pa.Table):
        self._common = [Column(table.column(name)) for name in _FIELDS]
        self._own = {name: Column(table.column(name)) for name in chunks.own_names(table)}

    def __getitem__(self, line: int) -> Example:
        ids, spans, origin, own_tokens, own_items, copy = (column[line] for column in self._common)
        own = Own(self._own, line)
        return Example(ids, _weights(spans, len(ids)), origin, own, own_tokens, own_items, copy)


def _weights(spans: np.ndarray, length: int) -> np.ndarray:
    """[length] float32: the weight of each token, from runs of equal weight."""
    weights = np.zeros(length, dtype=np.float32)
    for start, end, weight in spans.reshape(-1, 3):
        weights[int(start) : int(end)] = weight
    return weights


def label_counts(reports: list[Report]) -> dict[str, int]:
    """Labels of several files together, most frequent first."""
    counts: collections.Counter[str] = collections.Counter()
    for report in reports:
        counts.update(report.labels)
    return dict(counts.most_common())
