"""A sweep as one page that needs nothing from elsewhere: ranking, heat map, parallel coordinates, curves, Pareto fronts."""

from __future__ import annotations

import io
import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lab.report import pages
from lora_lab.report.curves import Curve, smoothed
from lora_lab.runtime import console, storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#010203"  # stands for the page's own colour of text, light or dark
_MARK = "#1b6ca8"  # the same for what stands out
_FONT = ["Noto Sans CJK SC", "Noto Sans SC", "Microsoft YaHei", "PingFang SC", "sans-serif"]


def write(file: Path, result: dict[str, Any], curves: Sequence[Curve]) -> None:
    """Write the page; what cannot be drawn from these runs is left out.

    Args:
        result: what `ranking.json` says.
    """
    places = [place for place in result["ranking"] if place["metric"] is not None]
    plots: list[tuple[str, Callable[[], Figure | None]]] = [
        ("Heat map", lambda: _heat_map(places, result)),
        ("Parallel coordinates", lambda: _parallel(places, result)),
        ("Losses", lambda: _curves(curves)),
        (f"{result['metric']} against cost", lambda: _pareto(places, result)),
    ]
    notes = [note for curve in curves for note in curve.notes]
    drawn = []
    for title, draw in plots:
        try:
            figure = draw()
            drawn += [] if figure is None else [(title, _svg(figure))]
        except Exception as error:  # values can be anything; the other drawings and the table are worth having
            notes.append(f"{title}: cannot be drawn of these runs ({error}).")
    for note in notes:
        console.say("damaged", note)
    keys = list(dict.fromkeys(key for place in result["ranking"] for key in place["values"]))
    page = pages.render("sweep.html.jinja", result=result, keys=keys, figures=drawn, notes=notes)
    storage.write_text(file, page)


def _figure(width: float, height: float) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # the page's reader has fonts of their own
    mpl.rcParams["font.family"] = "sans-serif"
    mpl.rcParams["font.sans-serif"] = _FONT
    mpl.rcParams["text.parse_math"] = False  # a value with two $ is no formula
    mpl.rcParams["svg.hashsalt"] = "lora_lab"
    for part in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        mpl.rcParams[part] = _INK
    mpl.rcParams["svg.fonttype"] = "none"
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> str:
    """The drawing in the page's colours, not narrower than its texts can be read at."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    text = file.getvalue()[file.getvalue().index("<svg") :].replace(_INK, "var(--ink)").replace(_MARK, "var(--mark)")
    return text.replace("<svg", f'<svg style="min-width: {60 * figure.get_figwidth():.0f}px"', 1)


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


def _colours(result: dict[str, Any]) -> str:
    """The colour map in which the best is bright."""
    return "viridis_r" if result["lower_is_better"] else "viridis"


def _heat_map(places: Sequence[dict[str, Any]], result: dict[str, Any]) -> Figure | None:
    """The two first values that vary, rank and learning rate before others; the mean over all others."""
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
    figure = _figure(1.8 + 1.1 * len(across), 1.6 + 0.55 * len(down))
    ax = figure.subplots()
    ax.imshow(cells, cmap=_colours(result), aspect="auto")
    middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
    for (row, column), value in np.ndenumerate(cells):
        if math.isfinite(value):
            ax.text(
                column,
                row,
                f"{value:.4f}",
                ha="center",
                va="center",
                color="black" if (value <= middle) == result["lower_is_better"] else "white",
            )
    ax.set_xticks(range(len(across)), [_label(value) for value in across])
    ax.set_yticks(range(len(down)), [_label(value) for value in down])
    ax.set_xlabel(keys[1])
    ax.set_ylabel(keys[0])
    ax.set_title(f"{result['metric']}, the best is bright", fontsize=10)
    return figure


def _parallel(places: Sequence[dict[str, Any]], result: dict[str, Any]) -> Figure | None:
    keys = _varying(places)
    if not keys or len(places) < 2:
        return None
    import matplotlib as mpl

    figure = _figure(2 + 1.8 * len(keys), 3.6)
    ax = figure.subplots()
    metrics = [place["metric"] for place in places]
    scale = mpl.colors.Normalize(min(metrics), max(metrics))
    levels = {key: _levels(places, key) for key in keys}
    for place in reversed(places):  # the best is drawn last
        heights = [_height(levels[key].index(place["values"].get(key)), len(levels[key])) for key in keys]
        heights.append(float(scale(place["metric"])))
        ax.plot(
            range(len(heights)),
            heights,
            "o-",
            color=mpl.colormaps[_colours(result)](scale(place["metric"])),
            lw=1.6,
            ms=4,
        )
    for x, key in enumerate(keys):
        ax.axvline(x, color="#bbbbbb", lw=1, zorder=0)
        for number, value in enumerate(levels[key]):
            ax.text(x + 0.03, _height(number, len(levels[key])), _label(value), fontsize=8, va="bottom")
    ax.axvline(len(keys), color="#bbbbbb", lw=1, zorder=0)
    for share in (0.0, 1.0):
        ax.text(len(keys) + 0.03, share, f"{scale.inverse(share):.4f}", fontsize=8, va="bottom")
    ax.set_xticks(range(len(keys) + 1), [*map(_short, keys), result["metric"]])
    ax.set_yticks([])
    ax.set_xlim(-0.1, len(keys) + 0.5)
    for side in ax.spines.values():
        side.set_visible(False)
    return figure


def _height(number: int, count: int) -> float:
    return number / (count - 1) if count > 1 else 0.5


def _curves(curves: Sequence[Curve], most: int = 8) -> Figure | None:
    if not any(curve.train and curve.train[0] for curve in curves):
        return None
    axes = [("training loss, smoothed", True)]
    if any(
        len(one) > 1 for curve in curves[:most] for one in curve.held_out
    ):  # a point is no curve; the ranking has it
        axes.append(("held-out loss", False))
    figure = _figure(1.5 + 4.8 * len(axes), 3.8)
    panels = figure.subplots(1, len(axes), squeeze=False)[0]
    for number, curve in enumerate(curves[:most]):
        colour = f"C{number}"
        label = _shortened(curve.title, 60)
        for (_, is_train), ax in zip(axes, panels, strict=True):
            if is_train:
                _draw(ax, [smoothed(one) for one in curve.train], colour, label)
            else:
                _draw(ax, curve.held_out, colour, label, marker="o")
    more = f" (the {most} best of {len(curves)})" if len(curves) > most else ""
    for (title, _), ax in zip(axes, panels, strict=True):
        ax.set_title(title + more, fontsize=10)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=7, frameon=False)
    return figure


def _draw(ax: Axes, seeds: Sequence[dict[int, float]], colour: str, label: str, marker: str = "") -> None:
    """The mean over the seeds, and one standard deviation around it."""
    steps = sorted(set.intersection(*map(set, seeds))) if seeds else []
    if not steps:
        return
    values = np.array([[one[step] for step in steps] for one in seeds])
    mean = values.mean(0)
    ax.plot(steps, mean, color=colour, label=label, lw=1.4, marker=marker, ms=3)
    if len(seeds) > 1:
        spread = values.std(0, ddof=1)
        ax.fill_between(steps, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)


def _pareto(places: Sequence[dict[str, Any]], result: dict[str, Any]) -> Figure | None:
    costs = [
        (key, label)
        for key, label in (
            ("parameters", "adapter, parameters"),
            ("memory", "memory of its own, MiB"),
            ("seconds", "training, seconds"),
        )
        if len({place[key] for place in places if place[key] is not None}) > 1
    ]
    if not costs or len(places) < 2:
        return None
    from matplotlib.ticker import EngFormatter

    sign = 1 if result["lower_is_better"] else -1
    figure = _figure(4 * len(costs), 3.6)
    for (key, label), ax in zip(costs, figure.subplots(1, len(costs), squeeze=False)[0], strict=True):
        points = sorted(
            (place[key], sign * place["metric"], place["name"]) for place in places if place[key] is not None
        )
        front = [point for i, point in enumerate(points) if all(point[1] < other[1] for other in points[:i])]
        ax.scatter([x for x, _, _ in points], [sign * y for _, y, _ in points], color="#8c8c8c", s=18)
        ax.plot([x for x, _, _ in front], [sign * y for _, y, _ in front], "o-", color=_MARK, ms=5)
        for x, y, name in points:
            ax.annotate(name, (x, sign * y), textcoords="offset points", xytext=(4, 3), fontsize=8)
        ax.set_xlabel(label)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_ylabel(result["metric"])
        ax.spines[["top", "right"]].set_visible(False)
    return figure
