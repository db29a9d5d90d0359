"""Metrics of a run: always `metrics.jsonl`, and one of accelerate's trackers beside it."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

from lora_lab.config.train import TrackerConfig
from lora_lab.errors import ConfigError, RunError
from lora_lab.runtime import console, ranks, reading, storage

_MAX_BYTES = 2**30  # five million steps


class MetricsLog:
    """One JSON object a line, in order of steps, flushed at once.

    A line that cannot be written ends nothing by itself: it waits in `unwritten`, and `problem` says why, until whoever trains
    has saved the state and stops.
    """

    def __init__(self, file: Path, tracker: Any = None):
        self.file = file
        self.tracker = tracker
        self.unwritten: list[str] = []
        self.problem: RunError | None = None

    def write(self, step: int, **values: float | int | None) -> None:
        """Append one line; `step` counts finished optimizer steps. What is not finite is written as null."""
        if not ranks.main():
            return
        self.unwritten.append(json.dumps(storage.finite({"step": step, **values}), allow_nan=False))
        self._append(durable=False)
        if self.tracker is not None:
            known = {key: value for key, value in values.items() if value is not None}
            self._tracked(lambda: self.tracker.log(known, step=step))

    def sync(self) -> list[str]:
        """Make every line survive a power cut; those that cannot be written, which whoever goes on from here needs as well."""
        self._append(durable=True)
        return list(self.unwritten)

    def _append(self, durable: bool) -> None:
        content = "".join(line + "\n" for line in self.unwritten).encode()
        try:
            descriptor = storage.open_own(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            try:
                storage.append_whole(descriptor, content)
                self.unwritten, self.problem = [], None
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except RunError as error:
            self.problem = error
        except OSError as error:
            self.problem = storage.cannot_be_written(self.file, error)

    def _tracked(self, action: Callable[[], None]) -> None:
        """A tracker has copies of what `metrics.jsonl` says, so it is left out, aloud, when it fails."""
        try:
            action()
        except Exception as error:
            console.say("tracker", f"failed ({type(error).__name__}: {error}); the run continues without it")
            self.tracker = None

    def read(self) -> list[dict[str, Any]]:
        """All whole lines.

        Raises:
            RunError: the file cannot be read.
        """
        return read_lines(self.file)[0]

    def waiting(self) -> list[dict[str, Any]]:
        """The lines that are not in the file yet."""
        return [line for text in self.unwritten if (line := _parsed(text.encode("utf-8", "replace")))]

    def rewind(self, step: int) -> None:
        """Drop lines beyond `step`: they will be written again when training goes on from there. Lines that are damaged or missing are
        told of."""
        lines, damaged = read_lines(self.file)
        for number in damaged:
            console.say("metrics", f"{self.file}, line {number}: damaged; left out")
        kept = {json.dumps(line): line for line in [*lines, *self.waiting()] if line["step"] <= step}
        known = {line["step"] for line in kept.values() if "loss" in line}
        absent = [number for number in range(1, step + 1) if number not in known]
        if absent:
            console.say(
                "metrics", f"{self.file}: no losses of {_steps(absent)}, which are done; its curve has a gap there"
            )
        storage.write_text(self.file, "".join(line + "\n" for line in kept))
        self.unwritten, self.problem = [], None

    def close(self) -> None:
        """Flush and end the tracker."""
        if self.tracker is not None:
            self._tracked(lambda: self.tracker.finish())


def read_lines(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Every whole line of a `metrics.jsonl`, and the numbers (from 1) of those that are damaged, such as a last line without an end,
    which a killed process leaves. There is none where there is no file.

    Raises:
        RunError: the file is no regular file, too large, or cannot be read.
    """
    if not file.exists():
        return [], []
    *rows, torn = reading.read_bytes(file, RunError, _MAX_BYTES).split(b"\n")
    found = [_parsed(row) for row in rows] + ([None] if torn else [])
    return [line for line in found if line], [number for number, line in enumerate(found, 1) if line is None]


def _parsed(row: bytes) -> dict[str, Any] | None:
    """The line, if it is one that `MetricsLog.write` writes: a step and numbers."""
    try:
        line = json.loads(row.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
        return None
    return line if all(isinstance(value, (int, float, NoneType)) for value in line.values()) else None


def _steps(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return (
        f"step {shown}" if len(numbers) == 1 else f"{len(numbers)} steps ({shown}{', ...' if len(numbers) > 5 else ''})"
    )


def tracker_name(config: TrackerConfig) -> str | None:
    """The tracker to use, or None; checked before anything heavy starts.

    Raises:
        ConfigError: the named tracker is not installed.
    """
    if config.name == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") else None
    if config.name == "none":
        return None
    if importlib.util.find_spec(config.name) is None:
        package = config.name.replace("_", "-")
        raise ConfigError(f"tracker.name={config.name}: not installed. pip install {package}, or use tracker=none.")
    return config.name


def open_log(folder: Path, config: TrackerConfig) -> MetricsLog:
    """The metrics log of the run in `folder`."""
    name = tracker_name(config)
    return MetricsLog(folder / "metrics.jsonl", _start(name, folder, config) if name else None)


def _start(name: str, folder: Path, config: TrackerConfig) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it whether this is the main process
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    title = name if name == "tensorboard" else config.project
    try:
        tracker = tracker_class(title, folder) if tracker_class.requires_logging_directory else tracker_class(title)
        tracker.start()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RunError(f"tracker.name={name}: cannot start ({reason}). Fix that, or use tracker=none.") from error
    return tracker
