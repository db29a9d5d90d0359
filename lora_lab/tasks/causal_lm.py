"""Learn to answer: next-token loss on the supervised tokens of chats, measured by loss and by generated answers."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lora_lab import console
from lora_lab.config import TaskConfig
from lora_lab.data.collate import PackedBatch, pack
from lora_lab.data.dataset import Dataset, first_examples
from lora_lab.data.encode import Encoder, Example
from lora_lab.train import packing

if TYPE_CHECKING:
    from peft import PeftModel

_EVAL_TOKENS = 2048  # tokens of one forward pass in evaluation
_GENERATE_ROWS = 32  # prompts generated together


@dataclasses.dataclass(frozen=True)
class LossSum:
    """A sum over supervised tokens and how many there were, so that any split of a step adds up to the same."""

    loss: torch.Tensor  # scalar, float32, the weighted sum (not the mean)
    weight: float  # sum of the weights
    num_tokens: int
    num_correct: int  # top-1 hits


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated answer beside the reference."""

    question: str  # the last message before the answer
    reference: str
    text: str


class CausalLM:
    """`task=causal_lm`."""

    peft_task_type = "CAUSAL_LM"

    def __init__(self, config: TaskConfig, encoder: Encoder):
        self.config = config
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer

    def loss(self, model: PeftModel, batch: PackedBatch) -> LossSum:
        """Summed cross-entropy of a packed batch, in float32."""
        logits = packing.logits(model, batch).float()
        if batch.weights is None:
            loss, weight = cross_entropy(logits, batch.targets, reduction="sum"), float(len(batch.targets))
        else:
            loss = (cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()
            weight = batch.weights.sum().item()
        correct = int((logits.detach().argmax(-1) == batch.targets).sum())
        return LossSum(loss, weight, len(batch.targets), correct)

    @torch.no_grad()
    def measure(self, model: PeftModel, data: Dataset, packed: bool) -> dict[str, float]:
        """Teacher-forced loss (weighted mean over supervised tokens), perplexity and token accuracy."""
        loss, weight, tokens, correct = 0.0, 0.0, 0, 0
        for places in eval_batches(data.lengths, packed):
            part = self.loss(model, pack([example for i in places for example in data[i]], model.device))
            loss, weight = loss + part.loss.item(), weight + part.weight
            tokens, correct = tokens + part.num_tokens, correct + part.num_correct
        mean = loss / weight
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "token_accuracy": correct / tokens}

    def answers(self, model: PeftModel, data: Dataset, title: str) -> list[Answer]:
        """Greedy answers to the first `task.generate_rows` rows, each prompted up to its last answer."""
        rows = [row for row in first_examples(data, self.config.generate_rows) if row.conversation]
        prompts = [self.encoder.template.text(_question(row), row.tools, add_generation_prompt=True) for row in rows]
        texts: dict[int, str] = {}
        order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # like lengths together: less padding
        with console.steps(title, len(rows)) as progress:
            for start in range(0, len(order), _GENERATE_ROWS):
                chunk = order[start : start + _GENERATE_ROWS]
                texts.update(zip(chunk, self.generate(model, [prompts[i] for i in chunk]), strict=True))
                progress.advance(len(chunk))
        return [Answer(_shown(_question(row)[-1]), _shown(row.messages[-1]), texts[i]) for i, row in enumerate(rows)]

    @torch.no_grad()
    def generate(self, model: PeftModel, prompts: list[str], **options: Any) -> list[str]:
        """Answers to rendered prompts (greedy unless `options`, transformers' own, say otherwise)."""
        self.tokenizer.padding_side = "left"
        batch = self.tokenizer(prompts, add_special_tokens=False, return_tensors="pt", padding=True).to(model.device)
        settings = {"do_sample": False, "max_new_tokens": self.config.max_new_tokens, **options}
        done = model.generate(
            **batch, eos_token_id=self.encoder.end_tokens(), pad_token_id=self.tokenizer.pad_token_id, **settings
        )
        return self.tokenizer.batch_decode(done[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    def score(self, answers: list[Answer]) -> dict[str, float]:
        """Share of exact answers; for `answer_format=json`, equality as parsed JSON, and the share of valid JSON."""
        if not answers:
            return {}
        if self.config.answer_format == "text":
            return {"exact_match": _share(answer.text.strip() == answer.reference.strip() for answer in answers)}
        parsed = [(_parse(answer.text), _parse(answer.reference)) for answer in answers]
        return {
            "exact_match": _share(text is not None and text == reference for text, reference in parsed),
            "valid_json": _share(text is not None for text, _ in parsed),
        }


def _question(row: Example) -> list[dict[str, Any]]:
    return row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages


def _shown(message: dict[str, Any]) -> str:
    """A message's text, or the call that it makes."""
    return message.get("content") or json.dumps(message.get("tool_calls"), ensure_ascii=False)


def eval_batches(lengths: np.ndarray, packed: bool) -> list[list[int]]:
    """Places of the examples that evaluation puts together: of like length, as many as fit (at least one)."""
    batches: list[list[int]] = []
    limit = _EVAL_TOKENS if packed else 0
    room = 0
    for place in np.argsort(lengths, kind="stable"):
        size = int(lengths[place])
        if size > room:
            batches.append([])
            room = limit
        batches[-1].append(int(place))
        room -= size
    return batches


def _share(hits) -> float:
    hits = list(hits)
    return sum(hits) / len(hits)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
