"""Small files of others: bounded, checked, and told of in a sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_lab.errors import BaseModelError, ConfigError
from lora_lab.runtime.reading import read_bytes, read_json, read_yaml, reading

_BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "must hold a JSON object, not list"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' * 200 + b"1" + b"}" * 200, "nested deeper than 100"),
        (b" " * 2048, "larger than 1 KiB"),
    ],
)
def test_json_that_cannot_be_used_is_a_sentence_that_names_the_file(tmp_path, content, said):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    limit = 1024 if content.startswith(b" ") else 2**20
    with pytest.raises(BaseModelError, match=f"config.json: .*{said}"):
        read_json(file, BaseModelError, max_bytes=limit)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n b: 2\n", "line 2, column 3"),
        ("a:\tb: c\n", "line 1, column"),
        ("a: 1\na: 2\n", "line 2, column 1: the key 'a' appears twice"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1, column 4: not valid YAML"),
        (_BOMB, "more than 100,000 values"),
        ("a: &a [*a]\n", "contains it"),
        ("[" * 300 + "]" * 300, "nested deeper than 100"),
        ("[" * 5000 + "]" * 5000, "nested deeper than 100"),
        ("a: %x\n", "line 1, column 4"),
        ("a: 2026-99-99\n", "not valid YAML"),
    ],
)
def test_yaml_that_cannot_be_used_is_told_with_its_place(tmp_path, text, said):
    file = tmp_path / "own.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        read_yaml(file, ConfigError)
    assert f"{file}" in str(raised.value)
    assert said in str(raised.value)


def test_good_yaml_is_read_with_its_aliases(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("a: &x {b: 1}\nc: *x\n", encoding="utf-8")
    assert read_yaml(file, ConfigError) == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(BaseModelError, match="not a regular file"):
        read_bytes(tmp_path / "config.json", BaseModelError)


def test_what_a_library_raises_becomes_a_sentence_and_memory_goes_through():
    with pytest.raises(BaseModelError, match=r"x.gguf: cannot be read \(KeyError: 'y'\)"):
        with reading(Path("x.gguf"), BaseModelError):
            {}["y"]
    with pytest.raises(MemoryError):
        with reading("x", BaseModelError):
            raise MemoryError
