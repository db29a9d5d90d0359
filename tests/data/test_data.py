"""From rows to exact masks: what is supervised, what is refused, and that counts add up."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lora_lab.base.tokenizer import PLAIN_TEMPLATE
from lora_lab.config.data import DataConfig
from lora_lab.data import build, formats, sources
from lora_lab.data.chat import ChatEncoder
from lora_lab.data.collate import pack
from lora_lab.data.encode import Example
from lora_lab.data.sources import Row
from lora_lab.errors import DataError
from lora_lab.tasks.causal_lm.config import CausalLMConfig
from tests.conftest import make_rows, make_tokenizer, write_jsonl

SYSTEM = {"role": "system", "content": "one two"}
USER, ANSWER = {"role": "user", "content": "red cat"}, {"role": "assistant", "content": "blue 你好 dog"}
USER2, ANSWER2 = {"role": "user", "content": "green"}, {"role": "assistant", "content": " bird\n\n table "}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encode_messages(messages, tokenizer, **config) -> Example:
    """The one example of a conversation."""
    [outcome] = ChatEncoder(DataConfig(train="-", **config), CausalLMConfig(), tokenizer).encode(
        [Row(1, {"messages": messages})], "row", "messages"
    )
    assert outcome.problem is None, outcome.sentence
    [example] = outcome.examples
    return example


def load(tokenizer, *files, **config):
    """The training rows of some files."""
    config = DataConfig(train=[str(file) for file in files], **config)
    return build.build(config, ChatEncoder(config, CausalLMConfig(), tokenizer)).train


def rows_of(file) -> list[Row]:
    [found] = sources.find("data.train", str(file))
    return list(found.rows())


def supervised_text(example, tokenizer) -> str:
    return tokenizer.decode(example.input_ids[example.supervised])


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([USER, ANSWER], "blue 你好 dog<|im_end|>"),
        ([SYSTEM, USER, ANSWER], "blue 你好 dog<|im_end|>"),
        ([USER, ANSWER, USER2, ANSWER2], "blue 你好 dog<|im_end|> bird\n\n table <|im_end|>"),
        ([SYSTEM, USER, ANSWER, USER2], "blue 你好 dog<|im_end|>"),
    ],
)
def test_answers_and_their_end_tokens_are_supervised(messages, text, tokenizer):
    example = encode_messages(messages, tokenizer)
    assert supervised_text(example, tokenizer) == text
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_supervise_all(tokenizer):
    example = encode_messages([USER, ANSWER], tokenizer, supervise="all")
    assert example.supervised[1:].all()
    assert not example.supervised[0]


def test_template_without_end_token_gets_one(tmp_path):
    tokenizer = make_tokenizer(tmp_path, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    # no generation prompt: what inference would see ends with the question's line
    example = encode_messages([USER, ANSWER], tokenizer)
    assert supervised_text(example, tokenizer).endswith("blue 你好 dog<|im_end|>")
    assert ChatEncoder(DataConfig(train="-"), CausalLMConfig(), tokenizer).end_tokens() == [tokenizer.eos_token_id]


@pytest.mark.parametrize("config", [{}, {"supervise": "all"}, {"max_tokens": 8}], ids=str)
def test_generation_stops_at_the_end_of_a_turn(tmp_path, config):
    tokenizer = make_tokenizer(tmp_path, eos_token="<|endoftext|>")
    ids = ChatEncoder(DataConfig(train="-", **config), CausalLMConfig(), tokenizer).end_tokens()
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|endoftext|>", "<|im_end|>"]


def test_a_prompt_is_tokenized_as_inference_does(tmp_path):
    """Two line ends are one token at the end of a prompt and two tokens before an answer: training must see the one."""
    template = (
        "{% for m in messages %}{{ m['role'] }}:\n\n{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n\n{% endif %}"
    )
    tokenizer = make_tokenizer(tmp_path, template, corpus="red\n\n")
    messages = [USER, ANSWER, USER2, {"role": "assistant", "content": "dog"}]
    encoder = ChatEncoder(DataConfig(train="-"), CausalLMConfig(), tokenizer)
    [outcome] = encoder.encode([Row(1, {"messages": messages})], "row", "messages")
    assert outcome.cut_at_border
    assert len(outcome.examples) == 2  # the history of the second answer is tokenized as a whole again
    for turn, example in zip((1, 3), outcome.examples, strict=True):
        prompt = tokenizer(encoder.prompt(messages[:turn]), add_special_tokens=False)["input_ids"]
        assert example.input_ids[: len(prompt)].tolist() == prompt
        assert not example.supervised[: len(prompt)].any()
        assert supervised_text(example, tokenizer) == f"{messages[turn]['content']}<|im_end|>"
        assert example.messages == messages[: turn + 1]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(outcome.examples[1].input_ids) == whole
    assert tokenizer(whole, add_special_tokens=False)["input_ids"] != outcome.examples[1].input_ids.tolist()


def test_plain_template_supervises_the_end(tmp_path):
    tokenizer = make_tokenizer(tmp_path, PLAIN_TEMPLATE)
    example = encode_messages([SYSTEM, USER, ANSWER], tokenizer)
    assert supervised_text(example, tokenizer) == "blue 你好 dog<|im_end|>"


def test_template_that_raises_names_the_row(tmp_path):
    tokenizer = make_tokenizer(tmp_path, "{{ raise_exception('no system role') }}")
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [SYSTEM, USER, ANSWER]}])
    with pytest.raises(
        DataError, match="rows.jsonl row 1: the model's chat template cannot render it .*no system role"
    ):
        load(tokenizer, file)


def test_pack_shifts_targets_within_each_example(tokenizer):
    examples = [encode_messages([USER, ANSWER], tokenizer), encode_messages([USER2, ANSWER2], tokenizer)]
    batch = pack(examples)
    assert batch.lengths == [len(e.input_ids) for e in examples]
    assert batch.input_ids.shape == (1, sum(batch.lengths))
    assert batch.position_ids[0].tolist() == [*range(batch.lengths[0]), *range(batch.lengths[1])]
    following = batch.input_ids[0][batch.logit_positions + 1]
    assert following.tolist() == batch.targets.tolist()
    assert batch.targets.tolist() == [t for e in examples for t in e.input_ids[e.supervised].tolist()]


ALPACA = {"instruction": "red", "input": "cat", "output": "dog"}
FORMATS = [
    ({"messages": [USER, ANSWER]}, "messages", [USER, ANSWER]),
    ({"prompt": "red", "completion": "dog"}, "prompt_completion", [("user", "red"), ("assistant", "dog")]),
    ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion", [USER, ANSWER]),
    (ALPACA, "alpaca", [("user", "red\n\ncat"), ("assistant", "dog")]),
    ({**ALPACA, "input": ""}, "alpaca", [("user", "red"), ("assistant", "dog")]),
    ({"instruction": "red", "output": "dog"}, "alpaca", [("user", "red"), ("assistant", "dog")]),
]


@pytest.mark.parametrize(("row", "name", "expected"), FORMATS)
def test_formats_are_detected(row, name, expected):
    assert formats.detect("rows", list(row), "auto") == name
    expected = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in expected]
    assert formats.read(row, name).messages == expected


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_file_kind_gives_the_same_rows(suffix, tmp_path):
    import pandas

    rows, file = make_rows(5), tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(file, rows)
    elif suffix == "json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        getattr(pandas.DataFrame(rows), f"to_{suffix}")(file, index=False)
    assert [row.values for row in rows_of(file)] == rows


@pytest.mark.parametrize(
    "name", ["订单 (1).jsonl", "a[1].jsonl", "a*b.jsonl", "a::b.jsonl", "p{1,2}.jsonl", "it's#%20.jsonl"]
)
def test_a_file_name_is_not_a_pattern(name, tmp_path):
    write_jsonl(tmp_path / "axb.jsonl", make_rows(9))
    file = write_jsonl(tmp_path / name, make_rows(2))
    [found] = sources.find("data.train", str(file))
    assert found.name == name
    assert [row.number for row in found.rows()] == [1, 2]


def test_files_of_unlike_formats_and_like_names(tmp_path, tokenizer):
    (tmp_path / "x").mkdir()
    first = write_jsonl(tmp_path / "rows.jsonl", make_rows(3))
    second = write_jsonl(tmp_path / "x/rows.jsonl", [ALPACA])
    data = load(tokenizer, first, second)
    assert [report.format for report in data.reports] == ["prompt_completion", "alpaca"]
    assert len(data) == 4
    assert len(data.files) == 2


def long_rows(tmp_path, tokenizer, policy: str):
    rows = [*make_rows(4), {"prompt": "red " * 100 + "lamp", "completion": "dog"}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    return load(tokenizer, file, max_tokens=60, too_long=policy)


def test_too_long_drop_counts(tmp_path, tokenizer):
    data = long_rows(tmp_path, tokenizer, "drop")
    assert (data.rows_read, data.rows_used, len(data), data.rows_dropped) == (5, 4, 4, {"too long": 1})
    assert "4 used, 1 too long" in str(data)


def test_too_long_truncate_keeps_answer_and_template(tmp_path, tokenizer):
    data = long_rows(tmp_path, tokenizer, "truncate_prompt")
    [cut] = data[4]
    assert (len(data), data.reports[0].truncated) == (5, 1)
    assert 50 <= len(cut.input_ids) <= 60
    assert supervised_text(cut, tokenizer) == "dog<|im_end|>"
    text = tokenizer.decode(cut.input_ids)
    assert text.startswith("<|im_start|>user\n")
    assert "lamp<|im_end|>" in text


def test_too_long_error_and_hopeless_rows(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl row 5: \d+ tokens, more than data\.max_tokens=60"):
        long_rows(tmp_path, tokenizer, "error")
    file = write_jsonl(tmp_path / "answer.jsonl", [{"prompt": "red", "completion": "dog " * 100}])
    with pytest.raises(DataError, match="its answers and template alone need more"):
        load(tokenizer, file, max_tokens=60, too_long="truncate_prompt")
    with pytest.raises(DataError, match="none of the 1 rows is left: 1 too long"):
        load(tokenizer, file, max_tokens=60, too_long="drop")


def test_supervised_positions_survive_any_unicode(tokenizer):
    for content in ["é", "你好世界", "a\u0301", "😀 ok", "tab\tend", "  spaces  ", "ñ" * 30]:
        example = encode_messages([USER, {"role": "assistant", "content": content}], tokenizer)
        assert supervised_text(example, tokenizer) == f"{content}<|im_end|>"
        assert example.supervised.dtype == np.bool_
