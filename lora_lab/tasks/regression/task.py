"""Give texts, or pairs of texts, a number, such as how alike two sentences are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from lora_lab.config.run import RunConfig
from lora_lab.data.collate import PaddedBatch
from lora_lab.data.encode import Example
from lora_lab.data.formats import Record, RowError
from lora_lab.tasks import metrics
from lora_lab.tasks.base import EvalResult, PaddedTask, Predictions
from lora_lab.tasks.classification.task import LabelEncoder
from lora_lab.tasks.metrics import reports
from lora_lab.tasks.regression.config import RegressionConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


class NumberEncoder(LabelEncoder):
    """Labels are numbers, or text that is one (CSV files have nothing else)."""

    @property
    def columns(self) -> dict[str, pa.DataType]:
        return {**super().columns, "value": pa.float64()}

    def shown(self, example: Example) -> str:
        return repr(example["value"])

    def label(self, record: Record) -> dict[str, Any]:
        try:
            number = float(record.label)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RowError(
                "label", f"label {record.label!r} is not a number. For classes there is task=classification."
            )
        return {"value": number}


class Regression(PaddedTask[RegressionConfig, PaddedBatch]):
    """`task=regression`: mean squared error."""

    one_place = True
    encoder_class = NumberEncoder
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    head = "always"

    @classmethod
    def settings(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, learned: dict[str, Any]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression", "pad_token_id": tokenizer.pad_token_id}

    def collate(self, examples: list[Example], rng: np.random.Generator) -> PaddedBatch:
        return PaddedBatch(
            inputs=self.inputs([e.input_ids for e in examples], [e["pair_start"] for e in examples]),
            lengths=[len(e.input_ids) for e in examples],
            places=None,
            targets=torch.tensor([e["value"] for e in examples], dtype=torch.float32),
            weights=None,
            origins=[e.origin for e in examples],
        )

    def item_losses(self, logits: torch.Tensor, batch: PaddedBatch, smoothing: float) -> torch.Tensor:
        return (logits[:, 0] - batch.targets) ** 2

    def observed(self, examples: list[Example], logits: torch.Tensor, batch: PaddedBatch) -> Predictions:
        numbers = logits.float().cpu()
        return Predictions(examples, numbers, numbers[:, 0].numpy(), batch.targets.cpu().numpy())

    def unlabelled(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "label": 0.0}

    def said(self, seen: Predictions) -> list[tuple[float, dict[str, Any]]]:
        """`value`."""
        return [(1.0, {"value": value}) for value in seen.predicted.tolist()]

    explains = "predicted number"

    def explained(self, model: PeftModel, batch: PaddedBatch) -> torch.Tensor:
        return self.logits(model, batch)[:, 0].sum()

    def off(self, found: dict[str, Any], example: Example) -> float:
        """The distance between the two numbers."""
        return abs(float(found["value"]) - float(example["value"]))

    @reports(metrics.regression, lower=("loss",))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        targets = np.concatenate([one.targets for one in seen])
        predicted = np.concatenate([one.predicted for one in seen])
        return EvalResult({"loss": loss, **metrics.regression(targets, predicted)})
