"""Encoded rows as training sees them: a numbered sequence of examples, stored or read as they are needed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from lora_lab.data import store
from lora_lab.data.chunks import Report, columns_of, encode_chunk, schema_of
from lora_lab.data.encode import Encoder, Example
from lora_lab.data.sources import MAX_LINE_BYTES, NOT_UTF8, DataFile, HubData, Row, checked, parse_json_line, renamed
from lora_lab.errors import DataError

_BLOCK_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources one after another, and how many items of each an epoch holds."""

    sizes: tuple[int, ...]
    draws: tuple[int, ...]


@dataclasses.dataclass
class Dataset:
    """All examples of `data.train` or `data.eval`, and what became of the rows that are not among them."""

    key: str
    table: pa.Table  # examples of all its files; see `store.py`
    chosen: np.ndarray  # [n] int64: lines of the table, in order
    source_of: np.ndarray  # [n] int64: which source each comes from
    rows: np.ndarray  # [n] int64: number of the row that each comes from, different for different rows
    reports: list[Report]
    files: dict[str, str]  # file -> SHA-256
    weights: list[float] | None = None  # of each source
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)  # rows left out after encoding: policy -> rows
    other_side: int = 0  # rows that a split put on the other side
    cached: bool = False
    starts: np.ndarray | None = None  # [items + 1] where in `chosen` each item begins; None: each example is an item

    def __len__(self) -> int:
        return len(self.chosen) if self.starts is None else len(self.starts) - 1

    def __getitem__(self, index: int) -> list[Example]:
        """The examples of item `index`: one, unless it is a block of several."""
        first, last = (index, index + 1) if self.starts is None else self.starts[index : index + 2]
        return [self._examples[int(line)] for line in self.chosen[first:last]]

    @functools.cached_property
    def _examples(self) -> store.Examples:
        return store.Examples(self.table)

    def __iter__(self) -> Iterator[Example]:
        return (example for i in range(len(self)) for example in self[i])

    def _of_items(self, values: np.ndarray) -> np.ndarray:
        return values if self.starts is None else np.add.reduceat(values, self.starts[:-1])

    @property
    def lengths(self) -> np.ndarray:
        """[n] tokens of each item."""
        return self._of_items(self.table.column("length").to_numpy()[self.chosen])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that a model reads at once."""
        return int(self.table.column("longest").to_numpy()[self.chosen].max(initial=0))

    @property
    def supervised(self) -> np.ndarray:
        """[n] how many things are learned from each item: tokens, or rows as a whole."""
        return self._of_items(self.table.column("supervised").to_numpy()[self.chosen])

    @property
    def digests(self) -> np.ndarray:
        """[n] uint64, equal for examples of equal rows."""
        return self.table.column("digest").to_numpy()[self.chosen]

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of all that its examples hold, in their order."""
        whole, sink = self.table.take(pa.array(self.chosen)).combine_chunks(), pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, whole.schema) as writer:
            writer.write_table(whole)
        content = hashlib.sha256(sink.getvalue())
        if self.starts is not None:
            content.update(self.starts.tobytes())
        return content.hexdigest()

    def numbered(self, column: str) -> np.ndarray:
        """[n] int64: a number for each item, equal where the first examples have the same in a column."""
        firsts = self.chosen if self.starts is None else self.chosen[self.starts[:-1]]
        values = self.table.column(column).combine_chunks().dictionary_encode()
        return values.indices.to_numpy()[firsts].astype(np.int64)

    @property
    def labels(self) -> list[str]:
        """All labels of the rows, sorted; of a task that has a column of them."""
        return sorted(self.label_counts)

    @property
    def label_counts(self) -> dict[str, int]:
        """How often each label occurs."""
        counts = pyarrow.compute.value_counts(pyarrow.compute.list_flatten(self._labels)).to_pylist()
        return {count["values"]: count["counts"] for count in counts}

    @property
    def _labels(self) -> pa.ChunkedArray:
        return self.table.column("labels").take(pa.array(self.chosen))

    def origin_of(self, label: str) -> str:
        """File and row of the first example with a label."""
        place = next(i for i, labels in enumerate(self._labels) if label in labels.as_py())
        return self.table.column("origin")[int(self.chosen[place])].as_py()

    def in_blocks(self, max_tokens: int) -> Dataset:
        """The same with neighbouring examples of one source put together as items of at most so many tokens."""
        lengths, starts, room, source = self.lengths, [], 0, None
        for place, size in enumerate(lengths):
            if size > room or self.source_of[place] != source:
                starts.append(place)
                room, source = max_tokens, self.source_of[place]
            room -= int(size)
        return dataclasses.replace(self, starts=np.array([*starts, len(lengths)]))

    @property
    def formats(self) -> list[str]:
        """The format of each file."""
        return [report.format for report in self.reports]

    @property
    def rows_read(self) -> int:
        return sum(report.rows for report in self.reports)

    @property
    def rows_used(self) -> int:
        return sum(report.used for report in self.reports) - sum(self.dropped.values()) - self.other_side

    @property
    def rows_dropped(self) -> dict[str, int]:
        """Rows that are not used, by the reason."""
        counts: dict[str, int] = {}
        for part in [*(report.dropped for report in self.reports), self.dropped]:
            for kind, count in part.items():
                counts[kind] = counts.get(kind, 0) + count
        return {**counts, **({self._other: self.other_side} if self.other_side else {})}

    @property
    def _other(self) -> str:
        return "held out" if self.key == "data.train" else "for training"

    @property
    def repeated(self) -> np.ndarray:
        """[n] bool: an earlier row has the same content."""
        _, first, back = np.unique(self.digests, return_index=True, return_inverse=True)
        return self.rows[first[back]] != self.rows

    @property
    def mixture(self) -> Mixture | None:
        """How many examples of each source an epoch of as many examples as there are holds; None: all, once."""
        sources = self.source_of if self.starts is None else self.source_of[self.starts[:-1]]
        return _mixture(np.bincount(sources, minlength=len(self.weights or [])), self.weights)

    def only(self, keep: np.ndarray) -> Dataset:
        """The same with some of the examples; `keep` is [n] bool."""
        return dataclasses.replace(self, chosen=self.chosen[keep], source_of=self.source_of[keep], rows=self.rows[keep])

    def __str__(self) -> str:
        lengths, supervised = self.lengths, int(self.supervised.sum())
        formats = ", ".join(dict.fromkeys(self.formats))
        dropped = "".join(f", {count} {kind}" for kind, count in self.rows_dropped.items()) or ", none dropped"
        truncated = sum(report.truncated for report in self.reports)
        split = sum(report.split for report in self.reports)
        copies = int((self.table.column("copy").to_numpy()[self.chosen] > 0).sum())
        return (
            f"{self.rows_read} rows read as {formats}: {self.rows_used} used{dropped}"
            + (f", {truncated} prompts truncated" if truncated else "")
            + (f", {split} of them as several examples" if split else "")
            + (f", {copies} changed copies added" if copies else "")
            + (f" ({len(self)} examples in all)" if split or copies else "")
            + f"; {lengths.sum():,} tokens, longest {lengths.max()}"
            + (f", {100 * supervised / lengths.sum():.0f} % supervised" if supervised > len(self) else "")
            + (" (encoded before)" if self.cached else "")
        )


def first_examples(data: Dataset | Stream, count: int) -> list[Example]:
    """The examples of the first items, up to so many."""
    found: list[Example] = []
    for index in range(len(data)):
        if len(found) >= count:
            break
        found += data[index]
    return found[:count]


def spread_examples(data: Dataset, count: int) -> list[Example]:
    """The examples of so many items, evenly spread."""
    places = np.unique(np.linspace(0, len(data) - 1, num=min(count, len(data))).astype(int))
    return [example for place in places for example in data[int(place)]]


def _mixture(sizes: Any, weights: list[float] | None) -> Mixture | None:
    if weights is None:
        return None
    sizes, shares = np.asarray(sizes), np.asarray(weights) / sum(weights)
    exact = shares * sizes.sum()
    draws = np.floor(exact).astype(int)
    for index in np.argsort(draws - exact, kind="stable")[: int(sizes.sum() - draws.sum())]:
        draws[index] += 1  # largest remainders, so that the shares add up
    return Mixture(tuple(int(n) for n in sizes), tuple(int(n) for n in draws))


class Stream:
    """Rows of JSONL files, read and encoded when they are asked for. Any row can be asked for at any time, so the order
    of a run is as random, and resumes as exactly, as that of stored rows; memory holds eight bytes a row."""

    def __init__(
        self, key: str, files: Sequence[DataFile | HubData], encoder: Encoder, weights: list[float] | None = None
    ):
        """Finds where each line begins.

        Raises:
            DataError: a file that is not plain JSONL, or a line that is too long.
        """
        plain: list[DataFile] = []
        for file in files:
            if not isinstance(file, DataFile) or file.kind != "jsonl" or file.zipped:
                raise DataError(
                    f"{key}={file.path}: data.streaming=true reads plain .jsonl files, in which any row can be found at once. "
                    "Convert or unpack it, or set data.streaming=false (rows are then encoded once, onto the disk)."
                )
            plain.append(file)
        self.key, self.inputs, self.encoder, self.weights = key, plain, encoder, weights
        self.formats = [store.format_of(file, encoder) for file in plain]
        self.files = {str(file.path): file.digest() for file in plain}
        self._starts = [_line_starts(file) for file in plain]
        self._ends = np.cumsum([len(starts) - 1 for starts in self._starts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> list[Example]:
        """The examples of a row; none if it is dropped by a policy, several for some conversations.

        Raises:
            DataError: the row cannot be used, and the policies do not say to drop it.
        """
        part, row = self._row(index)
        if row is None:
            return []
        name = self.inputs[part].name
        [outcome] = self.encoder.encode([row], name, self.formats[part])
        if outcome.problem is not None:
            sentence = f"{self.key}: {name} row {row.number}: {outcome.sentence}"
            store.check_policy(self.encoder.config, outcome.problem, sentence)
        return outcome.examples

    def _row(self, index: int) -> tuple[int, Row | None]:
        """The number of a line's file and the row in it; None for an empty line."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        line = index - (int(self._ends[part - 1]) if part else 0)
        file, starts = self.inputs[part], self._starts[part]
        with open(file.path, "rb") as stream:
            stream.seek(starts[line])
            text = stream.read(int(starts[line + 1] - starts[line]))
        if not text.strip():
            return part, None
        try:
            values, problem = parse_json_line(text.decode("utf-8-sig"))
        except UnicodeDecodeError:
            values, problem = {}, NOT_UTF8
        return part, renamed(checked(Row(line + 1, values, problem)), columns_of(file, self.encoder.config))

    def sample(self, count: int = 1000) -> Dataset:
        """Lines evenly spread over all, encoded now: what the checks look at.

        Raises:
            DataError: one of them cannot be used, and the policies do not say to drop it.
        """
        places = np.unique(np.linspace(0, len(self) - 1, num=min(count, len(self))).astype(int))
        reports = [Report(file.name, name) for file, name in zip(self.inputs, self.formats, strict=True)]
        batches, parts = [], []
        for place in places:
            part, row = self._row(int(place))
            if row is None:
                continue
            batch, report = encode_chunk(self.encoder, [row], self.inputs[part].name, self.formats[part])
            reports[part].absorb(report)
            batches.append(batch)
            parts += [part] * len(batch)
        table = pa.Table.from_batches(batches, schema=schema_of(self.encoder))
        rows = table.column("row").to_numpy() + (np.asarray(parts, dtype=np.int64) << 40)
        return Dataset(
            self.key, table, np.arange(len(table)), np.asarray(parts, dtype=np.int64), rows, reports, self.files
        )

    def first_reports(self, count: int = 64) -> list[Report]:
        """What becomes of the first lines of each file."""
        reports, first = [], 0
        for part, last in enumerate(self._ends):
            found = (self._row(line)[1] for line in range(first, min(first + count, int(last))))
            rows = [row for row in found if row is not None]
            reports.append(encode_chunk(self.encoder, rows, self.inputs[part].name, self.formats[part])[1])
            first = int(last)
        return reports

    @property
    def mixture(self) -> Mixture | None:
        lines = [len(starts) - 1 for starts in self._starts]
        return _mixture(np.bincount([file.number for file in self.inputs], weights=lines).astype(int), self.weights)

    def __str__(self) -> str:
        names = ", ".join(dict.fromkeys(self.formats))
        return f"{len(self)} lines of {names}, read and encoded as they are needed"


def _line_starts(file: DataFile) -> np.ndarray:
    """[lines + 1] int64: where each line begins, and the end of the file."""
    found, position = [np.zeros(1, dtype=np.int64)], 0
    with open(file.path, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            found.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 10) + position + 1)
            position += len(block)
    starts = np.concatenate(found)
    if starts[-1] != position:
        starts = np.append(starts, position)
    longest = int(np.diff(starts).argmax())
    if starts[longest + 1] - starts[longest] > MAX_LINE_BYTES:
        raise DataError(f"{file.key}={file.path}: line {longest + 1} is longer than {MAX_LINE_BYTES // 2**20} MiB.")
    return starts
