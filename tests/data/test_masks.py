"""The table of chat_templates/table.json: (template, conversation) -> exact training text and exact supervised text."""

from __future__ import annotations

import functools
import itertools
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest

from lora_lab.config.data import DataConfig
from lora_lab.data.chat import ChatEncoder
from lora_lab.data.encode import Example
from lora_lab.data.sources import Row
from lora_lab.tasks.causal_lm.config import CausalLMConfig
from tests.conftest import make_tokenizer

FOLDER = Path(__file__).parent / "chat_templates"
TABLE = json.loads((FOLDER / "table.json").read_text(encoding="utf-8"))
TOKENIZERS = json.loads((FOLDER / "tokenizers.json").read_text(encoding="utf-8"))


@functools.cache
def tokenizer_of(name: str):
    settings = TOKENIZERS[name]
    with tempfile.TemporaryDirectory() as folder:
        return make_tokenizer(
            Path(folder),
            (FOLDER / f"{name}.jinja").read_text(encoding="utf-8"),
            tuple(settings["special"]),
            tuple(settings["added"]),
            settings["bos_token"],
            settings["eos_token"],
        )


def encoder_of(case: dict) -> ChatEncoder:
    config = DataConfig(
        train="-", supervise=case["supervise"], chat_template_kwargs=case["kwargs"] or None, max_tokens=4096
    )
    return ChatEncoder(config, CausalLMConfig(), tokenizer_of(case["template"]))


def encode(case: dict):
    values = {"messages": case["messages"], **({"tools": case["tools"]} if case["tools"] else {})}
    [outcome] = encoder_of(case).encode([Row(1, values)], "rows.jsonl", "messages")
    return outcome


def runs(example: Example) -> list[tuple[int, int]]:
    """Where the weight is the same from token to token, and not 0."""
    edges = np.flatnonzero(np.diff(example.weights, prepend=np.nan, append=np.nan))
    return [(start, end) for start, end in itertools.pairwise(edges) if example.weights[start]]


def identity(case: dict) -> str:
    return f"{case['template']}: {case['name']}"


@pytest.mark.parametrize("case", [c for c in TABLE if c["examples"]], ids=identity)
def test_training_text_and_supervised_text(case):
    outcome, tokenizer = encode(case), tokenizer_of(case["template"])
    assert outcome.problem is None, outcome.sentence
    assert [tokenizer.decode(e.input_ids) for e in outcome.examples] == [e["text"] for e in case["examples"]]
    for example, expected in zip(outcome.examples, case["examples"], strict=True):
        trained = [tokenizer.decode(example.input_ids[start:end]) for start, end in runs(example)]
        supervised, weights = expected["supervised"], expected.get("weights")
        if case["supervise"] == "all":  # nothing predicts the first token
            supervised = ["".join(supervised)[len(tokenizer.decode(example.input_ids[:1])) :]]
        assert trained == supervised
        assert [example.weights[start] for start, _ in runs(example)] == (weights or [1.0] * len(supervised))


@pytest.mark.parametrize("case", [c for c in TABLE if c["examples"] and c["supervise"] != "all"], ids=identity)
def test_tokens_before_an_answer_are_those_of_inference(case):
    """What chat feeds the model is, id by id, what training put before the answer."""
    encoder, tokenizer = encoder_of(case), tokenizer_of(case["template"])
    for example in encode(case).examples:
        starts = [start for start, _ in runs(example)]
        answers = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
        prompts = [
            tokenizer(encoder.prompt(example.messages[:i], example.tools), add_special_tokens=False)["input_ids"]
            for i in answers
        ]
        assert any(example.input_ids[:start].tolist() == prompt for start in starts for prompt in prompts)


@pytest.mark.parametrize("case", [c for c in TABLE if not c["examples"]], ids=identity)
def test_conversations_that_a_template_cannot_show(case):
    outcome = encode(case)
    assert outcome.problem in ("template", "role")
    if outcome.problem == "template":
        assert re.search(case.get("error", r"renders message \d differently"), outcome.sentence)


def test_every_family_is_in_the_table():
    assert {case["template"] for case in TABLE} == {file.stem for file in FOLDER.glob("*.jinja")}
