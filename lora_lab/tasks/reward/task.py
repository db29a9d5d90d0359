"""Learn a score that is higher for the better of two answers (Bradley-Terry, as in arXiv:2203.02155)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from lora_lab.base.tokenizer import decode
from lora_lab.config.data import DataConfig
from lora_lab.config.run import RunConfig
from lora_lab.data.collate import PaddedBatch
from lora_lab.data.columns import TOKENS
from lora_lab.data.encode import Encoded, Encoder, Example
from lora_lab.data.formats import Message, Record, RowError, promised
from lora_lab.tasks.base import TRIED_TOKENS, EvalResult, PaddedTask, Pass, Predictions, another
from lora_lab.tasks.metrics import reports
from lora_lab.tasks.preference.config import PreferenceConfig
from lora_lab.tasks.preference.task import PreferenceEncoder
from lora_lab.tasks.reward.config import RewardConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class RewardEncoder(Encoder):
    """Both conversations as the chat template renders them; for a tokenizer without one, prompt and answer as a pair of
    texts."""

    token_columns = ("second_ids",)

    def __init__(
        self, config: DataConfig, task: RewardConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
    ):
        super().__init__(config, task, tokenizer, vocab_size)
        self.rendering = PreferenceEncoder(config, PreferenceConfig(), tokenizer) if tokenizer.chat_template else None

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The worse answer with its prompt, and where the better and the worse answer begin; 0: they are no pairs of texts."""
        return {"second_ids": TOKENS, "starts": TOKENS}

    def shown(self, example: Example) -> str:
        return decode(self.tokenizer, example["second_ids"])

    def examples(self, records: list[Record], origins: list[str]) -> list[Encoded | RowError]:
        if self.rendering is None:
            return super().examples(records, origins)
        return [
            one
            if isinstance(one, RowError)
            else dataclasses.replace(one, examples=[_unweighted(e) for e in one.examples])
            for one in self.rendering.examples(records, origins)
        ]

    def example(self, record: Record, origin: str) -> Encoded:
        (better, start), (worse, other), truncated = (
            self._pair(promised(record.messages)),
            self._pair(promised(record.rejected)),
            False,
        )
        limit = self.config.max_tokens
        if max(len(better), len(worse)) > limit:
            raise self.too_long(max(len(better), len(worse)), "Raise data.max_tokens, or choose data.too_long=drop.")
        if better == worse:
            raise RowError(
                "equal", "chosen and rejected are the same answer, so there is nothing to learn. Remove the row."
            )
        ids, own = np.asarray(better, dtype=np.int64), {"second_ids": worse, "starts": [start, other]}
        return Encoded([Example(ids, np.zeros(len(ids), dtype=np.float32), origin, own)], truncated)

    def _pair(self, messages: list[Message]) -> tuple[list[int], int]:
        """Token ids, and where the answer begins."""
        prompt = self.cleaned("\n\n".join(message["content"] for message in messages[:-1]))
        found = self.tokenizer(prompt, self.unmarked(messages[-1]["content"]), verbose=False)
        return found["input_ids"], found.sequence_ids().index(1)


def _unweighted(example: Example) -> Example:
    own = {"second_ids": example["second_ids"], "starts": [0, 0]}
    return Example(example.input_ids, np.zeros_like(example.weights), example.origin, own)


class Reward(PaddedTask[RewardConfig, PaddedBatch]):
    """`task=reward`. Rows of a batch: all chosen answers, then all rejected ones; an item is a pair."""

    one_place = True
    encoder_class = RewardEncoder
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    head = "always"

    @classmethod
    def settings(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, learned: dict[str, Any]) -> dict[str, Any]:
        return {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}

    def collate(self, examples: list[Example], rng: np.random.Generator) -> PaddedBatch:
        rows = [*(e.input_ids for e in examples), *(e["second_ids"] for e in examples)]
        starts = np.stack([e["starts"] for e in examples], axis=1)
        return PaddedBatch(
            inputs=self.inputs(rows, starts.flatten().tolist()),
            lengths=[len(row) for row in rows],
            places=None,
            targets=torch.ones(len(examples), dtype=torch.int64),
            weights=None,
            origins=[e.origin for e in examples],
        )

    def shortened(self, example: Example) -> Example:
        rows = example.input_ids, example["second_ids"]
        cuts = [max(0, len(row) - TRIED_TOKENS) for row in rows]
        starts = np.maximum(example["starts"] - np.array(cuts), 0)
        own = {**example.own, "second_ids": rows[1][cuts[1] :], "starts": starts}
        return dataclasses.replace(example, input_ids=rows[0][cuts[0] :], weights=example.weights[cuts[0] :], own=own)

    def read(self, outputs: Any, batch: PaddedBatch) -> torch.Tensor:
        better, worse = outputs.logits[:, 0].float().chunk(2)
        return _compared(better, worse)

    def row_outputs(self, model: PeftModel, batch: PaddedBatch) -> torch.Tensor:
        scores = model(**batch.inputs).logits[:, 0].float()  # their difference may be no more than rounding
        return torch.stack(scores.chunk(2), 1).flatten()

    def unlabelled(self, row: dict[str, Any]) -> dict[str, Any]:
        """`messages`, or `prompt` and `completion`: an answer, beside another that the encoder wants to see."""
        if isinstance(row.get("messages"), list) and row["messages"]:
            *before, last = row["messages"]
            other = [*before, {**last, "content": another(last.get("content"))}] if isinstance(last, dict) else before
            return {"chosen": row["messages"], "rejected": other}
        if not {"prompt", "completion"} <= row.keys():
            raise RowError("empty", f"has the columns {', '.join(row)}; give messages, or prompt and completion.")
        return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": another(row["completion"])}

    def without_label(self, example: Example) -> Example:
        """The answer alone."""
        own = {**example.own, "second_ids": example["second_ids"][:0], "starts": example["starts"][:1]}
        return dataclasses.replace(example, own=own, own_tokens=0)

    @torch.no_grad()
    def predict(self, model: PeftModel, examples: list[Example]) -> list[tuple[float, dict[str, Any]]]:
        """`reward`: the score of the answer; only differences between answers to one prompt mean something."""
        inputs = self.inputs([one.input_ids for one in examples], [int(one["starts"][0]) for one in examples])
        scores = model(**{name: one.to(model.device) for name, one in inputs.items()}).logits[:, 0].float()
        return [(1.0, {"reward": score}) for score in scores.tolist()]

    explains = "score of the better answer minus that of the worse one"

    def explained(self, model: PeftModel, batch: PaddedBatch) -> torch.Tensor:
        return self.logits(model, batch)[:, 1].sum()

    @reports(lower=("loss",), higher=("accuracy", "reward_margin"))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        gaps = torch.cat([one.logits[:, 1] for one in seen])
        return EvalResult(
            {"loss": loss, "accuracy": (gaps > 0).float().mean().item(), "reward_margin": gaps.mean().item()}
        )

    def passes(self, example: Example) -> list[Pass]:
        inputs = self.collate([example], np.random.default_rng(0)).inputs
        lengths = len(example.input_ids), len(example["second_ids"])
        return [
            Pass({name: rows[side : side + 1, :length] for name, rows in inputs.items()}, None)
            for side, length in enumerate(lengths)
        ]

    def compared(self, outputs: list[dict[str, torch.Tensor]], example: Example) -> torch.Tensor:
        better, worse = (output["logits"] for output in outputs)
        return _compared(better, worse)


def _compared(better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """[B, 2]: log-odds that the second, or the first, of two answers is the better one."""
    return torch.stack([torch.zeros_like(better), better - worse], dim=-1)
