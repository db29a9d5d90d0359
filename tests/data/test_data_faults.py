"""Data and tokenizers that would train a wrong model: each is refused with its reason, before any weight is loaded."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

from lora_lab.data.sources import MAX_LINE_BYTES
from tests.conftest import CHATML, fails, make_rows, make_tokenizer, write_jsonl

GOOD = {"prompt": "red cat", "completion": "blue dog"}
USER, ANSWER = {"role": "user", "content": "red"}, {"role": "assistant", "content": "dog"}
LABELLED = {"text": "red cat", "label": 1}


def lines(*rows: dict) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def refusal(overrides, capsys, *more: str, verb: str = "train") -> str:
    return fails([verb, *overrides, "data.max_tokens=64", *more], capsys)


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Nothing here may get as far as loading the model."""
    monkeypatch.setattr("lora_lab.base.load.load_model", lambda *_: pytest.fail("weights were loaded"))


DROP = "data.unusable=drop"
# name, content, further overrides, what the message must say
FAULTS = [
    ("empty.jsonl", b"", [], ["the file is empty"]),
    ("blank.jsonl", b"\n\n", [], ["no rows"]),
    ("header.csv", b"prompt,completion\n", [], ["no rows"]),
    (
        "filtered.jsonl",
        lines({**GOOD, "completion": ""}, {"prompt": "red " * 90, "completion": "b"}),
        [DROP, "data.too_long=drop"],
        ["none of the 2 rows is left: 1 empty, 1 too long", "filtered.jsonl row 1"],
    ),
    ("columns.jsonl", lines({"question": "a", "answer": "b"}), [], ["columns question, answer fit no format", "prompt, completion"]),
    ("gap.jsonl", lines(GOOD, {"prompt": "a"}), [], ["gap.jsonl row 2: column 'completion' is missing. The row has prompt"]),
    ("mapped.jsonl", lines(GOOD), ["data.columns={prompt: qestion}"], ["data.columns.prompt=qestion", "prompt, completion"]),
    ("null.jsonl", lines(GOOD, {**GOOD, "completion": None}), [], ["null.jsonl row 2: the content of an assistant message must be text, not None"]),
    ("nan.jsonl", b'{"prompt": "a", "completion": NaN}\n', [], ["nan.jsonl row 1", "must be text, not nan"]),
    ("float.jsonl", lines({**GOOD, "prompt": 1.5}), [], ["float.jsonl row 1", "must be text, not 1.5"]),
    ("empty_field.csv", b"prompt,completion\na,b\nc,\n", [], ["empty_field.csv row 3: the answer is empty"]),
    ("ragged.csv", b"prompt,completion\na,b,c\n", [], ["ragged.csv row 2: 3 fields where the header has 2"]),
    ("latin.jsonl", lines(GOOD) + b'{"prompt": "caf\xe9", "completion": "b"}\n', [], ["latin.jsonl row 2: not valid UTF-8"]),
    ("latin.csv", b"prompt,completion\ncaf\xe9,b\n", [], ["latin.csv", "row 2: not valid UTF-8"]),
    ("nul.jsonl", lines({**GOOD, "prompt": "a\0b"}), [], ["nul.jsonl row 1", "holds a NUL character"]),
    ("broken.jsonl", lines(GOOD) + b'{"prompt": \n', [], ["broken.jsonl row 2: not valid JSON"]),
    ("list.jsonl", b"[1]\n", [], ["not a JSON object"]),
    ("deep.jsonl", lines(GOOD) + b"[" * 100_000 + b"\n", [], ["deep.jsonl row 2: not valid JSON"]),
    ("masked.jsonl", lines({"messages": [USER]}), [], ["masked.jsonl row 1", "every label is masked"]),
    ("untrained.jsonl", lines({"messages": [USER, {**ANSWER, "train": False}]}), [], ["untrained.jsonl row 1", "every label is masked"]),
    ("all_masked.jsonl", lines({"messages": [USER]}, {"messages": [USER]}), [DROP], ["none of the 2 rows is left: 2 masked"]),
    ("weight.jsonl", lines({"messages": [USER, {**ANSWER, "weight": -1}]}), [], ["'weight' of a message must be a number"]),
    ("trained_user.jsonl", lines({"messages": [{**USER, "train": True}, ANSWER]}), [], ["a user message asks to be trained on"]),
    ("answer_long.jsonl", lines({"prompt": "red", "completion": "dog " * 90}), ["data.too_long=truncate_prompt"], ["answers and template alone need more than data.max_tokens=64"]),
    ("long.jsonl", lines(GOOD, {"prompt": "red " * 90, "completion": "b"}), [], ["long.jsonl row 2", "more than data.max_tokens=64", "data.too_long=drop"]),
    ("classes.jsonl", lines(LABELLED, {**LABELLED, "label": 7}), ["data.label_names=[a,b]"], ["classes.jsonl row 2: label 7 is out of range", "classes 0 to 1"]),
    ("negative.jsonl", lines({**LABELLED, "label": -1}), [], ["label -1 is negative"]),
    ("named.jsonl", lines({**LABELLED, "label": "bb"}), ["data.label_names=[aa,b]"], ["label 'bb' is not in data.label_names"]),
    ("one_class.jsonl", lines(LABELLED, {"text": "dog", "label": 1}), [], ["all labels are 1: there is nothing to tell apart"]),
    ("tags.jsonl", lines({"tokens": ["a", "b"], "tags": ["O"]}), ["task=token_classification"], ["2 tokens and 1 tags"]),
    ("words.jsonl", lines({"tokens": ["a"], "tags": ["O"]}), [], ["columns tokens, tags fit no format of this task"]),
    ("span.jsonl", lines({"context": "red cat", "question": "what?", "answers": {"text": ["dog"], "answer_start": [0]}}), [], ["answer 'dog' is not at character 0"]),
    ("role.jsonl", lines({"messages": [{**USER, "role": "narrator"}, ANSWER]}), [], ["role 'narrator' is not one of"]),
    ("order.jsonl", lines({"messages": [USER, USER, ANSWER]}), [], ["message 2: a user message cannot stand after user"]),
    ("first.jsonl", lines({"messages": [ANSWER, USER, ANSWER]}), [], ["an assistant message cannot stand at the start"]),
    ("tool.jsonl", lines({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}), [], ["a tool message cannot stand after user"]),
    ("silent.jsonl", lines({**GOOD, "completion": " "}), [], ["silent.jsonl row 1: the answer is empty"]),
    ("call.jsonl", lines({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]}), [], ["a function call must be JSON with name and arguments"]),
    ("endless.jsonl", b'{"prompt": "' + b"a" * MAX_LINE_BYTES, [], ["line 1 is longer than 64 MiB"]),
    ("bomb.jsonl.gz", gzip.compress(lines(GOOD) + b"a" * 2**23), [], ["over 200 times as much"]),
    ("cut.jsonl.gz", gzip.compress(lines(*make_rows(50)))[:-40], [], ["cannot be read", "cut or damaged"]),
    ("rows.docx", b"x", [], ["not a data file that can be read"]),
    ("broken.parquet", b"PAR1xxxx", [], ["not a Parquet file"]),
    ("broken.json", b"[1, ", [], ["not valid JSON"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "more", "says"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_bad_rows_stop_before_the_model(name, content, more, says, overrides, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    message = refusal(overrides, capsys, f"data.train={tmp_path / name}", *more)
    for text in says:
        assert text in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + lines(GOOD),
    b'{"prompt": "red cat", "completion": "blue dog"}\r\n\r\n',
    lines(GOOD)[:-1],
])  # fmt: skip
def test_marks_and_line_ends_do_not_matter(content, tmp_path, config_of):
    from lora_lab.run import prepared

    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    config = config_of(f"data.train={file}")
    [example] = prepared.build_data(config, prepared.find_base(config))[0].train[0]
    assert [message["content"] for message in example.messages] == ["red cat", "blue dog"]


def test_masked_rows_can_be_dropped_and_are_counted(tmp_path, config_of, capsys):
    from lora_lab.run import prepared

    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER]}, {"messages": [USER, ANSWER]}])
    config = config_of(f"data.train={file}", DROP)
    data = prepared.build_data(config, prepared.find_base(config))[0].train
    assert (data.rows_used, data.rows_dropped) == (1, {"masked": 1})
    assert "1 used, 1 masked" in capsys.readouterr().out


def test_rows_of_both_sides_are_counted(tmp_path, overrides, capsys, config_of):
    from lora_lab.run import prepared

    rows = make_rows(6)
    train, held = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "b.jsonl", rows[:2])
    config = config_of(f"data.train={train}", f"data.eval={held}")
    prepared.build_data(config, prepared.find_base(config))
    assert (
        "warning: data.train: 2 rows are held-out rows as well (a.jsonl row 1, a.jsonl row 2)"
        in capsys.readouterr().out
    )
    config = config_of(f"data.train={train}", f"data.eval={held}", "data.shared=drop")
    data = prepared.build_data(config, prepared.find_base(config))[0].train
    assert (data.rows_used, data.rows_dropped) == (4, {"also held out": 2})


# -- templates and tokenizers --------------------------------------------------------------------------------------------


def base_with(base: Path, folder: Path, template: str | None = None, **config) -> Path:
    """A copy of the base with another chat template or other settings."""
    shutil.copytree(base, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if config:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**old, **config}))
    return folder


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
TEMPLATES = [
    ("{{ ''.__class__.__mro__ }}", ["the model's chat template cannot render it"]),
    ("{{ messages.__init__.__globals__['os'].system('true') }}", ["the model's chat template cannot render it"]),
    (ENDLESS, ["was stopped after 1 s: it does not end"]),
    ("{{ 'a' * 10 ** 11 }}", ["the model's chat template cannot render it"]),
    ("{{ messages[5]['content'] }}", ["the model's chat template cannot render it"]),
    ("nothing", ["renders message 2 differently from the inference prompt"]),
    (CHATML.replace("message['content'] +", "(message['content'] if message['role'] == 'user' else '') +"), ["row 1"]),
]  # fmt: skip


@pytest.mark.parametrize(("template", "says"), TEMPLATES[:-1], ids=range(len(TEMPLATES) - 1))
def test_bad_templates_are_refused(template, says, base, overrides, tmp_path, capsys):
    other = base_with(base, tmp_path / "base", template)
    message = refusal(overrides, capsys, f"model.path={other}")
    for text in says:
        assert text in message


def test_special_tokens_in_a_message_are_reported(tmp_path, config_of, capsys):
    from lora_lab.run import prepared

    file = write_jsonl(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "prompt": "red<|im_end|>\n<|im_start|>assistant\nno"}])
    config = config_of(f"data.train={file}")
    prepared.build_data(config, prepared.find_base(config))
    assert "1 examples hold a special token in a message (rows.jsonl row 2)" in capsys.readouterr().out


def test_a_template_that_writes_the_date_is_reported(base, tmp_path, config_of, capsys):
    from lora_lab.run import prepared

    dated = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
        + CHATML
    )
    folder = base_with(base, tmp_path / "base", dated)
    config = config_of(f"model.path={folder}")
    prepared.build_data(config, prepared.find_base(config))
    assert "the chat template writes today's date" in capsys.readouterr().out
    config = config_of(f"model.path={folder}", "data.chat_template_kwargs={date_string: today}")
    prepared.build_data(config, prepared.find_base(config))
    assert "writes today's date" not in capsys.readouterr().out


def test_end_of_sequence_is_learned_without_a_pad_token(base, tmp_path, config_of):
    """A tokenizer without a pad token, or with pad equal to eos: the end token is trained on all the same."""
    from lora_lab.run import prepared

    for pad in (None, "<|im_end|>"):
        folder = base_with(base, tmp_path / f"base{pad is None}")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("pad_token", None)
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **({"pad_token": pad} if pad else {})}))
        found = prepared.find_base(config_of(f"model.path={folder}"))
        assert found.encoder.tokenizer.pad_token_id == found.encoder.tokenizer.eos_token_id
        for example in prepared.build_data(config_of(f"model.path={folder}"), found)[0].train:
            assert example.supervised[example.input_ids == found.encoder.tokenizer.eos_token_id][-1]


def test_tokenizer_beyond_the_embedding_is_refused(base, overrides, tmp_path, capsys):
    folder = base_with(base, tmp_path / "base")
    make_tokenizer(folder, added=("Graz",))
    file = write_jsonl(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "prompt": "red Graz"}])
    message = refusal(overrides, capsys, f"model.path={folder}", f"data.train={file}")
    assert "rows.jsonl row 2: token 'Graz' has id 300, and the model's embedding has 300 rows" in message


def test_rows_beyond_the_positions_are_refused(base, overrides, tmp_path, capsys):
    folder = base_with(base, tmp_path / "base", max_position_embeddings=32)
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "red " * 20, "completion": "dog"}])
    message = refusal(overrides, capsys, f"model.path={folder}", f"data.train={file}")
    assert "the model has 32 positions. Set data.max_tokens=32" in message


@pytest.mark.parametrize(
    "config",
    [{"_attn_implementation_internal": "a/b"}, {"auto_map": {}}, {"model_type": "llama\nimport os"}, {"text_config": {"model_type": "a\nb"}}],
    ids=str,
)  # fmt: skip
def test_configs_that_name_code_are_refused(config, base, overrides, tmp_path, capsys):
    folder = base_with(base, tmp_path / "base", **config)
    message = refusal(overrides, capsys, f"model.path={folder}")
    assert "names code to run" in message or "is not a name" in message


def test_only_pickled_weights(base, overrides, tmp_path, capsys):
    folder = base_with(base, tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "convert it with transformers' save_pretrained" in refusal(overrides, capsys, f"model.path={folder}")


def test_variables_that_rows_set_are_refused(overrides, capsys):
    message = refusal(
        overrides, capsys, "data.chat_template_kwargs={tools: []}", "data.clean=[stem]", "data.clean_language=zh"
    )
    assert "data.chat_template_kwargs.tools: not a variable of the template" in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (["data.chat_template_kwargs={enable_thinkin: false}"], "data.chat_template_kwargs.enable_thinkin: the model's chat template has no such"),
        (["data.label_names=[a,b]"], "data.label_names: no effect, because no file has labelled rows"),
        (["data.sample_by=paragraph"], "data.sample_by=paragraph: no effect"),
        (["data.stratify=kind", "data.eval_ratio=0.2"], "data.stratify=kind: no such column. The file has prompt, completion"),
        (["data.stratify=prompt"], "data.stratify=prompt: no effect without data.eval_ratio"),
        (["data.clean=[stem]", "data.clean_language=zh"], "stem"),
        (["data.streaming=true", "data.duplicates=drop"], "data.duplicates=drop: needs all rows beforehand"),
        (["data.streaming=true", "data.processes=2"], "data.processes=2: no effect with data.streaming=true"),
        (["data.augment.methods=[swap]", "data.processes=2"], "data.processes=2: no effect with data.augment"),
        (["data.eval_ratio=0.2", "data.max_eval_rows=3"], "data.max_eval_rows: no effect with data.eval_ratio"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(override, says, overrides, capsys):
    assert says in refusal(overrides, capsys, *override)
