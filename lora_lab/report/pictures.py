"""Drawings for pages, as SVG whose colours are the page's own, so that they follow it into the dark.

A page defines the variables --ink, --dim, --line, --card, --bar, --on-bar and --error, and for curves --line-1 to --line-6. Texts are escaped here.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from lora_lab.runtime import console

_MANY, _CLASSES = (
    6,
    24,
)  # classes above which a matrix is wide; most that are drawn: of more, those that are mixed up most
_LETTERS = 14  # of a class's name
_BINS = 10  # of a calibration
_FEW, _LEAST = 10, 30  # rows of a bin at least; rows from which a plot is drawn
_PARTS = 6  # of the lengths
_POINTS, _DOTS = 600, 60  # of a line that are drawn; most that are marked
_LEGEND = 48  # letters of a line's name
COLOURS = range(1, 7)  # of lines: the variables --line-1 to --line-6
_DASHES = ("", "7 4", "2 3", "10 3 2 3", "4 2", "1 2 6 2")  # of the lines, which differ in more than their colour
_WIDTH, _HEIGHT = 420, 280  # of a plot
_ROW = 20  # of a bar
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 42  # around its frame
_CELL, _CELL_HEIGHT = 64, 34  # of a heat map
_FULL = 0.72  # share from which a cell is dark enough for light letters
_AXIS, _LEVELS = 120, 10  # between two axes of parallel coordinates; most that are named on one
_OVER = "; paint-order: stroke; stroke: var(--card); stroke-width: 3px"  # letters that lines go through
_LARGE = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))  # numbers from, what they are divided by, its letter


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawing, what it shows, and what to make of it."""

    title: str
    svg: str
    says: str
    wide: bool = False  # it needs the width of the page


def confusion(labels: Sequence[str], rows: Sequence[Sequence[int]]) -> Picture | None:
    """Rows are true classes, columns what was said; the shade is the share of the row. None: there is one class."""
    counts = np.asarray(rows)
    if len(labels) < 2 or counts.sum() == 0:
        return None
    wrong = counts.sum(1) + counts.sum(0) - 2 * counts.diagonal()
    chosen = np.sort(np.argsort(-wrong, kind="stable")[:_CLASSES])
    names, counts = [labels[place] for place in chosen], counts[np.ix_(chosen, chosen)]
    count, longest = len(names), max(_columns(_short(name)) for name in names)
    cell = max(30, min(64, 420 // count))
    left, slanted = 26 + 7 * longest, 7 * longest > cell - 6
    top = 44 + (5 * longest if slanted else 0)
    right = 5 * longest if slanted else 6
    parts = [
        _label(left + cell * count / 2, 14, "said", "dim"),
        _label(12, top + cell * count / 2, "true", "dim", turn=-90),
    ]
    for place, name in enumerate(names):
        middle = left + cell * (place + 0.5)
        if slanted:
            parts.append(_label(middle, top - 8, _short(name), anchor="start", turn=-45, title=name))
        else:
            parts.append(_label(middle, top - 8, _short(name), title=name))
        parts.append(_label(left - 8, top + cell * (place + 0.5) + 4, _short(name), anchor="end", title=name))
    for (row, column), value in np.ndenumerate(counts):
        share = value / max(1, counts[row].sum())
        x, y = left + cell * column, top + cell * row
        colour = "line" if not value else "bar" if row == column else "error"
        title = f"{names[row]} said to be {names[column]}: {value} ({share:.0%})"
        parts.append(
            f'<rect x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{cell - 2}" rx="3" style="fill: var(--{colour})" '
            f'fill-opacity="{0.1 + 0.9 * share if value else 0.35:.3f}"><title>{_safe(title)}</title></rect>'
        )
        if value:
            parts.append(_label(x + cell / 2, y + cell / 2 + 4, str(value), "on-bar" if share > 0.5 else "ink"))
    left_out = f" Of {len(labels)} classes, the {count} that are mixed up most." if count < len(labels) else ""
    pairs = [
        (int(counts[row, column]), names[row], names[column])
        for row, column in itertools.product(range(count), repeat=2)
        if row != column
    ]
    most, true, said = max(pairs)
    says = (
        f"Most often mixed up: {true} is said to be {said}, {most} times." if most else "No class is taken for another."
    )
    title = "Which class is taken for which"
    drawing = _svg(left + cell * count + right, top + cell * count + 6, parts, title)
    return Picture(title, drawing, says + left_out, count > _MANY)


def calibration(scores: Sequence[tuple[float, bool]]) -> Picture | None:
    """How often what was said with a probability is right, in parts of as many rows. None: too few rows."""
    if len(scores) < _LEAST:
        return None
    given, right = np.array([score for score, _ in scores]), np.array([is_right for _, is_right in scores], dtype=float)
    order = np.argsort(given, kind="stable")
    plot = _Plot((0, 1), (0, 1), "probability", "share that is right")
    parts = [plot.frame([0, 0.25, 0.5, 0.75, 1], [0, 0.25, 0.5, 0.75, 1])]
    parts.append(
        f'<line x1="{plot.x(0):.1f}" y1="{plot.y(0):.1f}" x2="{plot.x(1):.1f}" y2="{plot.y(1):.1f}" '
        'style="stroke: var(--dim)" stroke-dasharray="4 4"/>'
    )
    error = 0.0
    for inside in np.array_split(order, min(_BINS, len(order) // _FEW)):
        count, x, y = len(inside), float(given[inside].mean()), float(right[inside].mean())
        error += count / len(given) * abs(x - y)
        low, high = interval(y * count, count)
        title = f"{count} rows: said with {x:.2f}, right {y:.2f}"
        parts.append(_whisker(plot.x(x), plot.y(low), plot.y(high)))
        parts.append(
            f'<circle cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="4.5" style="fill: var(--bar)"><title>{_safe(title)}</title></circle>'
        )
    lean = float((given - right).mean())
    which = "surer than it should be" if lean > 0 else "less sure than it could be"
    says = f"Expected calibration error {error:.3f}; the model is {which} by {abs(lean):.3f} on average. Below the dashed line it is too sure."
    title = "Is it as often right as it says?"
    return Picture(title, _svg(_WIDTH, _HEIGHT, parts, title), says)


def by_length(rows: Sequence[tuple[int, float]], unit: str) -> Picture | None:
    """How far off rows of each length are, in parts of as many rows. None: too few rows, or nothing is off."""
    if len(rows) < _LEAST or not any(off for _, off in rows):
        return None
    lengths, off = np.array([length for length, _ in rows]), np.array([value for _, value in rows])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, min(_PARTS, len(rows) // _FEW) + 1)).round().astype(int))
    if len(edges) < 3:
        return None
    edges[-1] += 1
    is_share = set(np.unique(off)) <= {0.0, 1.0}
    bars = []
    for start, end in itertools.pairwise(edges):
        inside = off[(lengths >= start) & (lengths < end)]
        if len(inside):
            mean = float(inside.mean())
            spread = 1.96 * float(inside.std()) / math.sqrt(len(inside))
            low, high = (
                interval(float(inside.sum()), len(inside)) if is_share else (max(0.0, mean - spread), mean + spread)
            )
            bars.append((f"{start}–{end - 1}" if end - 1 > start else f"{start}", len(inside), mean, low, high))
    ticks = _ticks(max(high for *_, high in bars))
    plot = _Plot((0, len(bars)), (0, ticks[-1]), unit, "share that is off" if is_share else "mean distance")
    parts = [plot.frame([], ticks)]
    for place, (name, count, mean, low, high) in enumerate(bars):
        x, width = plot.x(place + 0.5), 0.62 * (plot.x(1) - plot.x(0))
        title = f"{name}: {count} rows, {mean:.3g}"
        parts.append(
            f'<rect x="{x - width / 2:.1f}" y="{plot.y(mean):.1f}" width="{width:.1f}" height="{plot.y(0) - plot.y(mean):.1f}" rx="2" '
            f'style="fill: var(--bar)"><title>{_safe(title)}</title></rect>'
        )
        parts.append(_whisker(x, plot.y(low), plot.y(high)))
        parts.append(_label(x, plot.y(0) + 15, name, "dim", size=11))
    first, last = bars[0], bars[-1]
    apart = first[4] < last[3] or last[4] < first[3]
    says = f"Shortest {first[2]:.3g}, longest {last[2]:.3g}; the lines are 95 % intervals"
    says += "." if apart else ", and those of the two overlap: no difference can be told."
    title = "Does it depend on the length?"
    return Picture(title, _svg(_WIDTH, _HEIGHT, parts, title), says)


@dataclasses.dataclass(frozen=True)
class Line:
    """Values by step. Lines of one name share a colour and an entry of the legend."""

    name: str
    points: Mapping[int, float]
    faint: bool = False  # behind the others, without an entry of its own
    dots: bool = False
    band: Mapping[int, tuple[float, float]] = dataclasses.field(default_factory=dict)  # around the points


def lines(title: str, unit: str, drawn: Sequence[Line], says: str = "") -> Picture | None:
    """Curves over the steps. None: no line has two points."""
    drawn = [line for line in drawn if line.points]
    if not any(len(line.points) > 1 for line in drawn):
        return None
    names = list(dict.fromkeys(line.name for line in drawn))
    steps = [step for line in drawn for step in line.points]
    values = [value for line in drawn if not line.faint for value in line.points.values()]
    across, up = _around(min(steps), max(steps)), _around(min(values), max(values))
    plot = _Plot((min(steps), max(steps)), (up[0], up[-1]), "step", unit)
    whole = [tick for tick in across if min(steps) <= tick <= max(steps) and tick.is_integer()]
    parts = [plot.frame(whole, up)]
    for line in sorted(drawn, key=lambda one: not one.faint):
        number = names.index(line.name) % len(_DASHES)
        colour = f"stroke: var(--line-{number + 1}); fill: none"
        dash = f' stroke-dasharray="{_DASHES[number]}"' if _DASHES[number] and not line.faint else ""
        if line.band:
            edges = [(step, low) for step, (low, _) in sorted(line.band.items())]
            edges += [(step, high) for step, (_, high) in sorted(line.band.items(), reverse=True)]
            around = " ".join(
                f"{plot.x(step):.1f},{plot.y(min(max(value, up[0]), up[-1])):.1f}" for step, value in edges
            )
            parts.append(f'<polygon points="{around}" style="fill: var(--line-{number + 1})" fill-opacity="0.15"/>')
        points = [(plot.x(step), plot.y(min(max(value, up[0]), up[-1]))) for step, value in _thinned(line.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        weight = 'stroke-width="1" stroke-opacity="0.3"' if line.faint else 'stroke-width="2"'
        parts.append(f'<polyline points="{path}" style="{colour}" stroke-linejoin="round" {weight}{dash}/>')
        if line.dots and len(points) <= _DOTS:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill: var(--line-{number + 1})">'
                f"<title>{_safe(f'step {step}: {value:.4g}')}</title></circle>"
                for (x, y), (step, value) in zip(points, sorted(line.points.items()), strict=True)
            ]
    height = _HEIGHT
    for name in names if len(names) > 1 else ():
        number = names.index(name) % len(_DASHES)
        parts.append(
            f'<line x1="{_LEFT}" y1="{height + 6}" x2="{_LEFT + 28}" y2="{height + 6}" stroke-width="2" '
            f'style="stroke: var(--line-{number + 1})" stroke-dasharray="{_DASHES[number] or "none"}"/>'
        )
        parts.append(_label(_LEFT + 36, height + 10, _short(name, _LEGEND), anchor="start", title=name))
        height += 18
    return Picture(title, _svg(_WIDTH, height + 2, parts, f"{title}. {says}"), says)


@dataclasses.dataclass(frozen=True)
class Dot:
    """Something that has a price and a value."""

    name: str
    x: float
    y: float
    ahead: bool  # nothing that costs less is as good


def dots(title: str, x_unit: str, y_unit: str, drawn: Sequence[Dot], says: str = "") -> Picture:
    """Values against prices, and the line of those that are ahead. The prices differ."""
    across = _around(min(dot.x for dot in drawn), max(dot.x for dot in drawn), 5)
    up = _around(min(dot.y for dot in drawn), max(dot.y for dot in drawn))
    plot = _Plot((across[0], across[-1]), (up[0], up[-1]), x_unit, y_unit)
    front = " ".join(f"{plot.x(dot.x):.1f},{plot.y(dot.y):.1f}" for dot in sorted(drawn, key=_price) if dot.ahead)
    parts = [
        plot.frame(across, up),
        f'<polyline points="{front}" style="stroke: var(--bar); fill: none" stroke-width="2"/>',
    ]
    for dot in sorted(drawn, key=lambda one: one.ahead):
        x, y, colour = plot.x(dot.x), plot.y(dot.y), "bar" if dot.ahead else "dim"
        told = _safe(f"{dot.name}: {dot.x:.4g}, {dot.y:.4g}")
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4.5 if dot.ahead else 3.5}" style="fill: var(--{colour})"><title>{told}</title></circle>'
        )
        on_the_right = x < _WIDTH - _RIGHT - 24
        side, anchor = (x + 6, "start") if on_the_right else (x - 6, "end")
        parts.append(
            _label(side, y - 4, _short(dot.name), "ink" if dot.ahead else "dim", anchor, size=11, title=dot.name)
        )
    return Picture(title, _svg(_WIDTH, _HEIGHT, parts, f"{title}. {says}"), says)


def _price(dot: Dot) -> tuple[float, float]:
    return dot.x, dot.y


def heat_map(
    title: str,
    down: tuple[str, Sequence[str]],
    across: tuple[str, Sequence[str]],
    cells: np.ndarray,
    lower_is_better: bool,
    says: str,
) -> Picture:
    """The better, the fuller.

    Args:
        down: what the rows differ in, and their names; `across`: the columns.
        cells: of rows and columns; nan: there is none.
    """
    names = [[_short(name) for name in axis[1]] for axis in (down, across)]
    left, top = 30 + 7 * max(map(_columns, names[0])), 42
    cell = max(_CELL, 14 + 7 * max(map(_columns, names[1])))
    width = left + cell * len(names[1]) + 6
    parts = [
        _label(left + cell * len(names[1]) / 2, 14, across[0], "dim"),
        _label(12, top + _CELL_HEIGHT * len(names[0]) / 2, down[0], "dim", turn=-90),
    ]
    parts += [_label(left + cell * (place + 0.5), top - 8, name) for place, name in enumerate(names[1])]
    parts += [
        _label(left - 8, top + _CELL_HEIGHT * (place + 0.5) + 4, name, anchor="end")
        for place, name in enumerate(names[0])
    ]
    shares = _shares(cells, lower_is_better)
    for (row, column), value in np.ndenumerate(cells):
        x, y, share = left + cell * column, top + _CELL_HEIGHT * row, shares[row, column]
        is_there = math.isfinite(value)
        colour, full = ("bar", 0.08 + 0.92 * share) if is_there else ("line", 0.35)
        parts.append(
            f'<rect x="{x + 1}" y="{y + 1}" width="{cell - 2}" height="{_CELL_HEIGHT - 2}" rx="3" style="fill: var(--{colour})" '
            f'fill-opacity="{full:.3f}"/>'
        )
        if is_there:
            ink = "on-bar" if share > _FULL else "ink"
            parts.append(_label(x + cell / 2, y + _CELL_HEIGHT / 2 + 4, f"{value:.4f}", ink))
    drawing = _svg(width, top + _CELL_HEIGHT * len(names[0]) + 6, parts, f"{title}. {says}")
    return Picture(title, drawing, says, width > _WIDTH)


def _shares(values: np.ndarray, lower_is_better: bool) -> np.ndarray:
    """From 0, the worst, to 1, the best."""
    low, high = np.nanmin(values), np.nanmax(values)
    shares = (values - low) / (high - low) if high > low else np.ones_like(values)
    return 1 - shares if lower_is_better and high > low else shares


def parallel(
    title: str,
    axes: Sequence[tuple[str, Sequence[str]]],
    drawn: Sequence[tuple[Sequence[int], float]],
    lower_is_better: bool,
    says: str,
) -> Picture:
    """Each as a line through what it has of each axis, and at last its value; the better, the stronger, and the best in a colour of its own.

    Args:
        axes: what they differ in, and the names of its levels, the lowest first.
        drawn: the level on each axis, and the value.
    """
    values = np.array([value for _, value in drawn])
    shares, low, high = _shares(values, lower_is_better), float(values.min()), float(values.max())
    top, bottom, last = 16, _HEIGHT - 34, len(axes)
    width = 24 + _AXIS * last + 64

    def y(share: float) -> float:
        return bottom - share * (bottom - top)

    parts = []
    for place in range(last + 1):
        x = 14 + _AXIS * place
        parts.append(f'<line x1="{x}" y1="{top}" x2="{x}" y2="{bottom}" style="stroke: var(--line)" stroke-width="2"/>')
    best = int(np.argmax(shares))
    for one in sorted(range(len(drawn)), key=lambda number: (number == best, shares[number])):
        levels, value = drawn[one]
        heights = [
            level / (len(axis[1]) - 1) if len(axis[1]) > 1 else 0.5 for level, axis in zip(levels, axes, strict=True)
        ]
        heights.append((value - low) / (high - low) if high > low else 0.5)
        path = " ".join(f"{14 + _AXIS * place},{y(height):.1f}" for place, height in enumerate(heights))
        colour = "line-2" if one == best else "bar"
        weight = (
            'stroke-width="2.5"'
            if one == best
            else f'stroke-width="1.5" stroke-opacity="{0.15 + 0.6 * shares[one]:.2f}"'
        )
        parts.append(
            f'<polyline points="{path}" style="stroke: var(--{colour}); fill: none" stroke-linejoin="round" {weight}/>'
        )
    for place, (key, names) in enumerate(axes):
        x = 14 + _AXIS * place
        parts.append(_label(x, _HEIGHT - 10, key, "dim", "start" if place == 0 else "middle"))
        for number, level in list(enumerate(names))[:: math.ceil(len(names) / _LEVELS)]:
            height = number / (len(names) - 1) if len(names) > 1 else 0.5
            parts.append(_label(x + 5, y(height) - 4, _short(level), anchor="start", size=11, title=level, style=_OVER))
    x = 14 + _AXIS * last
    parts += [
        _label(x + 5, y(share) - 4, f"{value:.4g}", anchor="start", size=11, style=_OVER)
        for share, value in ((0.0, low), (1.0, high))
    ]
    parts.append(_label(x, _HEIGHT - 10, title, "dim"))
    return Picture(
        "Parallel coordinates", _svg(width, _HEIGHT, parts, f"Parallel coordinates. {says}"), says, width > _WIDTH + 60
    )


def _around(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from below the lowest to above the highest value."""
    if not high > low:
        least = 0.0 if low >= 0 else -math.inf  # no share is below 0
        low, high = max(least, low - (abs(low) or 1.0) / 2), high + (abs(high) or 1.0) / 2
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _thinned(points: Mapping[int, float]) -> list[tuple[int, float]]:
    """In order; of very many the lowest and the highest of each part, so that no peak is lost."""
    found = sorted(points.items())
    if len(found) <= _POINTS:
        return found
    kept = []
    for part in np.array_split(np.arange(len(found)), _POINTS // 2):
        inside = [found[place] for place in part]
        ends = {min(inside, key=lambda one: one[1]), max(inside, key=lambda one: one[1])}
        kept += sorted(ends)
    return kept


def rises(parts: Sequence[tuple[str, float, float | None]], title: str) -> Picture | None:
    """Numbers of some parts as bars from 0, with half the width of their intervals; None: there are none.

    Args:
        parts: name, number, and half the width; None: it cannot be told.
    """
    if not parts:
        return None
    left = 20 + 7 * max(_columns(_short(name)) for name, _, _ in parts)
    ends = [value + sign * (margin or 0.0) for _, value, margin in parts for sign in (-1, 1)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    scale = (_WIDTH - left - 70) / (high - low or 1.0)
    parts_of_picture = [
        f'<line x1="{left - low * scale:.1f}" y1="4" x2="{left - low * scale:.1f}" y2="{_ROW * len(parts) + 4}" style="stroke: var(--line)"/>'
    ]
    for place, (name, value, margin) in enumerate(parts):
        middle, start, end = (
            _ROW * (place + 0.5) + 4,
            left + (min(0.0, value) - low) * scale,
            left + (max(0.0, value) - low) * scale,
        )
        text = f"{value:+.3g}" if margin is None else f"{value:+.3g} ± {margin:.2g}"
        parts_of_picture += [
            _label(left - 8, middle + 4, _short(name), anchor="end", title=name),
            f'<rect x="{start:.1f}" y="{middle - 6:.1f}" width="{end - start:.1f}" height="12" rx="2" style="fill: var(--bar)">'
            f"<title>{_safe(f'{name}: {text}')}</title></rect>",
            _label(_WIDTH - 2, middle + 4, f"{value:+.3g}", "dim", "end", size=11),
        ]
        if margin is not None:
            from_x, to_x = left + (value - margin - low) * scale, left + (value + margin - low) * scale
            parts_of_picture.append(
                f'<line x1="{from_x:.1f}" y1="{middle:.1f}" x2="{to_x:.1f}" y2="{middle:.1f}" style="stroke: var(--ink)" stroke-width="1.5"/>'
            )
    apart = [name for name, value, margin in parts if margin is not None and abs(value) > margin]
    most = max(parts, key=lambda one: one[1])
    says = f"It rises most without {most[0]} ({most[1]:+.3g}). Lines are 95 % intervals; {len(apart)} of {len(parts)} can be told from no change."
    return Picture(title, _svg(_WIDTH, _ROW * len(parts) + 8, parts_of_picture, f"{title}. {says}"), says)


def interval(hits: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    share, scale = hits / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclasses.dataclass(frozen=True)
class _Plot:
    """A frame with two axes."""

    across: tuple[float, float]
    up: tuple[float, float]
    x_title: str
    y_title: str

    def x(self, value: float) -> float:
        low, high = self.across
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.up
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def frame(self, across: Sequence[float], up: Sequence[float]) -> str:
        parts = []
        for value in up:
            parts.append(
                f'<line x1="{_LEFT}" y1="{self.y(value):.1f}" x2="{_WIDTH - _RIGHT}" y2="{self.y(value):.1f}" style="stroke: var(--line)"/>'
            )
            parts.append(_label(_LEFT - 6, self.y(value) + 4, _number(value), "dim", "end", size=11))
        parts += [_label(self.x(value), _HEIGHT - _BOTTOM + 15, _number(value), "dim", size=11) for value in across]
        parts.append(_label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, self.x_title, "dim"))
        parts.append(_label(11, (_TOP + _HEIGHT - _BOTTOM) / 2, self.y_title, "dim", turn=-90))
        return "".join(parts)


def _number(value: float) -> str:
    """At an axis: no 1e+06."""
    for least, unit, letter in _LARGE:
        if abs(value) >= least:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _ticks(most: float) -> list[float]:
    """Round numbers from 0 to above the largest value."""
    step = 10 ** math.floor(math.log10(most / 3)) if most > 0 else 1.0
    step = next(step * factor for factor in (1, 2, 5, 10) if step * factor * 5 >= most)
    return [round(step * number, 10) for number in range(math.ceil(most / step - 1e-9) + 1)]


def _whisker(x: float, low: float, high: float) -> str:
    return f'<line x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}" style="stroke: var(--ink)" stroke-width="1.5"/>'


def _label(
    x: float,
    y: float,
    text: str,
    colour: str = "ink",
    anchor: str = "middle",
    turn: int = 0,
    size: int = 12,
    title: str = "",
    style: str = "",
) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    hint = f"<title>{_safe(title)}</title>" if title and title != text else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" style="fill: var(--{colour}){style}"{turned}>'
        f"{_safe(text)}{hint}</text>"
    )


def _svg(width: float, height: float, parts: Sequence[str], name: str) -> str:
    """A drawing, with its name for who does not see it."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{_safe(name)}" style="max-width: {width:.0f}px">'
        f"{''.join(parts)}</svg>"
    )


def _safe(text: str) -> str:
    return html.escape(console.shown(text).replace("\n", " "))


def _short(name: str, most: int = _LETTERS) -> str:
    text = name.strip() or "(empty)"
    return text if _columns(text) <= most else f"{text[: most - 1 if _columns(text) == len(text) else most // 2]}…"


def _columns(text: str) -> int:
    """The width of a text in letters; Chinese ones are twice as wide."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
