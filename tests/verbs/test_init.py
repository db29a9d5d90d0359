"""`lora-lab init`: the recipe for a data file reads its rows, composes and trains as it was written."""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path

import pytest

from lora_lab import cli
from lora_lab.config import compose
from lora_lab.data import guess, sources
from lora_lab.errors import DataError
from lora_lab.plan import bases, recipe
from lora_lab.tasks import TASKS
from tests.conftest import WORDS, fails, make_base, make_rows, write_jsonl

DATA = Path(os.environ.get("LORA_LAB_DATA", Path(__file__).parents[3] / "shared/data"))


MEANT = sorted({name for task in TASKS.values() for name in task.meant_for})


def looked(file: Path, **more) -> guess.Guess:
    """As `lora-lab init` looks."""
    return guess.look(sources.find("data.train", str(file))[0], **{"of_task": MEANT, **more})


def write(file: Path, rows: list[dict]) -> Path:
    """A file of rows in the kind that its name says."""
    if file.suffix == ".jsonl":
        return write_jsonl(file, rows)
    if file.suffix == ".json":
        file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        return file
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
        return file
    with open(file, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return file


def texts(count: int, chinese: bool = False, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = list("外卖送得很快味道好服务差慢冷难吃不错") if chinese else WORDS[:13]
    joined = ["".join if chinese else " ".join][0]
    return [joined(draw.choices(words, k=draw.randint(4, 12))) for _ in range(count)]


# -- what a file holds --------------------------------------------------------------------------------------------------

TEXTS, ZH = texts(40), texts(40, chinese=True)
LABELS = [("good", "bad")[number % 2] for number in range(40)]
KINDS = {
    "classes": ([{"review": a, "sentiment": b} for a, b in zip(TEXTS, LABELS, strict=True)], "text_label", {"text": "review", "label": "sentiment"}),
    "chinese": ([{"评论": a, "情感": b} for a, b in zip(ZH, LABELS, strict=True)], "text_label", {"text": "评论", "label": "情感"}),
    "kaggle": ([{"id": n, "text": a, "target": n % 2} for n, a in enumerate(TEXTS)], "text_label", {"label": "target"}),
    "pairs": ([{"sentence1": a, "sentence2": a, "score": n / 7} for n, a in enumerate(TEXTS)], "pair_label", {"text": "sentence1", "text_pair": "sentence2", "label": "score"}),
    "answers": ([{"question": a, "answer": f"{a} {n}"} for n, a in enumerate(TEXTS)], "prompt_completion", {"prompt": "question", "completion": "answer"}),
    "instructions": ([{"instruction": a, "input": "", "output": a} for a in TEXTS], "alpaca", {}),
    "translation": ([{"en": a, "zh": b} for a, b in zip(TEXTS, ZH, strict=True)], "source_target", {"source": "en", "target": "zh"}),
    "chats": ([{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": a}]} for a in TEXTS], "messages", {}),
    "judged": ([{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": a}], "label": n % 2 == 0} for n, a in enumerate(TEXTS)], "feedback_messages", {}),
    "better": ([{"question": a, "chosen": f"{a} x", "rejected": f"{a} y"} for a in TEXTS], "preference", {"prompt": "question"}),
    "words": ([{"words": ["Graz", "is"], "ner_tags": ["B-LOC", "O"]}] * 3, "token_labels", {"tokens": "words", "tags": "ner_tags"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_columns_and_rows_say_what_a_file_is_for(kind, tmp_path):
    rows, name, mapping = KINDS[kind]
    found = looked(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert (found.format, found.columns) == (name, mapping)
    assert found.is_numbers == (kind == "pairs")


def test_scripts_and_languages(tmp_path):
    found = looked(write_jsonl(tmp_path / "a.jsonl", KINDS["translation"][0]))
    assert (found.scripts, found.languages) == ({"Latin", "Chinese"}, ("English", "Chinese"))
    assert looked(write_jsonl(tmp_path / "b.jsonl", KINDS["chinese"][0])).scripts == {
        "Chinese"
    }  # the classes' names are English
    mixed = [{"text": f"iPhone 的 {text}", "label": n % 2} for n, text in enumerate(ZH)]
    assert looked(write_jsonl(tmp_path / "c.jsonl", mixed)).scripts == {"Chinese"}


def test_names_of_numbered_classes_are_read_in_their_place(tmp_path):
    rows = [{"text": a, "label": n % 2, "label_name": "ab"[n % 2], "id": str(n)} for n, a in enumerate(TEXTS)]
    found = looked(write_jsonl(tmp_path / "a.jsonl", rows))
    assert (found.names, found.columns, found.left) == ("label_name", {"label": "label_name"}, ["label", "id"])
    rows[0]["label_name"] = "b"  # now they say something else
    assert looked(write_jsonl(tmp_path / "b.jsonl", rows)).columns == {}


def test_what_is_not_known_is_asked(tmp_path):
    rows = [{"留言": a, "结果": b} for a, b in zip(ZH, LABELS, strict=True)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"columns 留言, 结果 fit no format") as told:
        looked(file)
    assert "\"data.columns={text: '留言', label: '结果'}\"" in str(told.value)
    assert looked(file, told={"text": "留言", "label": "结果"}).format == "text_label"
    broken = write_jsonl(tmp_path / "broken.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}])
    with pytest.raises(DataError, match="those of token_labels, and no row can be read: row 1: 2 tokens and 1 tags"):
        looked(broken)


# -- the recipe ---------------------------------------------------------------------------------------------------------


def composed(place: Path, *more: str):
    return compose.compose([f"recipe={place.stem}", *more], str(place.parent.parent))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


OWN = ["model.dtype=float32", "quant=none", "hardware=cpu", "tracker=none"]


@pytest.mark.parametrize(
    "name",
    [
        "classes.csv",
        "answers.parquet",
        *(pytest.param(one, marks=pytest.mark.long) for one in ("kaggle.tsv", "chats.json")),
    ],
)
def test_each_kind_of_file_becomes_a_recipe(name, here, base, capsys):
    kind, suffix = Path(name).stem, Path(name).suffix
    file = write(here / f"rows of mine{suffix}", KINDS[kind][0])
    assert cli.main(["init", file.name, f"model.path={base}", *OWN]) == 0
    said = capsys.readouterr().out
    place = here / "mine/recipe/rows_of_mine.yaml"
    assert "lora-lab train --config-dir mine recipe=rows_of_mine" in said
    config = composed(place)
    assert config.data.train == file.name
    assert (config.data.columns or {}) == KINDS[kind][2]
    assert (config.model.dtype, config.quant.method) == ("float32", "none")
    assert "Assumed" in place.read_text(encoding="utf-8")


def test_a_recipe_of_a_chinese_file_trains_as_it_is(here, capsys):
    """Names of the file and of the columns, quotes and blanks come back as they are."""

    own = make_base(here / "base")
    file = write(
        here / "外卖 评论.csv",
        [{"评论": f"{a}{n}", "情感": b} for n, (a, b) in enumerate(zip(ZH, LABELS, strict=True))],
    )

    assert cli.main(["init", file.name, f"model.path={own}", *OWN, "export.targets=[]", "train.max_steps=3"]) == 0
    place = here / "mine/recipe/外卖_评论.yaml"
    config = composed(place)
    assert (config.data.train, config.data.columns) == (file.name, {"text": "评论", "label": "情感"})
    capsys.readouterr()
    assert cli.main(["train", "--config-dir", "mine", "recipe=外卖_评论", "run_dir=run"]) == 0
    assert json.loads((here / "run/result.json").read_text())["steps"] == 3


@pytest.mark.long
def test_chats_train_as_they_are(here, base):
    file = write_jsonl(here / "chats.jsonl", make_rows(30))
    assert (
        cli.main(
            [
                "init",
                file.name,
                f"model.path={base}",
                *OWN,
                "out=own/recipe/talk.yaml",
                "train.max_steps=2",
                "task.max_new_tokens=4",
            ]
        )
        == 0
    )
    assert cli.main(["train", "--config-dir", "own", "recipe=talk", "run_dir=run"]) == 0
    assert json.loads((here / "run/result.json").read_text())["tuned"]["loss"] > 0


@pytest.mark.long
def test_held_out_rows_beside_the_file_are_taken(here, base):
    rows = KINDS["classes"][0]
    train = write_jsonl(here / "train.jsonl", rows)
    write_jsonl(here / "test.jsonl", rows[:10])
    write_jsonl(here / "validation.jsonl", [{"other": 1}])
    assert cli.main(["init", str(train), f"model.path={base}", *OWN, "out=mine/recipe/a.yaml"]) == 0
    config = composed(here / "mine/recipe/a.yaml")
    assert (config.data.eval, config.data.shared) == (str(here / "test.jsonl"), "drop")
    assert config.data.stratify is None


def test_a_few_rows_are_enough(here, base):
    file = write_jsonl(here / "few.jsonl", [{"text": f"{WORDS[n]} {n}", "label": n % 3} for n in range(9)])
    assert cli.main(["init", file.name, f"model.path={base}", *OWN]) == 0
    config = composed(here / "mine/recipe/few.yaml")
    assert (config.data.eval_ratio, config.data.stratify, config.train.batch_size) == (0.25, None, 16)
    assert config.train.epochs == 10


@pytest.mark.long
def test_rows_that_are_too_long_or_twice_are_told(here, base):
    rows = [{"prompt": "one " * (40 if n else 2_000), "completion": f"two {n}"} for n in range(30)] * 2
    file = write_jsonl(here / "long.jsonl", rows)
    assert cli.main(["init", file.name, f"model.path={base}", *OWN]) == 0
    config = composed(here / "mine/recipe/long.yaml")
    assert (config.data.too_long, config.data.duplicates) == ("drop", "drop")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["init"], "init: needs a data file"),
        (["init", "absent.csv"], "absent.csv: no such file"),
        (["init", "rows.csv", "recipe=demo"], "recipe=demo: a recipe is written of a file"),
        (["init", "rows.csv", "out=x.yaml"], "Write out=mine/recipe/x.yaml"),
        (["init", "rows.csv", "out=recipe/spam.yaml"], "lora_lab has a recipe of that name"),
        (["init", "rows.csv", "out=mine/recipe/there.yaml"], "there.yaml: exists"),
        (["init", "rows.csv", "optim.lrr=1"], "optim.lrr=1: unknown key"),
        (["init", "rows.csv", "optim.lr=1,2"], "several values"),
        (["init", "rows.csv", "task=regression"], "label 'good' is not a number"),
    ],
)
def test_mistakes(line, said, here, capsys, base):
    write(here / "rows.csv", KINDS["classes"][0])
    (here / "mine/recipe").mkdir(parents=True)
    (here / "mine/recipe/there.yaml").write_text("mine")
    assert said in fails([*line, f"model.path={base}"] if len(line) > 1 else line, capsys)
    assert (here / "mine/recipe/there.yaml").read_text() == "mine"
    assert len(list(here.rglob("*.yaml"))) == 1


def test_no_base_is_said_before_anything_is_loaded(here, monkeypatch, capsys):
    monkeypatch.setenv("LORA_LAB_MODELS", str(here))
    monkeypatch.setattr(bases, "is_here", lambda base: False)
    write(here / "rows.csv", KINDS["chinese"][0])
    assert "no encoder for texts in Chinese letters is on this machine" in fails(["init", "rows.csv"], capsys)


def test_names_of_recipes():
    assert recipe._named("data/spam.csv") == "my_spam"
    assert recipe._named("a/b/news/train.jsonl.gz") == "news"
    assert recipe._named("hub:owner/some-set") == "some_set"
    assert recipe._named("外卖 评论.csv") == "外卖_评论"


# -- real data ----------------------------------------------------------------------------------------------------------

SETS = {
    "alpaca_en_1k/train.jsonl": "causal_lm",
    "alpaca_zh_1k/train.jsonl": "causal_lm",
    "alpaca_eval_pref/train.jsonl.gz": "preference",
    "cmrc2018_zh/train.jsonl.gz": "question_answering",
    "csl_title_zh/train.jsonl": "causal_lm",
    "dialogsum/train.jsonl": "seq2seq",
    "dpo_demo_en_zh/zh.jsonl": "preference",
    "glaive_toolcall_300/train.jsonl": "causal_lm",
    "gsm8k_train/train.jsonl.gz": "causal_lm",
    "kto_demo_en/train.jsonl": "preference",
    "multi30k_en_de/train.jsonl": "seq2seq",
    "resume_ner_zh/train.jsonl": "token_classification",
    "sms_spam/train.jsonl": "classification",
    "snli_subset/train.jsonl": "classification",
    "sst2/train.jsonl": "classification",
    "stsb_en/train.jsonl": "regression",
    "tatoeba_en_zh/train.jsonl": "causal_lm",
    "thucnews_titles_zh/train.jsonl": "classification",
    "tiny_shakespeare/input.txt": "completion",
    "waimai_zh/train.jsonl": "classification",
    "wnut17/train.jsonl": "token_classification",
    "xquad_en/test.jsonl": "question_answering",
    "zh_wiki_paragraphs/input.txt": "completion",
}  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SETS)
def test_published_data_become_recipes_that_read_them(name, here):
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not there (LORA_LAB_DATA names the folder of published data sets)")
    if not os.environ.get("LORA_LAB_MODELS"):
        pytest.skip("LORA_LAB_MODELS names no folder of small models")
    assert cli.main(["init", str(DATA / name), "out=mine/recipe/own.yaml"]) == 0
    config = composed(here / "mine/recipe/own.yaml")
    assert config.task.name == SETS[name]
