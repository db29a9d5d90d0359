"""Rows in every shape that they are published in: read for what they mean, or refused with the way out; never guessed."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from lora_lab import cli
from lora_lab.config.data import DataConfig
from lora_lab.data import build, formats, hints, sources, values
from lora_lab.data.check import check
from lora_lab.data.conversations import history_of, refuse_lost_reasoning
from lora_lab.data.encode import Encoder
from lora_lab.data.formats import RowError
from lora_lab.errors import ConfigError, DataError
from lora_lab.tasks import TASKS
from lora_lab.tasks.classification.config import ClassificationConfig
from tests.conftest import CHATML, make_tokenizer, write_jsonl

EARLIER = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "red"), ("assistant", "dog"), ("assistant", "cat"))
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encoder_of(task: str, tokenizer, file, **options) -> Encoder:
    task, config = (
        TASKS[task](**options.pop("task", {})),
        DataConfig(train=str(file), max_tokens=256, **options),
    )
    return task.load().encoder_class(config, task, tokenizer)


def load(task: str, tokenizer, file, **options):
    encoder = encoder_of(task, tokenizer, file, **options)
    data = build.build(encoder.config, encoder)
    return data.train, [str(finding) for finding in check(data, encoder.config, encoder)]


def rows_in(path, **options) -> list[dict]:
    [file] = sources.find("data.train", str(path), **options)
    return [row.values for row in file.rows()]


# -- structures in texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history", [
    [["one", "two"]],
    ["one", "two"],
    EARLIER,
    [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}],
    [{"instruction": "one", "input": "", "output": "two"}],
    [{"user": "one", "assistant": "two"}],
    [{"question": "one", "answer": "two"}],
], ids=str)  # fmt: skip
def test_earlier_turns_in_every_shape(history):
    for given in (
        history,
        json.dumps(history),
        str(history),
        str([tuple(turn) if isinstance(turn, list) else turn for turn in history]),
    ):
        assert history_of(given) == EARLIER
    row = {"instruction": "red", "output": "dog", "history": json.dumps(history)}
    assert formats.read(row, "alpaca").messages == [*EARLIER, USER, GOOD]


@pytest.mark.parametrize("history", [None, "", "[]", []])
def test_no_earlier_turns(history):
    assert formats.read({"instruction": "red", "output": "dog", "history": history}, "alpaca").messages == [USER, GOOD]


@pytest.mark.parametrize("history", [
    ["one"], ["one", "two", "three"], [["one", "two", "three"]], [["one", 2]], [{"one": "two"}], "one", 5, {"one": "two"},
    [{"question": "one", "prompt": "uno", "answer": "two"}], "[['one' 'two']]", [["one", None]],
    [["user", "one"], ["assistant", "two"]], [["Human", "one"], ["gpt", "two"]], "[('user', 'one')]",
], ids=str)  # fmt: skip
def test_earlier_turns_that_could_mean_two_things(history):
    with pytest.raises(RowError, match="'history'"):
        formats.read({"instruction": "red", "output": "dog", "history": history}, "alpaca")


def test_literals_are_read_and_nothing_is_run():
    assert values.literal("['a', \"it's\", 'b']") == ["a", "it's", "b"]
    assert values.literal("[('a', 1)]") == [("a", 1)]
    for text in (
        "['a' 'b']",  # as numpy prints arrays: two texts, of which Python would make one
        "['a'\n 'b']",
        "[0 1 0]",
        "array(['a'], dtype=object)",
        "[__import__('os').getcwd()]",
        "[{'a': 1, 'a': 2}]",
        "[" * 5000,
        "[" + "-" * 100_000 + "1]",
        "a",
        "{'a', 'b'}",
    ):
        assert values.literal(text) is None


@pytest.mark.parametrize(("label", "read"), [
    ("['a', 'b']", ["a", "b"]), ('["a","b"]', ["a", "b"]), ("('a', 'b')", ["a", "b"]), ("(a)", "(a)"), ("[a] b", "[a] b"), ([" a", "b "], ["a", "b"]), ("[]", []),
], ids=str)  # fmt: skip
def test_lists_of_labels_as_text(label, read):
    assert formats.read({"text": "red", "label": label}, "text_label").label == read


@pytest.mark.parametrize(
    "label", ["['a' 'b']", "[a, b]", "['a', 'b'", "array(['a'])", [True, False], "[true]"], ids=str
)
def test_lists_of_labels_that_cannot_be_read(label):
    with pytest.raises(RowError, match="label"):
        formats.read({"text": "red", "label": label}, "text_label")


@pytest.mark.parametrize(("labels", "level", "says"), [
    (["a", "a\u200b"], "error", r"labels 'a' and 'a\u200b' look the same"),
    (["caf\u00e9", "cafe\u0301"], "error", r"labels 'caf\xe9' and 'cafe\u0301' look the same"),
    (["pos", "Pos"], "warning", "labels 'pos' and 'Pos' differ in capitals, width or blanks only"),
    (["1", "１"], "warning", "labels '1' and '１' differ in capitals"),
    (["very good", "very  good"], "warning", "differ in capitals, width or blanks only"),
    (["a", "NaN"], "warning", "label 'NaN' is a class like any other"),
], ids=str)  # fmt: skip
def test_labels_that_look_alike_are_told(labels, level, says, tokenizer, tmp_path):
    rows = [{"text": f"red {number}", "label": label} for number, label in enumerate([*labels, "none"])]
    _, said = load("classification", tokenizer, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [line for line in said if line.startswith(f"{level}: data.train: label") and says in line]
    plain = [{**row, "label": "ab"[number % 2]} for number, row in enumerate(rows)]
    _, said = load("classification", tokenizer, write_jsonl(tmp_path / "plain.jsonl", plain))
    assert not any("data.train: label" in line for line in said)


@pytest.mark.parametrize("text", ["a,b", "a;b", "a|b", "甲，乙", "甲、乙"])
def test_several_classes_in_one_text_are_no_class(text, tokenizer):
    def outcome(multi_label: bool, names: list[str] | None = None):
        task = ClassificationConfig(multi_label=multi_label)
        encoder = task.load().encoder_class(DataConfig(train="-", label_names=names), task, tokenizer)
        [found] = encoder.encode([sources.Row(1, {"text": "red", "label": text})], "rows", "text_label")
        return found

    assert "with task.multi_label=true it may mean several classes. Write a list" in outcome(True).sentence
    for found in (outcome(False), outcome(True, ["a", text])):
        assert [example["labels"] for example in found.examples] == [[text]]


@pytest.mark.parametrize("tag", [-100, "-100"])
@pytest.mark.parametrize("names", [None, ["O", "B-X"]])
def test_tags_that_do_not_count_are_no_tag(tag, names):
    row = {"tokens": ["[CLS]", "cat"], "tags": [tag, "O"]}
    with pytest.raises(RowError, match="tag -100 stands for words that do not count"):
        formats.read(row, "token_labels", names)
    assert formats.read({**row, "tags": ["-100", "O"]}, "token_labels", ["O", "-100"]).label == ["-100", "O"]


def test_words_and_tags_as_text(tmp_path):
    row = {"tokens": "['the', 'cat']", "tags": "[0, 1]"}
    assert formats.read(row, "token_labels", ["O", "B-X"]).label == ["O", "B-X"]
    assert formats.read({"tokens": ["the"], "tags": ["1"]}, "token_labels", ["O", "B-X"]).label == ["B-X"]
    with pytest.raises(RowError, match=r"tag 0 is a number.*data.label_names=\[O,B-PER,I-PER\]"):
        formats.read(row, "token_labels")
    with pytest.raises(RowError, match="tag True"):
        formats.read({"tokens": ["a"], "tags": [True]}, "token_labels", ["O", "B-X"])
    with pytest.raises(RowError, match="'tokens' is neither a structure nor JSON text"):
        formats.read({"tokens": "['the' 'cat']", "tags": "[0, 1]"}, "token_labels", ["O", "B-X"])


# -- classes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "classes"), [
    (["pos", "pos ", " neg"], ["neg", "pos"]),
    (["00", "01", "00"], ["00", "01"]),
    (["007", "7", "10"], ["007", "10", "7"]),
    ([1, 2, 5], ["1", "2", "5"]),
    (["2", "10", "1"], ["1", "2", "10"]),
    ([True, False], ["false", "true"]),
    ([0, 1, 3], ["0", "1", "3"]),
    ([100_001, 200_001], ["100001", "200001"]),
    (["1.5", "2.5"], ["1.5", "2.5"]),
], ids=str)  # fmt: skip
def test_a_class_that_no_row_has_is_no_class(given, classes, tokenizer, tmp_path):
    from lora_lab.tasks.classification.task import check_labels, class_labels

    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"red {i}", "label": label} for i, label in enumerate(given)])
    data, said = load("classification", tokenizer, file)
    encoder_config = type("Config", (), {"data": DataConfig(train=str(file))})
    assert class_labels(encoder_config, data) == classes
    check_labels(data, classes)
    blanks = any(isinstance(label, str) and label != label.strip() for label in given)
    assert any("2 rows of rows.jsonl: labels with blanks around them" in line for line in said) == blanks
    assert any("no row has the label" in line for line in said) == (given in ([1, 2, 5], [0, 1, 3], ["2", "10", "1"]))


def test_labels_with_names():
    def read(label, names):
        return formats.read({"text": "red", "label": label}, "text_label", names).label

    assert read(True, ["ham", "spam"]) == "spam"
    assert read(False, ["true", "false"]) == "false"
    assert read(" 1 ", ["ham", "spam"]) == "spam"
    assert read(1, ["1", "2", "3"]) == "1"  # a name, not a place
    assert read("[x]", ["[x]", "y"]) == "[x]"
    with pytest.raises(RowError, match="'01' is not in data.label_names"):
        read("01", ["ham", "spam"])
    with pytest.raises(RowError, match="data.label_names has 3"):
        read(True, ["a", "b", "c"])


# -- preferences --------------------------------------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "be kind"}
PAIRS = {
    "texts": {"prompt": "red", "chosen": "dog", "rejected": "cat"},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "with their prompt": {"prompt": " red", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 3.5},
    "with a list": {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "lists": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "a list and texts": {"prompt": [USER], "chosen": "dog", "rejected": "cat"},
    "a text and lists": {"prompt": "red", "chosen": [GOOD], "rejected": [BAD]},
    "JSON text": {"prompt": "red", "chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])},
    "Python text": {"chosen": str([USER, GOOD]), "rejected": str([USER, BAD])},
    "ShareGPT": {"conversations": [{"from": "human", "value": "red"}], "chosen": {"from": "gpt", "value": "dog"}, "rejected": {"from": "gpt", "value": "cat"}},
    "spoken prompt": {"prompt": "\n\nHuman: red\n\nAssistant:", "chosen": " dog", "rejected": " cat"},
    "spoken, with its prompt": {"prompt": "red", "chosen": "\n\nHuman: red\n\nAssistant: dog", "rejected": "\n\nHuman: red\n\nAssistant: cat"},
    "spoken on both sides": {"prompt": "\n\nHuman: red\n\nAssistant:", "chosen": "\n\nHuman: red\n\nAssistant: dog", "rejected": "\n\nHuman: red\n\nAssistant: cat"},
    "spoken": {"chosen": "\n\nHuman: red\n\nAssistant: dog", "rejected": "\n\nHuman: red\n\nAssistant: cat"},
}  # fmt: skip


@pytest.mark.parametrize("shape", PAIRS)
def test_pairs_of_answers(shape):
    row = PAIRS[shape]
    assert formats.detect("rows", list(row), "auto", ["preference"]) == "preference"
    record = formats.read(row, "preference")
    assert (record.messages, record.rejected) == ([USER, GOOD], [USER, BAD])
    record = formats.read({**row, "system": "be kind"}, "preference")
    assert (record.messages, record.rejected) == ([SYSTEM, USER, GOOD], [SYSTEM, USER, BAD])


@pytest.mark.parametrize(("row", "says"), [
    ({"chosen": "dog", "rejected": "cat"}, "the row has no 'prompt'"),
    ({"prompt": "blue", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "no user's message in it equals the prompt"),
    ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "blue"}, BAD]}, "differ before their last answers"),
    ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]}, "differ before their last answers"),
    ({"prompt": "red", "chosen": [USER, GOOD], "rejected": "cat"}, "one of 'chosen' and 'rejected' is a text"),
    ({"prompt": "red", "chosen": 1, "rejected": 2}, "'chosen' must be text or messages, not 1"),
    ({"prompt": "red", "chosen": [], "rejected": []}, "'chosen' is an empty list"),
], ids=str)  # fmt: skip
def test_pairs_that_cannot_be_read(row, says):
    with pytest.raises(RowError, match=says):
        formats.read(row, "preference")


def test_a_text_that_is_json_stays_a_text():
    text = json.dumps([USER])
    record = formats.read({"prompt": text, "completion": "dog"}, "prompt_completion")
    assert record.messages[0]["content"] == text
    assert formats.read({"prompt": str([USER]), "completion": "dog"}, "prompt_completion").messages == [USER, GOOD]


def test_judgements_as_text():
    for text, good in (("True", True), ("false", False), ("1", True), ("0", False)):
        assert formats.read({"prompt": "red", "completion": "dog", "label": text}, "feedback").label is good


# -- what is not read -----------------------------------------------------------------------------------------------------


def test_columns_that_are_not_read_are_said_once(tokenizer, tmp_path):
    row = {"prompt": "red", "completion": "dog", "id": 3, "system_prompt": "be kind", "empty": ""}
    file = write_jsonl(tmp_path / "rows.jsonl", [row, {**row, "prompt": "blue"}])
    _, said = load("causal_lm", tokenizer, file)
    assert "note: data.train: rows.jsonl: columns that are not read: id (2 rows), system_prompt (2 rows)." in said
    assert sum("data.columns={system: system_prompt}" in line for line in said) == 1
    _, said = load("causal_lm", tokenizer, file, columns={"system": "system_prompt"}, stratify="id", eval_ratio=0.5)
    assert not any("not read" in line for line in said)


def test_columns_that_streamed_rows_never_read_are_said(tokenizer, tmp_path):
    rows = [{"prompt": "red", "completion": "dog", "id": 3, "system_prompt": "be kind"}] * 100
    other = {"messages": [{"role": "human", "content": "red"}, {"role": "gpt", "content": "dog"}], "model": "x"}
    for name, given in (("a.jsonl", rows), ("b.jsonl", [other] * 3)):
        write_jsonl(tmp_path / name, given)
    _, said = load("causal_lm", tokenizer, tmp_path, streaming=True)
    assert (
        "note: data.train: a.jsonl: columns that are not read: id (64 rows), system_prompt (64 rows) (of the first 64 rows, which "
        "were looked at)." in said
    )
    assert any("data.columns={system: system_prompt}" in line for line in said)
    assert any("b.jsonl: columns that are not read: model (3 rows) (of the first 3 rows" in line for line in said)
    assert any(
        "3 rows of b.jsonl: roles human, gpt read as user, assistant or tool (of the first 3" in line for line in said
    )


@pytest.mark.parametrize("name", ["image", "images", "audio", "videos"])
def test_what_a_model_of_texts_cannot_see_is_refused(name):
    for row in ({"messages": [USER, GOOD], name: ["a.png"]}, {"messages": [{**USER, name: ["a.png"]}, GOOD]}):
        with pytest.raises(RowError, match=f"holds {name}, which a text model cannot see"):
            formats.read(row, "messages")
    assert formats.read({"messages": [USER, GOOD], name: []}, "messages").messages == [USER, GOOD]


def test_reasoning_is_kept_where_the_template_shows_it_and_refused_elsewhere(tmp_path):
    answer = {**GOOD, "reasoning_content": "hmm"}
    shown = CHATML.replace("message['content'] +", "(message['reasoning_content'] or '') + message['content'] +")
    assert "reasoning_content" in shown
    refuse_lost_reasoning([USER, answer], shown)
    for name in ("messages", "conversations"):
        turns = [{"from": "human", "value": "red"}, {"from": "gpt", "value": "dog", "reasoning_content": "hmm"}]
        row = {name: [USER, answer] if name == "messages" else turns}
        file = write_jsonl(tmp_path / f"{name}.jsonl", [row])
        (tmp_path / name).mkdir()
        with pytest.raises(
            DataError, match="message 2 has reasoning_content, which the model's chat template does not show"
        ):
            load("causal_lm", make_tokenizer(tmp_path / name), file)


def test_functions_are_tools():
    tool = {"name": "f", "parameters": {}}
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    record = formats.read(
        {"messages": [USER, call, {"role": "function", "name": "f", "content": "x"}, GOOD], "functions": [tool]},
        "messages",
    )
    assert record.tools == [{"type": "function", "function": tool}]
    assert [message["role"] for message in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert record.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    with pytest.raises(RowError, match="both 'tools' and 'functions'"):
        formats.read({"messages": [USER, GOOD], "functions": [tool], "tools": [tool]}, "messages")
    with pytest.raises(RowError, match="'system' must be text"):
        formats.read({"messages": [USER, GOOD], "system": ["be kind"]}, "messages")


@pytest.mark.parametrize(("first", "second"), [("human", "gpt"), ("Human", "bot"), ("user", "model"), ("USER", "AI")])
def test_roles_by_other_names_are_read_and_said(first, second, tokenizer, tmp_path):
    row = {"messages": [{"role": first, "content": "red"}, {"role": second, "content": "dog"}]}
    file = write_jsonl(tmp_path / "rows.jsonl", [row])
    data, said = load("causal_lm", tokenizer, file)
    assert data[0][0].messages == [USER, GOOD]
    assert any(f"{second} read as user, assistant or tool" in line for line in said)
    row = {"messages": [{"from": first, "value": "red"}, {"from": second, "value": "dog"}]}
    assert formats.read(row, "messages").messages == [USER, GOOD]


# -- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "content", "says"), [
    ("a.csv", "text,label,text\na,b,c\n", "column 'text' is there twice, as column 1 and column 3"),
    ("a.csv", "text,label, text\na,b,c\n", "column 'text' is there twice, as column 1 and column 3"),
    ("a.tsv", "text\ttext\na\tb\n", "column 'text' is there twice, as column 1 and column 2"),
    ("a.jsonl", '{"text": "a", "label": "b", "text": "c"}\n', "a.jsonl row 1: key 'text' is there twice, as key 1 and key 3"),
    ("a.jsonl", '{"messages": [{"role": "user", "role": "user", "content": "c"}]}\n', "key 'role' is there twice"),
    ("a.json", '[{"text": "a", "text": "c"}]', "key 'text' is there twice, as key 1 and key 2"),
    ("a.json", '{"version": 1, "data": [\n{"text": "a", "label": "b"}]}', r"its rows may be in 'data': data\.field=data"),
    ("a.json", '{"version": 1, "data": [{"text": "a", "label": "b"}]}', r"its rows may be in 'data': data\.field=data"),
    ("a.json", '{\n"train": [{"text": "a"}], "test": [{"text": "a"}]}', r"data\.field=train or data\.field=test"),
    ("a.json", '{\n"text": {"0": "a"}}', "one object with the keys text. Write one object for each row"),
    ("a.json", '{"text": "a", "label": 1}\n{"text": \n', "row 2: not valid JSON"),
    ("a.xlsx", "PK", "It is a spreadsheet. Save its sheet as CSV"),
    ("a.zip", "PK", "It is an archive. Unpack it"),
    ("a.csv.zip", "PK", "It is an archive. Unpack it"),
    ("a.pdf", "PK", "It is a document"),
    ("a.csv", b"\xff\xfet\x00e\x00x\x00t\x00\n", "line 1: not valid UTF-8"),
], ids=str)  # fmt: skip
def test_files_that_would_be_read_wrongly(name, content, says, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        load("classification", tokenizer, tmp_path / name)


def test_two_columns_of_one_name_in_parquet(tokenizer, tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["text", "label", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'text' is there twice, as column 1 and column 3"):
        load("classification", tokenizer, tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.csv", "text;label\na, b;c\n", "semicolons"),
    ("a.csv", "\ufefftext\tlabel\na, b\tc\n", "tabs"),
    ("a.csv", "sep=;\ntext;label\na, b;c\n", "semicolons"),
    ("a.tsv", 'text,label\n"a, b",c\n', "commas"),
    ("a.csv", 'text,label\n"a, b",c\n', None),
    ("a.tsv", "text\tlabel\na, b\tc\n", None),
    ("a.csv", '"text;x",label,text\n"y","c","a, b"\n', None),
], ids=str)  # fmt: skip
def test_separators(name, content, words, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8")
    [row] = rows_in(tmp_path / name)
    assert (row["text"], row["label"]) == ("a, b", "c")
    [file] = sources.find("data.train", str(tmp_path / name))
    assert sources.separator_of(file) == words


def test_the_separator_is_said(tokenizer, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text;label\na;b\nc;d\n")
    load("classification", tokenizer, tmp_path / "a.csv")
    assert "a.csv: its columns are separated by semicolons" in capsys.readouterr().out


def test_rows_inside_an_object(tokenizer, tmp_path):
    rows = [{"text": "a", "label": "b"}, {"text": "c", "label": "d"}]
    for indent in (None, 1):
        (tmp_path / "a.json").write_text(json.dumps({"version": 1, "a": {"rows": rows}}, indent=indent))
        assert rows_in(tmp_path / "a.json", field="a.rows") == rows
    data, _ = load("classification", tokenizer, tmp_path / "a.json", field="a.rows")
    assert len(data) == 2
    with pytest.raises(DataError, match=r"data.field=a.row: no 'row'.*the keys rows. Did you mean 'rows'"):
        rows_in(tmp_path / "a.json", field="a.row")
    with pytest.raises(DataError, match=r"data\.field=a\.rows"):
        rows_in(tmp_path / "a.json", field="a")
    with pytest.raises(DataError, match=r"columns version, a fit no format.*may be in 'a.rows': data\.field=a\.rows"):
        (tmp_path / "c.json").write_text(json.dumps({"version": 1, "a": {"rows": rows}}))
        load("classification", tokenizer, tmp_path / "c.json")
    with pytest.raises(ConfigError, match="data.field=a: no effect, because no file is a .json file"):
        load("classification", tokenizer, write_jsonl(tmp_path / "b.jsonl", rows), field="a")


def test_squads_own_file(tmp_path):
    asked = {"question": "what?", "id": "1", "answers": [{"text": "dog", "answer_start": 2}]}
    (tmp_path / "a.json").write_text(
        json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": "a dog", "qas": [asked]}]}]})
    )
    [row] = rows_in(tmp_path / "a.json", field="data")
    assert formats.detect("rows", list(row), "auto") == "question_answering"
    assert formats.read(row, "question_answering").label == [["dog", 2]]


def test_hidden_files_are_left_out_and_said(tmp_path, capsys):
    for name in (
        "a.jsonl",
        "._a.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        "__MACOSX/a.jsonl",
        "more/.b.jsonl",
        "more/c.jsonl",
    ):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / "d" / name, [{"text": "a"}])
    for name, count in (("d", 2), ("d/*.jsonl", 1), ("d/**/*.jsonl", 2)):
        assert len(sources.find("data.train", str(tmp_path / name))) == count
        assert "hidden files are left out" in capsys.readouterr().out
    for name in ("d/.ipynb_checkpoints", "d/._a.jsonl", "d/.ipynb_checkpoints/*.jsonl"):  # named by the user
        assert len(sources.find("data.train", str(tmp_path / name))) == 1
    assert "hidden" not in capsys.readouterr().out
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match="holds no data file.*a.xlsx is a spreadsheet"):
        sources.find("data.train", str(tmp_path / "x"))


# -- names of columns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("columns", "task", "option"), [
    (["question", "answer"], "causal_lm", '"data.columns={prompt: question, completion: answer}"'),
    (["q", "a"], "causal_lm", '"data.columns={prompt: q, completion: a}"'),
    (["instruction", "response"], "causal_lm", '"data.columns={output: response}"'),
    (["query", "reply"], "causal_lm", '"data.columns={prompt: query, completion: reply}"'),
    (["Prompt", "Completion"], "causal_lm", '"data.columns={prompt: Prompt, completion: Completion}"'),
    (["问题", "答案"], "causal_lm", "\"data.columns={prompt: '问题', completion: '答案'}\""),
    (["review", "sentiment"], "classification", '"data.columns={text: review, label: sentiment}"'),
    (["premise", "hypothesis", "label"], "classification", '"data.columns={text: premise, text_pair: hypothesis}"'),
    (["article", "summary"], "seq2seq", '"data.columns={source: article, target: summary}"'),
    (["tokens", "ner_tags"], "token_classification", '"data.columns={tags: ner_tags}"'),
    (["question", "chosen", "rejected", "system"], "preference", '"data.columns={prompt: question}"'),
    (["foo", "bar"], "causal_lm", "Map them with data.columns to one of"),
], ids=str)  # fmt: skip
def test_the_mapping_is_offered_whole(columns, task, option, tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [dict.fromkeys(columns, "x")])
    with pytest.raises(DataError) as refused:
        load(task, tokenizer, file)
    assert option in str(refused.value)


def test_an_offered_mapping_works(config_of, tmp_path):
    from lora_lab.run import prepared

    file = write_jsonl(tmp_path / "a.jsonl", [{"my question": "red", "it's": "dog"}])
    option = hints.option({"prompt": "my question", "completion": "it's"}).strip('"')
    config = config_of(f"data.train={file}", option)
    assert config.data.columns == {"prompt": "my question", "completion": "it's"}
    assert len(prepared.build_data(config, prepared.find_base(config))[0].train) == 1


def test_a_mapping_the_wrong_way_round(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"question": "red", "answer": "dog"}])
    with pytest.raises(
        DataError, match=r'ours comes first. Write "data.columns={prompt: question, completion: answer}"'
    ):
        load("causal_lm", tokenizer, file, columns={"question": "prompt", "answer": "completion"})
    with pytest.raises(DataError, match=r'Write "data.columns={prompt: question, completion: answer}"'):
        load("causal_lm", tokenizer, file, columns={"question": "prompt", "completion": "answer"})
    with pytest.raises(
        DataError, match="data.columns.promt: no format reads a column of this name.*Did you mean 'prompt'"
    ):
        load("causal_lm", tokenizer, file, columns={"promt": "question", "completion": "answer"})


def test_a_file_in_the_home_folder(overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "red", "completion": "dog"}] * 2)
    assert cli.main(["data", *overrides, "data.train=~/rows.jsonl"]) == 0
    assert "rows 2" in capsys.readouterr().out
