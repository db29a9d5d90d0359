"""Masked-language pretraining on domain text (BERT, arXiv:1810.04805), with masks drawn anew in every step."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import cross_entropy

from lora_lab.config.data import DataConfig
from lora_lab.data.collate import PlacedBatch
from lora_lab.data.columns import TOKENS
from lora_lab.data.dataset import Dataset, first_examples
from lora_lab.data.encode import Encoded, Encoder, Example
from lora_lab.data.formats import Record, RowError, promised
from lora_lab.errors import BaseModelError, NoRoomError
from lora_lab.runtime import console, ranks
from lora_lab.runtime.memory import attempts
from lora_lab.tasks.base import EvalResult, PlacedTask, Predictions, logits_at
from lora_lab.tasks.masked_lm.config import MaskedLMConfig
from lora_lab.tasks.metrics import reported, reports

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_MASKED, _RANDOM = 0.8, 0.1  # shares of the chosen tokens that are masked, or replaced; the others stay as they are
_COPIES = 64  # of a row with one token masked each, in one forward pass


class MaskedEncoder(Encoder):
    """Texts with the tokenizer's own marks around them, in pieces of at most `data.max_tokens`; every other token counts."""

    task: MaskedLMConfig
    task_options = ("whole_words",)

    def __init__(
        self,
        config: DataConfig,
        task: MaskedLMConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int | None = None,
    ):
        super().__init__(config, task, tokenizer, vocab_size)
        if tokenizer.mask_token_id is None:
            raise BaseModelError(
                "model.path: its tokenizer has no mask token, so task=masked_lm cannot mask. Use another base."
            )
        if vocab_size is not None and tokenizer.mask_token_id >= vocab_size:
            raise BaseModelError(
                f"model.path: its mask token {tokenizer.mask_token!r} has id {tokenizer.mask_token_id}, and the embedding has "
                f"{vocab_size} rows: the tokenizer does not belong to this model. Use another base."
            )

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The number of the word that each token is of, from 0; -1: of none."""
        return {"words": TOKENS} if self.task.whole_words else {}

    def example(self, record: Record, origin: str) -> Encoded:
        found = self.tokenizer(
            self.cleaned(promised(record.text)),
            truncation=True,
            max_length=self.config.max_tokens,
            return_overflowing_tokens=True,
            return_special_tokens_mask=True,
        )
        examples = []
        for piece, (ids, special) in enumerate(zip(found["input_ids"], found["special_tokens_mask"], strict=True)):
            weights = 1 - np.asarray(special, dtype=np.float32)
            weights[np.isin(ids, self.marks.unlearned)] = 0
            if weights.any():
                examples.append(Example(np.asarray(ids, dtype=np.int64), weights, origin, self._words(found, piece)))
        if not examples:
            raise RowError("empty", "no token that could be masked. Remove the row.")
        return Encoded(examples)

    def _words(self, found: BatchEncoding, piece: int) -> dict[str, Any]:
        if not self.task.whole_words:
            return {}
        return {"words": [-1 if word is None else word for word in found.word_ids(piece)]}


class MaskedLM(PlacedTask[MaskedLMConfig]):
    """`task=masked_lm`."""

    encoder_class = MaskedEncoder
    auto_class = "AutoModelForMaskedLM"
    peft_task_type = None
    head = "missing"

    @classmethod
    def reported(cls, config: MaskedLMConfig) -> tuple[str, ...]:
        return super().reported(config) + (reported(cls.examine) if config.pseudo_perplexity_rows else ())

    def collate(self, examples: list[Example], rng: np.random.Generator) -> PlacedBatch:
        chosen, rows = [], []
        for example in examples:  # all draws of one example before the next, so that batches can be split anywhere
            chosen.append(self._choose(example, rng))
            rows.append(self._corrupt(example.input_ids, chosen[-1], rng))
        row_of = np.repeat(np.arange(len(examples)), [len(places) for places in chosen])
        columns = np.concatenate(chosen)
        targets = np.concatenate([e.input_ids[places] for e, places in zip(examples, chosen, strict=True)])
        return PlacedBatch(
            inputs=self.inputs(rows, [0] * len(rows)),
            lengths=[len(row) for row in rows],
            places=(torch.from_numpy(row_of), torch.from_numpy(columns)),
            targets=torch.from_numpy(targets),
            weights=None,
            origins=[example.origin for example in examples],
        )

    def shortened(self, example: Example) -> Example:
        short = super().shortened(example)
        if not short.supervised.any():
            return example
        words = example.own.get("words")
        own = {} if words is None else {"words": words[-len(short.input_ids) :]}
        return dataclasses.replace(short, own={**short.own, **own})

    @property
    def _known(self) -> int:
        """Tokens of the tokenizer that the model has an embedding for."""
        return min(len(self.tokenizer), self.encoder.vocab_size or len(self.tokenizer))

    def _choose(self, example: Example, rng: np.random.Generator) -> np.ndarray:
        """Places of the tokens to be guessed: each token, or word, with `mask_probability`; at least one.

        Their number is left to chance: with the same share in every row, a model gets used to that share, and guesses worse
        where fewer tokens are hidden.
        """
        allowed = np.flatnonzero(example.supervised)
        words = example["words"][allowed] if self.config.whole_words else np.arange(len(allowed))
        distinct = np.unique(words)
        chosen = distinct[rng.random(len(distinct)) < self.config.mask_probability]
        return allowed[np.isin(words, chosen if len(chosen) else rng.choice(distinct))]

    def _corrupt(self, ids: np.ndarray, places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        changed, draws = ids.copy(), rng.random(len(places))
        changed[places[draws < _MASKED]] = self.tokenizer.mask_token_id
        replaced = places[(draws >= _MASKED) & (draws < _MASKED + _RANDOM)]
        changed[replaced] = rng.integers(self._known, size=len(replaced))
        return changed

    @reports(lower=("loss",), higher=("masked_accuracy",))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        correct = sum(int((one.predicted == one.targets).sum()) for one in seen)
        return EvalResult({"loss": loss, "masked_accuracy": correct / sum(len(one.targets) for one in seen)})

    @reports(lower=("pseudo_perplexity",))
    @torch.no_grad()
    def examine(self, model: PeftModel, data: Dataset, title: str) -> EvalResult:
        """Pseudo-perplexity (Salazar et al. 2020, arXiv:1910.14659): exp of the mean loss of each token masked alone."""
        rows = first_examples(data, self.config.pseudo_perplexity_rows)
        if not rows:
            return EvalResult({})
        if ranks.in_step():  # rows have unlike numbers of passes
            found = [self._pseudo_loss(model, rows, title)]
        else:
            part = [rows[place] for place in ranks.own([row.num_tokens**2 for row in rows])]
            found = ranks.together(lambda: self._pseudo_loss(model, part, title))
        return EvalResult({"pseudo_perplexity": math.exp(sum(loss for loss, _ in found) / sum(n for _, n in found))})

    def _pseudo_loss(self, model: PeftModel, rows: list[Example], title: str) -> tuple[float, int]:
        """Summed loss of every token of some rows, masked alone, and how many they are."""
        loss, tokens, most = 0.0, 0, [_COPIES]
        with console.steps(title, len(rows)) as progress:
            for row in rows:
                places = np.flatnonzero(row.supervised)
                for attempt in attempts(functools.partial(_fewer_copies, most)):
                    with attempt:
                        parts = [places[start : start + most[0]] for start in range(0, len(places), most[0])]
                        own = sum(self._one_by_one(model, row.input_ids, part) for part in parts)
                loss += own
                tokens += len(places)
                progress.advance()
        return loss, tokens

    def _one_by_one(self, model: PeftModel, ids: np.ndarray, places: np.ndarray) -> float:
        """Summed loss of the tokens at `places`, each masked in a copy of its own."""
        copies = np.tile(ids, (len(places), 1))
        rows = np.arange(len(places))
        copies[rows, places] = self.tokenizer.mask_token_id
        inputs = {name: tensor.to(model.device) for name, tensor in self.inputs(list(copies)).items()}
        where, which = (torch.from_numpy(one).to(model.device) for one in (rows, places))
        logits = logits_at(model, inputs, (where, which))
        return cross_entropy(logits, torch.from_numpy(ids[places]).to(logits.device), reduction="sum").item()


def _fewer_copies(most: list[int], lacked: str) -> None:
    """After a failed allocation: half as many copies of a row at once, in place.

    Raises:
        NoRoomError: it was one already.
    """
    if most[0] == 1:
        raise NoRoomError(
            f"task.pseudo_perplexity_rows: a row does not fit into memory, with one token masked at a time ({lacked}). Set it to 0, or "
            "a smaller data.max_tokens."
        )
    most[0] //= 2
