"""What a person sees: tables and a progress bar in a terminal, plain lines when piped.

Text of rows, labels, file names, templates and models may hold anything. All of it passes `shown` here, so that none of it can
move the cursor, set a clipboard or hide itself; what the terminal's encoding lacks is written in its place; and a full disk or a
closed pipe behind stdout ends nothing but the output.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lora_lab.errors import Interrupted, LoraLabError
from lora_lab.runtime import storage

_PIPED_WIDTH = 160  # for tables; lines of text keep their length
_LINE_SECONDS = 10  # between lines of progress where no bar can be drawn
_TEXT_COLUMN = 30  # letters that a column of texts takes at least
_BAR_WIDTH = 120  # of a terminal that has room for a bar beside its numbers

# Characters that a terminal obeys instead of showing them (C0 but newline and tab, C1), that reorder or hide their neighbours
# (bidi marks, embeddings, overrides and isolates, tags), that end a line unseen, and halves of characters, which no file can hold.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)
_PLAIN = dict(
    zip("█▏⟦⟧─→⏎…–⚠", ("#", "|", "[", "]", "-", "->", "|", "...", "-", "!"), strict=True)
)  # our own signs in ASCII


def shown(text: object) -> str:
    """Text that is safe in a terminal, a log and a page: what would act instead of being seen is written out, such as `\\x1b`.

    Newlines and tabs stay.
    """
    return _UNSAFE.sub(_escaped, str(text))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """A codec's way with characters that an encoding lacks."""
    assert isinstance(error, UnicodeEncodeError)
    found = error.object[error.start : error.end]
    return "".join(
        _PLAIN.get(one) or one.encode("ascii", "backslashreplace").decode("ascii") for one in found
    ), error.end


codecs.register_error("lora_lab", _replaced)


def _encodable(text: str, encoding: str | None) -> str:
    """The text in what an encoding has."""
    return text.encode(encoding or "utf-8", "lora_lab").decode(encoding or "utf-8")


class Stream:
    """stdout or stderr as it is at the moment. What cannot be written any more (full disk, closed pipe) is dropped: output is not
    what a run is for, and `log.txt` has it too."""

    def __init__(self, name: str):
        self.name = name  # of sys's attribute
        self.lost: OSError | None = None  # why nothing more was written

    @property
    def _file(self) -> TextIO | None:
        file = getattr(sys, self.name)
        return getattr(file, "rich_proxied_file", file)  # a progress bar puts itself before it

    @property
    def encoding(self) -> str:
        return getattr(self._file, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._file is not None and self._file.isatty()

    def fileno(self) -> int:
        if self._file is None:
            raise OSError("there is no such stream")
        return self._file.fileno()

    def write(self, text: str) -> int:
        if self._file is not None:  # the process was started without it otherwise
            with self._kept():
                self._file.write(_encodable(text, self.encoding))
        return len(text)

    def flush(self) -> None:
        if self._file is not None:
            with self._kept():
                self._file.flush()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = error
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        """Let what is buffered, and what other libraries print, go where it fits; else Python fails once more when it ends."""
        try:
            descriptor = self.fileno()
        except (OSError, ValueError):  # not a file of the system
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


class Console(rich.console.Console):
    """rich's console, through which no text can steer the terminal."""

    def __init__(self, **options: Any):
        super().__init__(**{"highlight": False, "soft_wrap": True, "emoji": False, **options})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's; the last gate for texts that did not pass `shown` before."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else shown(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


stdout, stderr = Stream("stdout"), Stream("stderr")
out = Console(file=stdout, width=None if stdout.isatty() else _PIPED_WIDTH)
_log: list[Console] = []  # the run's log.txt, while a run is open


@contextlib.contextmanager
def logged_to(file: Path) -> Iterator[None]:
    """Inside the block, everything that is said and shown goes into a file as well (progress bars as lines).

    Raises:
        RunError: the file cannot be opened, or is no regular file. Later on, a log that no disk takes is told of and left out.
    """
    try:
        descriptor = storage.open_own(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    except OSError as error:
        raise storage.cannot_be_written(file, error) from error
    _log.append(Console(file=_LogFile(file, descriptor), width=_PIPED_WIDTH, highlight=False, soft_wrap=True))
    try:
        yield
    except (LoraLabError, Interrupted) as error:
        _say(_log[-1], "stopped", error)
        raise
    finally:
        _log.pop()
        os.close(descriptor)


class _LogFile(io.TextIOBase):
    """A log without a buffer. It must not end a run: when the disk is full, that is said once and the log ends."""

    def __init__(self, file: Path, descriptor: int):
        self.file, self.descriptor, self.ended = file, descriptor, False

    def write(self, text: str) -> int:
        if self.ended:
            return len(text)
        try:
            storage.write_all(self.descriptor, text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            self.ended = True
            _say(out, "log", f"{self.file}: cannot be written ({error.strerror}); the log ends here, the run continues")
        return len(text)


def say(topic: str, text: object) -> None:
    """One line about what was decided or done: a topic of at most 9 letters and a sentence."""
    for console in (out, *_log):
        _say(console, topic, text)


def _say(console: Console, topic: str, text: object) -> None:
    console.print(f"{shown(topic):>9}", style="bold cyan", markup=False, end="")
    console.print(f"  {shown(text)}", markup=False)


def complain(text: object) -> None:
    """A line on stderr: an error, in plain text."""
    stderr.write(f"{shown(text)}\n")
    stderr.flush()


def stream(text: str, end: str = "") -> None:
    """A piece of a text that grows, such as a model's answer; not for the log."""
    stdout.write(shown(text) + end)
    stdout.flush()


def setting(key: str, value: str, note: str) -> None:
    """One `key=value` line, ready to be copied as an override, with a note behind it."""
    out.print(shown(key), style="bold", markup=False, end="")
    out.print(f"={shown(value):<{max(0, 44 - len(key))}}", markup=False, end="")
    out.print(f"  # {shown(note)}", style="dim", markup=False)


def show_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    numbers: slice = slice(1, None),
    spare: Sequence[str] = (),
) -> None:
    """Print a table under a line of text.

    Args:
        numbers: the columns that are aligned right.
        spare: columns that are left out, one after the other, where the terminal has no room for all.
    """
    for console in (out, *_log):
        _print_table(console, title, header, rows, numbers, spare)


def show_texts(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of texts; where its columns would be too narrow to read, each row's texts one below the other."""
    for console in (out, *_log):
        if console.width >= _TEXT_COLUMN * len(header):
            _print_table(console, title, header, rows, slice(0, 0))
            continue
        console.print(shown(title), style="bold", markup=False)
        for row in rows:
            grid = Table.grid("name", "text", padding=(0, 2))
            for name, text in zip(header, row, strict=True):
                grid.add_row(Text(f"{shown(name):>9}", style="cyan"), _cell(text, console.encoding))
            console.print(grid, soft_wrap=False)
            console.print()


def _print_table(
    console: Console,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    numbers: slice,
    spare: Sequence[str] = (),
) -> None:
    right = range(len(header))[numbers]
    # For each console, because widths depend on what its encoding has
    cells = [[_cell(value, console.encoding) for value in row] for row in (header, *rows)]
    widths = [3 + max(row[place].cell_len for row in cells) for place in range(len(header))]
    places, left_out = list(range(len(header))), list[str]()
    for name in spare:
        if 1 + sum(widths[place] for place in places) > console.width:
            left_out.append(name)
            places.remove(header.index(name))
    table = Table()
    for place in places:
        table.add_column(cells[0][place], justify="right" if place in right else "left", overflow="fold")
    for row in cells[1:]:
        table.add_row(*(row[place] for place in places))
    console.print(shown(title), style="bold", markup=False)
    console.print(table, soft_wrap=False)
    if left_out:
        console.print(f"no room for: {', '.join(left_out)}", style="dim", markup=False)


def _cell(value: Any, encoding: str) -> Text:
    if isinstance(value, float):
        return Text(f"{value:.4g}" if abs(value) < 1e-3 and value else f"{value:.4f}")
    return Text("" if value is None else _encodable(shown(value), encoding))


class Steps:
    """Progress over a known number of steps; `advance(**fields)` shows the newest values."""

    def __init__(self, progress: Progress | None, title: str, total: int, done: int):
        self.progress, self.title, self.total, self.done = progress, title, total, done
        self.task = progress.add_task(shown(title), total=total, completed=done, values="") if progress else None
        self.last_line = time.monotonic()

    def advance(self, count: int = 1, /, **fields: str) -> None:
        """So many more steps are done."""
        self.done += count
        text = shown("  ".join(f"{name} {value}" for name, value in fields.items()))
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=self.done, values=text)
        if self.done == self.total or time.monotonic() - self.last_line > _LINE_SECONDS:
            self.last_line = time.monotonic()
            for console in _log if self.progress is not None else (out, *_log):
                _say(console, self.title, f"{self.done}/{self.total}  {text}")


@contextlib.contextmanager
def steps(title: str, total: int, done: int = 0) -> Iterator[Steps]:
    """A progress bar with time left in a terminal; a line now and then when piped."""
    if not out.is_terminal:
        yield Steps(None, title, total, done)
        return
    bar = [BarColumn(bar_width=24)] if out.width >= _BAR_WIDTH else []  # numbers say more, and they are cut otherwise
    columns: list[ProgressColumn] = [
        TextColumn("{task.description:>9} ", style="bold cyan", markup=False), *bar, MofNCompleteColumn(),
        TextColumn("{task.fields[values]}", markup=False), *([TimeElapsedColumn()] if bar else []), TimeRemainingColumn(), TextColumn("left"),
    ]  # fmt: skip
    with Progress(*columns, console=out, transient=False) as progress:
        yield Steps(progress, title, total, done)


def metrics_table(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    """Metrics side by side, one column for each model."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    show_table(title, ["", *columns], [[name, *(metrics.get(name) for metrics in columns.values())] for name in names])
