"""Run the cells of a slice one after another: each is written down at once, what is there is not measured again, none runs past its time.

Imports nothing but Python's own modules.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import slices
from benchmarks.gpu.slices import Cell, Scale
from benchmarks.sources import ROOT, commit, now, sources

Launch = Callable[[str, dict[str, Any], float, str], dict[str, Any]]  # kind, given, seconds, group -> found or error
_TOO_LONG = "stopped after"
_SHOWN = (
    "passed", "gflops_per_second", "tokens_per_second", "new_tokens_per_second", "fits", "fits_tokens", "merge_seconds", "peak_gib",
    "peak_reserved_gib",
)  # fmt: skip
_STARTING = 60  # seconds for a process that only says what it is


@dataclasses.dataclass
class Bench:
    """Everything that slices need.

    Args:
        launch: measures, see `by_process`.
        seconds: for a slice, at most.
        retry: cells that failed are measured again.
        only: parts of names; other cells are not measured. None: every cell is.
    """

    out: Path
    work: Path
    scale: Scale
    launch: Launch
    seconds: float
    retry: bool = False
    only: Sequence[str] | None = None
    clock: Callable[[], float] = time.perf_counter
    _stamps: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    _unprepared: dict[str, str] = dataclasses.field(default_factory=dict)

    def run(self, number: int) -> list[Cell]:
        """Measure what is left of a slice; the cells for which no time was left."""
        end, later = self.clock() + self.seconds, []
        for cell in slices.of(number, self.scale):
            if self._done(cell) or not self._wanted(cell):
                continue
            try:
                self._measure(cell, end)
            except _NoTimeLeft:
                later.append(cell)
                say(f"{cell.name}: later, its time is not left")
        return later

    def file(self, number: int) -> Path:
        """Where a slice's cells are written."""
        return self.out / f"slice_{number}.json"

    def cells(self, number: int) -> list[dict[str, Any]]:
        """What is written of a slice."""
        return read(self.file(number))

    def clean(self, numbers: Sequence[int]) -> None:
        """Remove what was prepared and nothing that is left of these slices needs: bases of all sizes together are large."""
        cells = [cell for number in numbers for cell in slices.of(number, self.scale) if not self._done(cell)]
        needed = {path for cell in cells for path in self._needs(cell)}
        for folder in (*self.work.glob("bases/*"), *self.work.glob("rows/*")):
            if str(folder.relative_to(self.work)) not in needed:
                shutil.rmtree(folder)

    def _wanted(self, cell: Cell) -> bool:
        return self.only is None or any(part in cell.name for part in self.only)

    def _needs(self, cell: Cell) -> list[str]:
        return [path for own in cell.needs for path in (*self._needs(slices.prepared(own, self.scale)), own)]

    def _done(self, cell: Cell) -> bool:
        known = next((one for one in self.cells(cell.slice) if self._is(one, cell)), None)
        if known is None or "absent" in known:
            return False
        return "found" in known or not self.retry

    def _is(self, one: Mapping[str, Any], cell: Cell) -> bool:
        return one["name"] == cell.name and one["card"] == self._stamp("own")["card"]

    def _stamp(self, group: str) -> dict[str, Any]:
        if group not in self._stamps:
            told = self.launch("stamp", {}, _STARTING, group)
            if "found" not in told:
                raise RuntimeError(f"the machine cannot be asked what it is: {told['error']}")
            self._stamps[group] = told["found"]
        return self._stamps[group]

    def _measure(self, cell: Cell, end: float) -> None:
        lacks = self._absent(cell)
        if lacks:
            self._write(cell, {"absent": lacks}, 0.0)
            return
        reason = next((why for path in cell.needs if (why := self._prepare(path, end))), None)
        if reason:
            self._write(cell, {"error": reason}, 0.0)
            return
        left = self._left(cell, end)
        started = self.clock()
        told = self.launch(cell.kind, cell.given, left, cell.group)
        if told.get("error", "").startswith(_TOO_LONG) and left < cell.seconds:
            raise _NoTimeLeft
        self._write(cell, told, self.clock() - started)

    def _left(self, cell: Cell, end: float) -> float:
        """Seconds for a cell: its share, or of a long one what is left, when that is half a slice."""
        left = end - self.clock()
        if left < min(cell.seconds, self.seconds / 2):
            raise _NoTimeLeft
        return min(cell.seconds, left)

    def _absent(self, cell: Cell) -> str | None:
        """What another tool's cell lacks."""
        if cell.group == "own":
            return None
        system = str(cell.given["system"])
        needed = [cell.group, *(["liger-kernel"] if "liger" in system else [])]
        lacking = [name for name in needed if name not in self._stamp(cell.group)["versions"]]
        return f"{', '.join(lacking)} not installed" if lacking else None

    def _prepare(self, path: str, end: float) -> str | None:
        """Make what a cell needs, where it is not there; why that cannot be done."""
        if (self.work / path).exists():
            return None
        if path not in self._unprepared:
            cell = slices.prepared(path, self.scale)
            reason = next((why for one in cell.needs if (why := self._prepare(one, end))), None)
            left = self._left(cell, end)
            told = {"error": reason} if reason else self.launch(cell.kind, cell.given, left, cell.group)
            if "found" in told:
                say(f"{path}: made")
                return None
            self._unprepared[path] = told["error"]
        return f"{path} cannot be made: {self._unprepared[path]}"

    def _write(self, cell: Cell, told: dict[str, Any], seconds: float) -> None:
        stamp = self._stamp(cell.group)
        one = {
            "name": cell.name, "kind": cell.kind, "group": cell.group, "given": cell.given, **stamp, "commit": commit(), "sources": sources(),
            "when": now(), "seconds": round(seconds, 1), **told,
        }  # fmt: skip
        kept = [other for other in self.cells(cell.slice) if not self._is(other, cell)]
        write(self.file(cell.slice), [*kept, one])
        say(f"{cell.name}: {shown(told)} ({seconds:.0f} s)")


class _NoTimeLeft(Exception):
    """A cell's share of time is more than what is left of its slice."""


def read(file: Path) -> list[dict[str, Any]]:
    """Cells that were written."""
    if not file.exists():
        return []
    cells: list[dict[str, Any]] = json.loads(file.read_text())["cells"]
    return cells


def write(file: Path, cells: list[dict[str, Any]]) -> None:
    """Cells, as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps({"cells": cells}, indent=1) + "\n")
    os.replace(temporary, file)


def say(text: str) -> None:
    """A line, at once."""
    print(text, flush=True)


def shown(told: Mapping[str, Any]) -> str:
    """The main figures of a cell."""
    if "found" not in told:
        return str(told.get("error") or told.get("absent"))
    found = told["found"]
    figures = {name: one for name, one in found.items() if name in _SHOWN and one is not None}
    return ", ".join(f"{name} {one:.5g}" for name, one in figures.items()) or "done"


def by_process(work: Path, device: str, python: str, paths: Mapping[str, Sequence[Path]]) -> Launch:
    """Measure in a process of its own, which is ended with all that it has started when its time is over.

    Args:
        paths: of each group, folders of modules that come first.
    """

    def launch(kind: str, given: dict[str, Any], seconds: float, group: str) -> dict[str, Any]:
        folder = work / "now"
        folder.mkdir(parents=True, exist_ok=True)
        asked, out = folder / "given.json", folder / "out.json"
        out.unlink(missing_ok=True)
        spec = {"kind": kind, "given": given, "work": str(work), "device": device, "seconds": seconds, "group": group}
        asked.write_text(json.dumps(spec))
        first = os.pathsep.join([*map(str, paths.get(group, ())), str(ROOT)])
        environment = {
            **os.environ, "PYTHONPATH": first, "HF_HUB_OFFLINE": "1", "BENCHMARK_BEGAN": str(time.time()),
            "LORA_LAB_CACHE": str(work / "cache"), "UNSLOTH_DISABLE_STATISTICS": "1",
        }  # fmt: skip
        command = [python, "-m", "benchmarks.gpu.cells", str(asked), str(out)]
        with (folder / "said.log").open("w") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(timeout=seconds)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                return {"error": f"{_TOO_LONG} {seconds:.0f} s"}
        if out.exists():
            told: dict[str, Any] = json.loads(out.read_text())
            return told
        last = (folder / "said.log").read_text(errors="replace").strip().splitlines()[-1:]
        return {"error": f"the process ended with {code}: {' '.join(last)[:400]}"}

    return launch
