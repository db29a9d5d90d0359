"""The folder of runs that is looked at. Names in requests are looked up among what was found in it, and never become paths."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.errors import LoraLabError, RunError
from lora_lab.report import runs
from lora_lab.report.runs import Listed
from lora_lab.runtime import reading

RANKING = "ranking.json"
PAGES = {  # pages of their own that verbs write, by file
    "evaluation.html": "Evaluation: pictures, and the rows that are off",
    "inspect.html": "Inspection: tokens, layers, and which rows taught it",
    "report.html": "Sweep report: heat map, curves, Pareto fronts",
    "data.html": "Rows as the model sees them",
}
_SEEN = ("config.yaml", "result.json", "metrics.jsonl")  # what a run's line in the table depends on


class Missing(RunError):
    """There is nothing of this name."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What is in the folder at the moment, by names: paths from it, with '/'."""

    runs: dict[str, Listed]  # the newest first
    unread: dict[str, str]  # the reason
    sweeps: list[str]


class Folder:
    """Reads a run again when its files have changed."""

    def __init__(self, root: Path):
        self.root = root
        self._known: dict[Path, tuple[Any, Listed | str]] = {}

    def look(self) -> Found:
        """Every run, readable or not, and every sweep."""
        now = {path: self._read(path) for path in runs.folders(self.root)}
        self._known = now
        listed = {path: one for path, (_, one) in now.items() if isinstance(one, Listed)}
        newest = sorted(listed, key=lambda path: (-listed[path].begun, str(path)))
        sweeps = dict.fromkeys(above for path in now for above in (path, path.parent) if self._is_sweep(above))
        return Found(
            {self.name(path): listed[path] for path in newest},
            {self.name(path): one for path, (_, one) in now.items() if isinstance(one, str)},
            sorted(self.name(path) for path in sweeps),
        )

    def _read(self, path: Path) -> tuple[Any, Listed | str]:
        seen = [_signature(path / name) for name in _SEEN] + [_signature(path.parent / RANKING)]
        if path in self._known and self._known[path][0] == seen:
            return self._known[path]
        try:
            return seen, runs.open_one(str(path))
        except LoraLabError as error:
            return seen, str(error)

    def _is_sweep(self, path: Path) -> bool:
        return path.is_relative_to(self.root) and (path / RANKING).is_file()

    def name(self, path: Path) -> str:
        """What a folder is called here; '.' is the root."""
        return path.relative_to(self.root).as_posix()

    def file(self, name: str, file: str, known: Sequence[str]) -> Path:
        """A file of a folder that was found.

        Raises:
            Missing: the folder is not among the known ones, or has no such file.
            RunError: it is a link that leaves the root.
        """
        if name not in known:
            raise Missing(f"{name}: no such folder here.")
        found = self.root / name / file
        if not os.path.lexists(found):
            raise Missing(f"{name}: has no {file}.")
        if not Path(os.path.realpath(found)).is_relative_to(os.path.realpath(self.root)):
            raise RunError(f"{name}/{file}: is a link that leaves {self.root}; it was not followed.")
        return found

    def pages(self, name: str) -> list[tuple[str, str]]:
        """The pages of a folder and of those above it: folder and file."""
        found, above = [], Path(name)
        while True:
            files = [file for file in PAGES if (self.root / above / file).is_file()]
            found += [(above.as_posix(), file) for file in files if above.as_posix() == name or file == "data.html"]
            if above == above.parent:
                return found
            above = above.parent

    def page(self, name: str, file: str, found: Found) -> bytes:
        """A page that a verb wrote.

        Raises:
            LoraLabError: there is none, or it cannot be read.
        """
        if file not in PAGES:
            raise Missing(f"{file}: no page of a run is called so.")
        inside = [path for one in (*found.runs, *found.sweeps) for path in (Path(one), *Path(one).parents)]
        known = [path.as_posix() for path in inside]
        return reading.read_bytes(self.file(name, file, known), RunError)


def _signature(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
