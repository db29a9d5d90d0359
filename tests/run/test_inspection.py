"""`lora-lab inspect`, `lora-lab label` and `lora-lab data check=labels` on a small classifier."""

from __future__ import annotations

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import lora_lab
from lora_lab import cli
from lora_lab.run import inspection
from tests.conftest import fails, write_jsonl
from tests.tasks.test_tasks import make_bert

COLOURS = ["red", "green", "<b>blue"]
ASKED, PLANTED = 3, 31  # a held-out row, and the training row with its text and a wrong label


def texts(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    words = ["table", "lamp", "Oslo", "Graz", "cat", "dog"]
    rows = []
    for number in range(count):
        colour = COLOURS[number % 3]
        rows.append(
            {
                "review": " ".join([*draw.choices(words, k=4), colour.removeprefix("<b>"), draw.choice(words)]),
                "kind": colour,
            }
        )
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that sorts texts by their colour, and learned one wrong row."""
    folder = tmp_path_factory.mktemp("inspect")
    train, held_out = texts(40, 0), texts(60, 1)
    train[PLANTED - 1] = {**held_out[ASKED - 1], "kind": COLOURS[ASKED % 3]}
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "eval.jsonl", held_out)
    config = lora_lab.load_config(
        "task=classification", "model=hub", f"model.path={make_bert(folder / 'bert')}", "model.dtype=float32", "quant=none",
        "tracker=none", "hardware=cpu", f"data.train={folder}/train.jsonl", f"data.eval={folder}/eval.jsonl", "data.check=off",
        "data.columns={text: review, label: kind}", "train.max_steps=40", "train.epochs=20", "train.batch_size=8", "optim.lr=0.01",
        "train.save_steps=20", "train.keep_checkpoints=3", "train.keep_best=false", "export.targets=[]", f"run_dir={folder}/run",
    )  # fmt: skip
    return lora_lab.train(config).path


class _Page(HTMLParser):
    """The tags of a page, and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_planted_wrong_row_is_named_first_and_everything_is_written(run, capsys):
    assert cli.main(["inspect", f"run={run}", f"row={ASKED}"]) == 0
    said = capsys.readouterr().out
    found = json.loads((run / inspection.JSON).read_text())
    [row], [taught] = found["rows"], found["taught"]["rows"]
    assert row["row"] == taught["row"] == f"eval.jsonl row {ASKED}"
    wrong = row["said"].startswith(COLOURS[ASKED % 3])
    assert taught["for" if wrong else "against"][0]["row"] == f"train.jsonl row {PLANTED}"
    *before, last = found["taught"]["states"]
    assert last == "adapter"
    assert before
    assert all(name.startswith("step-") for name in before)
    assert found["taught"]["in_turns"] == found["layers"]["ablation"]["in_turns"] == ""
    for model in ("base", "tuned"):
        assert row[model]["relative_error"] <= 0.05
        [own] = row[model]["sequences"]
        assert len(own["tokens"]) == len(own["integrated_gradients"]) == len(own["gradient_x_input"])
    parts = {one["part"]: one for one in found["layers"]["parts"]}
    assert {"layer 0", "layer 1", "classifier"} <= set(parts)
    assert all("rise" in one and "margin" in one for one in parts.values())
    assert sum(one.get("energy", 0) for one in parts.values()) == pytest.approx(1)
    assert "training rows that taught it most, of 40 looked through (of 40)" in said
    page = _Page((run / inspection.PAGE).read_text())
    assert "script" not in page.tags
    assert page.tags.count("b") == 0  # the class's name is text
    assert "<b>blue" in " ".join(page.texts)
    assert {"svg", "table", "details"} <= set(page.tags)
    style = re.search(r"<style>(.*?)</style>", (run / inspection.PAGE).read_text(), re.DOTALL)[1]
    assert "prefers-color-scheme: dark" in style


def test_texts_are_explained(run, capsys):
    assert cli.main(["inspect", f"run={run}", "text=dog red lamp", "among=0"]) == 0
    found = json.loads((run / inspection.JSON).read_text())
    [row] = found["rows"]
    assert (row["row"], row["expected"], found["taught"]["reason"]) == ("text 1", "", "among=0")
    assert row["tuned"]["sequences"][0]["tokens"][1:4] == ["dog", "red", "lamp"]
    assert "no training rows are named: among=0" in capsys.readouterr().out


@pytest.mark.long
def test_the_rows_with_the_highest_loss_are_explained(run):
    assert cli.main(["inspect", f"run={run}", "rows=2"]) == 0
    found = json.loads((run / inspection.JSON).read_text())
    assert len(found["rows"]) == len(found["taught"]["rows"]) == 2
    assert cli.main(["evaluate", f"run={run}"]) == 0
    first = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])  # the errors first, the surest before
    assert found["rows"][0]["row"] == first["predicted_of"]


def test_what_cannot_be_inspected_is_refused(run, capsys):
    inspect = ["inspect", f"run={run}"]
    assert "no held-out row that is used is called so" in fails([*inspect, "row=999"], capsys)
    assert "the first is 'eval.jsonl row 1'" in fails([*inspect, "row=train.jsonl row 1"], capsys)
    assert "rows=3: row= or text= say which rows already" in fails([*inspect, "rows=3", "row=1"], capsys)
    assert "rows=0: must be a number from 1 to 100" in fails([*inspect, "rows=0"], capsys)
    assert "text=: is empty" in fails([*inspect, "text="], capsys)


# -- label --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path) -> Path:
    return write_jsonl(
        tmp_path / "pool.jsonl", [{"review": row["review"], "more": n} for n, row in enumerate(texts(30, 2))]
    )


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "way", ["diverse", *(pytest.param(way, marks=pytest.mark.long) for way in ("random", "uncertain"))]
)
def test_rows_to_label_by_hand_are_written_without_labels(run, pool, tmp_path, way, capsys):
    out = tmp_path / "out.jsonl"
    assert cli.main(["label", f"run={run}", f"pool={pool}", f"out={out}", f"choose={way}", "count=6"]) == 0
    rows = read(out)
    assert len({row["more"] for row in rows}) == 6
    assert {row["kind"] for row in rows} == {None}
    assert all(row["predicted_label"] in COLOURS for row in rows)
    if way == "uncertain":
        assert cli.main(["predict", f"run={run}", f"data={pool}", f"out={tmp_path}/said.jsonl"]) == 0
        scores = sorted(row["predicted_score"] for row in read(tmp_path / "said.jsonl"))
        assert [row["predicted_score"] for row in rows] == pytest.approx(scores[:6], abs=1e-5)
    message = fails(["evaluate", f"run={run}", f"data.eval={out}"], capsys)  # nobody filled them
    assert "out.jsonl row 1" in message


def test_sure_labels_are_accepted_and_can_be_trained_on(run, pool, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    told = ["label", f"run={run}", f"pool={pool}", f"out={out}", "accept=0.5", "precision=0.5"]
    assert cli.main(told) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "expected to be wrong" in said
    assert "temperature" in said
    rows = read(out)
    assert rows
    assert all(row["kind"] in COLOURS and row["predicted_score"] >= 0.5 for row in rows)
    assert cli.main(["evaluate", f"run={run}", f"data.eval={out}"]) == 0
    assert "exists. Choose another name" in fails(told, capsys)


def test_labels_are_not_accepted_without_proof(run, pool, tmp_path, capsys):
    told = ["label", f"run={run}", f"pool={pool}", f"out={tmp_path}/out.jsonl"]
    message = fails([*told, "accept=0.5", "precision=0.999"], capsys)
    assert "precision=0.999: of 60 held-out rows" in message
    assert "Nothing is written" in message
    assert not (tmp_path / "out.jsonl").exists()
    for more, why in (
        (["accept=0.9", "count=3"], "count=3: no effect with accept=."),
        (["precision=0.9"], "precision=0.9: no effect without accept=."),
        (["choose=divers"], "Did you mean 'diverse'?"),
        (["accept=2"], "accept=2: must be a number from 0 to 1"),
    ):
        assert why in fails([*told, *more], capsys)


def test_suspicious_labels_of_training_rows_are_written(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"review": row["review"], "kind": row["kind"]} for row in texts(60, 0)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    told = [
        "task=classification", "model=hub", f"model.path={run.parent}/bert", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={tmp_path}/train.jsonl", "data.check=off", "data.columns={text: review, label: kind}",
        f"run_dir={tmp_path}/runs/run",
    ]  # fmt: skip
    assert cli.main(["data", *told, "check=labels"]) == 0
    assert re.search(r"\d+ of 60 labels are likely to be wrong", capsys.readouterr().out)
    for row in read(tmp_path / "runs/suspicious_labels.jsonl"):
        assert row["label"] != row["likelier"]
        assert row["probability_of_label"] < row["probability_of_likelier"]
    assert "Drop --rows and --html" in fails(["data", *told, "check=labels", "--rows", "2"], capsys)
    assert "check=rows: there is check=labels" in fails(["data", *told, "check=rows"], capsys)
    assert "gives rows no single class" in fails(["data", *told, "task.multi_label=true", "check=labels"], capsys)
