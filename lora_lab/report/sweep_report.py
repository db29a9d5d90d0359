"""A sweep as one page that needs nothing from elsewhere: ranking, heat map, parallel coordinates, curves, Pareto fronts."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_lab.report import pages, pictures
from lora_lab.report.curves import Curve, smoothed
from lora_lab.report.pictures import Dot, Line, Picture
from lora_lab.runtime import console, storage

_CURVES = len(pictures.COLOURS)  # that are drawn together
_FILLED = 0.5  # cells of a heat map that have a run, at least
_APART = 0.1  # costs that are nearer to each other than this share say nothing


def write(file: Path, result: dict[str, Any], curves: Sequence[Curve]) -> None:
    """Write the page; what cannot be drawn from these runs is left out.

    Args:
        result: what `ranking.json` says.
    """
    places = [place for place in result["ranking"] if place["metric"] is not None]
    drawings: list[tuple[str, Callable[[], Sequence[Picture | None]]]] = [
        ("Heat map", lambda: [_heat_map(places, result)]),
        ("Parallel coordinates", lambda: [_parallel(places, result)]),
        ("Losses", lambda: _curves(curves)),
        (f"{_title(result)} against cost", lambda: _pareto(places, result)),
    ]
    notes = [note for curve in curves for note in curve.notes]
    drawn: list[Picture] = []
    for title, draw in drawings:
        try:
            drawn += [picture for picture in draw() if picture is not None]
        except Exception as error:  # values can be anything; the other drawings and the table are worth having
            notes.append(f"{title}: cannot be drawn of these runs ({error}).")
    for note in notes:
        console.say("damaged", note)
    keys = list(dict.fromkeys(key for place in result["ranking"] for key in place["values"]))
    page = pages.render("sweep.html.jinja", result=result, keys=keys, pictures=drawn, notes=notes)
    storage.write_text(file, page)


def _title(result: dict[str, Any]) -> str:
    metric: str = result["metric"]
    return metric[:1].upper() + metric[1:]


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else _shortened(value, 24)


def _shortened(value: Any, most: int) -> str:
    """A text that leaves room for the drawing."""
    text = console.shown(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _levels(places: Sequence[dict[str, Any]], key: str) -> list[Any]:
    values = {json.dumps(place["values"].get(key)): place["values"].get(key) for place in places}.values()
    numeric = all(isinstance(value, int | float) for value in values)
    return sorted(values) if numeric else list(values)


def _varying(places: Sequence[dict[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for place in places for key in place["values"])
    return [key for key in keys if len(_levels(places, key)) > 1]


def _best(result: dict[str, Any]) -> str:
    return f"the {'lowest' if result['lower_is_better'] else 'highest'} {result['metric']}"


def _heat_map(places: Sequence[dict[str, Any]], result: dict[str, Any]) -> Picture | None:
    """The two first values that vary, rank and learning rate before others; the mean over all others. None: they are no grid."""
    keys = sorted(_varying(places), key=lambda key: (key != "adapter.r", key != "optim.lr"))
    if len(keys) < 2:
        return None
    down, across = (_levels(places, key) for key in keys[:2])
    cells = np.full((len(down), len(across)), np.nan)
    for row, first in enumerate(down):
        for column, second in enumerate(across):
            found = [
                p["metric"] for p in places if (p["values"].get(keys[0]), p["values"].get(keys[1])) == (first, second)
            ]
            cells[row, column] = statistics.fmean(found) if found else np.nan
    if np.isfinite(cells).mean() < _FILLED:
        return None
    others = f", the mean over {', '.join(keys[2:])}" if len(keys) > 2 else ""
    rows, columns = (keys[0], list(map(_label, down))), (keys[1], list(map(_label, across)))
    title = f"{_title(result)} by {_short(keys[0])} and {_short(keys[1])}"
    says = f"The fullest has {_best(result)}{others}."
    return pictures.heat_map(title, rows, columns, cells, result["lower_is_better"], says)


def _parallel(places: Sequence[dict[str, Any]], result: dict[str, Any]) -> Picture | None:
    """Of three values that vary, or more; of two where there is no heat map, which says the same."""
    keys = _varying(places)
    if len(keys) < 2 or (len(keys) == 2 and _heat_map(places, result) is not None):
        return None
    levels = {key: _levels(places, key) for key in keys}
    drawn = [([levels[key].index(place["values"].get(key)) for key in keys], place["metric"]) for place in places]
    axes = [(_short(key), list(map(_label, levels[key]))) for key in keys]
    says = f"Each line is a run; that with {_best(result)} stands out, and of the others the better ones."
    return pictures.parallel(result["metric"], axes, drawn, result["lower_is_better"], says)


def _curves(curves: Sequence[Curve]) -> list[Picture | None]:
    some = curves[:_CURVES]
    says = f"The {len(some)} best of {len(curves)} runs." if len(some) < len(curves) else ""
    if any(len(one.train) > 1 for one in some):
        says += " With several seeds: the mean, and one standard deviation around it."
    return [
        pictures.lines(
            "Training loss, smoothed",
            "loss",
            [_line(one, [smoothed(seed) for seed in one.train]) for one in some],
            says.strip(),
        ),
        pictures.lines("Held-out loss", "loss", [_line(one, one.held_out, dots=True) for one in some], says.strip()),
    ]


def _line(curve: Curve, seeds: Sequence[dict[int, float]], dots: bool = False) -> Line:
    """The mean over the seeds, and one standard deviation around it."""
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    values = {step: [one[step] for one in seeds] for step in steps}
    means = {step: statistics.fmean(found) for step, found in values.items()}
    spread = {step: statistics.stdev(found) for step, found in values.items()} if len(seeds) > 1 else {}
    band = {step: (means[step] - one, means[step] + one) for step, one in spread.items()}
    return Line(curve.title, means, dots=dots, band=band)


def _pareto(places: Sequence[dict[str, Any]], result: dict[str, Any]) -> list[Picture | None]:
    """Against each cost in which runs differ by more than chance."""
    costs = {
        "parameters": "parameters of the adapter",
        "memory": "memory of its own, MiB",
        "seconds": "seconds of training",
    }
    sign = 1 if result["lower_is_better"] else -1
    found: list[Picture | None] = []
    for key, unit in costs.items():
        some = [place for place in places if place[key]]
        prices = [place[key] for place in some]
        if len(some) < 2 or min(prices) > (1 - _APART) * max(prices):
            continue
        ordered = sorted(some, key=lambda place: (place[key], sign * place["metric"]))
        best, drawn = math.inf, []
        for place in ordered:
            drawn.append(Dot(place["name"], place[key], place["metric"], sign * place["metric"] < best))
            best = min(best, sign * place["metric"])
        says = "On the line: no run that costs less is as good."
        found.append(pictures.dots(f"{_title(result)} against {key}", unit, result["metric"], drawn, says))
    return found
