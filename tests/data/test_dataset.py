"""Where rows come from, how they are kept, and in which order they are drawn."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_lab import cli
from lora_lab.config.data import DataConfig, Source
from lora_lab.data import build, chunks, formats, sources, store
from lora_lab.data.chat import ChatEncoder
from lora_lab.data.check import check
from lora_lab.data.dataset import Mixture, Stream
from lora_lab.errors import DataError, Interrupted
from lora_lab.run import pipeline
from lora_lab.run import prepared as stages
from lora_lab.runtime import storage
from lora_lab.tasks.causal_lm.config import CausalLMConfig
from lora_lab.training.batches import BatchPlan
from tests.conftest import CHATML, make_rows, make_tokenizer, write_jsonl
from tests.training.test_resume import digests, stop_at

USER, ANSWER = {"role": "user", "content": "red"}, {"role": "assistant", "content": "dog"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def load(tokenizer, train, **config) -> build.Data:
    config = DataConfig(train=train if isinstance(train, list) else str(train), **config)
    return build.build(config, ChatEncoder(config, CausalLMConfig(), tokenizer))


def contents(data) -> list[str]:
    """What each example was made of, in order."""
    return [json.dumps([example.messages, example.tools]) for example in data]


# -- sources ------------------------------------------------------------------------------------------------------------


def test_text_files_by_line_paragraph_and_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n", encoding="utf-8")
    for sample_by, expected in {
        "line": ["one", "two", "three"],
        "paragraph": ["one\ntwo", "three"],
        "document": ["one\ntwo\n\n\nthree"],
    }.items():
        [file] = sources.find("data.train", str(tmp_path / "a.txt"), sample_by)
        assert [row.values["text"] for row in file.rows()] == expected


def test_conll_sentences(tmp_path):
    (tmp_path / "a.conll").write_text("-DOCSTART- O\n\nGraz NNP B-LOC\nis VBZ O\n\nred O\nbroken\n", encoding="utf-8")
    [file] = sources.find("data.train", str(tmp_path / "a.conll"))
    rows = list(file.rows())
    assert rows[0].values == {"tokens": ["Graz", "is"], "tags": ["B-LOC", "O"]}
    assert "line 7: no tag behind the token" in rows[1].problem


def test_archives_folders_and_patterns(tmp_path, tokenizer):
    (tmp_path / "more").mkdir()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n'))
    (tmp_path / "more/b.tsv").write_text("prompt\tcompletion\nc\td\n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no data")
    for name, count in {"": 2, "*.gz": 1, "**/*.*sv": 1, "more": 1}.items():
        assert len(load(tokenizer, tmp_path / name).train) == count
    with pytest.raises(DataError, match="no file matches"):
        load(tokenizer, tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no data file"):
        load(tokenizer, tmp_path / "empty")


def test_hub_data_that_cannot_be_reached(tokenizer):
    with pytest.raises(DataError, match="hub:nobody/nothing: the hub request failed"):
        load(tokenizer, "hub:nobody/nothing")
    with pytest.raises(DataError, match="subset=main has no effect on rows.jsonl"):
        load(tokenizer, [Source(path="rows.jsonl", subset="main")])


def test_a_json_file_of_lines_and_of_a_list(tmp_path, tokenizer):
    rows = make_rows(3)
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "list.json").write_text(json.dumps(rows))
    assert contents(load(tokenizer, tmp_path / "lines.json").train) == contents(
        load(tokenizer, tmp_path / "list.json").train
    )


def test_columns_are_mapped_for_all_or_for_one_source(tmp_path, tokenizer):
    plain = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "red", "completion": "dog"}])
    named = write_jsonl(tmp_path / "b.jsonl", [{"question": "red", "answer": "dog", "id": 3}])
    mapping = {"prompt": "question", "completion": "answer"}
    whole = load(tokenizer, named, columns=mapping).train
    both = load(tokenizer, [Source(path=str(plain)), Source(path=str(named), columns=mapping)]).train
    assert contents(both) == contents(whole) * 2


# -- formats ------------------------------------------------------------------------------------------------------------

CALL = {"name": "weather", "arguments": {"city": "Graz"}}
LINKED = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": CALL, "id": "call00001"}],
}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "call00001", "name": "weather"}
ROWS = [
    ("sharegpt", {"conversations": [{"from": "human", "value": "red"}, {"from": "gpt", "value": "dog"}]}, [USER, ANSWER]),
    (
        "sharegpt",
        {
            "conversations": [
                {"role": "user", "content": "red"},
                {"role": "function_call", "content": json.dumps(CALL)},
                {"role": "observation", "content": "sunny"},
                {"role": "assistant", "content": "dog"},
            ],
            "system": "one two",
        },
        [{"role": "system", "content": "one two"}, USER, LINKED, RESULT, ANSWER],
    ),
    (
        "messages",  # OpenAI's: arguments as JSON text, parts of text
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "red"}]},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "type": "function", "function": {**CALL, "arguments": '{"city": "Graz"}'}}]},
                {"role": "tool", "tool_call_id": "x", "content": "sunny"},
                ANSWER,
            ]
        },
        [USER, {**LINKED, "tool_calls": [{"id": "x", "type": "function", "function": CALL}]}, {**RESULT, "tool_call_id": "x"}, ANSWER],
    ),
    ("preference", {"prompt": "red", "chosen": "dog", "rejected": "cat"}, [USER, ANSWER]),
    ("source_target", {"source": "red", "target": "dog"}, [USER, ANSWER]),
    (
        "question_answering",
        {"context": "a dog", "question": "what?", "answers": {"text": ["dog"], "answer_start": [2]}},
        [{"role": "user", "content": "a dog\n\nwhat?"}, ANSWER],
    ),
    ("text_label", {"text": "red", "label": "dog"}, [USER, ANSWER]),
    ("pair_label", {"text": "red", "text_pair": "blue", "label": "dog"}, [{"role": "user", "content": "red\n\nblue"}, ANSWER]),
    ("alpaca", {"instruction": "red", "output": "dog", "history": [["one", "two"]]}, [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, USER, ANSWER]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "messages"), ROWS, ids=[f"{i}-{row[0]}" for i, row in enumerate(ROWS)])
def test_rows_become_conversations(name, row, messages):
    assert formats.detect("rows", list(row), "auto") == name
    assert formats.read(row, name).messages == messages


def test_labels_by_number_take_their_names():
    record = formats.read({"text": "red", "label": 1}, "text_label", ["cat", "dog"])
    assert (record.messages, record.label) == ([USER, ANSWER], "dog")


def test_plain_text_is_learned_whole_and_ends(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("red cat\n")
    [example] = load(tokenizer, tmp_path / "a.txt").train
    assert tokenizer.decode(example.input_ids) == "red cat<|im_end|>"
    assert example.supervised[1:].all()


def test_cleaning_changes_prompts_and_leaves_answers(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "<b>RED</b>  Cat", "completion": "<b>DOG</b>"}])
    data = load(tokenizer, file, clean=["strip_html", "lowercase", "collapse_spaces"])
    [example] = data.train
    assert [message["content"] for message in example.messages] == ["red cat", "<b>DOG</b>"]
    encoder = ChatEncoder(DataConfig(train="-", clean=["lowercase"]), CausalLMConfig(), tokenizer)
    assert "red" in encoder.prompt([{"role": "user", "content": "RED"}])  # chat does the same


# -- the cache ----------------------------------------------------------------------------------------------------------


def test_every_change_is_a_miss_and_no_change_a_hit(tmp_path, tokenizer, monkeypatch):
    file = write_jsonl(tmp_path / "rows.jsonl", make_rows(4))
    options = {"max_tokens": 64}
    assert not load(tokenizer, file, **options).train.cached
    calls = []
    monkeypatch.setattr(ChatEncoder, "encode", lambda *_: calls.append(1) or pytest.fail("rows were encoded again"))
    assert load(tokenizer, file, **options).train.cached
    monkeypatch.undo()
    for change in (
        {"max_tokens": 65},
        {"supervise": "all"},
        {"clean": ["lowercase"]},
        {"chat_template_kwargs": {"a": 1}},
    ):
        assert not load(tokenizer, file, **{**options, **change}).train.cached
    assert not load(make_tokenizer(tmp_path / "t", CHATML + "\n"), file, **options).train.cached
    assert not load(make_tokenizer(tmp_path / "u", added=("Oslo",)), file, **options).train.cached
    stamp = os.stat(file)
    content = bytearray(file.read_bytes())
    content[content.index(b"completion") + 14] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert not load(tokenizer, file, **options).train.cached
    monkeypatch.setattr(store, "code_version", lambda _: "other code")
    assert not load(tokenizer, file, **options).train.cached


def test_choices_among_rows_do_not_encode_again(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "rows.jsonl", make_rows(12))
    load(tokenizer, file)
    for change in ({"eval_ratio": 0.3}, {"duplicates": "drop"}, {"unusable": "drop"}, {"check": "off"}):
        assert load(tokenizer, file, **change).train.cached


def test_a_damaged_entry_is_made_again(tmp_path, tokenizer, cache, capsys):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "only here", "completion": "dog"}])
    before = set((cache / "tokens").glob("*/examples.arrow"))
    expected = contents(load(tokenizer, file).train)
    [entry] = set((cache / "tokens").glob("*/examples.arrow")) - before
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    data = load(tokenizer, file).train
    assert not data.cached
    assert contents(data) == expected
    assert "It is made again" in capsys.readouterr().out


def _build(folder: str, file: str, queue) -> None:
    queue.put(contents(load(make_tokenizer(Path(folder)), file).train))


@pytest.mark.long
def test_two_processes_build_the_same_entry(tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", make_rows(300, seed=9))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for i in range(2):
        (tmp_path / str(i)).mkdir()
    workers = [context.Process(target=_build, args=(str(tmp_path / str(i)), str(file), queue)) for i in range(2)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert results[0] == results[1]
    assert len(results[0]) == 300


def _bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of examples in a cache, by the place of their part."""
    return {file.parent.name.partition("-")[2]: file.read_bytes() for file in folder.glob("tokens/*/examples.arrow")}


def test_several_processes_and_an_interruption_write_the_same_bytes(tmp_path, tokenizer, monkeypatch):
    rows = [*make_rows(600, seed=5), {"prompt": "a", "completion": ""}, *make_rows(600, seed=6)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr(store, "_PART_CHUNKS", 1)
    monkeypatch.setattr(store, "_PART_ROWS", chunks.CHUNK_ROWS)

    def prepared(name: str, **options):
        monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / name))
        data = load(tokenizer, file, unusable="drop", **options).train
        return data, _bytes_of(tmp_path / name)

    alone, expected = prepared("one")
    assert sorted(expected) == ["", "1", "2"]
    encode, first_rows, stop = ChatEncoder.encode, [], 513

    def watched(self, rows, *rest):
        if rows[0].number == stop:
            raise KeyboardInterrupt
        first_rows.append(rows[0].number)
        return encode(self, rows, *rest)

    monkeypatch.setattr(ChatEncoder, "encode", watched)
    with pytest.raises(KeyboardInterrupt):
        prepared("interrupted")
    assert _bytes_of(tmp_path / "interrupted") == {"": expected[""]}
    stop = None
    data, found = prepared("interrupted")
    assert first_rows == [1, 513, 1025]
    assert not data.cached
    assert found == expected
    assert data.reports == alone.reports
    with monkeypatch.context() as patch:
        patch.setattr(ChatEncoder, "encode", lambda *_: pytest.fail("encoded in this process"))
        data, found = prepared("two", processes=2)
    assert found == expected
    assert data.table.equals(alone.table)
    assert data.reports == alone.reports


# -- splits and mixtures ------------------------------------------------------------------------------------------------


def test_a_split_is_exact_disjoint_stable_and_keeps_equal_rows_together(tmp_path, tokenizer):
    rows = [{"prompt": f"red {i}", "completion": "dog", "kind": "ab"[i % 4 == 0]} for i in range(80)]
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows, *rows[:10]])
    data = load(tokenizer, file, eval_ratio=0.25, stratify="kind")
    sides = [set(contents(part)) for part in (data.train, data.held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 20
    kinds = [rows[int(json.loads(text)[0][0]["content"].split()[1])]["kind"] for text in sides[1]]
    assert kinds.count("b") == 5  # a quarter of its 20
    assert len(data.train) + len(data.held_out) == 90
    for part in (data.train, data.held_out):
        assert part.rows_read == part.rows_used + sum(part.rows_dropped.values())
    again = load(tokenizer, file, eval_ratio=0.25, stratify="kind").held_out
    assert contents(again) == contents(data.held_out)
    other = load(tokenizer, file, eval_ratio=0.25, stratify="kind", split_seed=1).held_out
    assert set(contents(other)) != sides[1]
    grown = write_jsonl(tmp_path / "grown.jsonl", [*rows, {"prompt": "new", "completion": "dog", "kind": "a"}])
    held = set(contents(load(tokenizer, grown, eval_ratio=0.25, stratify="kind").held_out))
    assert len(held & sides[1]) >= 19  # one more row moves at most one
    with pytest.raises(DataError, match="Both sides need at least one"):
        load(tokenizer, write_jsonl(tmp_path / "one.jsonl", rows[:1]), eval_ratio=0.5)
    with pytest.raises(DataError, match=r"or leave out data\.stratify, whose column has 20 different values"):
        apart = [{**row, "kind": str(number)} for number, row in enumerate(rows[:20])]
        load(tokenizer, write_jsonl(tmp_path / "apart.jsonl", apart), eval_ratio=0.2, stratify="kind")


def test_duplicates_are_counted_or_dropped(tmp_path, tokenizer):
    rows = make_rows(5)
    file = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[0], rows[0], rows[3]])
    config = DataConfig(train=str(file))
    encoder = ChatEncoder(config, CausalLMConfig(), tokenizer)
    [finding] = check(build.build(config, encoder), config, encoder)
    assert (
        "warning: data.train: 3 rows equal an earlier row (rows.jsonl row 6, rows.jsonl row 7, rows.jsonl row 8)"
        in str(finding)
    )
    data = load(tokenizer, file, duplicates="drop").train
    assert (data.rows_used, data.rows_dropped) == (5, {"duplicates": 3})


def test_limits_read_no_further(tmp_path, tokenizer):
    first = write_jsonl(tmp_path / "a.jsonl", make_rows(5))
    second = tmp_path / "b.jsonl"
    second.write_text(json.dumps(make_rows(1, seed=3)[0]) + "\n" + "broken\n" * 3)
    data = load(tokenizer, [str(first), str(second)], max_train_rows=6).train
    assert (data.rows_read, data.rows_used) == (6, 6)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_mixture_keeps_its_shares_and_wastes_no_row(seed):
    plan = BatchPlan(13, 4, 4, seed, Mixture(sizes=(10, 3), draws=(3, 10)))
    epochs = [
        [i for s in range(plan.steps_per_epoch) for part in plan.step(e * plan.steps_per_epoch + s) for i in part]
        for e in range(10)
    ]
    for epoch in epochs:
        assert (len(epoch), sum(i < 10 for i in epoch)) == (13, 3)
    first = [i for epoch in epochs for i in epoch if i < 10]
    assert sorted(first) == sorted([*range(10)] * 3)  # three whole passes in ten epochs
    second = np.bincount([i - 10 for epoch in epochs for i in epoch if i >= 10])
    assert second.max() - second.min() <= 1


def test_weights_of_sources(tmp_path, tokenizer):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", make_rows(10, seed=i)) for i in range(2)]
    data = load(tokenizer, [Source(path=str(file), weight=w) for file, w in zip(files, (3, 1), strict=True)]).train
    assert data.mixture == Mixture(sizes=(10, 10), draws=(15, 5))
    assert load(tokenizer, [str(file) for file in files]).train.mixture is None
    (tmp_path / "two").mkdir()
    for file in files:
        file.rename(tmp_path / "two" / file.name)
    single = write_jsonl(tmp_path / "single.jsonl", make_rows(4))
    sources_ = [Source(path=str(tmp_path / "two"), weight=1), Source(path=str(single), weight=1)]
    for streaming in (False, True):  # a folder is one source
        data = load(tokenizer, sources_, streaming=streaming).train
        assert data.mixture == Mixture(sizes=(20, 4), draws=(12, 12))
    assert load(tokenizer, sources_).train[0][0].origin == "0.jsonl row 1"


def test_files_of_one_name_are_told_apart(tmp_path, tokenizer):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "rows.jsonl", make_rows(1))
    origins = [example.origin for example in load(tokenizer, tmp_path).train]
    assert origins == ["a/rows.jsonl row 1", "b/rows.jsonl row 1"]


# -- streaming ----------------------------------------------------------------------------------------------------------


def test_a_stream_gives_what_is_stored(tmp_path, tokenizer):
    files = [write_jsonl(tmp_path / f"{i}.jsonl", make_rows(7, seed=i)) for i in range(2)]
    files[0].write_bytes(b"\xef\xbb\xbf" + files[0].read_bytes()[:-1])  # a mark at the start, no line end at the end
    names = [str(file) for file in files]
    stored, stream = load(tokenizer, names).train, load(tokenizer, names, streaming=True).train
    assert isinstance(stream, Stream)
    assert len(stream) == len(stored)
    for i in range(len(stored)):
        [one], [other] = stored[i], stream[i]
        assert (one.origin, one.messages, one.tools) == (other.origin, other.messages, other.tools)
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.weights, other.weights)


def test_only_plain_jsonl_can_be_streamed(tmp_path, tokenizer):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n'))
    with pytest.raises(DataError, match="reads plain .jsonl files"):
        load(tokenizer, tmp_path / "a.jsonl.gz", streaming=True)


STREAMED = [
    "data.streaming=true",
    "train.epochs=3",
    "train.max_steps=12",
    "train.micro_batch_size=2",
    "train.save_steps=5",
    "adapter.lora_dropout=0.2",
]


def test_a_streamed_run_equals_a_stored_one_and_resumes_exactly(config_of, tmp_path, monkeypatch):
    stored = pipeline.train(config_of(*STREAMED, "data.streaming=false", f"run_dir={tmp_path}/stored"))
    whole = pipeline.train(config_of(*STREAMED, f"run_dir={tmp_path}/whole"))
    expected = digests(whole.path)
    assert digests(stored.path) == expected
    cli.signals.install()
    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        with pytest.raises(Interrupted):
            pipeline.train(config_of(*STREAMED, f"run_dir={tmp_path}/stopped"))
    pipeline.resume(str(tmp_path / "stopped"), [])
    assert digests(tmp_path / "stopped") == expected


def test_rows_of_a_stream_are_dropped_as_they_come(config_of, tmp_path):
    long = {"prompt": "red " * 90, "completion": "b"}
    file = write_jsonl(tmp_path / "rows.jsonl", [long, long, *make_rows(2)])
    config = config_of(
        f"data.train={file}",
        *STREAMED[:1],
        "data.max_tokens=64",
        "data.too_long=drop",
        "train.batch_size=1",
        f"run_dir={tmp_path}/run",
    )
    lines = [json.loads(line) for line in (pipeline.train(config).path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert sum(line["loss"] is None for line in lines) == 2  # steps without a row make no update


STREAM_MEMORY = """
import resource, sys
from pathlib import Path
from lora_lab.base.tokenizer import load_tokenizer
from lora_lab.config.data import DataConfig
from lora_lab.tasks.causal_lm.config import CausalLMConfig
from lora_lab.data import build
from lora_lab.data.chat import ChatEncoder
from lora_lab.training.batches import BatchPlan
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = DataConfig(train=sys.argv[1], streaming=True)
data = build.build(config, ChatEncoder(config, CausalLMConfig(), load_tokenizer(Path(sys.argv[2])))).train
plan = BatchPlan(len(data), 4, 4, 0)
for step in range(50):
    [data[int(i)] for part in plan.step(step) for i in part]
print(len(data), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.long
def test_a_stream_needs_little_memory(tmp_path, base):
    """60 MB of rows in any order: far less than the file, in kilobytes of resident memory."""
    block = "".join(json.dumps(row) + "\n" for row in make_rows(2000)).encode()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(block * (60_000_000 // len(block)))
    done = subprocess.run(
        [sys.executable, "-c", STREAM_MEMORY, str(file), str(base)], capture_output=True, text=True, check=True
    )
    rows, kilobytes = map(int, done.stdout.split())
    assert rows == file.read_bytes().count(b"\n")
    assert kilobytes < 45_000


# -- checks -------------------------------------------------------------------------------------------------------------


def test_the_data_verb_shows_rows_and_checks_them(overrides, tmp_path, capsys):
    rows = [*make_rows(8), {"prompt": "<script>alert(1)</script>", "completion": "dog"}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    page = tmp_path / "page.html"
    assert cli.main(["data", *overrides, f"data.train={file}", "--rows", "9", "--html", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "⟦dog<|im_end|>⟧" in printed
    assert "no errors" in printed
    text = page.read_text(encoding="utf-8")
    assert "<mark>dog&lt;|im_end|&gt;</mark>" in text
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_data_verb_fails_on_errors_and_names_all_kinds(overrides, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    write_jsonl(
        file,
        [
            *make_rows(3),
            {"prompt": "a", "completion": ""},
            {"prompt": "a"},
            {"prompt": "red " * 90, "completion": "b"},
        ],
    )
    file.write_bytes(file.read_bytes() + b"\xff\n")
    assert cli.main(["data", *overrides, f"data.train={file}", "data.max_tokens=64"]) == 1
    printed = capsys.readouterr().out
    for kind in ("empty", "missing column", "too long", "unreadable"):
        assert f"error: data.train: 1 of 7 rows of rows.jsonl: {kind}. rows.jsonl row" in printed
    assert "not valid UTF-8" in printed
    assert "4 errors: see above" in printed


def test_the_data_verb_fails_when_no_row_is_left(overrides, tmp_path, capsys):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": ""}])
    assert cli.main(["data", *overrides, f"data.train={file}", "data.unusable=drop"]) == 1
    assert "error: data.train: none of the 1 rows is left to train on" in capsys.readouterr().out


def test_training_refuses_what_the_checks_find(overrides, tmp_path, capsys):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "red", "label": 1}, {"text": "cat", "label": 1}])
    assert cli.main(["train", *overrides, f"data.train={file}"]) == 2
    assert "To train anyway: data.check=warn." in capsys.readouterr().err
    assert cli.main(["train", *overrides, f"data.train={file}", "data.check=warn", "train.max_steps=1"]) == 0
    assert "error: data.train: all labels are 1" in capsys.readouterr().out
    assert (
        cli.main(
            [
                "train",
                *overrides,
                f"data.train={file}",
                "data.check=off",
                "train.max_steps=1",
                f"run_dir={tmp_path}/off",
            ]
        )
        == 0
    )
    assert "all labels are 1" not in capsys.readouterr().out


def test_an_answer_without_an_end_token_is_an_error(tmp_path, tokenizer, monkeypatch):
    """The masks always close answers, so the check is shown a set whose end tokens are of another tokenizer."""
    file = write_jsonl(tmp_path / "rows.jsonl", make_rows(3))
    config = DataConfig(train=str(file))
    data = build.build(config, ChatEncoder(config, CausalLMConfig(), tokenizer))
    other = make_tokenizer(tmp_path / "other", special=("<a>",), bos_token=None, eos_token="<a>")
    other.chat_template = CHATML
    findings = check(data, config, ChatEncoder(config, CausalLMConfig(), other))
    assert any("3 examples hold an answer whose end token is not trained on" in str(finding) for finding in findings)
    assert any("prompts differ between training and inference" in str(finding) for finding in findings)


def test_half_weight_halves_the_pull(config_of, tmp_path):
    """A row at weight 2 counts like the same row twice."""
    import torch

    from lora_lab.data.collate import pack

    def loss(rows: list[dict]) -> float:
        file = write_jsonl(tmp_path / f"{hashlib.sha256(json.dumps(rows).encode()).hexdigest()}.jsonl", rows)
        prepared = stages.prepare(config_of(f"data.train={file}"))
        model = prepared.loaded().model
        with torch.no_grad():
            out = prepared.task.loss(model, pack(list(prepared.train)))
        return out.loss.item() / out.weight

    one, other = ({"messages": [{**USER, "content": text}, ANSWER]} for text in ("red", "blue cat"))
    heavy = {"messages": [one["messages"][0], {**ANSWER, "weight": 2}]}
    assert loss([heavy, other]) == pytest.approx(loss([one, one, other]), rel=1e-6)
    assert loss([heavy]) == pytest.approx(loss([one]), rel=1e-6)


def test_the_manifest_of_a_run_names_its_data(config_of, rows_file):
    done = pipeline.train(config_of("train.max_steps=1", "data.eval_ratio=0.2"))
    manifest = json.loads((done.path / "manifest.json").read_text())
    assert manifest["data"]["data.train"] == {str(rows_file): storage.sha256(rows_file)}
