"""What is shown in a terminal of 80 columns, and in a wide one."""

from __future__ import annotations

import io
import re

import pytest

from lora_lab.runtime import console


@pytest.fixture
def screen(monkeypatch):
    """Of a width; what it shows, without the terminal's own sequences."""

    def begin(width: int):
        file = io.StringIO()
        monkeypatch.setattr(console, "out", console.Console(file=file, force_terminal=True, width=width, _environ={}))
        return lambda: re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()))

    return begin


def test_numbers_of_a_step_are_whole_where_a_bar_has_no_room(screen):
    for width in (80, 120):
        shown = screen(width)
        with console.steps("train", 144) as progress:
            progress.advance(142, **{"loss": "0.1586", "lr": "0.00e+00", "tok/s": "323", "GiB": "2.2"})
        last = [line for line in shown() if "142/144" in line][-1]
        assert "loss 0.1586  lr 0.00e+00  tok/s 323  GiB 2.2" in last
        assert "…" not in last
        assert ("━" in last) == (width == 120)
        assert len(last) <= width


def test_columns_that_can_be_spared_go_one_after_the_other(screen):
    header, rows = (
        ["run", "base", "loss", "minutes"],
        [["runs/a", "b" * 30, 0.5, 1.5], ["runs/b", "é" * 30, 0.25, None]],
    )
    for width, kept, note in (
        (80, header, []),
        (60, ["run", "base", "loss"], ["no room for: minutes"]),
        (40, ["run", "loss"], ["no room for: minutes, base"]),
    ):
        shown = screen(width)
        console.show_table("title", header, rows, spare=("minutes", "base"))
        lines = shown()
        [named] = [line for line in lines if "run" in line and "loss" in line]
        assert re.findall(r"[a-z]+", named) == kept
        assert [line for line in lines if line.startswith("no room")] == note
        assert max(map(len, lines)) <= width


def test_texts_that_have_no_room_side_by_side_stand_one_below_the_other(screen):
    header, row = ["question", "expected", "base", "tuned"], [f"{word} " * 12 for word in ("a", "b", "c", "d")]
    shown = screen(80)
    console.show_texts("answers", header, [row, row])
    lines = [line.split() for line in shown() if line.strip()]
    assert [line[0] for line in lines] == ["answers", *header, *header]
    shown = screen(120)
    console.show_texts("answers", header, [row])
    assert any(all(name in line for name in header) for line in shown())


def test_a_long_text_is_folded_beside_its_name(screen):
    shown = screen(40)
    console.show_texts("answers", ["question", "tuned"], [["word " * 20, "x"]])
    inside = [line for line in shown() if "word" in line]
    assert len(inside) > 2
    assert {line.index("word") for line in inside} == {inside[0].index("word")}
    assert max(map(len, inside)) <= 40
