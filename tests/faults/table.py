"""A pytest plugin: the table of `make test-faults`, one line for each programme. pytest -p tests.faults.table

Tests of the programme itself say how often they tried (the fixture `tally`); every other test that belongs to a programme counts
as one try. With this plugin only tests that belong to a programme are run.

--fault-report FILE: also writes the table as JSON, which `python -m benchmarks.faults --write` puts into the documents.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import machine
from tests.faults.items import ITEMS
from tests.faults.programmes import PROGRAMMES, TRIES, programme_of

COLUMNS = ("tried", "recovered", "lost", "silent", "traces")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-report", metavar="FILE", help="write the table of the fault programme as JSON")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        workers = config.getoption("numprocesses", None) or 1
        config.pluginmanager.register(Table(config.getoption("--fault-report"), workers), "fault-table")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Only what belongs to a programme."""
    other = [item for item in items if not _belongs(item.nodeid)]
    config.hook.pytest_deselected(items=other)
    items[:] = [item for item in items if _belongs(item.nodeid)]


def _belongs(node: str) -> bool:
    return programme_of(node) is not None or bool(_items_of(node))


def _items_of(node: str) -> list[int]:
    """Numbers of the items of the list of faults that a test asserts."""
    plain = node.partition("[")[0]
    return [number for number, item in ITEMS.items() if node in item.tests or plain in item.tests]


class Table:
    """Collects what tests report, from all workers."""

    def __init__(self, report: str | None, workers: int):
        self.report, self.workers, self.began = report, workers, time.monotonic()
        self.lines = {name: dict.fromkeys(COLUMNS, 0) for name in PROGRAMMES}
        self.items: dict[int, bool] = {}
        self.problems: list[str] = []
        self.notes: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Setup that fails is a failure of the test; a skipped test tried nothing."""
        if report.skipped or (report.when != "call" and report.passed):
            if report.when == "teardown":
                self._records(report)
            return
        for number in _items_of(report.nodeid):
            self.items[number] = self.items.get(number, True) and report.passed
        programme = programme_of(report.nodeid)
        if programme is not None and not _tallies(report.nodeid):
            line = self.lines[programme]
            tries = TRIES.get(report.nodeid, 1)
            line["tried"] += tries
            line["recovered" if report.passed else "lost"] += tries
        if report.failed:
            self.problems.append(f"{programme or 'R11'} {report.nodeid}")

    def _records(self, report: pytest.TestReport) -> None:
        for name, record in report.user_properties:
            if name != "faults":
                continue
            for column in COLUMNS:
                self.lines[record["programme"]][column] += record[column]
            self.problems += [f"{record['programme']} {problem}" for problem in record["problems"]]
            for note, times in record["notes"].items():
                self.notes[note] = self.notes.get(note, 0) + times

    def result(self) -> dict[str, Any]:
        """Lines by programme, and what was not counted as a fault but is worth knowing."""
        passed = sum(self.items.values())
        items = {
            "tried": len(self.items),
            "recovered": passed,
            "lost": len(self.items) - passed,
            "silent": 0,
            "traces": 0,
        }
        return {
            "programmes": self.lines | {"R11": items},
            "machine": machine(),
            "workers": self.workers,
            "minutes": round((time.monotonic() - self.began) / 60, 1),
            "problems": self.problems,
            "notes": self.notes,
        }

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        result = self.result()
        terminalreporter.section("the fault programme")
        for note, times in sorted(self.notes.items()):
            terminalreporter.write_line(f"note: {note}: {times}")
        for problem in self.problems:
            terminalreporter.write_line(f"problem: {problem}")
        for line in text_table(result):
            terminalreporter.write_line(line)
        if self.report:
            Path(self.report).parent.mkdir(parents=True, exist_ok=True)
            Path(self.report).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tallies(node: str) -> bool:
    """Whether a test says itself how often it tried."""
    return "/test_programme_" in node.partition("::")[0]


def text_table(result: dict[str, Any]) -> list[str]:
    """The table in columns."""
    found = [f"{'':4} {'programme':66}" + "".join(f"{name:>11}" for name in COLUMNS)]
    for name, title in PROGRAMMES.items():
        line = result["programmes"][name]
        found.append(f"{name:4} {title:66}" + "".join(f"{line[column]:>11,}" for column in COLUMNS))
    return found


def markdown_table(result: dict[str, Any]) -> list[str]:
    """The table for documents."""
    found = ["| | programme | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * len(COLUMNS)]
    for name, title in PROGRAMMES.items():
        line = result["programmes"][name]
        found.append(f"| {name} | {title} | " + " | ".join(f"{line[column]:,}" for column in COLUMNS) + " |")
    return found
