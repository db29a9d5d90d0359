"""Every error that is meant for a user's eyes, and the exit code that each one ends the process with.

    LoraLabError            2   a user error: the message names key, value, rule and how to fix it
    ├── ConfigError         2   keys and values (all problems at once)
    ├── DataError           2   rows, columns, files of data
    ├── BaseModelError      2   finding, reading or quantizing the base model
    ├── AdapterError        2   target modules, adapter files, an adapter on the wrong base
    ├── RunError            2   run folders: existing, missing, locked, read-only
    ├── CheckpointError     2   a checkpoint or artifact that fails its checksums
    ├── TrainingError       3   training stopped before a bad update (non-finite loss or gradient)
    │   ├── NoRoomError     3   something does not fit into memory, in the smallest way that is known
    │   └── ProcessError    3   another process of the run was lost, or is not as this one
    └── MergeError          4   the merged checkpoint is not the model that was trained
        ├── ExportError     4   an exported file does not load in its target runtime, or its outputs differ there
        └── TrimError       4   a trimmed base does not read or say what the base does
    Interrupted             130 (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP), after the state was saved

A disk that is full, a file that may not be read, memory that runs out: where nothing of ours says more, `cli.main` makes a
sentence of them (2). Anything else is a bug of ours: exit code 1 and a stack trace.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraLabError(Exception):
    """A problem that the user can fix; printed as one paragraph, without a stack trace."""

    exit_code = 2


class ConfigError(LoraLabError):
    """One or more keys or values of the configuration are wrong; all of them are in the message."""

    def __init__(self, *problems: str):
        """`problems`: one sentence each, naming key, value, rule and way out."""
        self.problems = list(problems)
        count = f"{len(problems)} problems in the configuration:\n  " if len(problems) > 1 else ""
        super().__init__(count + "\n  ".join(problems))


class DataError(LoraLabError):
    """A data file, column or row cannot be used."""


class BaseModelError(LoraLabError):
    """The base model cannot be found, read or trusted."""


class AdapterError(LoraLabError):
    """Adapter settings or files do not fit the base model."""


class RunError(LoraLabError):
    """A run folder exists already, is missing, is in use, or cannot be written."""


class CheckpointError(LoraLabError):
    """A saved folder does not match its manifest."""


class TrainingError(LoraLabError):
    """Training stopped before an update that would have destroyed the adapter."""

    exit_code = 3


class NoRoomError(TrainingError):
    """Something does not fit into memory, although it was tried in the smallest way that is known."""


class ProcessError(TrainingError):
    """Another process of the run was lost, or has something else than this one."""


class MergeError(LoraLabError):
    """The merged checkpoint differs from the trained model by more than the allowed margin."""

    exit_code = 4


class ExportError(MergeError):
    """An exported file does not load in its target runtime, or its outputs differ there."""


class TrimError(MergeError):
    """A trimmed base tokenizes otherwise than the base, or its outputs differ."""


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP. A BaseException, so that no `except Exception` can swallow it."""

    run: object = None  # folder of the run that was stopped, once there is one
    sweep: object = None  # or of the sweep
    steps: tuple[int, int] | None = None  # how many were done, and of how many, while training

    def __init__(self, signum: int):
        super().__init__(f"by signal {signum}")
        self.exit_code = 128 + signum


def nearest(word: object, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """' Did you mean X?' for the most similar choice, or '' when nothing is similar."""
    match = difflib.get_close_matches(str(word)[:100], list(choices), n=1, cutoff=cutoff)
    return f" Did you mean '{match[0]}'?" if match else ""
