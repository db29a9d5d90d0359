"""Turn one text into another with an encoder-decoder: summaries, translations."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from lora_lab.base.tokenizer import decode
from lora_lab.data.collate import PlacedBatch, pad
from lora_lab.data.columns import TOKENS
from lora_lab.data.dataset import Dataset, first_examples
from lora_lab.data.encode import Encoded, Encoder, Example
from lora_lab.data.formats import Record, RowError, unanswered
from lora_lab.errors import BaseModelError
from lora_lab.tasks import metrics
from lora_lab.tasks.base import TRIED_TOKENS, Answer, EvalResult, PlacedTask, Predictions
from lora_lab.tasks.generation import generate_all
from lora_lab.tasks.metrics import reports
from lora_lab.tasks.seq2seq.config import Seq2SeqConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig


class SourceEncoder(Encoder):
    """A source (with `task.prefix` before it) and its target, each with the tokenizer's own marks and of at most
    `data.max_tokens`; a long source may be cut (`data.too_long`), a target never is."""

    task: Seq2SeqConfig
    task_options = ("prefix",)
    token_columns = ("target_ids",)

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {"source": pa.string(), "target": pa.string(), "target_ids": TOKENS}

    def shown(self, example: Example) -> str:
        return decode(self.tokenizer, example["target_ids"])

    def example(self, record: Record, origin: str) -> Encoded:
        if record.text is None or record.target is None:
            raise RowError("not text", "source and target must be one text each, without earlier turns.")
        source = self.cleaned(record.text)
        ids = self.source_ids(source)
        target = self.tokenizer(text_target=self.unmarked(record.target), verbose=False)["input_ids"]
        limit = self.config.max_tokens
        if len(target) > limit:
            raise self.too_long(len(target), "They are the target's, which is never cut. Raise data.max_tokens.")
        truncated = len(ids) > limit
        if truncated:
            if self.config.too_long != "truncate_prompt":
                raise self.too_long(len(ids), "Raise data.max_tokens, or choose data.too_long=drop or truncate_prompt.")
            ids = self.tokenizer(self.task.prefix + source, truncation=True, max_length=limit, verbose=False)[
                "input_ids"
            ]
        own = {"source": source, "target": record.target, "target_ids": target}
        weights = np.zeros(len(ids), dtype=np.float32)
        example = Example(np.asarray(ids, dtype=np.int64), weights, origin, own, own_items=len(target))
        return Encoded([example], truncated)

    def source_ids(self, source: str) -> list[int]:
        """What the model is given for a source."""
        ids: list[int] = self.tokenizer(self.task.prefix + source, verbose=False)["input_ids"]
        return ids


class Seq2Seq(PlacedTask[Seq2SeqConfig]):
    """`task=seq2seq`: cross-entropy of the target's tokens."""

    encoder_class = SourceEncoder
    encoder: SourceEncoder
    auto_class = "AutoModelForSeq2SeqLM"
    peft_task_type = "SEQ_2_SEQ_LM"

    @classmethod
    def check_base(cls, config: PretrainedConfig) -> None:
        if not config.is_encoder_decoder:
            raise BaseModelError(
                f"model.path: {config.model_type} has no encoder for texts, so task=seq2seq cannot train it. Use task=causal_lm, or an "
                "encoder-decoder such as T5."
            )

    @classmethod
    def reported(cls, config: Seq2SeqConfig) -> tuple[str, ...]:
        return super().reported(config) + (metrics.reported(metrics.overlap) if config.generate_rows else ())

    def collate(self, examples: list[Example], rng: np.random.Generator) -> PlacedBatch:
        targets = [e["target_ids"] for e in examples]
        # what the decoder has seen before it says a token: its start mark, then the target so far
        started = [np.concatenate([[self.model.decoder_start_token_id], target[:-1]]) for target in targets]
        rows = np.repeat(np.arange(len(examples)), [len(target) for target in targets])
        columns = np.concatenate([np.arange(len(target)) for target in targets])
        inputs = self.inputs([e.input_ids for e in examples])
        inputs["decoder_input_ids"] = pad(started, self.tokenizer.pad_token_id)
        return PlacedBatch(
            inputs=inputs,
            lengths=[e.num_tokens for e in examples],
            places=(torch.from_numpy(rows), torch.from_numpy(columns)),
            targets=torch.from_numpy(np.concatenate(targets)),
            weights=None,
            origins=[e.origin for e in examples],
        )

    def shortened(self, example: Example) -> Example:
        short = super().shortened(example)
        target = example["target_ids"][-TRIED_TOKENS:]
        return dataclasses.replace(short, own={**short.own, "target_ids": target}, own_tokens=len(target))

    @reports(metrics.perplexity, lower=("loss",), higher=("token_accuracy",))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        correct = sum(int((one.predicted == one.targets).sum()) for one in seen)
        tokens = sum(len(one.targets) for one in seen)
        return EvalResult({"loss": loss, "perplexity": metrics.perplexity(loss), "token_accuracy": correct / tokens})

    def examine(self, model: PeftModel, data: Dataset, title: str, shots: str = "") -> EvalResult:
        """Generated targets of the first `task.generate_rows` rows; `shots`: text before each source."""
        rows = first_examples(data, self.config.generate_rows)
        if not rows:
            return EvalResult({})
        sources = [
            self.tokenizer(shots + self.config.prefix + row["source"], verbose=False)["input_ids"] for row in rows
        ]
        ends = [self.tokenizer.eos_token_id]
        with self.forward.generating(model):
            texts = generate_all(model, self.tokenizer, sources, self.config, ends, title)
        answers = [Answer(row["source"], row["target"], text) for row, text in zip(rows, texts, strict=True)]
        scores = metrics.overlap(texts, [row["target"] for row in rows], self.config.language)
        return EvalResult(scores, answers)

    def unlabelled(self, row: dict[str, Any]) -> dict[str, Any]:
        """A source, which may be called `text`, with a target."""
        return unanswered({"source": row["text"]} if row.keys() == {"text"} else row, self.config.formats)

    def prompt(self, record: Record) -> str:
        if record.text is None:
            raise RowError("not text", "this run turns one text into another. Give a text, not messages.")
        return self.encoder.cleaned(record.text)

    def generate(self, model: PeftModel, sources: list[str], title: str | None = None, **options: Any) -> list[str]:
        """Targets generated for sources (greedy or by beams, unless `options`, transformers' own, say otherwise)."""
        ids = [self.encoder.source_ids(source) for source in sources]
        return generate_all(model, self.tokenizer, ids, self.config, [self.tokenizer.eos_token_id], title, **options)

    def shots(self, train: Dataset, places: list[int]) -> str:
        """Training rows as text that can stand before a source."""
        rows = [example for place in places for example in train[place][:1]]
        return "".join(f"{self.config.prefix}{row['source']}\n{row['target']}\n\n" for row in rows)
