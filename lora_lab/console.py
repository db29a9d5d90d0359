"""What a person sees: tables and a progress bar in a terminal, plain lines when piped."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lora_lab import storage
from lora_lab.errors import Interrupted, LoraLabError

_PIPED_WIDTH = 160  # for tables; lines of text keep their length
_LINE_SECONDS = 10  # between lines of progress where no bar can be drawn

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
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
            _say(out, "log", f"{self.file}: cannot be written ({error.strerror}); the log ends here, the run goes on")
        return len(text)


def say(topic: str, text: object) -> None:
    """One line about what was decided or done: a topic of at most 9 letters and a sentence."""
    for console in (out, *_log):
        _say(console, topic, text)


def _say(console: Console, topic: str, text: object) -> None:
    console.print(f"[bold cyan]{topic:>9}[/]  ", end="")
    console.print(str(text), markup=False)


def setting(key: str, value: str, note: str) -> None:
    """One `key=value` line, ready to be copied as an override, with a note behind it."""
    out.print(f"[bold]{key}[/]=", end="")
    out.print(f"{value:<{max(0, 44 - len(key))}}", markup=False, end="")
    out.print(f"  # {note}", style="dim", markup=False)


def show_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[Any]], numbers: slice = slice(1, None)
) -> None:
    """Print a table under a line of text; the columns in `numbers` are aligned right."""
    table = Table()
    right = range(len(header))[numbers]
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    for console in (out, *_log):
        console.print(title, style="bold", markup=False)
        console.print(table, soft_wrap=False)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e-3 and value else f"{value:.4f}"
    return "" if value is None else str(value).replace("[", r"\[")


class Steps:
    """Progress over a known number of steps; `advance(**fields)` shows the newest values."""

    def __init__(self, progress: Progress | None, title: str, total: int, done: int):
        self.progress, self.title, self.total, self.done = progress, title, total, done
        self.task = progress.add_task(title, total=total, completed=done, values="") if progress else None
        self.last_line = time.monotonic()

    def advance(self, count: int = 1, **fields: str) -> None:
        """So many more steps are done."""
        self.done += count
        text = "  ".join(f"{name} {value}" for name, value in fields.items())
        if self.progress is not None:
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
    columns = (
        TextColumn(f"[bold cyan]{title:>9}[/] "), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[values]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=out, transient=False) as progress:
        yield Steps(progress, title, total, done)


def metrics_table(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    """Metrics side by side, one column for each model."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    show_table(title, ["", *columns], [[name, *(metrics.get(name) for metrics in columns.values())] for name in names])
