"""Metrics of a run: always `metrics.jsonl`, and one of accelerate's trackers beside it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from lora_lab import storage
from lora_lab.config import TrackerConfig
from lora_lab.errors import ConfigError


class MetricsLog:
    """One JSON object a line, in order of steps, flushed at once."""

    def __init__(self, file: Path, tracker: Any = None):
        self.file = file
        self.tracker = tracker

    def write(self, step: int, **values: float | int | None) -> None:
        """Append one line; `step` counts finished optimizer steps. What is not finite is written as null."""
        line = json.dumps(storage.finite({"step": step, **values}), allow_nan=False)
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        if self.tracker is not None:
            self.tracker.log({key: value for key, value in values.items() if value is not None}, step=step)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a line torn by a crash is left out."""
        lines = []
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines

    def rewind(self, step: int) -> None:
        """Drop lines beyond `step`: they will be written again when training goes on from there."""
        kept = [line for line in self.read() if line["step"] <= step]
        storage.write_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))

    def close(self) -> None:
        """Flush and end the tracker."""
        if self.tracker is not None:
            self.tracker.finish()


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
    tracker = tracker_class(title, folder) if tracker_class.requires_logging_directory else tracker_class(title)
    tracker.start()
    return tracker
