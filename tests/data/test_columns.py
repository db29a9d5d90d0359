"""An example's own columns: what an encoder declares goes through tables, streams and processes to `collate` as it was given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from lora_lab.config import compose
from lora_lab.config.data import DataConfig
from lora_lab.data import build, chunks, columns
from lora_lab.data.chat import ChatEncoder
from lora_lab.data.collate import PaddedBatch
from lora_lab.data.columns import TOKENS
from lora_lab.data.encode import Encoded, Encoder, Example
from lora_lab.data.formats import Record
from lora_lab.data.sources import Row
from lora_lab.errors import DataError
from lora_lab.tasks.base import PaddedTask
from lora_lab.tasks.causal_lm.config import CausalLMConfig
from lora_lab.tasks.regression.config import RegressionConfig
from tests.conftest import make_tokenizer, write_jsonl
from tests.tasks.examples import assert_same, same


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


# -- a kind of input that the package does not know -----------------------------------------------------------------------


class PictureEncoder(Encoder):
    """The path of a picture as the text, and a number to be found for it."""

    token_columns = ("caption_ids",)

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {"value": pa.float64(), "size": TOKENS, "path": pa.string(), "caption_ids": TOKENS}

    def example(self, record: Record, origin: str) -> Encoded:
        pixels = len(Path(record.text).read_bytes())
        ids = np.asarray(self.tokenizer("x y")["input_ids"], dtype=np.int64)
        caption = self.tokenizer(Path(record.text).stem)["input_ids"]
        own = {"path": record.text, "value": record.label / 3, "size": (pixels // 2, 2), "caption_ids": caption}
        return Encoded([Example(ids, np.zeros(len(ids), dtype=np.float32), origin, own, own_items=2)])


class Pictures(PaddedTask):
    """Opens the pictures when they are put together."""

    encoder_class = PictureEncoder

    def collate(self, examples: list[Example], rng: np.random.Generator) -> PaddedBatch:
        pictures = [np.frombuffer(Path(e["path"]).read_bytes(), np.uint8).reshape(e["size"]) for e in examples]
        return PaddedBatch(
            inputs={**self.inputs([e.input_ids for e in examples]), "pixels": torch.from_numpy(np.stack(pictures))},
            lengths=[e.num_tokens for e in examples],
            places=None,
            targets=torch.tensor([e["value"] for e in examples], dtype=torch.float64),
            weights=None,
            origins=[e.origin for e in examples],
        )


@pytest.fixture
def pictures(tmp_path) -> Path:
    rows = []
    for number in range(6):
        picture = tmp_path / f"{'cat' * (number + 1)}.raw"
        picture.write_bytes(bytes(range(number, number + 6)))
        rows.append({"text": str(picture), "label": number + 1})
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def picture_encoder(tokenizer, file: Path, vocab_size: int | None = None, **config) -> PictureEncoder:
    return PictureEncoder(DataConfig(train=str(file), **config), RegressionConfig(), tokenizer, vocab_size)


def test_a_new_kind_of_input_is_an_encoder_and_collate(pictures, tokenizer):
    """Its values come to `collate` from the encoder, from a table just written or found again, and from a stream alike."""
    encoder = picture_encoder(tokenizer, pictures)
    config = compose.compose(["model=hub", "model.path=-", f"data.train={pictures}", "task=regression", "run_dir=-"])
    task = Pictures(config, encoder, {}, None)
    values = [json.loads(line) for line in pictures.read_text().splitlines()]
    rows = [Row(number, row) for number, row in enumerate(values, start=1)]
    expected = [outcome.examples[0] for outcome in encoder.encode(rows, "rows.jsonl", "text_label")]
    written, found, stream = (
        build.build(one.config, one).train
        for one in (encoder, encoder, picture_encoder(tokenizer, pictures, streaming=True))
    )
    assert (written.cached, found.cached) == (False, True)
    for data in (written, found, stream):
        examples = [example for index in range(len(data)) for example in data[index]]
        for example, other in zip(examples, expected, strict=True):
            assert_same(example, other)
        batch = task.collate(examples, np.random.default_rng(0))
        assert batch.targets.tolist() == [(number + 1) / 3 for number in range(6)]
        assert batch.inputs["pixels"].tolist() == [[[n, n + 1], [n + 2, n + 3], [n + 4, n + 5]] for n in range(6)]
    assert same(expected[0]["size"], np.array([3, 2]))


def test_own_tokens_are_counted_and_checked(pictures, tokenizer):
    encoder = picture_encoder(tokenizer, pictures)
    data = build.build(encoder.config, encoder).train
    captions = [len(example["caption_ids"]) for example in data]
    prompt = len(data[0][0].input_ids)
    assert len(set(captions)) > 1
    assert data.lengths.tolist() == [prompt + count for count in captions]
    assert data.longest == max(prompt, *captions)
    assert data.supervised.tolist() == [2] * 6
    assert [example.num_tokens for example in data] == data.lengths.tolist()
    highest = max(int(ids.max()) for example in data for ids in encoder.sequences(example))
    assert highest > data[0][0].input_ids.max()  # it is a caption's
    small = picture_encoder(tokenizer, pictures, vocab_size=highest)
    with pytest.raises(DataError, match=f"has id {highest}"):
        build.build(small.config, small)


def test_other_columns_are_another_cache_entry(pictures, tokenizer, monkeypatch):
    encoder = picture_encoder(tokenizer, pictures)
    assert not build.build(encoder.config, encoder).train.cached
    assert build.build(encoder.config, encoder).train.cached
    fewer = {**encoder.columns, "size": pa.list_(pa.int16())}
    monkeypatch.setattr(PictureEncoder, "columns", property(lambda _: fewer))
    data = build.build(encoder.config, encoder).train
    assert not data.cached
    assert data.table.schema.field("size").type == fewer["size"]
    assert same(data[0][0]["size"], np.array([3, 2]))  # however few bits are kept


def test_an_encoder_gives_what_it_declares(pictures, tokenizer, monkeypatch):
    encoder = picture_encoder(tokenizer, pictures)
    monkeypatch.setattr(PictureEncoder, "columns", property(lambda _: {"value": pa.float64()}))
    with pytest.raises(AssertionError, match="PictureEncoder"):
        build.build(encoder.config, encoder)
    monkeypatch.setattr(PictureEncoder, "columns", property(lambda _: {"origin": pa.string()}))
    with pytest.raises(AssertionError, match="every task has columns of these names: origin"):
        chunks.schema_of(encoder)


# -- types ------------------------------------------------------------------------------------------------------------------

NESTED = {"a": [1, 2.5, None, True, {"ü 好": '"\\'}], "b": {}}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.float64(), 0.1 + 0.2),
        (pa.int32(), -7),
        (pa.bool_(), True),
        (pa.string(), "好 \n"),
        (columns.TEXTS, ["", "b"]),
        (columns.TEXTS, []),
        (columns.TOKENS, [3, 1, 2]),
        (columns.TOKENS, []),
        (columns.WEIGHTS, [0.1, 1.0]),
        (pa.list_(pa.float64()), [0.1]),
        (pa.struct({"a": pa.int64(), "b": columns.TEXTS}), {"a": 1, "b": ["x"]}),
        (columns.JSON, NESTED),
        (columns.JSON, [NESTED, "text"]),
        (columns.JSON, "text"),
        (columns.JSON, 0),
    ],
)
def test_a_value_of_each_type_comes_back_as_it_was(kind, value, tmp_path):
    given = [columns.typed(one, kind) for one in (value, None)]
    schema = pa.schema({"one": kind})
    file = str(tmp_path / "one.arrow")
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        lines = [{"one": columns.kept(one, kind)} for one in given]
        writer.write_batch(pa.RecordBatch.from_pylist(lines, schema=schema))
    table = pa.ipc.open_file(pa.memory_map(file)).read_all()
    for index, one in enumerate(given):
        own = columns.Own({"one": columns.Column(table.column("one"))}, index)
        assert same(own["one"], one)
        assert (list(own), len(own), own.get("two"), "two" in own) == (["one"], 1, None, False)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (pa.float64(), 3, 3.0),
        (pa.float32(), 0.1, float(np.float32(0.1))),
        (pa.int32(), np.int64(3), 3),
        (pa.bool_(), np.bool_(True), True),
        (pa.string(), np.str_("a"), "a"),
        (columns.TEXTS, ("a", "b"), ["a", "b"]),
        (columns.TOKENS, (1, 2), np.array([1, 2])),
        (columns.WEIGHTS, [1, 0.1], np.array([1, 0.1], dtype=np.float32)),
    ],
)
def test_what_an_encoder_gives_in_another_type_is_what_a_file_would_give(kind, given, expected):
    assert same(columns.typed(given, kind), expected)
    table = pa.table({"one": pa.array([expected], kind)})
    assert same(columns.Column(table.column("one"))[0], expected)


def test_conversations_come_back_as_they_were_and_are_parsed_when_asked_for(tmp_path, tokenizer, monkeypatch):
    call = {"type": "function", "function": {"name": "f", "arguments": NESTED}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": '好 "red" \\'},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "dog", "weight": 1},
            ],
            "tools": [tool],
        },
        {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "cat"}]},
    ]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(train=str(file))
    encoder = ChatEncoder(config, CausalLMConfig(), tokenizer)
    outcomes = encoder.encode([Row(n, row) for n, row in enumerate(rows, start=1)], "rows.jsonl", "messages")
    expected = [example for outcome in outcomes for example in outcome.examples]
    data = build.build(config, encoder).train
    for example, other in zip(data, expected, strict=True):
        assert_same(example, other)
    assert data[0][0].tools == [tool]
    assert data[1][0].tools is None
    [example] = data[1]
    monkeypatch.setattr(columns.json, "loads", lambda _: pytest.fail("parsed"))
    [again] = data[1]
    assert np.array_equal(again.input_ids, example.input_ids)
    with pytest.raises(pytest.fail.Exception):
        _ = again.messages


def test_plain_text_has_no_conversation(tmp_path, tokenizer):
    config = DataConfig(train=str(write_jsonl(tmp_path / "rows.jsonl", [{"text": "red cat"}])))
    [example] = build.build(config, ChatEncoder(config, CausalLMConfig(), tokenizer)).train
    assert (example["messages"], example.messages, example.tools) == (None, [], None)
