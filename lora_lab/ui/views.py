"""What each page holds: plain values for its template, read from the files of runs."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from lora_lab.config import compose
from lora_lab.errors import ConfigError, LoraLabError, RunError
from lora_lab.report import curves, evaluation_report, runs
from lora_lab.report.evaluation_report import Said
from lora_lab.report.runs import Listed
from lora_lab.runtime import reading
from lora_lab.schema.sections import values_of
from lora_lab.tasks import metrics
from lora_lab.ui.folder import PAGES, RANKING, Folder, Found, Missing
from lora_lab.ui.talk import MOST_RUNS, Turn, text_of

RUNS_A_PAGE, ROWS_A_PAGE = 100, 50
ONLY = {"": "all rows", "off": "rows that are off", "right": "rows that are right"}
_PARTS = ("adapter", "merged", "export")  # of a run's folder, that a person takes away
_LOG_LINES = 40


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of many things, and where the others are."""

    rows: Sequence[Any]
    number: int  # of this part, from 1
    count: int  # of parts
    total: int  # of things


def part(rows: Sequence[Any], number: int, size: int) -> Part:
    """A page of many things; a number beyond the last is the last."""
    count = max(1, -(-len(rows) // size))
    number = min(max(1, number), count)
    return Part(rows[(number - 1) * size : number * size], number, count, len(rows))


# -- the table of runs ------------------------------------------------------------------------------------------------


def index(found: Found, told: str, sort: str, number: int) -> dict[str, Any]:
    """Every run, as far as it has the values that were told."""
    chosen, problem = found.runs, ""
    try:
        fits = runs.matching(_words(told))
        chosen = {name: run for name, run in found.runs.items() if fits(run.config)}
        if sort and chosen:
            best = runs.ranked(list(chosen.values()), sort)
            names = {id(run): name for name, run in chosen.items()}
            chosen = {names[id(run)]: run for run in best}
    except ConfigError as error:
        problem = str(error)
    metric = sort or runs.metric_of(list(chosen.values())) or ""
    shown = list(dict.fromkeys(("loss", metric))) if metric else ["loss"]
    return {
        "told": told,
        "sort": sort,
        "problem": problem,
        "metrics": sorted({name for run in found.runs.values() for name in run.tuned}),
        "headings": [(name, "number") for name in shown],
        "page": part([line(name, run, shown) for name, run in chosen.items()], number, RUNS_A_PAGE),
        "unread": found.unread,
        "sweeps": found.sweeps,
        "total": len(found.runs),
    }


def _words(told: str) -> list[str]:
    try:
        return shlex.split(told)
    except ValueError as error:
        raise ConfigError(f"{told}: a quote is not closed.") from error


def line(name: str, run: Listed, names: Sequence[str]) -> dict[str, Any]:
    """A run in a row of a table."""
    return {
        "name": name,
        "state": run.state,
        "is_done": run.state == "done",
        "task": run.config["task.name"],
        "base": runs.base_of(run.config),
        "adapter": runs.adapter_of(run.config),
        "steps": run.steps,
        "figures": [Change.of(run, one) for one in names],
        "parameters": "" if run.parameters is None else f"{run.parameters:,}",
        "minutes": runs.minutes_of(run),
        "begun": time.strftime("%Y-%m-%d %H:%M", time.localtime(run.begun)),
        "place": run.place,
    }


@dataclasses.dataclass(frozen=True)
class Change:
    """A metric before and after training."""

    name: str
    before: str
    after: str
    verdict: str  # 'better', 'worse' or ''

    @classmethod
    def of(cls, run: Listed, name: str) -> Change:
        before, after = run.base.get(name), run.tuned.get(name)
        verdict = ""
        if before is not None and after is not None and before != after and metrics.is_declared(name):
            verdict = "better" if metrics.as_cost(name, after) < metrics.as_cost(name, before) else "worse"
        return cls(name, _figure(before), _figure(after), verdict)


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else f"{value}"


def chat(found: Found, names: Sequence[str], turns: Sequence[Turn], form: str) -> dict[str, Any]:
    """A conversation with a base and some runs on it, side by side.

    Args:
        form: the word that forms of ours hold.

    Raises:
        LoraLabError: a run is not there, or they are too many or not of one base.
    """
    if not 1 <= len(names) <= MOST_RUNS or len(set(names)) != len(names):
        raise RunError(f"Choose one to {MOST_RUNS} runs in the table to chat with, beside their base.")
    asked = [_run(found, name) for name in names]
    bases = dict.fromkeys(runs.base_of(run.config) for run in asked)
    if len(bases) > 1:
        raise RunError(f"Runs of one base are asked side by side, and these have {', '.join(bases)}. Choose others.")
    return {
        "names": names,
        "models": [f"base: {next(iter(bases))}", *names],
        "turns": turns,
        "text": "",
        "problem": "",
        "form": form,
        "held": text_of(turns),
    }


# -- one run ----------------------------------------------------------------------------------------------------------


def run(folder: Folder, found: Found, name: str) -> dict[str, Any]:
    """Everything of one run.

    Raises:
        LoraLabError: there is none, or it cannot be read.
    """
    one = _run(found, name)
    path, notes = Path(one.path), list[str]()
    names = list(dict.fromkeys((*one.base, *one.tuned)))
    above, config = Path(name).parent.as_posix(), compose.load(path / "config.yaml")
    return {
        "name": name,
        "line": line(name, one, names),
        "figures": [Change.of(one, metric) for metric in names],
        "pictures": curves.of_run(curves.read_lines(path, notes)),
        "settings": _settings(config),
        "sweep": above if above in found.sweeps else "",
        "pages": [(where, file, PAGES[file]) for where, file in folder.pages(name)],
        "chats": config.task.answers and (path / "adapter").is_dir(),
        "has_rows": os.path.lexists(path / evaluation_report.ROWS),
        "merge": _merge(folder, found, name, notes),
        "parts_of": [(part, _size(path / part)) for part in _PARTS if (path / part).is_dir()],
        "log": _log(folder, found, name, notes),
        "path": one.path,
        "notes": notes,
    }


def _run(found: Found, name: str) -> Listed:
    if name in found.unread:
        raise RunError(found.unread[name])
    if name not in found.runs:
        raise Missing(f"{name}: no run here is called so.")
    return found.runs[name]


@dataclasses.dataclass(frozen=True)
class Setting:
    """A key of the configuration."""

    key: str
    value: str
    default: str | None  # where the value is another; '': there is none


def _settings(config: Any) -> list[Setting]:
    """Every value, and what it would be by default where it is not."""
    found = []
    for key, value, default in values_of(config):
        other = "" if default is PydanticUndefined else _json(default)
        found.append(Setting(key, _json(value), None if value == default else other))
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _merge(folder: Folder, found: Found, name: str, notes: list[str]) -> dict[str, Any] | None:
    """What `merge_report.json` says, as a table; None: the run was not merged."""
    report = _read_json(folder, found, name, "merge_report.json", notes)
    if report is None:
        return None
    compared = {
        "base and adapter": report.get("merged_vs_base_and_adapter"),
        "model as trained": report.get("merged_vs_model_as_trained"),
    }
    gaps = {title: gap for title, gap in compared.items() if isinstance(gap, dict)}
    refused = report.get("refused")
    return {
        "refused": [str(one) for one in refused] if isinstance(refused, list) else [],
        "facts": {key: _json(report[key]) for key in ("base", "dtype", "rows", "positions", "texts") if key in report},
        "columns": list(gaps),
        "compared": {key: [_figure(gap.get(key)) for gap in gaps.values()] for gap in gaps.values() for key in gap},
    }


def _read_json(folder: Folder, found: Found, name: str, file: str, notes: list[str]) -> dict[str, Any] | None:
    try:
        read: dict[str, Any] = reading.read_json(folder.file(name, file, [*found.runs, *found.sweeps]), RunError)
    except Missing:
        return None
    except RunError as error:
        notes.append(str(error))
        return None
    return read


def _log(folder: Folder, found: Found, name: str, notes: list[str]) -> list[str]:
    try:
        text = reading.read_bytes(folder.file(name, "log.txt", list(found.runs)), RunError)
    except Missing:
        return []
    except RunError as error:
        notes.append(str(error))
        return []
    return text.decode("utf-8", "replace").splitlines()[-_LOG_LINES:]


def _size(path: Path) -> str:
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
    return f"{size / 2**20:,.1f} MiB"


# -- several runs -----------------------------------------------------------------------------------------------------


def compare(found: Found, names: Sequence[str]) -> dict[str, Any]:
    """In what runs differ, and what each reached.

    Raises:
        LoraLabError: fewer than two are named, or one cannot be read.
    """
    names = list(dict.fromkeys(names))
    if len(names) < 2:
        raise ConfigError("Choose at least two runs in the table, then Compare.")
    listed, notes = {name: _run(found, name) for name in names}, list[str]()
    keys = runs.differing(list(listed.values()))
    known = dict.fromkeys(metric for run in listed.values() for metric in run.tuned)
    return {
        "names": names,
        "settings": {key: [_json(run.config.get(key)) for run in listed.values()] for key in keys},
        "metrics": {metric: _best(metric, [run.tuned.get(metric) for run in listed.values()]) for metric in known},
        "pictures": curves.of_runs({name: curves.read_lines(Path(run.path), notes) for name, run in listed.items()}),
        "notes": notes,
    }


def _best(metric: str, values: Sequence[float | None]) -> list[tuple[str, bool]]:
    """Each value, and whether none is better."""
    given = [metrics.as_cost(metric, one) for one in values if one is not None] if metrics.is_declared(metric) else []
    return [
        (_figure(one), bool(given) and one is not None and metrics.as_cost(metric, one) == min(given)) for one in values
    ]


def sweep(folder: Folder, found: Found, name: str) -> dict[str, Any]:
    """What `ranking.json` says.

    Raises:
        LoraLabError: there is none, or it is damaged.
    """
    file = folder.file(name, RANKING, found.sweeps)
    told = reading.read_json(file, RunError)
    try:
        ranking = [_place(name, place, found) for place in told["ranking"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(
            f"{file}: not what a sweep writes. Make it again: lora-lab resume sweep={file.parent}"
        ) from error
    keys = list(dict.fromkeys(key for place in ranking for key in place["values"]))
    return {
        "name": name,
        "metric": str(told.get("metric")),
        "judgement": str(told.get("judgement") or ""),
        "take": told.get("take"),
        "keys": keys,
        "headings": [(key, "") for key in keys],
        "ranking": ranking,
        "several": any(place["seeds"] > 1 for place in ranking),
        "pages": [(where, page, PAGES[page]) for where, page in folder.pages(name)],
    }


def _place(sweep: str, place: Mapping[str, Any], found: Found) -> dict[str, Any]:
    own = (Path(sweep) / str(place["name"])).as_posix()
    seeds = [float(value) for value in place["metrics"]]
    return {
        "name": str(place["name"]),
        "run": own if own in found.runs else "",
        "values": {str(key): _json(value) for key, value in place["values"].items()},
        "metric": _figure(place["metric"]),
        "seeds": len(seeds),
        "mean": _figure(sum(seeds) / len(seeds)) if len(seeds) > 1 else "",
        "parameters": f"{place['parameters']:,}" if place["parameters"] else "",
        "seconds": f"{place['seconds']:.3g}" if place["seconds"] else "",
        "note": str(place["note"] or ""),
    }


# -- rows with what was said of them -----------------------------------------------------------------------------------


def predictions(folder: Folder, found: Found, name: str, only: str, text: str, number: int) -> dict[str, Any]:
    """Held-out rows with what the trained model said of them.

    Args:
        only: a key of `ONLY`.
        text: that a row must hold, whatever its case.

    Raises:
        LoraLabError: there are none, or they cannot be read.
    """
    _run(found, name)
    said, damaged = _said(folder.file(name, evaluation_report.ROWS, list(found.runs)))
    wanted = text.casefold()
    chosen = [
        one
        for one in said
        if (not only or bool(one.off) == (only == "off")) and (not wanted or wanted in _everything(one))
    ]
    some = part(chosen, number, ROWS_A_PAGE)
    return {
        "name": name,
        "only": only,
        "text": text,
        "choices": ONLY,
        "page": dataclasses.replace(some, rows=[evaluation_report.shown(one) for one in some.rows]),
        "total": len(said),
        "off": sum(1 for one in said if one.off),
        "notes": [f"{damaged} lines of {evaluation_report.ROWS} are damaged and left out."] if damaged else [],
    }


def _said(file: Path) -> tuple[list[Said], int]:
    """The rows, and how many lines are none."""
    said, damaged = [], 0
    for line in reading.read_text(file, RunError).splitlines():
        try:
            row = json.loads(line)
            said.append(evaluation_report.of_row(row))
        except (ValueError, AttributeError, TypeError, RecursionError):
            damaged += 1
    return said, damaged


def _everything(one: Said) -> str:
    return _json([one.origin, one.values, one.expected, one.said]).casefold()


def problem(status: int, error: LoraLabError | str) -> dict[str, Any]:
    """What is told where a page cannot be shown."""
    return {"status": status, "sentence": str(error)}
