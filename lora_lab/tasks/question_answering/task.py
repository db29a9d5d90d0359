"""Find the answer to a question as a piece of a context (extractive question answering)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from lora_lab.data.collate import PaddedBatch
from lora_lab.data.columns import TEXTS, TOKENS
from lora_lab.data.encode import Encoded, Encoder, Example
from lora_lab.data.formats import Record, RowError, promised
from lora_lab.tasks import metrics
from lora_lab.tasks.base import Answer, EvalResult, PaddedTask, Predictions
from lora_lab.tasks.metrics import reports
from lora_lab.tasks.question_answering.config import QuestionAnsweringConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from lora_lab.config.run import RunConfig

_CANDIDATES = 20  # best starts, and best ends, that are paired
_SHOWN = 32  # answers that are kept to be looked at


class SpanEncoder(Encoder):
    """A question and its context; a long context in windows that share `task.stride` tokens, an example each.

    The target of a window that does not hold the whole answer is its first token, as for BERT on SQuAD.
    """

    task: QuestionAnsweringConfig
    task_options = ("stride",)

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """`start`, `end`: first and last token of the answer; `pair_start`: first token of the window's context; `begins`, `ends`:
        the characters of the context at which each of the window's tokens of it begins and ends."""
        texts = {"question": pa.string(), "context": pa.string(), "answers": TEXTS}
        return {
            **texts,
            "start": pa.int32(),
            "end": pa.int32(),
            "pair_start": pa.int32(),
            "begins": TOKENS,
            "ends": TOKENS,
        }

    def shown(self, example: Example) -> str:
        return example["answers"][0] if example["start"] or example["end"] else "not in this window"

    def bare(self, record: Record) -> Record:
        """Question and context without the tokenizer's own marks around them; the answers' places move along."""
        whole = promised(record.pair)
        question, context = self.unmarked(promised(record.text)), self.unmarked(whole)
        shift = len(self.marks.opening) if whole.startswith(self.marks.opening) else 0
        spans = [[text, None if start is None else start - shift] for text, start in record.label]
        for text, start in spans:
            if start is not None and not 0 <= start <= len(context) - len(text):
                raise RowError("label", f"answer {text!r} is inside the tokenizer's own marks. Fix or remove the row.")
        return dataclasses.replace(record, text=question, pair=context, label=spans)

    def example(self, record: Record, origin: str) -> Encoded:
        asked, context = promised(record.text), promised(record.pair)
        text, start = record.label[0]
        if start is None:
            start = context.find(text)
        if start < 0 or not text.strip():
            raise RowError("label", f"answer {text!r} is not in the context. Fix or remove the row.")
        question = len(self.tokenizer(asked, verbose=False)["input_ids"])
        if question + self.task.stride + 8 > self.config.max_tokens:
            raise self.too_long(
                question,
                f"They are the question's alone, and task.stride={self.task.stride} come on top. Raise data.max_tokens.",
            )
        found = self.tokenizer(
            asked,
            context,
            truncation="only_second",
            max_length=self.config.max_tokens,
            stride=self.task.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        texts = {"question": asked, "context": context, "answers": [answer for answer, _ in record.label]}
        examples = []
        for window, ids in enumerate(found["input_ids"]):
            offsets = np.asarray(found["offset_mapping"][window])
            inside = np.array([part == 1 for part in found.sequence_ids(window)])
            first, last = _span(offsets, inside, start, start + len(text))
            begins, ends = offsets[inside].T
            places = {"start": first, "end": last, "pair_start": int(np.flatnonzero(inside)[0])}
            own = {**texts, **places, "begins": begins, "ends": ends}
            examples.append(Example(np.asarray(ids, dtype=np.int64), np.zeros(len(ids), dtype=np.float32), origin, own))
        return Encoded(examples)


def _span(offsets: np.ndarray, inside: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """First and last token of the characters from `start` to `end`; (0, 0) if the window does not hold all of them."""
    places = np.flatnonzero(inside)
    if not len(places) or offsets[places[0], 0] > start or offsets[places[-1], 1] < end:
        return 0, 0
    touched = places[(offsets[places, 1] > start) & (offsets[places, 0] < end)]
    return (int(touched[0]), int(touched[-1])) if len(touched) else (0, 0)


class QuestionAnswering(PaddedTask[QuestionAnsweringConfig, PaddedBatch]):
    """`task=question_answering`. The items of a batch are the starts of all rows, then their ends."""

    encoder_class = SpanEncoder
    auto_class = "AutoModelForQuestionAnswering"
    peft_task_type = None  # peft 0.21's class for QUESTION_ANS drops token_type_ids on the way to the model
    head = "always"

    @classmethod
    def settings(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, learned: dict[str, Any]) -> dict[str, Any]:
        """The head has two outputs for each token, the start's and the end's, however many classes the base was published for."""
        return {"num_labels": 2}

    def collate(self, examples: list[Example], rng: np.random.Generator) -> PaddedBatch:
        return PaddedBatch(
            inputs=self.inputs([e.input_ids for e in examples], [e["pair_start"] for e in examples]),
            lengths=[len(e.input_ids) for e in examples],
            places=None,
            targets=torch.tensor([e[side] for side in ("start", "end") for e in examples]),
            weights=None,
            origins=[e.origin for e in examples],
        )

    def shortened(self, example: Example) -> Example:
        short = super().shortened(example)
        cut = len(example.input_ids) - len(short.input_ids)
        places = {side: max(0, example[side] - cut) for side in ("start", "end")}
        return dataclasses.replace(short, own={**short.own, **places})

    def read(self, outputs: Any, batch: PaddedBatch) -> torch.Tensor:
        padding = batch.inputs["attention_mask"].repeat(2, 1) == 0
        logits = torch.cat([outputs.start_logits, outputs.end_logits]).float()[:, : padding.shape[1]]
        return logits.masked_fill(
            padding, -1e4
        )  # an answer is never in the padding, so that its length counts for nothing

    def row_outputs(self, model: PeftModel, batch: PaddedBatch) -> torch.Tensor:
        both = torch.stack(self.logits(model, batch).chunk(2), 1)  # [B, 2, T]
        return both[batch.inputs["attention_mask"][:, None].expand_as(both) == 1]

    def observed(self, examples: list[Example], logits: torch.Tensor, batch: PaddedBatch) -> Predictions:
        return Predictions(examples, logits.cpu(), logits.argmax(-1).cpu().numpy(), batch.targets.cpu().numpy())

    def unlabelled(self, row: dict[str, Any]) -> dict[str, Any]:
        context = row.get("context")
        first = context.split()[:1] if isinstance(context, str) else []
        return {**row, "answers": {"text": first}}

    def said(self, seen: Predictions) -> list[tuple[float, dict[str, Any]]]:
        """`answer`, of the likeliest of a row's windows."""
        starts, ends = seen.logits.chunk(2)
        found = [self._best(s.numpy(), e.numpy(), x) for s, e, x in zip(starts, ends, seen.examples, strict=True)]
        return [(score, {"answer": text}) for score, text in found]

    def off(self, found: dict[str, Any], example: Example) -> float:
        """What F1 lacks."""
        return 1 - metrics.squad([found["answer"]], [example["answers"]], self.config.language)["f1"]

    @reports(metrics.squad, lower=("loss",))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        best: dict[str, tuple[float, str]] = {}
        rows: dict[str, Example] = {}
        for one in seen:
            starts, ends = one.logits.chunk(2)
            for place, example in enumerate(one.examples):
                found = self._best(starts[place].numpy(), ends[place].numpy(), example)
                rows[example.origin] = example
                best[example.origin] = max(best.get(example.origin, found), found)
        texts = {origin: text for origin, (_, text) in best.items()}
        order = sorted(rows)
        scores = metrics.squad([texts[o] for o in order], [rows[o]["answers"] for o in order], self.config.language)
        answers = [Answer(rows[o]["question"], rows[o]["answers"][0], texts[o]) for o in order[:_SHOWN]]
        return EvalResult({"loss": loss, **scores}, answers)

    def _best(self, starts: np.ndarray, ends: np.ndarray, example: Example) -> tuple[float, str]:
        """Score and text of the likeliest span of the window's context."""
        begins, closes, first = example["begins"], example["ends"], example["pair_start"]
        starts, ends = starts[first : first + len(begins)], ends[first : first + len(begins)]
        pairs = [
            (float(starts[i] + ends[j]), i, j)
            for i in np.argsort(-starts, kind="stable")[:_CANDIDATES]
            for j in np.argsort(-ends, kind="stable")[:_CANDIDATES]
            if i <= j < i + self.config.max_answer_tokens
        ]
        if not pairs:
            return -np.inf, ""
        score, i, j = max(pairs)
        return score, example["context"][begins[i] : closes[j]]

    def compared(self, outputs: list[dict[str, torch.Tensor]], example: Example) -> torch.Tensor:
        return torch.stack([outputs[0]["start_logits"], outputs[0]["end_logits"]])
