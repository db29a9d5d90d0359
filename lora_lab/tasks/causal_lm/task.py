"""Learn to answer: next-token loss on the supervised tokens of chats, measured by loss and by generated answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_lab.config.run import RunConfig
from lora_lab.data.chat import ChatEncoder
from lora_lab.data.collate import PackedBatch, join, pack
from lora_lab.data.dataset import Dataset, first_examples
from lora_lab.data.encode import Encoder, Example
from lora_lab.data.formats import Record, promised, unanswered
from lora_lab.errors import BaseModelError
from lora_lab.tasks import metrics
from lora_lab.tasks.base import Answer, EvalResult, LossSum, Packed, Pass, Predictions, Section, Task, is_encoder
from lora_lab.tasks.causal_lm.config import CausalLMConfig
from lora_lab.tasks.generation import generate_all
from lora_lab.tasks.metrics import reports

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig


class PackedTask(Task[Section, Packed]):
    """A task of a language model: rows lie end to end, and each supervised token is an item."""

    def __init__(self, config: RunConfig, encoder: Encoder, learned: dict[str, Any], model: PretrainedConfig):
        super().__init__(config, encoder, learned, model)
        self.speed = config.speed
        self.forward.block_attention = config.speed.block_attention and self.forward.together

    @classmethod
    def check_base(cls, config: PretrainedConfig) -> None:
        if is_encoder(config):
            raise BaseModelError(
                f"model.path: {config.model_type} sees the tokens that it would have to predict. Use a decoder, or "
                "task=masked_lm."
            )
        super().check_base(config)

    @torch.no_grad()
    def accelerate(self, model: PeftModel, batch: Packed, prove: bool = True) -> str:
        if not self.speed.chunked_loss:
            return ""
        return self.forward.try_chunks(model, lambda: self.token_losses(model, batch)[0], prove)

    def logits(self, model: PeftModel, batch: Packed) -> torch.Tensor:
        return self.forward.logits(model, batch).float()

    def token_losses(
        self, model: PeftModel, batch: Packed, smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each supervised token [S], and its logits [S, V] or, in chunks, the likeliest token alone [S, 1]."""
        if self.forward.chunked_head:
            return self.forward.losses_in_chunks(model, batch, smoothing)
        logits = self.logits(model, batch)
        return self.item_losses(logits, batch, smoothing), logits.detach()

    def loss(self, model: PeftModel, batch: Packed, rdrop_alpha: float | None = None) -> LossSum:
        if rdrop_alpha is not None:  # compares whole distributions
            return super().loss(model, batch, rdrop_alpha)
        losses, logits = self.weighted_losses(model, batch)
        return LossSum(losses.sum(), batch.weight, len(batch.targets), logits)

    def weighted_losses(self, model: PeftModel, batch: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """`token_losses`, smoothed in training, times the tokens' weights."""
        losses, logits = self.token_losses(model, batch, self.config.smoothing if model.training else 0.0)
        return losses if batch.weights is None else losses * batch.weights, logits

    def observed(self, examples: list[Example], logits: torch.Tensor, batch: Packed) -> Predictions:
        predicted = (logits[:, 0] if self.forward.chunked_head else logits.argmax(-1)).cpu()
        return Predictions(examples, predicted[:, None].float(), predicted.numpy(), batch.targets.cpu().numpy())

    @reports(metrics.perplexity, lower=("loss",), higher=("token_accuracy",))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        correct = sum(int((one.predicted == one.targets).sum()) for one in seen)
        tokens = sum(len(one.targets) for one in seen)
        return EvalResult({"loss": loss, "perplexity": metrics.perplexity(loss), "token_accuracy": correct / tokens})

    def passes(self, example: Example) -> list[Pass]:
        batch = pack([example])
        return [Pass({"input_ids": batch.input_ids}, batch.logit_positions)]

    def compared_targets(self, example: Example) -> torch.Tensor:
        return pack([example]).targets


class DecoderTask(PackedTask[Section, PackedBatch]):
    """Such a task whose rows each learn for themselves."""

    def collate(self, examples: list[Example], rng: np.random.Generator) -> PackedBatch:
        return pack(examples)

    @property
    def shares_passes(self) -> bool:
        """As long as its loss is a sum over tokens, each from its own row, and a step needs no model."""
        own = type(self).loss is DecoderTask.loss and type(self).step is Task.step
        return own and self.forward.together

    def joined(self, batches: Sequence[PackedBatch]) -> PackedBatch:
        """Batches end to end, with all that the loss reads of them."""
        return join(batches)

    def losses_of_members(self, model: PeftModel, batches: Sequence[PackedBatch]) -> list[LossSum]:
        losses, _ = self.weighted_losses(model, self.joined(batches))
        parts = losses.split([len(batch.targets) for batch in batches])
        return [LossSum(part.sum(), b.weight, len(part), None) for part, b in zip(parts, batches, strict=True)]


class CausalLM(DecoderTask[CausalLMConfig]):
    """`task=causal_lm`."""

    encoder_class = ChatEncoder
    encoder: ChatEncoder

    @classmethod
    def reported(cls, config: CausalLMConfig) -> tuple[str, ...]:
        scored = _json_scores if config.answer_format == "json" else metrics.overlap
        return super().reported(config) + (metrics.reported(scored) if config.generate_rows else ())

    def examine(
        self, model: PeftModel, data: Dataset, title: str, shots: list[dict[str, Any]] | None = None
    ) -> EvalResult:
        """Answers to the first `task.generate_rows` rows, each prompted up to its last answer.

        Args:
            shots: messages of other rows that stand before each prompt.
        """
        rows = self._asked(data)
        prompts = [self._prompt(row, shots or []) for row in rows]
        texts = self.generate(model, prompts, title) if prompts else []
        answers = [
            Answer(_shown(_question(row)[-1]), _shown(row.messages[-1]), text)
            for row, text in zip(rows, texts, strict=True)
        ]
        return EvalResult(self.score(answers), answers)

    def _asked(self, data: Dataset) -> list[Example]:
        return [row for row in first_examples(data, self.config.generate_rows) if row.messages]

    def prompt_tokens(self, data: Dataset) -> list[int]:
        """Tokens of each prompt that `examine` asks of the model."""
        return [len(ids) for ids in self._ids([self._prompt(row, []) for row in self._asked(data)])]

    def shots(self, train: Dataset, places: list[int]) -> list[dict[str, Any]]:
        """Training rows as messages that can stand before a prompt."""
        return [
            message
            for place in places
            for example in train[place][:1]
            for message in example.messages
            if message["role"] not in ("system", "developer")
        ]

    def _prompt(self, row: Example, shots: list[dict[str, Any]]) -> str:
        messages = _question(row)
        first = sum(message["role"] in ("system", "developer") for message in messages)
        return self.encoder.template.text(
            messages[:first] + shots + messages[first:], row.tools, add_generation_prompt=True
        )

    def unlabelled(self, row: dict[str, Any]) -> dict[str, Any]:
        """A conversation, a prompt or a text to say something of, with an answer behind it."""
        return unanswered(row, self.config.formats)

    def prompt(self, record: Record) -> str:
        messages = promised(record.messages)
        return self.encoder.prompt(messages[:-1] if messages[-1]["role"] == "assistant" else messages, record.tools)

    def generate(self, model: PeftModel, prompts: list[str], title: str | None = None, **options: Any) -> list[str]:
        """Answers to rendered prompts (greedy or by beams, unless `options`, transformers' own, say otherwise)."""
        ids, ends = self._ids(prompts), self.encoder.end_tokens()
        with self.forward.generating(model):
            return generate_all(model, self.tokenizer, ids, self.config, ends, title, **options)

    def _ids(self, prompts: list[str]) -> list[list[int]]:
        return [self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"] for prompt in prompts]

    def score(self, answers: list[Answer]) -> dict[str, float]:
        """How near the answers are to the references; for `answer_format=json`, equality as parsed JSON, and valid JSON."""
        if not answers:
            return {}
        if self.config.answer_format == "text":
            return metrics.overlap([a.text for a in answers], [a.reference for a in answers], self.config.language)
        return _json_scores(answers)


@reports(higher=("exact_match", "valid_json"))
def _json_scores(answers: list[Answer]) -> dict[str, float]:
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


def _share(hits: Iterable[bool]) -> float:
    found = list(hits)
    return sum(found) / len(found)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # whatever a model wrote
        return None
