"""Where rows come from: local files of many kinds, one by one and row by row, and data sets on the hub.

Reading never holds a whole JSONL, CSV, text or Parquet file in memory. A line that cannot be read is a row with a
problem, so that it can be named, counted and, if the user says so, left out.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lora_lab.base.resolve import local_path
from lora_lab.config.data import Source
from lora_lab.config.run import RunConfig
from lora_lab.data.limits import MAX_ROW_CHARS, fault_of
from lora_lab.data.values import loads, twice
from lora_lab.errors import DataError, nearest
from lora_lab.runtime import console, storage
from lora_lab.runtime.reading import reading

HUB = "hub:"
KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".txt": "text", ".conll": "conll", ".bio": "conll", ".iob": "conll",
}  # fmt: skip
MAX_LINE_BYTES = 64 * 2**20  # a longer line is no row of text; refused before it fills the memory
NOT_UTF8 = "not valid UTF-8. Save the file as UTF-8."
_MAX_JSON_BYTES = 2**30  # a .json file is read whole
_MAX_GROUP_BYTES = 4 * 2**30  # of a Parquet file's parts
_BATCH_BYTES = 64 * 2**20  # of rows of Parquet that are read together
_MAX_RATIO, _RATIO_FROM_BYTES = (
    200,
    2**22,
)  # text compresses 3 to 20 times; far above that it is made to fill the machine
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# Files that hold rows in a way that is not read here, and the way out.
_OTHER_KINDS = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), "a spreadsheet. Save its sheet as CSV (UTF-8), and name that file."),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst"), "an archive. Unpack it, and name the file or folder inside."),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf", ".pdf", ".html", ".md"), "a document. Save its text as .txt (UTF-8), and name that file."),
    **dict.fromkeys((".arrow", ".feather"), "an Arrow file. Write it as Parquet (pandas: to_parquet), or name the data set as hub:owner/name."),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".npy", ".npz"), "not a file of texts. Write its rows as JSONL (pandas: to_json(orient='records', lines=True))."),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3", ".sql"), "a database. Export the table as CSV (UTF-8), and name that file."),
}  # fmt: skip
_UNREADABLE = (OSError, EOFError, zlib.error)
_SURROGATE = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8


@dataclasses.dataclass(frozen=True)
class Row:
    """One row as it stands in its file; `problem` says why it cannot be read."""

    number: int  # from 1; in files of lines, the line
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class DataFile:
    """One file of rows."""

    key: str  # data.train or data.eval, for messages
    path: Path
    kind: str  # a value of KINDS
    source: Source
    sample_by: str = "line"
    number: int = 0  # of the source, when there are several
    name: str = ""  # what messages call it
    field: str | None = None  # of a .json file: where the list of rows lies

    @property
    def zipped(self) -> bool:
        return self.path.suffix.lower() == ".gz"

    def digest(self) -> str:
        """SHA-256 of the file's bytes."""
        return storage.sha256(self.path)

    def rows(self, progress: Any = None) -> Iterator[Row]:
        """The rows in order; `progress.at(bytes)` is told how far into the file they are.

        Raises:
            DataError: the file as a whole cannot be read, or a line is too long to be a row.
        """
        try:
            with open(self.path, "rb") as raw:
                stream: Any = _Guarded(gzip.open(raw), raw, self) if self.zipped else raw
                for row in _READERS[self.kind](stream, self):
                    if progress is not None:
                        progress.at(raw.tell())
                    yield checked(row)
        except _UNREADABLE as error:
            reason = getattr(error, "strerror", None) or error
            hint = " Make the archive again: it is cut or damaged." if self.zipped else ""
            raise DataError(f"{self.key}={self.path}: cannot be read ({reason}).{hint}") from error


@dataclasses.dataclass(frozen=True)
class HubData:
    """A split of a data set on the hub."""

    key: str
    path: str  # owner/name[@revision]
    source: Source
    number: int = 0

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def _load(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        owner_name, _, revision = self.path.partition("@")
        try:
            return datasets.load_dataset(
                owner_name, self.source.subset, split=self.source.split, revision=revision or None
            )
        except Exception as error:  # the hub client raises many kinds
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"{self.key}=hub:{self.path}: the hub request failed ({type(error).__name__}: {reason}). Check owner/name, "
                "subset and split, your HF_TOKEN and the connection, or name a local file."
            ) from error

    def digest(self) -> str:
        return self._load()._fingerprint

    def rows(self, progress: Any = None) -> Iterator[Row]:
        with reading(f"{self.key}=hub:{self.path}", DataError):
            for number, values in enumerate(self._load(), start=1):
                yield checked(Row(number, values))


class _Guarded:
    """A decompressed stream that refuses to grow without end."""

    def __init__(self, stream: gzip.GzipFile, raw: IO[bytes], file: DataFile):
        self.stream, self.raw, self.file = stream, raw, file
        self.size = os.fstat(raw.fileno()).st_size
        self.produced = 0

    def _count(self, data: bytes) -> bytes:
        self.produced += len(data)
        if self.produced > _RATIO_FROM_BYTES and self.produced > _MAX_RATIO * self.size:
            raise DataError(
                f"{self.file.key}={self.file.path}: {self.size} bytes unpack to more than {self.produced}, over {_MAX_RATIO} "
                "times as much. That is no text; refused before it fills the machine."
            )
        return data

    def readline(self, limit: int = -1) -> bytes:
        return self._count(self.stream.readline(limit))

    def read(self, size: int = -1) -> bytes:
        if size >= 0:
            return self._count(self.stream.read(size))
        parts = []
        while part := self._count(self.stream.read(2**20)):
            parts.append(part)
        return b"".join(parts)


def find(
    key: str, names: str | list[str | Source], sample_by: str = "line", field: str | None = None
) -> list[DataFile | HubData]:
    """The files that a configuration key names, in order.

    Args:
        key: `data.train` or `data.eval`, for messages.
        sample_by: what a row of a text file is.
        field: where the list of rows lies in a .json file that is one object: keys with dots between them.

    Raises:
        DataError: something is missing, of an unknown kind, or cannot be read.
    """
    found: list[DataFile | HubData] = []
    for number, name in enumerate([names] if isinstance(names, str) else names):
        source = name if isinstance(name, Source) else Source(path=name)
        if source.path.startswith(HUB):
            found.append(HubData(key, source.path.removeprefix(HUB), source, number))
            continue
        if source.subset is not None:
            raise DataError(f"{key}: subset={source.subset} has no effect on {source.path}, which is not on the hub.")
        found += [
            DataFile(key, path, _kind(key, path, field), source, sample_by, number, field=field)
            for path in _paths(key, source.path)
        ]
    return [_named(file, found) for file in found]


def check_there(configs: Iterable[RunConfig]) -> None:
    """Refuse runs whose data files are missing or of an unknown kind; nothing is read, and the hub is not asked.

    Raises:
        DataError: see `find`.
    """
    asked = []
    for config in configs:
        for key, names in (("data.train", config.data.train), ("data.eval", config.data.eval)):
            if names is not None and (key, names) not in asked:
                asked.append((key, names))
                find(key, names, config.data.sample_by)


def _named(file: DataFile | HubData, others: list[DataFile | HubData]) -> DataFile | HubData:
    """The file with the shortest name that no other of them has."""
    if isinstance(file, HubData):
        return file
    parts = file.path.absolute().parts
    for count in range(1, len(parts)):
        name = "/".join(parts[-count:])
        if (
            sum(
                other.path.absolute().parts[-count:] == parts[-count:]
                for other in others
                if isinstance(other, DataFile)
            )
            == 1
        ):
            break
    return dataclasses.replace(file, name=name)


def _paths(key: str, name: str) -> list[Path]:
    if re.search(r"[*?\[]", name) and not Path(name).expanduser().exists():
        pattern = Path(name).expanduser()
        folder = Path(pattern.anchor) if pattern.is_absolute() else Path()
        paths = sorted(p for p in folder.glob(str(pattern.relative_to(pattern.anchor))) if p.is_file())
        paths = _without_hidden(key, name, paths, set(pattern.parts))
        if not paths:
            raise DataError(f"{key}={name}: no file matches (looked from {Path.cwd()}).")
        return paths
    path = local_path(name, key, DataError)
    if not path.is_dir():
        return [path]
    every = sorted(p for p in path.rglob("*") if p.is_file())
    paths = _without_hidden(key, name, [p for p in every if _suffix(p) in KINDS], set(path.parts))
    if not paths:
        other = next((f" {p.name} is {_OTHER_KINDS[_suffix(p)]}" for p in every if _suffix(p) in _OTHER_KINDS), "")
        raise DataError(f"{key}={name}: the folder holds no data file. Known are {', '.join(KINDS)} (also .gz).{other}")
    return paths


def _without_hidden(key: str, name: str, paths: list[Path], named: set[str]) -> list[Path]:
    """The paths without hidden files and folders: what editors, notebooks and other systems leave beside the data.

    Args:
        named: parts of paths that the user named, hidden or not.
    """
    kept: list[Path] = []
    hidden: list[Path] = []
    for path in paths:
        marks = [part for part in path.parts if part not in named and part.startswith((".", "~$", "__MACOSX"))]
        (hidden if marks else kept).append(path)
    if hidden:
        more = f" and {len(hidden) - 1} more" if len(hidden) > 1 else ""
        console.say("data", f"{key}={name}: hidden files are left out ({hidden[0]}{more})")
    return kept


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _kind(key: str, path: Path, field: str | None) -> str:
    kind = KINDS.get(_suffix(path))
    if path.suffix.lower() == ".gz" and kind == "parquet":
        kind = None  # compressed inside already
    if kind is None or not path.is_file() or not os.access(path, os.R_OK):
        other = _OTHER_KINDS.get(path.suffix.lower()) or _OTHER_KINDS.get(_suffix(path))
        what = f" It is {other}" if other else ""
        raise DataError(
            f"{key}={path}: not a data file that can be read.{what} Use one of {', '.join(KINDS)} (also .gz)."
        )
    if not path.stat().st_size:
        raise DataError(f"{key}={path}: the file is empty. Name a file with at least one row.")
    return "jsonl" if kind == "json" and field is None and _holds_lines(path) else kind


def _holds_lines(path: Path) -> bool:
    """Whether a .json file holds one object a line, whatever its name says."""
    with (
        gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as stream,
        contextlib.suppress(*_UNREADABLE),
    ):
        line = b""
        while not line and (read := stream.readline(MAX_LINE_BYTES)):
            line = read.removeprefix(b"\xef\xbb\xbf").strip()
        if not line.startswith(b"{"):
            return False
        # A first line that is no whole object is broken, and others follow, or the object goes on in the next lines.
        return _is_object(line) or _is_object(stream.readline(MAX_LINE_BYTES))
    return False


def _is_object(line: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(line), dict)
    return False


# -- readers: stream -> rows --------------------------------------------------------------------------------------------


def _lines(stream: IO[bytes], file: DataFile) -> Iterator[tuple[int, str, str | None]]:
    """(number, text, problem) of every line; a byte order mark and line ends are dropped."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{file.key}={file.path}: line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB, so it is no row of text. "
                "Write one row a line."
            )
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, line.decode("utf-8").rstrip("\r\n"), None
        except UnicodeDecodeError:
            yield number, "", NOT_UTF8


def checked(row: Row) -> Row:
    """The row, or the same row with what keeps it from being text: half characters, too much of it, nested too deep."""
    if row.problem is not None:
        return row
    problem = fault_of(row.values)
    return row if problem is None else Row(row.number, {}, problem)


def parse_json_line(text: str) -> tuple[dict[str, Any], str | None]:
    """The object that one line holds, and what is wrong with it."""
    try:
        values = loads(text)
    except (ValueError, RecursionError) as error:
        if "is there twice" in str(error):
            return {}, f"{error}."
        return {}, f"not valid JSON ({error}). Every line must be one JSON object."
    if not isinstance(values, dict):
        return {}, 'not a JSON object. Every line must be one, such as {"prompt": ...}.'
    return values, None


def _read_jsonl(stream: IO[bytes], file: DataFile) -> Iterator[Row]:
    for number, text, problem in _lines(stream, file):
        if problem is None and not text.strip():
            continue
        values, fault = ({}, problem) if problem else parse_json_line(text)
        yield Row(number, values, fault)


def _read_json(stream: IO[bytes], file: DataFile) -> Iterator[Row]:
    if file.path.stat().st_size > _MAX_JSON_BYTES:
        raise DataError(
            f"{file.key}={file.path}: a .json file above 1 GiB. Write one object a line into a .jsonl file."
        )
    content = stream.read(_MAX_JSON_BYTES + 1)
    if len(content) > _MAX_JSON_BYTES:
        raise DataError(
            f"{file.key}={file.path}: unpacks to more than 1 GiB. Write one object a line into a .jsonl file."
        )
    try:
        content = loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = str(error) if "is there twice" in str(error) else f"not valid JSON ({error})"
        raise DataError(f"{file.key}={file.path}: {reason}.") from error
    for number, values in enumerate(_list_in(content, file), start=1):
        wrong = None if isinstance(values, dict) else f"not an object but {type(values).__name__}."
        yield Row(number, values if wrong is None else {}, wrong)


def _list_in(content: Any, file: DataFile) -> list[Any]:
    """The list of rows of a .json file: the whole, or what lies at `data.field`.

    Raises:
        DataError: there is none; lists that could be meant are named.
    """
    rows, place = content, f"{file.key}={file.path}"
    for part in file.field.split(".") if file.field else ():
        if not isinstance(rows, dict) or part not in rows:
            there = (
                f"the keys {', '.join(map(str, list(rows)[:10]))}" if isinstance(rows, dict) else type(rows).__name__
            )
            hint = nearest(part, rows) if isinstance(rows, dict) else " Drop data.field." if rows is content else ""
            raise DataError(f"{place}: data.field={file.field}: no '{part}'. There is {there}.{hint}")
        rows = rows[part]
    if not isinstance(rows, list):
        raise DataError(f"{place}: must hold a list of objects, or one object a line.{_inside(rows, file.field)}")
    return _questions(rows)


def _inside(value: Any, field: str | None) -> str:
    """What an object holds instead of being a list of rows, and how to name it."""
    if not isinstance(value, dict):
        return f" It holds {type(value).__name__}."
    lists = list(_lists_of_objects(value))
    if lists:
        options = " or ".join(f"data.field={f'{field}.' if field else ''}{key}" for key in lists[:5])
        return f" It is one object, and its rows may be in {' or '.join(map(repr, lists[:5]))}: {options}."
    return (
        f" It is one object with the keys {', '.join(list(value)[:10])}. Write one object for each row "
        "(pandas: to_json(orient='records', lines=True))."
    )


def _lists_of_objects(value: dict[str, Any], depth: int = 3) -> Iterator[str]:
    """Where lists of objects lie in an object, as `data.field` names them; no deeper than so many objects."""
    for key, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], dict):
            yield str(key)
        elif isinstance(item, dict) and depth > 1:
            yield from (f"{key}.{inner}" for inner in _lists_of_objects(item, depth - 1))


def lists_in(file: DataFile | HubData, rows: list[Row]) -> str:
    """For a .json file of one line: where its rows may be, if the line holds lists of objects; else nothing."""
    if not isinstance(file, DataFile) or _suffix(file.path) != ".json" or len(rows) != 1 or file.field is not None:
        return ""
    return _inside(rows[0].values, None) if "data.field=" in _inside(rows[0].values, None) else ""


def _questions(rows: list[Any]) -> list[Any]:
    """The questions of SQuAD's own file, whose rows are articles of paragraphs; other rows as they are."""
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("paragraphs"), list) for row in rows):
        return rows
    paragraphs = [part for row in rows for part in row["paragraphs"]]
    if not all(
        isinstance(part, dict) and "context" in part and isinstance(part.get("qas"), list) for part in paragraphs
    ):
        return rows
    return [
        {**asked, "context": part["context"]} if isinstance(asked, dict) else asked
        for part in paragraphs
        for asked in part["qas"]
    ]


def _read_csv(stream: IO[bytes], file: DataFile) -> Iterator[Row]:
    """Every value is text, as it stands in the file."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = _CsvLines(stream, file)
    first = next(iter(lines), "")
    separator, declared = _separator(first, file.kind)
    reader = csv.reader(lines if declared else itertools.chain([first], lines), delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(header, file)
        for fields in reader:
            number, lines.taken = reader.line_num + declared, 0
            if not fields:
                continue
            if any(map(_SURROGATE.search, fields)):
                yield Row(number, {}, NOT_UTF8)
            elif len(fields) != len(header):
                yield Row(
                    number, {}, f"{len(fields)} fields where the header has {len(header)}. Quote commas and line ends."
                )
            else:
                yield Row(number, dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise DataError(
            f"{file.key}={file.path}: line {reader.line_num}: {error}. Quote fields as CSV does."
        ) from error


def _separator(first: str, kind: str) -> tuple[str, bool]:
    """What parts the columns of a CSV file, and whether its first line says nothing else (Excel's `sep=;`)."""
    declared = re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE)
    if declared:
        return declared.group(1), True
    usual = "\t" if kind == "tsv" else ","
    counts = {mark: _columns(first, mark) for mark in _SEPARATORS}
    most = max(counts, key=counts.__getitem__)
    return (most if counts[usual] == 1 < counts[most] else usual), False


def _columns(header: str, separator: str) -> int:
    try:
        return len(next(csv.reader([header], delimiter=separator), []))
    except csv.Error:
        return 1


def separator_of(file: DataFile | HubData) -> str | None:
    """What parts the columns of a CSV or TSV file, in words, if it is not what its name says.

    Raises:
        DataError: the file cannot be read.
    """
    if not isinstance(file, DataFile) or file.kind not in ("csv", "tsv"):
        return None
    with contextlib.suppress(*_UNREADABLE), gzip.open(file.path) if file.zipped else open(file.path, "rb") as stream:
        found, _ = _separator(next(iter(_CsvLines(stream, file)), ""), file.kind)
        return None if found == ("\t" if file.kind == "tsv" else ",") else _SEPARATORS.get(found, repr(found))
    return None  # told when its rows are read


def _check_header(header: list[str], file: DataFile) -> None:
    """Refuse a header that is no text, or names two columns alike: the last would win.

    Raises:
        DataError: as said.
    """
    if any(map(_SURROGATE.search, header)):
        raise DataError(f"{file.key}={file.path}: line 1: {NOT_UTF8}")
    named = [name for name in header if name]  # an index without a name may come up more than once
    if len(set(named)) < len(named):
        raise DataError(f"{file.key}={file.path}: line 1: {twice(header, 'column')}.")


class _CsvLines:
    """The lines of a CSV file; a row may have many, but not without end."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, file: DataFile):
        self.stream, self.file = stream, file
        self.taken = 0  # bytes since the last row
        self.first = True

    def __iter__(self) -> Iterator[str]:
        while line := self.stream.readline(MAX_LINE_BYTES + 1):
            self.taken += len(line)
            if self.taken > MAX_LINE_BYTES:
                raise DataError(
                    f"{self.file.key}={self.file.path}: a row is longer than {MAX_LINE_BYTES // 2**20} MiB, so it is no row of text. "
                    "Is a quote not closed?"
                )
            if self.first:
                line, self.first = line.removeprefix(b"\xef\xbb\xbf"), False
            yield line.decode("utf-8", errors="surrogateescape")


def _read_parquet(stream: IO[bytes], file: DataFile) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        columns = table.schema_arrow.names
        if len(set(columns)) < len(columns):
            raise DataError(f"{file.key}={file.path}: {twice(columns, 'column')}.")
        for batch in table.iter_batches(batch_size=_parquet_rows(table, file)):
            for values in _of_batch(batch):
                number += 1
                yield Row(number, {}, NOT_UTF8) if values is None else Row(number, _without_nulls(values))
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{file.key}={file.path}: not a Parquet file that can be read ({reason}).") from error


def _parquet_rows(table: Any, file: DataFile) -> int:
    """How many rows of a Parquet file are read together.

    Raises:
        DataError: it can only be read in parts that are too large.
    """
    largest = 0
    for index in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(index)
        if group.total_byte_size > _MAX_GROUP_BYTES:
            raise DataError(
                f"{file.key}={file.path}: row group {index + 1} holds {group.total_byte_size / 2**30:.1f} GiB, above "
                f"{_MAX_GROUP_BYTES // 2**30}, and is read at once. Write smaller row groups."
            )
        largest = max(largest, group.total_byte_size // max(1, group.num_rows))
    return max(1, min(1024, _BATCH_BYTES // max(1, largest)))


def _of_batch(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch; None for one whose bytes are not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                [values] = batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError:
                values = None
            yield values


def _without_nulls(value: Any) -> Any:
    """Arrow fills every struct of a column with all keys that any row has; a key without a value was not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _read_text(stream: IO[bytes], file: DataFile) -> Iterator[Row]:
    """Lines, paragraphs (parted by blank lines) or the whole file, without those that hold no text."""
    part: list[str] = []
    first, size = 1, 0
    for number, text, problem in _lines(stream, file):
        size = size + len(text) if part else len(text)
        if size > MAX_LINE_BYTES:
            raise DataError(
                f"{file.key}={file.path}: what starts in line {first} is longer than {MAX_LINE_BYTES // 2**20} MiB. Set "
                "data.sample_by=paragraph or line, or split the file."
            )
        if problem:
            yield Row(number, {}, problem)
            continue
        if file.sample_by == "line" or (file.sample_by == "paragraph" and not text.strip()):
            part += [text] if file.sample_by == "line" else []
            if "\n".join(part).strip():
                yield Row(first if part and file.sample_by == "paragraph" else number, {"text": "\n".join(part)})
            part = []
            continue
        first = number if not part else first
        part.append(text)
    if "\n".join(part).strip():
        yield Row(first, {"text": "\n".join(part)})


def _read_conll(stream: IO[bytes], file: DataFile) -> Iterator[Row]:
    """Sentences of `token ... tag` lines, parted by blank lines: the first and the last column count."""
    tokens: list[str] = []
    tags: list[str] = []
    first, fault = 1, None
    for number, text, problem in _lines(stream, file):
        fields = text.split("\t" if "\t" in text else None)
        if not text.strip() or text.startswith("-DOCSTART-"):
            if tokens or fault:
                yield Row(first, {"tokens": tokens, "tags": tags}, fault)
            tokens, tags, fault = [], [], None
            continue
        first = number if not tokens else first
        if len(tokens) > MAX_ROW_CHARS:
            raise DataError(
                f"{file.key}={file.path}: the sentence of line {first} does not end. Separate sentences by blank lines."
            )
        if problem or len(fields) < 2:
            fault = (
                fault or f"line {number}: {problem or 'no tag behind the token. Write token and tag in two columns.'}"
            )
            continue
        tokens.append(fields[0])
        tags.append(fields[-1])
    if tokens or fault:
        yield Row(first, {"tokens": tokens, "tags": tags}, fault)


_READERS = {
    "jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "tsv": _read_csv, "parquet": _read_parquet,
    "text": _read_text, "conll": _read_conll,
}  # fmt: skip


def renamed(row: Row, columns: dict[str, str] | None) -> Row:
    """The row with the user's column names replaced by ours (`data.columns`: ours to theirs)."""
    if not columns or row.problem:
        return row
    missing = [theirs for theirs in columns.values() if theirs not in row.values]
    if missing:
        return Row(row.number, {}, f"column '{missing[0]}' is missing. The row has {', '.join(row.values) or 'none'}.")
    kept = {name: value for name, value in row.values.items() if name not in columns.values()}
    return Row(row.number, {**kept, **{ours: row.values[theirs] for ours, theirs in columns.items()}})
