"""The drawings of a sweep's report, and the bins of a data page: numbers where they belong, and round ones."""

from __future__ import annotations

import re

import numpy as np
import pytest

from lora_lab.report import data_report, pictures, sweep_report
from lora_lab.report.curves import Curve
from lora_lab.report.pictures import Dot
from tests.report.test_evaluation import drawn, points

RESULT = {"folder": "runs/ranks", "metric": "loss", "lower_is_better": True, "take": "0", "judgement": "Take 0."}


def place(name: str, metric: float | None, **values: object) -> dict[str, object]:
    own = {"values": values, "metrics": [metric], "parameters": 10_000 * int(values["r"]), "memory": 2.0}
    return {"name": name, "metric": metric, **own, "seconds": 3.0, "steps": 4, "note": ""}


def grid(*more: str) -> list[dict[str, object]]:
    found = [(r, lr) for r in (4, 8) for lr in (0.001, 0.01)]
    return [place(f"{i}", 1.0 + i, r=r, lr=lr, **dict.fromkeys(more, f"{i}")) for i, (r, lr) in enumerate(found)]


def fills(svg: str) -> list[tuple[str, float]]:
    return [(name, float(full)) for name, full in re.findall(r"fill: var\(--([\w-]+)\)\" fill-opacity=\"([\d.]+)", svg)]


def test_the_fullest_cell_of_a_heat_map_is_the_best():
    cells = np.array([[1.0, 2.0], [np.nan, 3.0]])
    low = pictures.heat_map("Loss", ("r", ["4", "8"]), ("lr", ["<1>", "2"]), cells, True, "says")
    assert [name for name, _ in fills(low.svg)] == ["bar", "bar", "line", "bar"]
    assert [full for _, full in fills(low.svg)] == pytest.approx([1.0, 0.54, 0.35, 0.08])
    assert drawn(low) == ["lr", "r", "<1>", "2", "4", "8", "1.0000", "2.0000", "3.0000"]
    high = pictures.heat_map("F1", ("r", ["4", "8"]), ("lr", ["1", "2"]), cells, False, "says")
    assert [full for _, full in fills(high.svg)] == pytest.approx([0.08, 0.54, 0.35, 1.0])


def test_runs_that_nothing_cheaper_equals_are_joined():
    picture = sweep_report._pareto(grid(), RESULT)
    assert [one.title for one in picture] == ["Loss against parameters"]  # all others cost the same
    assert len(points(picture[0].svg)[0]) == 1  # run 0 is the best, and the cheapest
    better = [place("0", 2.0, r=4), place("1", 1.5, r=8), place("2", 1.7, r=16)]
    [picture] = sweep_report._pareto(better, RESULT)
    assert len(points(picture.svg)[0]) == 2
    assert {"0", "1", "2", "50k", "100k", "150k"} <= set(drawn(picture))


def test_large_numbers_at_an_axis_are_short():
    drawing = pictures.dots("Loss", "parameters", "loss", [Dot("a", 1e6, 1.0, True), Dot("b", 3.5e6, 2.0, False)])
    assert {"1M", "2M", "3M", "4M"} <= set(drawn(drawing))
    assert not [text for text in drawn(drawing) if "e+" in text]


def test_lines_through_all_values_are_drawn_of_three_or_more():
    assert sweep_report._parallel(grid(), RESULT) is None  # the heat map says it all
    searched = [place(f"{i}", 1.0 + i, r=4 * (i + 1), lr=0.001 * (i + 1)) for i in range(24)]
    assert sweep_report._heat_map(searched, RESULT) is None  # most of its cells would be empty
    assert len(points(sweep_report._parallel(searched, RESULT).svg)) == 24
    picture = sweep_report._parallel(grid("seed"), RESULT)
    lines = points(picture.svg)
    assert [len(line) for line in lines] == [4] * 4
    assert "--line-2" in picture.svg.rpartition("<polyline")[2]  # the best is drawn over the others
    assert lines[-1][-1][1] == max(y for line in lines for _, y in line)  # and its loss is the lowest
    assert {"r", "lr", "seed", "loss", "0.001", "0.01", "4", "8", "1"} <= set(drawn(picture))


def test_seeds_are_a_mean_and_a_band_and_one_point_is_no_curve():
    seeds = [{1: 1.0, 2: 2.0}, {1: 3.0, 2: 4.0, 3: 9.0}]
    line = sweep_report._line(Curve("0", "r=4", seeds, []), seeds)
    assert line.points == {1: 2.0, 2: 3.0}
    assert line.band[1] == pytest.approx((2 - 2**0.5, 2 + 2**0.5))
    losses, held_out = sweep_report._curves([Curve("0", "r=4", seeds, [{3: 1.0}])])
    assert "<polygon" in losses.svg
    assert "one standard deviation" in losses.says
    assert held_out is None
    many = [Curve(f"{i}", f"r={i}", [{1: 1.0, 2: 2.0}], []) for i in range(8)]
    assert sweep_report._curves(many)[0].says == "The 6 best of 8 runs."


@pytest.mark.parametrize(
    ("lengths", "width", "first", "count"),
    [
        ([3, 128], 20, 0, 7),
        ([7, 7], 1, 7, 1),
        ([500, 700], 20, 500, 11),
        ([0, 119], 10, 0, 12),
        ([3, 70_000], 10_000, 0, 8),
    ],
)
def test_bins_are_round_and_hold_every_length_once(lengths, width, first, count):
    bins = data_report._bins(np.array([*lengths, lengths[0]]))
    assert (bins[0].start, len(bins)) == (first, count)
    assert {one.end - one.start + 1 for one in bins} == {width}
    assert sum(one.count for one in bins) == 3
    assert bins[-1].start <= max(lengths) <= bins[-1].end
    assert max(one.share for one in bins) == 1
