"""`lora-lab predict`: what a trained run says of each row of a file, beside the row."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lab.data import sources
from lora_lab.data.formats import RowError
from lora_lab.data.sources import DataFile, HubData, Row
from lora_lab.errors import ConfigError, DataError, Interrupted, RunError
from lora_lab.report.evaluation_report import PREFIX
from lora_lab.run import takes
from lora_lab.run.answering import Answering, asked, ready
from lora_lab.run.run_dir import RunDir
from lora_lab.run.trained import open_trained
from lora_lab.runtime import console, signals, storage

_ERROR = f"{PREFIX}error"
_KEY = "data"
_ROWS = 64  # that are said together; so many are said again after a kill
_FOLDER = "predictions"  # of a run, for those that are not told where to go


def predict_texts(path: str, overrides: Sequence[str], texts: Sequence[str]) -> None:
    """Print what a trained run says of texts, each as a line of JSON.

    Raises:
        DataError: a text that cannot be used.
    """
    run, config = open_trained(path, takes.PREDICT, overrides)
    trained = ready(run, config)
    rows = [Row(number, {"text": text}) for number, text in enumerate(texts, start=1)]
    for row in rows:
        with _named(row):
            asked(trained.setup, row, "text")
    model = Answering(trained.loaded())
    try:
        for found in model.outcomes(rows, "text"):
            if isinstance(found, DataError):
                raise found
            console.stream(json.dumps(found, ensure_ascii=False), "\n")
    finally:
        model.close()


@contextlib.contextmanager
def _named(row: Row) -> Iterator[None]:
    try:
        yield
    except RowError as error:
        raise DataError(f"text {row.number}: {error}") from error


def predict_file(path: str, overrides: Sequence[str], name: str, out: str | None) -> int:
    """Write what a trained run says of each row of a file, beside the row's own columns; goes on where it was stopped.

    Args:
        name: of a file, a folder, a pattern or a data set on the hub, as `data.train` takes it.
        out: where to: .jsonl, .csv or .parquet; None: in the run's folder.

    Returns:
        How many rows could not be used; their sentences are in the column `predicted_error`.

    Raises:
        ConfigError: `out` is there, or of no kind that is written.
        DataError: the file cannot be read, its columns are not those that the task reads, or nothing is to be said.
    """
    run, config = open_trained(path, takes.PREDICT, overrides)
    files = sources.find(_KEY, name, config.data.sample_by, config.data.field)
    place = _place(run, files[0], out)
    total, first = _looked_through(files)
    trained = ready(run, config)
    with contextlib.suppress(RowError):  # this row alone: it is told in its place
        asked(trained.setup, first, files[0].name)
    made_of = {
        "data": [file.digest() for file in files], "run": storage.sha256(run.adapter / storage.MANIFEST), "told": sorted(overrides)
    }  # fmt: skip
    with _begun(place, made_of) as part:
        if part.done:
            console.say("predict", f"goes on behind row {part.done:,} of {total:,}, where it was stopped")
        model = Answering(trained.loaded())
        try:
            with console.steps("predict", total, part.done) as progress:
                for name, rows in _blocks(files, part.done):
                    part.add([_with(row, found) for row, found in zip(rows, model.outcomes(rows, name), strict=True)])
                    progress.advance(len(rows))
        except Interrupted:
            console.say("predict", f"{part.done:,} of {total:,} rows are kept; the same command goes on behind them")
            raise
        finally:
            model.close()
        _WRITERS[place.suffix](part, place)
        part.remove()
    console.say("written", place)
    if part.failed:
        console.say("failed", f"{part.failed:,} of {total:,} rows could not be used: see the column {_ERROR}")
    return part.failed


def _place(run: RunDir, file: DataFile | HubData, out: str | None) -> Path:
    """Where the rows go.

    Raises:
        ConfigError: it is there already, or of no kind that is written.
    """
    place = Path(out) if out is not None else run.path / _FOLDER / f"{Path(file.name).name.partition('.')[0]}.jsonl"
    if place.suffix not in _WRITERS:
        raise ConfigError(f"out={place}: must end in {', '.join(_WRITERS)}.")
    if os.path.lexists(place):
        raise ConfigError(f"out={place}: exists. Choose another name, or remove it.")
    if not place.parent.is_dir() and out is not None:
        raise ConfigError(f"out={place}: there is no folder {place.parent}. Make it first.")
    return place


def _looked_through(files: Sequence[DataFile | HubData]) -> tuple[int, Row]:
    """How many rows there are, and the first that can be read.

    Raises:
        DataError: a file cannot be read, there are no rows, or they have been predicted already.
    """
    total, first = 0, None
    for file in files:
        for row in file.rows():
            total += 1
            first = row if first is None and row.problem is None else first
    if first is None:
        raise DataError(f"{_KEY}={files[0].path}: {f'none of {total} rows can be read' if total else 'no rows'}.")
    taken = [column for column in first.values if column.startswith(PREFIX)]
    if taken:
        raise DataError(f"{_KEY}={files[0].path}: has the column {taken[0]} already. Predict of the original rows.")
    return total, first


def _blocks(files: Sequence[DataFile | HubData], done: int) -> Iterator[tuple[str, list[Row]]]:
    """The rows behind the first `done` ones, some of a file at a time, with its name."""
    for file in files:
        rows = file.rows()
        done -= sum(1 for _ in itertools.islice(rows, done))
        while block := list(itertools.islice(rows, _ROWS)):
            yield file.name, block


def _with(row: Row, found: dict[str, Any] | DataError) -> dict[str, Any]:
    said = {"error": str(found)} if isinstance(found, DataError) else found
    return row.values | {f"{PREFIX}{name}": value for name, value in said.items()}


# -- what is kept until all is said -----------------------------------------------------------------------------------


class _Part:
    """Rows so far, a line of JSON each, in a file beside the output, behind a line that says what they are made of."""

    def __init__(self, path: Path, descriptor: int):
        self._path, self._descriptor = path, descriptor
        self.done = self.failed = 0

    def begin(self, made_of: dict[str, Any]) -> None:
        """Take up what is there, or begin.

        Raises:
            ConfigError: it was made of something else.
        """
        whole = 0  # bytes up to the end of the last whole line
        with open(self._path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                if number == 0 and line != _line(made_of):
                    raise ConfigError(
                        f"{self._path}: begun with other rows, another adapter or other overrides. To begin anew, remove it."
                    )
                self._count(line, number)
                whole += len(line)
        os.ftruncate(self._descriptor, whole)
        if not whole:
            storage.append_whole(self._descriptor, _line(made_of))

    def _count(self, line: bytes, number: int) -> None:
        if number:
            self.done += 1
            self.failed += _ERROR in json.loads(line)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep more rows.

        Raises:
            RunError: they cannot be written.
        """
        try:
            with signals.deferred():
                storage.append_whole(self._descriptor, b"".join(map(_line, rows)))
                self.done += len(rows)
                self.failed += sum(_ERROR in row for row in rows)
        except OSError as error:
            raise storage.cannot_be_written(self._path, error) from error

    def lines(self) -> Iterator[bytes]:
        """All rows, as they are kept."""
        with open(self._path, "rb") as file:
            yield from itertools.islice(file, 1, None)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows."""
        return map(json.loads, self.lines())

    def columns(self) -> list[str]:
        """Names of the columns of all rows: the rows' own, then those that were added."""
        names = dict.fromkeys(name for row in self.rows() for name in row)
        return sorted(names, key=lambda name: name.startswith(PREFIX))

    def remove(self) -> None:
        """It is not needed any more."""
        os.unlink(self._path)


def new_jsonl(out: str) -> Path:
    """Where rows go.

    Raises:
        ConfigError: it is there already, no .jsonl, or in no folder.
    """
    place = Path(out)
    if place.suffix != ".jsonl":
        raise ConfigError(f"out={place}: must end in .jsonl.")
    if os.path.lexists(place):
        raise ConfigError(f"out={place}: exists. Choose another name, or remove it.")
    if not place.parent.is_dir():
        raise ConfigError(f"out={place}: there is no folder {place.parent}. Make it first.")
    return place


def write_rows(place: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows that are all there, a line of JSON each, in the place of what was there.

    Raises:
        RunError: they cannot be written.
    """
    _write_lines(place, map(_line, rows))


def _write_lines(place: Path, lines: Iterable[bytes]) -> None:
    with storage.new_file(place) as file:
        file.writelines(lines)


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace")


@contextlib.contextmanager
def _begun(place: Path, made_of: dict[str, Any]) -> Iterator[_Part]:
    """The part of a file that is to be written, held against other processes."""
    path = place.with_name(f"{place.name}.part")
    try:
        storage.make_folders(path.parent)
        descriptor = storage.open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        raise storage.cannot_be_written(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part = _Part(path, descriptor)
        part.begin(made_of)
        yield part
    except BlockingIOError as error:
        raise RunError(f"{path}: another lora-lab process is writing it. Wait for it or stop it.") from error
    finally:
        os.close(descriptor)


# -- what is written --------------------------------------------------------------------------------------------------


def _write_jsonl(part: _Part, place: Path) -> None:
    _write_lines(place, part.lines())


def _write_csv(part: _Part, place: Path) -> None:
    """What is neither text nor a number is JSON in its cell."""
    columns = part.columns()
    with storage.new_file(place) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows([_cell(row.get(column)) for column in columns] for row in part.rows())
        text.detach()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list, bool)) else value


def _write_parquet(part: _Part, place: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    columns = part.columns()
    try:
        table = pa.table({column: [row.get(column) for row in part.rows()] for column in columns})
    except pa.ArrowException as error:
        raise DataError(
            f"out={place}: a column holds values of several kinds ({error}). Say the same with out={place.with_suffix('.jsonl')}, and move "
            f"{place.name}.part to {place.with_suffix('.jsonl').name}.part to keep what is done."
        ) from error
    with storage.new_file(place) as file:
        pyarrow.parquet.write_table(table, file)


_WRITERS: dict[str, Callable[[_Part, Path], None]] = {
    ".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet
}  # fmt: skip
