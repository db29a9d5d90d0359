"""Scores of a query and a document: a decoder's answer yes or no, and what is read of rows that have no label."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_lab.config import compose
from lora_lab.config.data import DataConfig
from lora_lab.data.formats import Record
from lora_lab.data.sources import Row
from lora_lab.errors import BaseModelError
from lora_lab.run import prepared
from lora_lab.run.answering import asked
from lora_lab.tasks.reranker.config import RerankerConfig
from lora_lab.tasks.reranker.task import QuestionEncoder
from tests.conftest import make_tokenizer
from tests.tasks.test_tasks import models, start  # noqa: F401

SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the answer can only be "
    '"y" or "n".'
)


def question(tokenizer, query: str, document: str) -> str:
    """As a deployment would ask."""
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"<Instruct>: a\n<Query>: {query}\n<Document>: {document}"},
    ]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_score_is_the_log_odds_of_a_plain_model(start, models):  # noqa: F811
    """Rows of unlike length in one padded batch, against transformers' model asked one question at a time: float32 rounding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ready = prepared.prepare(compose.compose(start("reranker-yes_no", rows=3)))
    model = ready.loaded().model
    examples = list(ready.train)
    found = ready.task.logits(model, ready.task.collate(examples, np.random.default_rng(0)))[:, 0]
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    plain = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32).eval()
    yes, no = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in "yn")
    expected = []
    for query, *documents in (example["texts"] for example in examples):
        for document in documents:
            text = question(tokenizer, query, document)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            logits = plain(ids).logits[0, -1]
            expected.append((logits[yes] - logits[no]).item())
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(set(map(len, (sequence for one in examples for sequence in ready.encoder.sequences(one))))) > 1


def test_the_question_is_that_of_qwen3_reranker(tmp_path):
    """The prompt that Qwen3-Reranker publishes, of Qwen3's chat template."""
    template = Path(__file__).parents[1] / "data/chat_templates/qwen3.jinja"
    tokenizer = make_tokenizer(tmp_path, template.read_text(), added=("yes", "no"), bos_token=None)
    config = DataConfig(train="-", max_tokens=4096, chat_template_kwargs={"enable_thinking": False})
    encoder = QuestionEncoder(config, RerankerConfig(score="yes_no"), tokenizer)
    published = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
        'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
        "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: lamp\n<Document>: red<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    record = Record(text="lamp", pair="red", label=["green"])
    [example] = encoder.example(record, "row 1").examples
    assert tokenizer.decode(example.input_ids) == published
    assert tokenizer.convert_ids_to_tokens(list(encoder.answers)) == ["yes", "no"]


def test_a_base_without_a_chat_template_is_not_asked(tmp_path):
    tokenizer = make_tokenizer(tmp_path, None)
    with pytest.raises(BaseModelError, match="has no chat template"):
        QuestionEncoder(DataConfig(train="-"), RerankerConfig(score="yes_no"), tokenizer)


def test_a_long_document_loses_its_end_and_the_question_stays_whole(start):  # noqa: F811
    whole = prepared.prepare(compose.compose(start("reranker-yes_no", rows=1)))
    [example] = whole.train
    most = max(map(len, whole.encoder.sequences(example))) - 3
    told = [f"data.max_tokens={most}", "data.too_long=truncate_prompt"]
    cut = prepared.prepare(compose.compose(start("reranker-yes_no", *told, rows=1)))
    [short] = cut.train
    texts = [cut.encoder.tokenizer.decode(ids) for ids in cut.encoder.sequences(short)]
    assert max(map(len, cut.encoder.sequences(short))) <= most
    before, after = question(cut.encoder.tokenizer, example["texts"][0], "###").split("###")
    for text, document in zip(texts, example["texts"][1:], strict=True):
        assert text.startswith(before)
        assert text.endswith(after)
        assert document.startswith(text[len(before) : len(text) - len(after)])


@pytest.mark.parametrize("case", ["reranker", "reranker-yes_no"])
def test_of_a_row_without_a_label_the_document_alone_is_read(case, start):  # noqa: F811
    """One that fills `data.max_tokens` to the last token among them."""
    query, document = "lamp Oslo", "red table cat"
    row = Row(1, {"query": query, "document": document})
    ready = prepared.prepare(compose.compose(start(case, rows=4)))
    [alone] = asked(ready, row, "rows")
    ready.encoder.config = dataclasses.replace(ready.encoder.config, max_tokens=alone.num_tokens)
    [example] = asked(ready, row, "rows")
    batch = ready.task.collate([example], np.random.default_rng(0))
    assert batch.lengths == [len(example.input_ids)] == [example.num_tokens] == [alone.num_tokens]
    assert example["texts"] == [query, document]
