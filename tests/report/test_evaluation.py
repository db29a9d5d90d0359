"""What was said of held-out rows: the rows with the errors first, and pictures that say what they show."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

import lora_lab
from lora_lab import cli
from lora_lab.report import evaluation_report, pictures
from lora_lab.report.evaluation_report import Said
from tests.conftest import WORDS, make_rows, write_jsonl


def drawn(picture: pictures.Picture | None) -> list[str]:
    """The texts of a picture, which is well-formed."""
    assert picture is not None
    tree = ElementTree.fromstring(picture.svg)  # noqa: S314  (it was drawn here)
    return ["".join(node.itertext()) for node in tree.iter("text")]


# -- pictures -----------------------------------------------------------------------------------------------------------


def test_a_matrix_names_the_worst_pair_and_escapes_names():
    picture = pictures.confusion(["<b>", "b & c", "d"], [[5, 4, 0], [1, 7, 0], [0, 0, 3]])
    assert "<b> is said to be b & c, 4 times" in picture.says
    texts = drawn(picture)
    assert {"<b>", "b & c", "d", "said", "true", "5", "4", "7", "3", "1"} <= set(texts)
    assert "0" not in texts  # empty cells are empty
    assert not picture.wide
    assert pictures.confusion(["a"], [[3]]) is None
    assert pictures.confusion(["a", "b"], [[0, 0], [0, 0]]) is None


def test_of_many_classes_those_that_are_mixed_up_most_are_drawn():
    labels = [f"class {number}" for number in range(40)]
    rows = [[9 if a == b else 0 for b in range(40)] for a in range(40)]
    rows[30][35] = 5
    picture = pictures.confusion(labels, rows)
    assert picture.wide
    assert "Of 40 classes, the 24 that are mixed up most" in picture.says
    assert {"class 30", "class 35"} <= set(drawn(picture))


@pytest.mark.parametrize(("share", "lean"), [(0.5, "surer than it should be"), (1.0, "less sure than it could be")])
def test_a_calibration_says_which_way_it_leans(share, lean):
    scores = [(0.75 + number / 1000, number % 10 < 10 * share) for number in range(100)]
    picture = pictures.calibration(scores)
    assert lean in picture.says
    error = float(re.search(r"error ([\d.]+)", picture.says)[1])
    assert error == pytest.approx(abs(share - 0.7995), abs=0.001)
    assert pictures.calibration(scores[:29]) is None


def test_lengths_that_make_no_difference_are_called_so():
    even = [(number, float(number % 5 == 0)) for number in range(1, 101)]
    assert "no difference can be told" in pictures.by_length(even, "tokens").says
    uneven = [(number, float(number > 80)) for number in range(1, 101)]
    picture = pictures.by_length(uneven, "tokens")
    assert "overlap" not in picture.says
    assert "share that is off" in drawn(picture)
    distances = pictures.by_length([(number, number / 7) for number in range(1, 101)], "tokens")
    assert "mean distance" in drawn(distances)
    for nothing in (even[:20], [(number, 0.0) for number in range(100)], [(7, 1.0)] * 100):
        assert pictures.by_length(nothing, "tokens") is None


def test_an_interval_is_wilsons():
    assert pictures.interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert pictures.interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)


def test_a_page_shows_texts_and_obeys_none(tmp_path):
    said = [Said("a.csv row 1", {"text": "<script>alert(1)</script>\u202e"}, "x", {"label": "<i>y"}, 1.0, 0.9, 3)]
    evaluation_report.write(
        tmp_path / "page.html", "runs/<a>", {"base": {"loss": 1.0}, "tuned": {"f1": 0.5}}, said, None, "tokens"
    )
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<i>y" not in page
    assert "\u202e" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"(src|href)=", page)


# -- runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(base) -> list[str]:
    return [
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu", "adapter.r=2",
        "optim.lr=0.01", "train.batch_size=4", "train.max_steps=2", "export.targets=[]",
    ]  # fmt: skip


ROWS = {
    "classification": [{"text": f"{word} {number}", "label": "ab"[number % 2], "id": number} for number, word in enumerate(WORDS)],
    "regression": [{"text": f"{word} {number}", "label": number / 7} for number, word in enumerate(WORDS)],
    "token_classification": [{"tokens": [word, "is"], "tags": ["B-X" if number % 2 else "O", "O"]} for number, word in enumerate(WORDS)],
    "causal_lm": make_rows(8),
}  # fmt: skip


@pytest.mark.parametrize(
    "task", ["classification", *(pytest.param(one, marks=pytest.mark.long) for one in ROWS if one != "classification")]
)
def test_rows_are_written_with_the_errors_first(task, tiny, tmp_path, capsys):
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS[task])
    more = ["task.generate_rows=6", "task.max_new_tokens=4"] if task == "causal_lm" else []
    run = lora_lab.train(
        lora_lab.load_config(
            *tiny, f"task={task}", f"data.train={file}", f"data.eval={file}", f"run_dir={tmp_path}/run", *more
        )
    )
    capsys.readouterr()
    assert cli.main(["evaluate", f"run={run.path}"]) == 0
    place = Path(run.path) / "predictions.jsonl"
    rows = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == (6 if task == "causal_lm" else len(ROWS[task]))
    off = [row["predicted_off"] for row in rows]
    assert off == sorted(off, reverse=True)
    assert any(off)
    for row in rows:
        if task == "classification":
            assert row["predicted_off"] == float(row["predicted_label"] != row["label"])
            assert row["predicted_expected"] == row["label"]
            assert row["predicted_of"] == f"rows.jsonl row {row['id'] + 1}"
        if task == "regression":
            assert row["predicted_off"] == pytest.approx(abs(row["predicted_value"] - row["label"]))
    if task == "classification":
        wrong = sum(map(bool, off))
        assert 1 - wrong / len(rows) == pytest.approx(run.result["tuned"]["accuracy"])
    assert f"{place}: {len(rows)} held-out rows" in capsys.readouterr().out
    page = (Path(run.path) / "evaluation.html").read_text(encoding="utf-8")
    assert ("<svg" in page) == (task == "classification")  # the others are too few for a picture
    assert ("B-X" in page) == (task == "token_classification")


# -- curves -------------------------------------------------------------------------------------------------------------


def points(svg: str) -> list[list[tuple[float, float]]]:
    """Every line of a drawing, as it lies on the page."""
    return [
        [tuple(map(float, pair.split(","))) for pair in found.split()] for found in re.findall(r'points="([^"]+)"', svg)
    ]


def test_a_curve_lies_where_its_values_are():
    picture = pictures.lines("Loss", "loss", [pictures.Line("<a>", {0: 4.0, 5: 2.0, 10: 3.0})], "It falls & rises.")
    [line] = points(picture.svg)
    assert [x for x, _ in line] == pytest.approx([46, 227, 408])  # the frame, and its middle
    heights = [y for _, y in line]
    assert (heights[1] - heights[0]) / (heights[2] - heights[0]) == pytest.approx(2)
    assert 'aria-label="Loss. It falls &amp; rises."' in picture.svg
    assert {"2", "2.5", "3", "3.5", "4", "0", "10", "step", "loss"} <= set(drawn(picture))
    assert pictures.lines("Loss", "loss", [pictures.Line("a", {3: 1.0}), pictures.Line("b", {})]) is None


def test_of_a_long_curve_no_peak_is_lost():
    values = {step: 9.0 if step == 12_345 else 1.0 for step in range(20_000)}
    [line] = points(pictures.lines("Loss", "loss", [pictures.Line("a", values)]).svg)
    assert len(line) <= 600
    assert min(y for _, y in line) < min(y for _, y in line if y != min(y for _, y in line)) - 100


def test_lines_differ_in_more_than_their_colour():
    named = [pictures.Line(f"run {number}", {0: number, 1: number + 1}) for number in range(6)]
    picture = pictures.lines("Loss", "loss", named)
    assert len(set(re.findall(r'polyline[^>]*?(stroke-dasharray="[^"]+"|/>)', picture.svg))) == 6
    assert {line.name for line in named} <= set(drawn(picture))
    flat = pictures.lines("Loss", "loss", [pictures.Line("a", {0: 0.0, 1: 0.0})])
    assert len(drawn(flat)) > 3


def test_what_was_said_of_a_row_is_read_back_as_it_was_written():
    one = Said("test.jsonl row 3", {"text": "red"}, "a", {"label": "b", "score": 0.75}, 1.0, 0.75, 9)
    back = evaluation_report.of_row(json.loads(json.dumps(evaluation_report.as_row(one))))
    assert back == dataclasses.replace(one, length=0)
    assert evaluation_report.of_row({"predicted_off": "x", "predicted_score": []}).off is None
