"""Sort texts, or pairs of texts, into classes: one class each, or any number."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch

from lora_lab.config.run import RunConfig
from lora_lab.data.collate import PaddedBatch
from lora_lab.data.columns import TEXTS
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.data.encode import Encoded, Encoder, Example
from lora_lab.data.formats import Record, RowError, class_name, counts
from lora_lab.errors import ConfigError, DataError, nearest
from lora_lab.tasks import metrics
from lora_lab.tasks.base import EvalResult, PaddedTask, Predictions
from lora_lab.tasks.classification.config import ClassificationConfig
from lora_lab.tasks.metrics import reports
from lora_lab.tasks.token_classification.config import TokenClassificationConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

Classes = TypeVar("Classes", ClassificationConfig, TokenClassificationConfig)

_MOST_CLASSES = 10_000
_PARTS = re.compile(r"[,;|，；、]")  # what may part the classes of one text


class LabelEncoder(Encoder):
    """A text or a pair of texts with the tokenizer's own marks around them, and a label."""

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """Where the second text begins; 0: there is one text."""
        return {"pair_start": pa.int32()}

    def example(self, record: Record, origin: str) -> Encoded:
        label = self.label(record)
        texts = [self.cleaned(text) for text in (record.text, record.pair) if text is not None]
        if not any(text.strip() for text in texts):
            raise RowError("empty", "the text is empty, so there is nothing to learn. Remove the row.")
        found = self.tokenizer(*texts, verbose=False)
        limit, truncated = self.config.max_tokens, False
        if len(found["input_ids"]) > limit:
            if self.config.too_long != "truncate_prompt":
                raise self.too_long(
                    len(found["input_ids"]), "Raise data.max_tokens, or choose data.too_long=drop or truncate_prompt."
                )
            found, truncated = self.tokenizer(*texts, truncation=True, max_length=limit, verbose=False), True
        ids = np.asarray(found["input_ids"], dtype=np.int64)
        second = [place for place, text in enumerate(found.sequence_ids()) if text == 1]
        weights = np.zeros(len(ids), dtype=np.float32)
        return Encoded([Example(ids, weights, origin, {"pair_start": second[0] if second else 0, **label})], truncated)

    def label(self, record: Record) -> dict[str, Any]:
        """The row's label, in columns of the subclass.

        Raises:
            RowError: it is none that the task could learn.
        """
        raise NotImplementedError


class ClassEncoder(LabelEncoder):
    """Labels are names of classes."""

    task: ClassificationConfig
    task_options = ("multi_label",)

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The names of the row's classes: one, or any number with `task.multi_label`."""
        return {**super().columns, "labels": TEXTS}

    def shown(self, example: Example) -> str:
        return ", ".join(example["labels"])

    def label(self, record: Record) -> dict[str, Any]:
        several = isinstance(record.label, list)
        if several and not self.task.multi_label:
            raise RowError(
                "label", f"{len(record.label)} labels {record.label}. For any number there is task.multi_label=true."
            )
        if self.task.multi_label and not several and self._may_be_several(record.label):
            raise RowError(
                "label",
                f"label {record.label!r} is one text, and with task.multi_label=true it may mean several classes. Write a list, such "
                'as ["a", "b"], or name all classes with data.label_names.',
            )
        return {"labels": [class_name(label) for label in (record.label if several else [record.label])]}

    def _may_be_several(self, label: Any) -> bool:
        return isinstance(label, str) and bool(_PARTS.search(label)) and label not in (self.config.label_names or ())


class ClassTask(PaddedTask[Classes, PaddedBatch]):
    """A task with named classes, known from the training rows."""

    head = "always"

    @classmethod
    def learn(cls, config: RunConfig, train: Dataset | Stream) -> dict[str, Any]:
        labels = class_labels(config, train)
        return {"labels": labels, "class_weights": class_weights(cls.section(config).class_weights, train, labels)}

    @classmethod
    def settings(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, learned: dict[str, Any]) -> dict[str, Any]:
        labels = learned.get("labels") or ["0", "1"]  # as long as they are not known, any number will do
        return {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
            "pad_token_id": tokenizer.pad_token_id,
        }

    @property
    def labels(self) -> list[str]:
        labels: list[str] = self.learned["labels"]
        return labels

    def check(self, data: Dataset) -> None:
        check_labels(data, self.labels)


class Classification(ClassTask[ClassificationConfig]):
    """`task=classification`."""

    one_place = True
    encoder_class = ClassEncoder
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"

    @classmethod
    def reported(cls, config: ClassificationConfig) -> tuple[str, ...]:
        scored = metrics.multi_label if config.multi_label else metrics.classification
        return super().reported(config) + metrics.reported(scored)

    @classmethod
    def settings(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, learned: dict[str, Any]) -> dict[str, Any]:
        kind = "multi_label" if cls.section(config).multi_label else "single_label"
        return {**super().settings(config, tokenizer, learned), "problem_type": f"{kind}_classification"}

    def collate(self, examples: list[Example], rng: np.random.Generator) -> PaddedBatch:
        targets = torch.tensor([self._target(example) for example in examples]).reshape(
            -1
        )  # [B], or [B * C] of 0 and 1
        weights, given = None, self.learned.get("class_weights")
        if given is not None:
            by_class = torch.tensor(given, dtype=torch.float32)
            weights = by_class.repeat(len(examples)) if self.config.multi_label else by_class[targets]
        return PaddedBatch(
            inputs=self.inputs([e.input_ids for e in examples], [e["pair_start"] for e in examples]),
            lengths=[len(e.input_ids) for e in examples],
            places=None,
            targets=targets,
            weights=weights,
            origins=[e.origin for e in examples],
        )

    def _target(self, example: Example) -> int | list[int]:
        if self.config.multi_label:
            own = example["labels"]
            return [int(label in own) for label in self.labels]
        return self.labels.index(example["labels"][0])

    def read(self, outputs: Any, batch: PaddedBatch) -> torch.Tensor:
        logits = super().read(outputs, batch)
        return one_by_one(logits) if self.config.multi_label else logits

    def unlabelled(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "label": [] if self.config.multi_label else self.labels[0]}

    def said(self, seen: Predictions) -> list[tuple[float, dict[str, Any]]]:
        """`label` with its probability, `score`; with `task.multi_label` `labels`, and the `scores` of all."""
        shares = seen.logits.softmax(-1)
        if not self.config.multi_label:
            best = shares.max(-1)
            return [
                (score, {"label": self.labels[number], "score": score})
                for score, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        rows = shares[:, 1].reshape(-1, len(self.labels)).tolist()
        return [
            (
                1.0,
                {
                    "labels": [label for label, share in zip(self.labels, row, strict=True) if share > 0.5],
                    "scores": dict(zip(self.labels, row, strict=True)),
                },
            )
            for row in rows
        ]

    def off(self, found: dict[str, Any], example: Example) -> float:
        """1: another class, or other classes."""
        said = found["labels"] if self.config.multi_label else [found["label"]]
        return float(set(said) != set(example["labels"]))

    explains = "score (logit) of the class, or log-probability of several"

    def explained(self, model: PeftModel, batch: PaddedBatch) -> torch.Tensor:
        if self.config.multi_label:
            return super().explained(model, batch)
        return self.logits(model, batch).gather(1, batch.targets[:, None]).sum()

    def as_said(self, example: Example, found: dict[str, Any]) -> Example:
        labels = found["labels"] if self.config.multi_label else [found["label"]]
        return dataclasses.replace(example, own={**example.own, "labels": labels})

    @reports(lower=("loss",))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        targets = np.concatenate([one.targets for one in seen])
        predicted = np.concatenate([one.predicted for one in seen])
        if self.config.multi_label:
            shape = (-1, len(self.labels))
            found, details = metrics.multi_label(targets.reshape(shape), predicted.reshape(shape), self.labels)
        else:
            found, details = metrics.classification(targets.tolist(), predicted.tolist(), self.labels)
        return EvalResult({"loss": loss, **found}, details=details)

    def compared(self, outputs: list[dict[str, torch.Tensor]], example: Example) -> torch.Tensor:
        logits = super().compared(outputs, example)
        return one_by_one(logits) if self.config.multi_label else logits


def one_by_one(logits: torch.Tensor) -> torch.Tensor:
    """Scores [B, C] of classes that exclude nothing as [B * C, 2] of "not this class" and "this class": softmax over the last
    dimension is the sigmoid of the score, so cross-entropy is the binary one."""
    return torch.stack([torch.zeros_like(logits), logits], dim=-1).reshape(-1, 2)


def class_labels(config: RunConfig, train: Dataset | Stream) -> list[str]:
    """Names of the classes, in the order of their numbers.

    Raises:
        DataError: fewer than two, or they cannot be known beforehand.
    """
    if config.data.label_names is not None:
        return list(config.data.label_names)
    if isinstance(train, Stream):
        raise DataError(
            f"{train.key}: with data.streaming=true the classes must be known beforehand. Name them: data.label_names=[...]"
        )
    labels = train.labels  # a class that no row has is no class
    if labels and all(counts(label) for label in labels):
        labels = sorted(labels, key=int)
    if len(labels) > _MOST_CLASSES:
        raise DataError(
            f"{train.key}: {len(labels):,} different labels, above {_MOST_CLASSES:,} (the first: {', '.join(labels[:5])}). Is it the "
            "right column? Name the classes with data.label_names if it is."
        )
    if len(labels) < 2:
        raise DataError(
            f"{train.key}: all labels are {labels[0] if labels else 'empty'}: there is nothing to tell apart."
        )
    return labels


def check_labels(data: Dataset, labels: list[str]) -> None:
    """Refuse rows with a class that the model does not have.

    Raises:
        DataError: naming file and row.
    """
    for label in data.labels:
        if label not in labels:
            raise DataError(
                f"{data.key}: {data.origin_of(label)}: label {label!r} is in no training row. The classes are "
                f"{', '.join(labels[:20])}.{nearest(label, labels)} Fix the row, or name all classes with data.label_names."
            )


def class_weights(
    given: Literal["balanced"] | list[float] | None, train: Dataset | Stream, labels: list[str]
) -> list[float] | None:
    """Weight of each class in the loss, as `task.class_weights` says.

    Raises:
        ConfigError: not one for each class, or they cannot be known beforehand.
    """
    if given is None:
        return None
    if given != "balanced":
        if len(given) != len(labels):
            raise ConfigError(
                f"task.class_weights: {len(given)} weights for {len(labels)} classes. Give one for each of {', '.join(labels)}."
            )
        return given
    if isinstance(train, Stream):
        raise ConfigError(
            "task.class_weights=balanced: needs all rows beforehand, and data.streaming=true. Give a list."
        )
    from sklearn.utils.class_weight import compute_class_weight

    counts = train.label_counts
    present = [label for label in labels if label in counts]
    rows = np.repeat(present, [counts[label] for label in present])
    balanced = dict(zip(present, compute_class_weight("balanced", classes=np.array(present), y=rows), strict=True))
    return [float(balanced.get(label, 1.0)) for label in labels]  # a class without rows weighs nothing anywhere
