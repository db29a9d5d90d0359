"""Encode the rows of a file some at a time, a large file's on all cores, into lines of an Arrow table."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lora_lab.config.data import DataConfig
from lora_lab.data import sources
from lora_lab.data.columns import kept
from lora_lab.data.encode import Encoder, Outcome
from lora_lab.data.sources import DataFile, HubData, Row
from lora_lab.runtime import children, console
from lora_lab.runtime.environment import usable_cores

CHUNK_ROWS = 512  # encoded together
_PARALLEL_BYTES = 32 * 2**20  # starting the processes takes some seconds: smaller files are encoded sooner without
_SENTENCES = 20  # kept for each kind of problem
_LABELS = 1000  # different labels that are counted

_COMMON = pa.schema(
    {
        "row": pa.int64(),
        "digest": pa.uint64(),  # of the row's content
        "input_ids": pa.list_(pa.int32()),
        "spans": pa.list_(pa.float64()),  # start, end, weight of each run of supervised tokens
        "own_tokens": pa.int32(),
        "own_items": pa.int32(),
        "length": pa.int32(),  # tokens that the model reads
        "longest": pa.int32(),  # of them, those of the longest sequence
        "supervised": pa.int32(),  # how many things are learned from it
        "origin": pa.string(),
        "copy": pa.int8(),
        "stratum": pa.string(),  # value of the column data.stratify
    }
)


def schema_of(encoder: Encoder) -> pa.Schema:
    """The columns of a table of examples: those of every task, then the encoder's own."""
    own = pa.schema(encoder.columns)
    taken = {*own.names} & {*_COMMON.names}
    assert not taken, f"{type(encoder).__name__}: every task has columns of these names: {', '.join(sorted(taken))}"
    return pa.schema([*_COMMON, *own])


def own_names(table: pa.Table) -> tuple[str, ...]:
    """The columns of a table that are the task's own."""
    return tuple(table.column_names[len(_COMMON) :])


@dataclasses.dataclass
class Report:
    """What became of the rows of one file."""

    name: str
    format: str
    rows: int = 0
    used: int = 0
    truncated: int = 0  # of the used
    split: int = 0  # of the used: rows that became several examples
    bordered: int = 0  # of the used: prompt and answer tokenized apart
    copies: int = 0  # examples that are changed copies of others (data.augment)
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)  # kind of problem -> rows
    sentences: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # kind -> the first few, with their rows
    labels: dict[str, int] = dataclasses.field(default_factory=dict)  # label -> rows (or words)
    unread: dict[str, int] = dataclasses.field(default_factory=dict)  # column that is never read -> rows that have it
    notes: dict[str, int] = dataclasses.field(default_factory=dict)  # how rows were read -> of the used

    def add(self, outcome: Outcome) -> None:
        """Count one row."""
        self.rows += 1
        _count(self.unread, dict.fromkeys(outcome.unread, 1))
        if outcome.problem is not None:
            self.dropped[outcome.problem] = self.dropped.get(outcome.problem, 0) + 1
            kept = self.sentences.setdefault(outcome.problem, [])
            if len(kept) < _SENTENCES:
                kept.append(f"{self.name} row {outcome.row}: {outcome.sentence}")
            return
        self.used += 1
        _count(self.notes, dict.fromkeys(outcome.notes, 1))
        self.truncated += outcome.truncated
        self.copies += sum(example.copy > 0 for example in outcome.examples)
        self.split += sum(example.copy == 0 for example in outcome.examples) > 1
        self.bordered += outcome.cut_at_border
        for label in outcome.label if isinstance(outcome.label, list) else [outcome.label]:
            name = str(label)
            if isinstance(label, (str, int, float)) and (name in self.labels or len(self.labels) < _LABELS):
                self.labels[name] = self.labels.get(name, 0) + 1

    def absorb(self, later: Report) -> None:
        """Count the rows that another report, of later rows of the file, has counted."""
        for name in ("rows", "used", "truncated", "split", "bordered", "copies"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        _count(self.unread, later.unread)
        _count(self.notes, later.notes)
        for kind, count in later.dropped.items():
            self.dropped[kind] = self.dropped.get(kind, 0) + count
            self.sentences[kind] = (self.sentences.get(kind, []) + later.sentences[kind])[:_SENTENCES]
        for label, count in later.labels.items():
            if label in self.labels or len(self.labels) < _LABELS:
                self.labels[label] = self.labels.get(label, 0) + count


def _count(counts: dict[str, int], more: dict[str, int]) -> None:
    """Add counts, of no more than so many different names."""
    for name, count in more.items():
        if name in counts or len(counts) < _LABELS:
            counts[name] = counts.get(name, 0) + count


def encoded(
    file: DataFile | HubData, format_name: str, encoder: Encoder, limit: int | None, begun: int = 0
) -> Iterator[tuple[pa.RecordBatch, Report]]:
    """The examples of the file's rows in order, and what became of the rows, some at a time, with a progress bar.

    Args:
        limit: rows to read, from the first on; None: all.
        begun: rows that are passed over, because they are encoded already.
    """
    mapping = columns_of(file, encoder.config)
    with watched(file, "tokenize") as mark:
        mark.rows = begun
        rows = itertools.islice(file.rows(mark), begun, limit)
        chunks = iter(lambda: [sources.renamed(row, mapping) for row in itertools.islice(rows, CHUNK_ROWS)], [])
        processes = _processes(encoder, mark.size if limit is None else 0)
        encode = functools.partial(_in_processes, processes=processes) if processes > 1 else _here
        for found in encode(chunks, encoder, file.name, format_name):
            mark.rows += found[1].rows
            yield found
        mark.done()


def _processes(encoder: Encoder, size: int) -> int:
    """How many processes encode the rows.

    Args:
        size: bytes that are read.
    """
    if encoder.augmenter is not None:  # it has a model, once
        return 1
    return encoder.config.processes or (usable_cores() if size >= _PARALLEL_BYTES else 1)


def encode_chunk(encoder: Encoder, rows: Sequence[Row], name: str, format_name: str) -> tuple[pa.RecordBatch, Report]:
    """The examples of some rows as lines of a table, and what became of the rows."""
    outcomes, report = encoder.encode(rows, name, format_name), Report(name, format_name)
    for outcome in outcomes:
        report.add(outcome)
    return _batch(rows, outcomes, encoder), report


def _here(
    chunks: Iterator[list[Row]], encoder: Encoder, name: str, format_name: str
) -> Iterator[tuple[pa.RecordBatch, Report]]:
    return (encode_chunk(encoder, rows, name, format_name) for rows in chunks)


def _in_processes(
    chunks: Iterator[list[Row]], encoder: Encoder, name: str, format_name: str, processes: int
) -> Iterator[tuple[pa.RecordBatch, Report]]:
    """The same by so many processes; results come in order, and the file is never read far ahead."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's and the tokenizer's locked threads
    setting = (type(encoder), encoder.config, encoder.task, encoder.tokenizer, encoder.vocab_size)
    with concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker, setting) as pool:
        waiting: collections.deque[concurrent.futures.Future[tuple[pa.RecordBatch, Report]]] = collections.deque()
        for rows in chunks:
            waiting.append(pool.submit(_encode_in_worker, rows, name, format_name))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


_encoder: Encoder | None = None  # of a worker process


def _start_worker(kind: type[Encoder], *setting: Any) -> None:
    global _encoder
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    children.end_with_parent(parent.pid)
    for signum in (
        signal.SIGINT,
        signal.SIGHUP,
    ):  # Ctrl-C and a closed terminal are for the process that started this one
        signal.signal(signum, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one worker for each core
    _encoder = kind(*setting)


def _encode_in_worker(rows: list[Row], name: str, format_name: str) -> tuple[pa.RecordBatch, Report]:
    assert _encoder is not None
    return encode_chunk(_encoder, rows, name, format_name)


def columns_of(file: DataFile | HubData, config: DataConfig) -> dict[str, str] | None:
    """Our column names to the file's, if they differ."""
    return config.columns if file.source.columns is None else file.source.columns


@contextlib.contextmanager
def watched(file: DataFile | HubData, title: str) -> Iterator[Percent]:
    """A progress bar over a file's rows, to be told of by whoever reads them."""
    size = max(1, file.path.stat().st_size) if isinstance(file, DataFile) else 1
    with console.steps(title, 100) as progress:
        yield Percent(progress, size)


class Percent:
    """Progress through a file, in percent of its bytes."""

    def __init__(self, progress: console.Steps, size: int):
        self.progress, self.size, self.rows = progress, size, 0

    def at(self, position: int) -> None:
        new = min(99, 100 * position // self.size) - self.progress.done
        if new > 0:
            self.progress.advance(new, rows=f"{self.rows:,}")

    def done(self) -> None:
        self.progress.advance(100 - self.progress.done, rows=f"{self.rows:,}")


def _batch(rows: Sequence[Row], outcomes: list[Outcome], encoder: Encoder) -> pa.RecordBatch:
    """The examples of some rows as lines of a table."""
    stratum, own = encoder.config.stratify, encoder.columns  # the column that goes along, and the task's own ones
    lines = [
        {
            "row": outcome.row,
            "digest": outcome.digest,
            "input_ids": example.input_ids,
            "spans": _spans(example.weights),
            "own_tokens": example.own_tokens,
            "own_items": example.own_items,
            "length": example.num_tokens,
            "longest": max(map(len, encoder.sequences(example))),
            "supervised": example.num_items,
            "origin": example.origin,
            "copy": example.copy,
            "stratum": None if stratum is None else str(row.values.get(stratum)),
            **{name: kept(example[name], kind) for name, kind in own.items()},
        }
        for row, outcome in zip(rows, outcomes, strict=True)
        for example in outcome.examples
    ]
    return pa.RecordBatch.from_pylist(lines, schema=schema_of(encoder))


def _spans(weights: np.ndarray) -> list[float]:
    """Runs of equal positive weight as a flat list of start, end, weight."""
    edges = np.flatnonzero(np.diff(weights, prepend=np.nan, append=np.nan))
    runs = [(start, end, weights[start]) for start, end in itertools.pairwise(edges) if weights[start] > 0]
    return [float(number) for run in runs for number in run]
