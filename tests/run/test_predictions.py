"""`lora-lab predict`: rows of files come back with what a trained model says of them, none lost, none twice."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path

import pyarrow.parquet
import pytest

import lora_lab
from lora_lab import cli
from lora_lab.run import predictions
from lora_lab.run.answering import Answering
from tests.conftest import fails, write_jsonl
from tests.tasks.test_tasks import make_bert

NUMBER = 200  # of rows: several blocks


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A run that sorts texts by their colour."""
    folder = tmp_path_factory.mktemp("predict")
    texts = [
        {"review": f"{colour} table {n}", "kind": colour} for n in range(16) for colour in ("red", "green", "blue")
    ]
    write_jsonl(folder / "train.jsonl", texts)
    config = lora_lab.load_config(
        "task=classification", "model=hub", f"model.path={make_bert(folder / 'bert')}", "model.dtype=float32", "quant=none",
        "tracker=none", "hardware=cpu", f"data.train={folder}/train.jsonl", "data.eval_ratio=0.2", "data.check=off",
        "data.columns={text: review, label: kind}", "train.max_steps=4", "train.batch_size=8", "optim.lr=0.01", "export.targets=[]",
        f"run_dir={folder}/run",
    )  # fmt: skip
    return lora_lab.train(config).path


@pytest.fixture
def mails(tmp_path) -> Path:
    """Rows without labels, of which one has no text."""
    rows = [{"number": n, "review": f"{('red', 'blue')[n % 2]} lamp", "more": {"of": [n]}} for n in range(NUMBER)]
    rows[70]["review"] = " "
    return write_jsonl(tmp_path / "mails.jsonl", rows)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def predict(run: Path, *told: object) -> int:
    return cli.main(["predict", f"run={run}", *map(str, told)])


def test_every_row_comes_back_with_what_is_said_of_it(classifier, mails, tmp_path, capsys):
    assert predict(classifier, f"data={mails}") == 1  # one row cannot be used
    said = capsys.readouterr().out
    assert "1 of 200 rows could not be used: see the column predicted_error" in said
    place = classifier / "predictions" / "mails.jsonl"
    assert str(place) in said
    found, given = read(place), read(mails)
    assert [{key: row[key] for key in given[0]} for row in found] == given
    assert found[70].keys() - given[0].keys() == {"predicted_error"}
    assert found[70]["predicted_error"].startswith("mails.jsonl row 71: the user's message is empty")
    with Answering.open(str(classifier)) as model:
        alone = [model.predictions([{"review": row["review"]}])[0] for row in given[:4]]
    for row, one in zip(found, alone, strict=False):
        assert row["predicted_label"] == one["label"]
        assert row["predicted_score"] == pytest.approx(one["score"], abs=1e-6)
    assert "exists. Choose another name" in fails(["predict", f"run={classifier}", f"data={mails}"], capsys)
    place.unlink()
    assert [name for name in os.listdir(place.parent) if name.endswith(".part")] == []


def test_tables_are_read_and_written(classifier, mails, tmp_path):
    table = tmp_path / "mails.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["review", "kind"], ["red lamp, 好", "red"], ['a "blue" table', "blue"]])
    assert predict(classifier, f"data={table}", f"out={tmp_path}/out.csv") == 0
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        first, second = csv.DictReader(file)
    assert [*first] == ["review", "kind", "predicted_label", "predicted_score"]
    assert (first["review"], second["review"], second["kind"]) == ("red lamp, 好", 'a "blue" table', "blue")
    assert predict(classifier, f"data={mails}", f"out={tmp_path}/out.parquet") == 1
    rows = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["number"] for row in rows] == [*range(NUMBER)]
    assert rows[3]["more"] == {"of": [3]}
    assert [row["number"] for row in rows if row["predicted_error"]] == [70]


def test_a_stopped_prediction_goes_on_where_it_was(classifier, mails, tmp_path, capsys, monkeypatch):
    outcomes, said = Answering.outcomes, []

    def one(model, rows, name):
        found = outcomes(model, rows, name)
        said.append([row.number for row in rows])
        if len(said) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(Answering, "outcomes", one)
    out = tmp_path / "out.jsonl"
    told = [f"data={mails}", f"out={out}"]
    assert predict(classifier, *told) == 143
    assert "64 of 200 rows are kept; the same command goes on behind them" in capsys.readouterr().out
    assert not out.exists()
    part = tmp_path / "out.jsonl.part"
    with open(part, "ab") as file:
        file.write(b'{"number": 64, "rev')  # killed while it was written
    other = write_jsonl(tmp_path / "other.jsonl", read(mails)[:-1])
    assert "begun with other rows" in fails(["predict", f"run={classifier}", f"data={other}", f"out={out}"], capsys)
    assert predict(classifier, *told) == 1
    assert "goes on behind row 64 of 200" in capsys.readouterr().out
    assert [numbers[0] for numbers in said] == [1, 65, 65, 129, 193]
    assert [row["number"] for row in read(out)] == [*range(NUMBER)]
    assert not part.exists()


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ([], "needs either data=FILE or text=TEXT"),
        (["text=a", "data=b.jsonl"], "needs either data=FILE or text=TEXT"),
        (["text=a", "out=b.jsonl"], "out=b.jsonl: it is for data=FILE"),
        (["data=none.jsonl"], "data=none.jsonl"),
        (["data={mails}", "out={folder}/out.xlsx"], "must end in .jsonl, .csv, .parquet"),
        (["data={mails}", "out={folder}/absent/out.csv"], "there is no folder {folder}/absent"),
        (["data={odd}"], "odd.jsonl row 1: columns sentence, label fit no format of this task"),
        (["data={twice}"], "has the column predicted_label already"),
        (["data={mails}", "optim.lr=1"], "optim.lr=1: no effect on a trained run"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(told, sentence, classifier, mails, tmp_path, capsys, monkeypatch):
    places = {
        "mails": mails,
        "folder": tmp_path,
        "odd": write_jsonl(tmp_path / "odd.jsonl", [{"sentence": "red"}]),
        "twice": write_jsonl(tmp_path / "twice.jsonl", [{"review": "red", "predicted_label": "red"}]),
    }
    monkeypatch.setattr(predictions, "Answering", None)  # what loads it
    line = ["predict", f"run={classifier}", *(text.format(**places) for text in told)]
    assert sentence.format(**places) in fails(line, capsys)


def test_a_text_is_answered_at_once(classifier, capsys):
    assert predict(classifier, "text=red lamp", "text=blue lamp") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [sorted(line) for line in lines] == [["label", "score"]] * 2
    assert "text 2: the user's message is empty" in fails(["predict", f"run={classifier}", "text=a", "text= "], capsys)
