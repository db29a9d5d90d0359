"""Learn from judgements: of two answers to a prompt the better one (DPO, IPO, SimPO, ORPO), or good and bad answers (KTO).

The reference model is the same base with its adapter off: no second model is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from lora_lab.adapters.attach import without_adapter
from lora_lab.base.tokenizer import decode
from lora_lab.config.data import DataConfig
from lora_lab.data.chat import ChatEncoder
from lora_lab.data.collate import PackedBatch, pack
from lora_lab.data.columns import TOKENS, WEIGHTS
from lora_lab.data.encode import Encoded, Example
from lora_lab.data.formats import Record, RowError
from lora_lab.tasks.base import EvalResult, LossSum, Pass, Predictions, StepBatches
from lora_lab.tasks.causal_lm.task import PackedTask
from lora_lab.tasks.metrics import reports
from lora_lab.tasks.preference import losses
from lora_lab.tasks.preference.config import PreferenceConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_WITHOUT_REFERENCE = ("simpo", "orpo")


class PreferenceEncoder(ChatEncoder):
    """Two conversations that differ in their last answer, which alone counts. For KTO one conversation and a judgement; there
    pairs become two examples."""

    task: PreferenceConfig
    task_options = ("loss",)
    token_columns = ("second_ids",)

    def __init__(
        self,
        config: DataConfig,
        task: PreferenceConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int | None = None,
    ):
        super().__init__(config, task, tokenizer, vocab_size)
        self.supervise = "last_answer"

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The conversation with the worse answer; for KTO whether the one answer is good."""
        own = {"good": pa.bool_()} if self.task.loss == "kto" else {"second_ids": TOKENS, "second_weights": WEIGHTS}
        return {**super().columns, **own}

    def shown(self, example: Example) -> str:
        if self.task.loss == "kto":
            return "good" if example["good"] else "bad"
        return decode(self.tokenizer, example["second_ids"])

    def examples(self, records: list[Record], origins: list[str]) -> list[Encoded | RowError]:
        first = super().examples(records, origins)
        worse = [dataclasses.replace(record, messages=record.rejected or record.messages) for record in records]
        second = super().examples(worse, origins)
        return [self._joined(*row) for row in zip(records, first, second, strict=True)]

    def _joined(self, record: Record, better: Encoded | RowError, worse: Encoded | RowError) -> Encoded | RowError:
        if isinstance(better, RowError):
            return better
        if isinstance(worse, RowError):
            return worse
        good, bad = better.examples[-1], worse.examples[-1]
        truncated, border = better.truncated or worse.truncated, better.cut_at_border or worse.cut_at_border
        if record.rejected is None:
            return Encoded([_with(good, good=bool(record.label))], truncated, border)
        if np.array_equal(good.input_ids, bad.input_ids):
            return RowError(
                "equal", "chosen and rejected are the same answer, so there is nothing to learn. Remove the row."
            )
        if self.task.loss == "kto":
            return Encoded([_with(good, good=True), _with(bad, good=False)], truncated, border)
        pair = _with(good, second_ids=bad.input_ids, second_weights=bad.weights)
        pair = dataclasses.replace(pair, own_items=int(bad.supervised.sum()))
        return Encoded([pair], truncated, border)


def _with(example: Example, **own: Any) -> Example:
    """The example with further values of its own."""
    return dataclasses.replace(example, own={**example.own, **own})


@dataclasses.dataclass(frozen=True, eq=False)
class AnswersBatch(PackedBatch):
    """Answers with their prompts, end to end: all chosen ones, then all rejected ones."""

    owner: torch.Tensor  # [S] int64: the answer that each supervised token belongs to
    num_rows: int  # pairs, or for KTO answers: what the step's loss is the mean of

    @property
    def weight(self) -> float:
        return float(self.num_rows)


@dataclasses.dataclass(frozen=True, eq=False)
class JudgedBatch(AnswersBatch):
    """KTO's: each answer once."""

    good: torch.Tensor  # [num_rows] bool
    baseline: torch.Tensor  # scalar: how far the policy is from the reference, over the whole step


class Preference(PackedTask[PreferenceConfig, AnswersBatch]):
    """`task=preference`."""

    encoder_class = PreferenceEncoder

    def collate(self, examples: list[Example], rng: np.random.Generator) -> AnswersBatch:
        if self.config.loss != "kto":
            return _answers([*examples, *map(_worse, examples)], len(examples))
        good = torch.tensor([example["good"] for example in examples])
        return JudgedBatch(**_fields(_answers(examples, len(examples))), good=good, baseline=torch.zeros(()))

    def shortened(self, example: Example) -> Example:
        short = dataclasses.replace(super().shortened(example), own=example.own)
        if "second_ids" not in example.own:
            return short
        worse = super().shortened(_worse(example))
        return _with(short, second_ids=worse.input_ids, second_weights=worse.weights)

    def step(
        self, model: PeftModel, parts: Iterable[list[Example]], rng: np.random.Generator
    ) -> StepBatches[AnswersBatch]:
        parts = [part for part in parts if part]
        found = super().step(model, parts, rng)
        if self.config.loss != "kto":
            return found
        baseline = self._baseline(model, parts)
        judged = [one for one in found.batches if isinstance(one, JudgedBatch)]
        return StepBatches([dataclasses.replace(one, baseline=baseline) for one in judged], found.weight)

    def _baseline(self, model: PeftModel, parts: list[list[Example]]) -> torch.Tensor:
        """KTO's: how far the policy is from the reference where each prompt has the next row's answer, over the whole step."""
        every = [example for part in parts for example in part]
        crossed = iter([_crossed(one, other) for one, other in zip(every, [*every[1:], *every[:1]], strict=True)])
        training = model.training
        model.eval()
        policy, reference = [], []
        with torch.no_grad():
            for part in parts:
                moved = _answers([next(crossed) for _ in part], len(part)).to(model.device)
                policy.append(self._log_probabilities(model, moved)[0])
                with without_adapter(model):
                    reference.append(self._log_probabilities(model, moved)[0])
        model.train(training)
        return losses.kto_kl(torch.cat(policy), torch.cat(reference))

    def loss(self, model: PeftModel, batch: AnswersBatch, rdrop_alpha: float | None = None) -> LossSum:
        policy, tokens = self._log_probabilities(model, batch)
        reference = None if self.config.loss in _WITHOUT_REFERENCE else self._reference(model, batch)
        smoothing = self.config.smoothing if model.training else 0.0
        loss = self._loss(policy, reference, tokens, batch, smoothing).sum()
        rewards = losses.rewards(policy.detach(), reference, tokens, self.config.beta)
        return LossSum(loss, batch.weight, len(batch.targets), rewards.reshape(-1, batch.num_rows).T)

    def _loss(
        self,
        policy: torch.Tensor,
        reference: torch.Tensor | None,
        tokens: torch.Tensor,
        batch: AnswersBatch,
        smoothing: float,
    ) -> torch.Tensor:
        config = self.config
        if reference is None:
            return self._without_reference(policy, tokens, smoothing)
        if isinstance(batch, JudgedBatch):
            weights = config.desirable_weight, config.undesirable_weight
            return losses.kto(policy, reference, batch.good, batch.baseline, config.beta, *weights)
        pairs = *_halves(policy), *_halves(reference)
        if config.loss == "ipo":
            return losses.ipo(*pairs, *_halves(tokens), config.beta)
        return losses.dpo(*pairs, config.beta, smoothing)

    def _without_reference(self, policy: torch.Tensor, tokens: torch.Tensor, smoothing: float) -> torch.Tensor:
        config = self.config
        if config.loss == "simpo":
            return losses.simpo(*_halves(policy), *_halves(tokens), config.beta, config.gamma, smoothing)
        return losses.orpo(*_halves(policy), *_halves(tokens), config.beta)

    def _log_probabilities(self, model: PeftModel, batch: AnswersBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """[answers] float32 summed log-probability of each answer's tokens, and how many they are."""
        each = -self.token_losses(model, batch)[0]
        zeros = torch.zeros(len(batch.lengths), device=each.device)
        return zeros.index_add(0, batch.owner, each), zeros.index_add(0, batch.owner, torch.ones_like(each))

    def _reference(self, model: PeftModel, batch: AnswersBatch) -> torch.Tensor:
        """The same of the base alone, which draws no dropout."""
        training = model.training
        model.eval()
        with torch.no_grad(), without_adapter(model):
            found, _ = self._log_probabilities(model, batch)
        model.train(training)
        return found

    explains = "log-probability of the better answer minus that of the worse one"

    def explained(self, model: PeftModel, batch: AnswersBatch) -> torch.Tensor:
        """Of KTO's rows, which are one answer each, its log-probability."""
        found, _ = self._log_probabilities(model, batch)
        if isinstance(batch, JudgedBatch):
            return found.sum()
        chosen, rejected = _halves(found)
        return (chosen - rejected).sum()

    def observed(self, examples: list[Example], logits: torch.Tensor, batch: AnswersBatch) -> Predictions:
        rewards = logits.cpu()
        targets = batch.good.cpu().numpy() if isinstance(batch, JudgedBatch) else np.ones(len(rewards))
        return Predictions(examples, rewards, rewards[:, 0].numpy(), targets)

    @reports(lower=("loss", "reward_rejected"), higher=("reward_accuracy", "reward_margin", "reward_chosen"))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        """Rewards are implicit: how much likelier the answer is than for the reference. Ties count half."""
        rewards = np.concatenate([one.logits.numpy() for one in seen])
        if self.config.loss == "kto":
            good = np.concatenate([one.targets for one in seen]).astype(bool)
            better, worse = rewards[good, 0], rewards[~good, 0]
            gaps = better[:, None] - worse[None]  # every good answer beside every bad one
        else:
            better, worse = rewards[:, 0], rewards[:, 1]
            gaps = better - worse
        found = {
            "reward_accuracy": _mean((gaps > 0) + (gaps == 0) / 2),
            "reward_margin": _mean(gaps),
            "reward_chosen": _mean(better),
            "reward_rejected": _mean(worse),
        }
        return EvalResult({"loss": loss, **found})

    def passes(self, example: Example) -> list[Pass]:
        return [Pass({"input_ids": one.input_ids}, one.logit_positions) for one in _each(example)]

    def compared_targets(self, example: Example) -> torch.Tensor:
        return torch.cat([one.targets for one in _each(example)])

    def compared(self, outputs: list[dict[str, torch.Tensor]], example: Example) -> torch.Tensor:
        return torch.cat([output["logits"] for output in outputs])


def _answers(examples: list[Example], num_rows: int) -> AnswersBatch:
    packed = pack([dataclasses.replace(e, weights=(e.weights > 0).astype(np.float32)) for e in examples])
    owner = np.repeat(np.arange(len(examples)), [int(e.supervised.sum()) for e in examples])
    return AnswersBatch(**_fields(packed), owner=torch.from_numpy(owner), num_rows=num_rows)


def _fields(batch: PackedBatch) -> dict[str, Any]:
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def _halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is of the chosen answers, and of the rejected ones."""
    chosen, rejected = values.chunk(2)
    return chosen, rejected


def _crossed(one: Example, other: Example) -> Example:
    """The prompt of one example with the answer of another."""
    start, begin = int(np.argmax(one.supervised)), int(np.argmax(other.supervised))
    ids = np.concatenate([one.input_ids[:start], other.input_ids[begin:]])
    weights = np.concatenate([one.weights[:start], other.weights[begin:]])
    return Example(ids, weights, one.origin)


def _each(example: Example) -> list[PackedBatch]:
    return [pack([one]) for one in ([example, _worse(example)] if "second_ids" in example.own else [example])]


def _worse(example: Example) -> Example:
    """The worse answer of a pair as an example of its own."""
    return Example(example["second_ids"], example["second_weights"], example.origin)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0
