"""Rows that are no text, or too much of it: each is named and counted, whatever kind of file it stands in."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from lora_lab.config.data import DataConfig, Source
from lora_lab.data import build
from lora_lab.data.encode import Encoder
from lora_lab.data.limits import MAX_ROW_CHARS
from lora_lab.errors import DataError
from lora_lab.tasks import TASKS
from tests.conftest import make_tokenizer, write_jsonl

HALF = "half \ud83d of a character"
USER, ANSWER = {"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": HALF}}}]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encoder_of(task: str, tokenizer, file: Path | Source, multi_label: bool = False, **options) -> Encoder:
    config = DataConfig(train=[file] if isinstance(file, Source) else str(file), max_tokens=4096, **options)
    section = TASKS[task](**({"multi_label": True} if multi_label else {}))
    return section.load().encoder_class(config, section, tokenizer)


def rows_of(task: str, tokenizer, file: Path | Source, multi_label: bool = False, **options):
    encoder = encoder_of(task, tokenizer, file, multi_label, **options)
    return build.build(encoder.config, encoder).train


# The second row has half a character in it, each time in another place.
PLACES = {
    "prompt": ("causal_lm", {"prompt": "red", "completion": "blue"}, {"prompt": HALF, "completion": "blue"}),
    "answer": ("causal_lm", {"prompt": "red", "completion": "blue"}, {"prompt": "red", "completion": HALF}),
    "message": ("causal_lm", {"messages": [USER, ANSWER]}, {"messages": [{"role": "user", "content": HALF}, ANSWER]}),
    "part": ("causal_lm", {"messages": [USER, ANSWER]}, {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}, ANSWER]}),
    "role": ("causal_lm", {"messages": [USER, ANSWER]}, {"messages": [USER, {**ANSWER, "role": HALF}]}),
    "field of a message": ("causal_lm", {"messages": [USER, ANSWER]}, {"messages": [USER, {**ANSWER, "reasoning_content": HALF}]}),
    "key of a message": ("causal_lm", {"messages": [USER, ANSWER]}, {"messages": [USER, {**ANSWER, HALF: "a"}]}),
    "tool call": ("causal_lm", {"messages": [USER, ANSWER]}, {"messages": [USER, CALL]}),
    "tool": ("causal_lm", {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], "tools": [{"name": HALF}]}),
    "system": ("causal_lm", {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], "system": HALF}),
    "structure as text": ("causal_lm", {"messages": json.dumps([USER, ANSWER])}, {"messages": json.dumps([USER, {**ANSWER, "content": HALF}])}),
    "sharegpt": ("causal_lm", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"conversations": [{"from": HALF, "value": "a"}]}),
    "history": ("causal_lm", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "history": [[HALF, "a"]]}),
    "preference": ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": HALF}),
    "column that is not read": ("causal_lm", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "other": HALF}),
    "name of a column": ("causal_lm", {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", HALF: "c"}),
    "text": ("classification", {"text": "a", "label": "x"}, {"text": HALF, "label": "x"}),
    "label": ("classification", {"text": "a", "label": "x"}, {"text": "a", "label": HALF}),
    "labels": ("classification", {"text": "a", "label": ["x"]}, {"text": "a", "label": [HALF]}),
    "labels as text": ("classification", {"text": "a", "label": '["x"]'}, {"text": "a", "label": '["\\ud83d"]'}),
    "number": ("regression", {"text": "a", "label": 1}, {"text": "a", "label": HALF}),
    "pair": ("classification", {"text": "a", "text_pair": "b", "label": "x"}, {"text": "a", "text_pair": HALF, "label": "x"}),
    "token": ("token_classification", {"tokens": ["a"], "tags": ["O"]}, {"tokens": [HALF], "tags": ["O"]}),
    "tag": ("token_classification", {"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a"], "tags": [HALF]}),
    "context": ("question_answering", {"question": "a", "context": "b c", "answers": {"text": ["b"], "answer_start": [0]}}, {"question": "a", "context": HALF, "answers": {"text": ["half"], "answer_start": [0]}}),
    "plain": ("completion", {"text": "red cat"}, {"text": HALF}),
    "target": ("seq2seq", {"source": "a", "target": "b"}, {"source": "a", "target": HALF}),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_half_a_character_makes_a_row_unusable(place, tokenizer, tmp_path):
    task, good, bad = PLACES[place]
    multi = place.startswith("labels")
    lines = [json.dumps(row) for row in (good, bad, good)]  # written as \ud83d
    for name, content in (("rows.jsonl", "\n".join(lines)), ("rows.json", f"[{','.join(lines)}]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=f"{name} row 2: .*half of a character.*data.unusable=drop"):
            rows_of(task, tokenizer, tmp_path / name, multi)
        data = rows_of(task, tokenizer, tmp_path / name, multi, unusable="drop")
        assert (data.rows_read, data.rows_used, sum(data.rows_dropped.values())) == (3, 2, 1)
        for report in data.reports:
            json.dumps(report.sentences, ensure_ascii=False).encode()  # can be printed and written


def test_half_a_character_in_streamed_rows(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": "a", "completion": "b"}) + '\n{"prompt": "\\ud83d", "completion": "b"}\n'
    )
    stream = rows_of("causal_lm", tokenizer, tmp_path / "rows.jsonl", streaming=True)
    assert len(stream[0]) == 1
    with pytest.raises(DataError, match="row 2: holds half of a character"):
        stream[1]


def test_half_a_character_in_structures_of_a_csv_file(tokenizer, tmp_path):
    import csv

    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(
            [["messages"], [json.dumps([USER, ANSWER])], [json.dumps([USER, {**ANSWER, "content": HALF}])]]
        )
    with pytest.raises(DataError, match="rows.csv row 3: 'messages' holds half of a character"):
        rows_of("causal_lm", tokenizer, tmp_path / "rows.csv")
    (tmp_path / "raw.csv").write_bytes(b"prompt,completion\na,b\n\xed\xa0\xbd,b\n")
    with pytest.raises(DataError, match="raw.csv row 3: not valid UTF-8"):
        rows_of("causal_lm", tokenizer, tmp_path / "raw.csv")


def test_bytes_of_a_parquet_file_that_are_no_text(tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    odd = pa.Array.from_buffers(pa.string(), 3, pa.array([b"red", b"\xed\xa0\xbd", b"cat"]).buffers())
    pa.parquet.write_table(pa.table({"prompt": odd, "completion": ["a", "b", "c"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="rows.parquet row 2: not valid UTF-8"):
        rows_of("causal_lm", tokenizer, tmp_path / "rows.parquet")
    assert rows_of("causal_lm", tokenizer, tmp_path / "rows.parquet", unusable="drop").rows_used == 2


def test_a_whole_character_in_two_halves_is_one(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "\\ud83d\\ude00", "completion": "b"}\n')
    [[example]] = [rows_of("causal_lm", tokenizer, tmp_path / "rows.jsonl")[0]]
    assert example.messages[0]["content"] == "😀"


# -- sizes ---------------------------------------------------------------------------------------------------------------


def long_row(kind: str, file: Path) -> Path:
    """Two rows, of which the second has 20 million characters."""
    rows = [
        {"prompt": "red cat", "completion": "blue dog"},
        {"prompt": "red cat " * (20_000_000 // 8), "completion": "blue"},
    ]
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "jsonl":
        write_jsonl(file, rows)
    elif kind == "json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    return file


@pytest.mark.parametrize(
    "kind",
    ["jsonl", "parquet", pytest.param("json", marks=pytest.mark.faults), pytest.param("csv", marks=pytest.mark.faults)],
)
def test_a_row_of_many_megabytes_is_unusable_at_once(kind, tokenizer, tmp_path):
    file = long_row(kind, tmp_path / f"rows.{kind}")
    started = time.process_time()
    with pytest.raises(
        DataError, match=f"rows.{kind} row [23]: holds 20,000,0.. characters, above {MAX_ROW_CHARS:,}. Split it"
    ):
        rows_of("causal_lm", tokenizer, file)
    assert rows_of("causal_lm", tokenizer, file, unusable="drop").rows_used == 1
    assert time.process_time() - started < 10  # tokenizing it takes ten times as long


def test_rows_of_a_parquet_file_are_read_in_parts_of_bounded_size(tokenizer, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet

    from lora_lab.data import sources

    rows = [{"prompt": "red cat " * 500, "completion": f"blue {n}"} for n in range(40)]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", use_dictionary=False)
    monkeypatch.setattr(sources, "_BATCH_BYTES", 10_000)
    assert sources._parquet_rows(pa.parquet.ParquetFile(tmp_path / "rows.parquet"), None) == 2
    assert rows_of("causal_lm", tokenizer, tmp_path / "rows.parquet").rows_used == 40
    monkeypatch.setattr(sources, "_MAX_GROUP_BYTES", 100_000)
    with pytest.raises(DataError, match="row group 1 holds .* Write smaller row groups"):
        rows_of("causal_lm", tokenizer, tmp_path / "rows.parquet")


def test_a_quote_that_is_never_closed_ends_in_a_sentence(tokenizer, tmp_path, monkeypatch):
    from lora_lab.data import sources

    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 10_000)
    (tmp_path / "rows.csv").write_text('prompt,completion\na,b\n"' + "red cat\n" * 5000)
    with pytest.raises(DataError, match="a row is longer than .* Is a quote not closed"):
        rows_of("causal_lm", tokenizer, tmp_path / "rows.csv")


def test_a_document_or_sentence_without_end_is_a_sentence(tokenizer, tmp_path, monkeypatch):
    from lora_lab.data import sources

    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 10_000)
    monkeypatch.setattr(sources, "MAX_ROW_CHARS", 1000)
    (tmp_path / "rows.txt").write_text("red cat\n" * 5000)
    with pytest.raises(DataError, match="what starts in line 1 is longer than"):
        rows_of("completion", tokenizer, tmp_path / "rows.txt", sample_by="document")
    (tmp_path / "rows.conll").write_text("red O\n" * 5000)
    with pytest.raises(DataError, match="the sentence of line 1 does not end"):
        rows_of("token_classification", tokenizer, tmp_path / "rows.conll")


@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_deep_nesting_makes_a_row_unusable(brackets, tokenizer, tmp_path):
    deep = "1"
    for _ in range(200):
        deep = f"[{deep}]" if brackets == "[]" else f'{{"a": {deep}}}'
    (tmp_path / "rows.jsonl").write_text(
        f'{{"prompt": "a", "completion": "b"}}\n{{"prompt": "a", "completion": "b", "tools": {deep}}}\n'
    )
    with pytest.raises(DataError, match="rows.jsonl row 2: is nested deeper than 100 levels"):
        rows_of("causal_lm", tokenizer, tmp_path / "rows.jsonl")
    (tmp_path / "text.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "tools": "[" * 100_000}) + "\n")
    with pytest.raises(DataError, match="text.jsonl row 1: 'tools' is neither a structure nor JSON text"):
        rows_of("causal_lm", tokenizer, tmp_path / "text.jsonl")


@pytest.mark.parametrize("label", ["[" * 100_000, "1" + "0" * 400, "9" * 5000])
def test_labels_that_no_number_can_hold(label, tokenizer, tmp_path):
    text = f'{{"text": "a", "label": {label if label[0] != "[" else json.dumps(label)}}}'
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n' + text + "\n")
    with pytest.raises(DataError, match="rows.jsonl row 2"):
        rows_of("regression", tokenizer, tmp_path / "rows.jsonl")


@pytest.mark.parametrize("history", [[None], [5], ["red", "blue", "cat"], [["a"]], "red", {"a": "b"}])
def test_a_history_that_is_no_list_of_pairs(history, tokenizer, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "history": history}])
    with pytest.raises(DataError, match="row 1: 'history' (must be a list of pairs|is neither|is a list of 3 texts)"):
        rows_of("causal_lm", tokenizer, tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json.gz", gzip.compress(b"[{}]", mtime=0)[:-12]),
        ("rows.json.gz", b"\x1f\x8b\x08" + bytes(30)),
        ("rows.jsonl.gz", gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 99, mtime=0)[:60]),
        ("rows.csv.gz", b"not gzip"),
        ("rows.parquet", b"PAR1" + bytes(200) + b"PAR1"),
        ("rows.json", b"[" * 100_000),
        ("rows.json", b'{"a": 1}{"b": 2}'),
        ("rows.csv", b'"'),
        ("rows.csv", b"\0\n\0\n"),
        ("rows.tsv", b"\xff\xfe\n\xff\n"),
        ("rows.conll", b"one\n"),
        ("rows.txt", b"\xff\n"),
    ],
)
def test_files_that_are_not_what_their_name_says(name, content, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    task = "token_classification" if "conll" in name else "completion" if "txt" in name else "causal_lm"
    with pytest.raises(DataError, match="rows"):
        rows_of(task, tokenizer, tmp_path / name)
