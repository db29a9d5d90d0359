"""Learn vectors of texts: those that belong together lie close, those of other rows apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import normalize

from lora_lab.base import pooling
from lora_lab.base.pooling import Pooling
from lora_lab.config.data import DataConfig
from lora_lab.config.run import RunConfig
from lora_lab.data import sources
from lora_lab.data.collate import PaddedBatch, of_like_length
from lora_lab.data.columns import TEXTS, TOKENS
from lora_lab.data.dataset import Dataset
from lora_lab.data.encode import Encoded, Encoder, Example, Told
from lora_lab.data.formats import Record, RowError, promised
from lora_lab.errors import BaseModelError, DataError
from lora_lab.tasks import bm25, metrics
from lora_lab.tasks.base import TRIED_TOKENS, EvalResult, LossSum, PaddedTask, Pass, Predictions, StepBatches
from lora_lab.tasks.embedding import losses
from lora_lab.tasks.embedding.config import EmbeddingConfig
from lora_lab.tasks.embedding.looks import look
from lora_lab.tasks.metrics import reported, reports

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_ENOUGH_TOKENS = 256  # of a pass that another one beside it is worth its start
_QUERIES = 1024  # that are compared with all documents at once
Side = Literal["query", "document"]


class TextsEncoder(Encoder):
    """The texts of a row, each with its prompt before it: the query first, then what it should find, then what it should not; or the
    two texts of a scored pair."""

    task: EmbeddingConfig
    task_options = ("loss", "query_prompt", "document_prompt")
    kept_together = "document"

    def __init__(
        self,
        config: DataConfig,
        task: EmbeddingConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int | None = None,
    ):
        self.published = own = _published(Path(tokenizer.name_or_path))
        query, document = (own.query_prompt, own.document_prompt) if own else ("", "")
        query = query if task.query_prompt is None else task.query_prompt
        document = document if task.document_prompt is None else task.document_prompt
        if own is not None and not own.pools_prompts and (query or document):
            raise BaseModelError(
                f"{tokenizer.name_or_path}: its prompts do not count in the pooling (include_prompt=false), which is not supported. "
                "Set task.query_prompt='' and task.document_prompt='', or choose another base."
            )
        task = dataclasses.replace(task, query_prompt=query, document_prompt=document)  # the cache goes by these too
        super().__init__(config, task, tokenizer, vocab_size)

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The tokens of the texts behind the first, end to end, and how many each has; all texts without their prompts; the text that
        should be found; the score of a pair."""
        return {
            "other_ids": TOKENS,
            "other_lengths": TOKENS,
            "texts": TEXTS,
            "document": pa.string(),
            "score": pa.float64(),
        }

    def shown(self, example: Example) -> str:
        first, *others = example["texts"][1:]
        if example["score"] is not None:
            return f"{example['score']:g}: {first}"
        return " | not: ".join([first, *others])

    def findings(self, train: Dataset | None, held_out: Dataset | None) -> list[Told]:
        return look(train, held_out) if self.task.loss == "infonce" else []

    def sequences(self, example: Example) -> list[np.ndarray]:
        ends = np.cumsum(example["other_lengths"])[:-1]
        return [example.input_ids, *np.split(example["other_ids"], ends)]

    def example(self, record: Record, origin: str) -> Encoded:
        scored = self.task.loss != "infonce"
        negatives = [] if scored else record.label
        texts = [self.cleaned(text) for text in (promised(record.text), promised(record.pair), *negatives)]
        if not scored and texts[1] in texts[2:]:
            raise RowError("label", "a negative is the positive after cleaning. Remove it.")
        first: Side = "document" if scored else "query"
        found = [self.tokens(text, first if place == 0 else "document") for place, text in enumerate(texts)]
        ids, *others = (one for one, _ in found)
        own = {
            "other_ids": np.concatenate(others),
            "other_lengths": [len(one) for one in others],
            "texts": texts,
            "document": texts[1],
            "score": record.label if scored else None,
        }
        cut = any(truncated for _, truncated in found)
        return Encoded([Example(ids, np.zeros(len(ids), dtype=np.float32), origin, own)], cut)

    def tokens(self, text: str, side: Side) -> tuple[np.ndarray, bool]:
        """The tokens of a text with its prompt, and whether its end was cut off.

        Raises:
            RowError: they are too many.
        """
        text = (promised(self.task.query_prompt) if side == "query" else promised(self.task.document_prompt)) + text
        ids, limit = self.tokenizer(text, verbose=False)["input_ids"], self.config.max_tokens
        cut = len(ids) > limit
        if cut and self.config.too_long != "truncate_prompt":
            raise self.too_long(
                len(ids),
                "Raise data.max_tokens, or choose data.too_long=drop or truncate_prompt, which cuts the end off.",
            )
        if cut:
            ids = self.tokenizer(text, truncation=True, max_length=limit, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64), cut


def _published(folder: Path) -> Pooling | None:
    return Pooling.read(folder) if pooling.described(folder) else None


class Draws:
    """What torch's generators are about to draw, to let them draw it again."""

    def __init__(self, device: torch.device):
        self._device = device if device.type == "cuda" else None
        self._states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if self._device else None

    def again(self) -> None:
        """Draw it again from now on."""
        own, card = self._states
        torch.set_rng_state(own)
        if card is not None and self._device is not None:
            torch.cuda.set_rng_state(card, self._device)


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """What is known of a batch's texts from a look at all texts of its step."""

    losses: torch.Tensor  # [rows] float32
    masked: float  # pairs of its rows that are no negatives because their texts are equal
    vectors: torch.Tensor | None = None  # [texts, D], where they are not computed again
    gradient: torch.Tensor | None = None  # [texts, D]: of the step's summed loss by the vectors
    draws: Draws | None = None  # of the dropout that the vectors were computed with


@dataclasses.dataclass(frozen=True, eq=False)
class TextsBatch(PaddedBatch):
    """The texts of some rows: all first ones, all second ones, then the negatives. An item is a row."""

    marks: list[tuple[str, bytes]]  # [texts] by which equal ones are known: the text and its tokens
    owners: list[int]  # [negatives] the row that each is of
    known: Known | None = None

    def texts_of(self, row: int) -> list[int]:
        """Where the texts of a row stand among all: the first, the second, then its negatives."""
        count = len(self.targets)
        return [row, count + row, *(2 * count + place for place, owner in enumerate(self.owners) if owner == row)]

    def only(self, row: int) -> TextsBatch:
        """What the loss must know of one row, without what the model reads."""
        texts = self.texts_of(row)
        return dataclasses.replace(
            self,
            inputs={},
            lengths=[self.lengths[text] for text in texts],
            targets=self.targets[row : row + 1],
            marks=[self.marks[text] for text in texts],
            owners=[0] * (len(texts) - 2),
            known=None,
        )


class Embedding(PaddedTask[EmbeddingConfig, TextsBatch]):
    """`task=embedding`. The rows of a whole optimizer step are each other's negatives, whatever its micro-batches: of several, all vectors
    are computed first, without gradients, then the gradient of the loss by each vector, and each micro-batch goes on from there
    (arXiv:2101.06983)."""

    encoder_class = TextsEncoder
    encoder: TextsEncoder
    auto_class = "AutoModel"
    peft_task_type = "FEATURE_EXTRACTION"
    unread = ("pooler",)

    def __init__(self, config: RunConfig, encoder: TextsEncoder, learned: dict[str, Any], model: PretrainedConfig):
        super().__init__(config, encoder, learned, model)
        self._rows = config.train.batch_size
        self._data = config.data
        self._corpus: list[str] | None = None
        self.learned = {"pooling": dataclasses.asdict(self._pooling()), **learned}
        self.pooling = Pooling(**self.learned["pooling"])

    def _pooling(self) -> Pooling:
        """As the options say, else as the base was published, else as its kind does it."""
        own, task = self.encoder.published, self.encoder.task
        causal = bool(_reads_forward_only(self.model))
        known = own or Pooling("last" if causal else "mean", True, None)
        return dataclasses.replace(
            known,
            way=self.config.pooling or known.way,
            normalizes=known.normalizes if self.config.normalize is None else self.config.normalize,
            query_prompt=promised(task.query_prompt),
            document_prompt=promised(task.document_prompt),
        )

    @classmethod
    def takes(cls, config: PretrainedConfig) -> bool:
        return super().takes(config) and not config.is_encoder_decoder

    @classmethod
    def reported(cls, config: EmbeddingConfig) -> tuple[str, ...]:
        return ("loss", *reported(metrics.retrieval if config.loss == "infonce" else metrics.correlations))

    def check(self, data: Dataset) -> None:
        """
        Raises:
            DataError: `task.corpus` cannot be read; vectors are shorter than `task.dimensions` asks.
        """
        width = int(self.model.get_text_config().hidden_size)
        for size in self.config.dimensions or []:
            if size >= width:
                raise DataError(
                    f"task.dimensions: {size} of the {width} numbers that a vector has. Name smaller sizes; the whole is trained anyway."
                )
        if self.config.loss == "angle" and any(size % 2 for size in (*(self.config.dimensions or []), width)):
            raise DataError("task.dimensions: task.loss=angle reads vectors in two halves. Name even sizes.")
        if self.config.corpus is not None:
            self._documents()

    # -- a step -------------------------------------------------------------------------------------------------------

    def collate(self, examples: list[Example], rng: np.random.Generator) -> TextsBatch:
        every = [self.encoder.sequences(example) for example in examples]
        texts = [example["texts"] for example in examples]
        order = [(row, 0) for row in range(len(every))] + [(row, 1) for row in range(len(every))]
        order += [(row, place) for row, own in enumerate(every) for place in range(2, len(own))]
        rows = [every[row][place] for row, place in order]
        scores = [example["score"] for example in examples]
        return TextsBatch(
            inputs=self.inputs(rows),
            lengths=[len(row) for row in rows],
            places=None,
            targets=torch.tensor([0.0 if score is None else score for score in scores], dtype=torch.float32),
            weights=None,
            origins=[example.origin for example in examples],
            marks=[
                (texts[row][place], ids.astype(np.int32).tobytes())
                for (row, place), ids in zip(order, rows, strict=True)
            ],
            owners=[row for row, place in order if place > 1],
        )

    def shortened(self, example: Example) -> Example:
        first, *others = (ids[-TRIED_TOKENS:] for ids in self.encoder.sequences(example))
        own = {
            **example.own,
            "other_ids": np.concatenate(others),
            "other_lengths": np.array([len(one) for one in others]),
        }
        tokens = sum(map(len, others))
        return dataclasses.replace(
            example, input_ids=first, weights=example.weights[-TRIED_TOKENS:], own=own, own_tokens=tokens
        )

    def step(
        self, model: PeftModel, parts: Iterable[list[Example]], rng: np.random.Generator
    ) -> StepBatches[TextsBatch]:
        found = super().step(model, parts, rng)
        if not torch.is_grad_enabled():
            return self._measured_together(model, found, rng)
        return self._learned_together(model, found) if len(found) > 1 else found

    def _learned_together(self, model: PeftModel, found: StepBatches[TextsBatch]) -> StepBatches[TextsBatch]:
        """The batches of a step, each with the gradient of the whole step's loss by its vectors."""
        draws, vectors = [], []
        with torch.no_grad():
            for batch in found.batches:
                draws.append(Draws(model.device))
                vectors.append(self.logits(model, batch.to(model.device)))
        for one in vectors:
            one.requires_grad_()
        each, masked = self._losses(vectors, found.batches)
        gradients = torch.autograd.grad(each.sum(), vectors)
        own = each.detach().split([len(batch.targets) for batch in found.batches])
        known = [
            Known(loss, count, gradient=gradient, draws=drawn)
            for loss, count, gradient, drawn in zip(own, masked, gradients, draws, strict=True)
        ]
        batches = [dataclasses.replace(batch, known=one) for batch, one in zip(found.batches, known, strict=True)]
        return StepBatches(batches, found.weight)

    def _measured_together(
        self, model: PeftModel, found: StepBatches[TextsBatch], rng: np.random.Generator
    ) -> StepBatches[TextsBatch]:
        """The batches of held-out rows with their vectors, and losses among as many rows as a step of training has, so that both
        compare."""
        vectors = [self.logits(model, batch.to(model.device)) for batch in found.batches]
        rows = [
            (one[batch.texts_of(row)], batch.only(row))
            for one, batch in zip(vectors, found.batches, strict=True)
            for row in range(len(batch.targets))
        ]
        order = rng.permutation(len(rows))
        losses_of = torch.zeros(len(rows))
        masked_of = np.zeros(len(rows))
        for start in range(0, len(rows), self._rows):
            part = order[start : start + self._rows].tolist()
            each, masked = self._losses(*zip(*(rows[place] for place in part), strict=True))
            losses_of[part], masked_of[part] = each.cpu(), masked
        batches, start = [], 0
        for one, batch in zip(vectors, found.batches, strict=True):
            own = slice(start, start + len(batch.targets))
            known = Known(losses_of[own].to(one.device), float(masked_of[own].sum()), vectors=one)
            batches.append(dataclasses.replace(batch, known=known))
            start = own.stop
        return StepBatches(batches, found.weight)

    def logits(self, model: PeftModel, batch: TextsBatch) -> torch.Tensor:
        """[texts, D] float32: the vector of each text, of whatever length."""
        groups = [] if self.forward.unpadded else of_like_length(batch.lengths, len(batch.lengths), _ENOUGH_TOKENS)
        if len(groups) < 2:  # indices would have to be copied to a card
            return self._in_one_pass(model, batch.inputs, batch.lengths)
        found = []
        for group in groups:
            inputs = {name: rows[group] for name, rows in batch.inputs.items()}
            found.append(self._in_one_pass(model, inputs, [batch.lengths[text] for text in group]))
        back = np.argsort([text for group in groups for text in group])
        return torch.cat(found)[torch.from_numpy(back).to(found[0].device)]

    def _in_one_pass(self, model: PeftModel, inputs: dict[str, torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
        """Their vectors; the pass is as long as the longest text."""
        shortened = {name: rows[:, : max(lengths)] for name, rows in inputs.items()}
        hidden = model(**shortened).last_hidden_state.float()
        return pooling.pooled(hidden, shortened["attention_mask"], self.pooling.way)

    def loss(self, model: PeftModel, batch: TextsBatch, rdrop_alpha: float | None = None) -> LossSum:
        known = batch.known
        if known is None:
            vectors = self.logits(model, batch)
            each, masked = self._losses([vectors], [batch])
            return self._summed(each.sum(), batch, vectors, sum(masked))
        if known.gradient is None:
            assert known.vectors is not None
            return self._summed(known.losses.sum(), batch, known.vectors, known.masked)
        if known.draws is not None:
            known.draws.again()
        vectors = self.logits(model, batch)
        inner = (vectors * known.gradient).sum()  # its gradient by the weights is that of the step's loss
        return self._summed(inner + (known.losses.sum() - inner).detach(), batch, vectors, known.masked)

    def _summed(self, loss: torch.Tensor, batch: TextsBatch, vectors: torch.Tensor, masked: float) -> LossSum:
        figures = {"equal_texts": masked} if self.config.loss == "infonce" else {}
        return LossSum(loss, batch.weight, len(batch.targets), vectors.detach(), figures)

    def row_outputs(self, model: PeftModel, batch: TextsBatch) -> torch.Tensor:
        return self.logits(model, batch)[_row_after_row(batch)].flatten()

    def _losses(
        self, vectors: Sequence[torch.Tensor], batches: Sequence[TextsBatch]
    ) -> tuple[torch.Tensor, list[float]]:
        """The losses [N] of the rows of some batches, each told apart from all the others; and for each batch how many pairs of its rows
        are masked, being equal."""
        counts = [len(batch.targets) for batch in batches]
        firsts, seconds, others = (
            torch.cat(parts)
            for parts in zip(*(_sides(v, n) for v, n in zip(vectors, counts, strict=True)), strict=True)
        )
        sizes = [*(self.config.dimensions or []), firsts.shape[1]]
        with torch.autocast(firsts.device.type, enabled=False):
            if self.config.loss != "infonce":
                goals = torch.cat([batch.targets for batch in batches]).to(firsts.device)
                alike = losses.angles if self.config.loss == "angle" else losses.cosines
                whole = torch.stack(
                    [
                        losses.ordered(alike(firsts[:, :size], seconds[:, :size]), goals, self.config.temperature)
                        for size in sizes
                    ]
                ).mean()
                return whole.expand(sum(counts)), [0.0] * len(counts)
            marks = [_sides(batch.marks, count) for batch, count in zip(batches, counts, strict=True)]
            queries, positives, negatives = (
                [mark for own in side for mark in own] for side in zip(*marks, strict=True)
            )
            equal = losses.equal_texts(queries, [*positives, *negatives])
            masked = torch.from_numpy(equal).to(firsts.device)
            documents = torch.cat([seconds, others])
            each = torch.stack(
                [
                    losses.infonce(
                        firsts[:, :size], documents[:, :size], masked, self.config.temperature, self.config.symmetric
                    )
                    for size in sizes
                ]
            ).mean(0)
        return each, [float(part.sum()) for part in np.split(equal, np.cumsum(counts)[:-1])]

    explains = "cosine of the two texts"

    def explained(self, model: PeftModel, batch: TextsBatch) -> torch.Tensor:
        firsts, seconds, _ = _sides(self.logits(model, batch), len(batch.targets))
        return losses.cosines(firsts, seconds).sum()

    # -- measuring ----------------------------------------------------------------------------------------------------

    def observed(self, examples: list[Example], logits: torch.Tensor, batch: TextsBatch) -> Predictions:
        """The vectors are kept row after row."""
        vectors = logits.cpu()[_row_after_row(batch)]
        return Predictions(examples, vectors, np.zeros(len(examples)), batch.targets.cpu().numpy())

    @reports(metrics.retrieval, metrics.correlations, lower=("loss",))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        """Among the documents of all held-out rows; with `task.corpus` that is left to `examine`."""
        if self.config.loss != "infonce":
            found = torch.cat([losses.cosines(one.logits[0::2], one.logits[1::2]) for one in seen]).numpy()
            return EvalResult({"loss": loss, **metrics.correlations(np.concatenate([s.targets for s in seen]), found)})
        if self.config.corpus is not None:
            return EvalResult({"loss": loss})
        rows = [
            (example, own)
            for one in seen
            for example, own in zip(
                one.examples, one.logits.split([len(example["texts"]) for example in one.examples]), strict=True
            )
        ]
        return EvalResult({"loss": loss}).with_also(self._found(_Archive.of(rows)))

    @torch.no_grad()
    def examine(self, model: PeftModel, data: Dataset, title: str) -> EvalResult:
        """With `task.corpus`: how well each held-out query finds its documents among all of those."""
        if self.config.corpus is None:
            return EvalResult({})
        queries: dict[str, np.ndarray] = {}
        right: dict[str, dict[str, None]] = {}
        documents: dict[str, np.ndarray] = {}
        for example in data:
            (query, positive, *_), (ids, *others) = example["texts"], self.encoder.sequences(example)
            queries.setdefault(query, ids)
            right.setdefault(query, {})[positive] = None
            documents.update(zip(example["texts"][1:], others, strict=True))
        for text in self._documents():
            if text not in documents:
                documents[text] = self.encoder.tokens(text, "document")[0]
        vectors = self._vectors(model, [*queries.values(), *documents.values()])
        places = {text: place for place, text in enumerate(documents)}
        found = [[places[text] for text in own] for own in right.values()]
        return self._found(_Archive(vectors[: len(queries)], found, places, vectors[len(queries) :]))

    def _found(self, archive: _Archive) -> EvalResult:
        found = archive.measured(None)
        details: dict[str, Any] = {"documents": len(archive.documents)}
        if self.config.dimensions:
            details["dimensions"] = {str(size): archive.measured(size) for size in self.config.dimensions}
        return EvalResult(found, details=details)

    def read_beside(self) -> list[str]:
        return [] if self.config.corpus is None else self._documents()

    def baselines(self, data: Dataset) -> dict[str, EvalResult]:
        """BM25: what the words alone find."""
        if self.config.loss != "infonce":
            return {}
        right: dict[str, set[str]] = {}
        documents: dict[str, None] = {}
        for example in data:
            query, positive, *others = example["texts"]
            right.setdefault(query, set()).add(positive)
            documents.update(dict.fromkeys([positive, *others]))
        if self.config.corpus is not None:
            documents.update(dict.fromkeys(self._documents()))
        index = bm25.BM25([bm25.words(text) for text in documents])
        places = {text: place for place, text in enumerate(documents)}
        ranks = [
            _ranks(torch.from_numpy(index.scores(bm25.words(query)))[None], [[places[text] for text in texts]])[0]
            for query, texts in right.items()
        ]
        return {"bm25": EvalResult(metrics.retrieval(ranks))}

    def _documents(self) -> list[str]:
        """The texts of `task.corpus`.

        Raises:
            DataError: it cannot be read, or a row has no text.
        """
        if self._corpus is None:
            assert self.config.corpus is not None
            self._corpus = [
                text
                for file in sources.find("task.corpus", self.config.corpus, self._data.sample_by, self._data.field)
                for text in _texts_of(file, (self._data.columns or {}).get("positive"))
            ]
            for text in self._corpus:
                try:
                    self.encoder.tokens(text, "document")
                except RowError as error:
                    raise DataError(f"task.corpus={self.config.corpus}: {error}") from error
        return self._corpus

    def _vectors(self, model: PeftModel, rows: list[np.ndarray]) -> torch.Tensor:
        """[rows, D] on the CPU, of texts of tokens."""
        found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        lengths = [len(row) for row in rows]
        for group in of_like_length(lengths, max(1, self.eval_tokens // max([1, *lengths])), _ENOUGH_TOKENS):
            for part in [group] if self.forward.together else [[row] for row in group]:
                inputs = {name: one.to(model.device) for name, one in self.inputs([rows[row] for row in part]).items()}
                hidden = model(**inputs).last_hidden_state.float()
                vectors = pooling.pooled(hidden, inputs["attention_mask"], self.pooling.way).cpu()
                for row, vector in zip(part, vectors, strict=True):
                    found[row] = vector
        return torch.stack(found)

    # -- rows without a label -----------------------------------------------------------------------------------------

    def unlabelled(self, row: dict[str, Any]) -> dict[str, Any]:
        """`query`, or `document` or `text` (or both sides); of scored pairs `text_a` and `text_b`, or `text`. A side that is missing is
        filled with what the encoder wants to see."""
        first, second = ("query", "positive") if self.config.loss == "infonce" else ("text_a", "text_b")
        sides = self._sides_of(row)
        if not sides:
            raise RowError("empty", f"has the columns {', '.join(row)}; give {first}, document or text.")
        given = {first: sides.get("first", sides.get("second")), second: sides.get("second", sides.get("first"))}
        return given if self.config.loss == "infonce" else {**given, "score": 0.0}

    def _sides_of(self, row: dict[str, Any]) -> dict[str, Any]:
        """What a row gives, by side."""
        names = {"query": "first", "text_a": "first", "document": "second", "positive": "second", "text_b": "second"}
        found = {side: row[name] for name, side in names.items() if row.get(name) is not None}
        if "second" not in found and row.get("text") is not None:
            found["second"] = row["text"]
        return found

    @torch.no_grad()
    def predict(self, model: PeftModel, examples: list[Example]) -> list[tuple[float, dict[str, Any]]]:
        batch = self.collate(examples, np.random.default_rng(0)).to(model.device)
        firsts, seconds, _ = _sides(self.logits(model, batch).cpu(), len(examples))
        alike = losses.cosines(firsts, seconds).tolist()
        if self.pooling.normalizes:
            firsts, seconds = normalize(firsts, dim=-1), normalize(seconds, dim=-1)
        return [
            (1.0, {"first": one, "second": other, "similarity": cosine})
            for one, other, cosine in zip(firsts.tolist(), seconds.tolist(), alike, strict=True)
        ]

    def of_row(self, found: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        """`vector` of a row with one text; of one with two, `vector` and `other_vector` and their `similarity` (cosine)."""
        sides = self._sides_of(row)
        if len(sides) == 1:
            return {"vector": found[next(iter(sides))]}
        return {"vector": found["first"], "other_vector": found["second"], "similarity": found["similarity"]}

    # -- merged checkpoints -------------------------------------------------------------------------------------------

    def passes(self, example: Example) -> list[Pass]:
        return [Pass(self.inputs([ids]), None) for ids in self.encoder.sequences(example)]

    def compared(self, outputs: list[dict[str, torch.Tensor]], example: Example) -> torch.Tensor:
        """[texts, D] the vectors of a row's texts, of length 1."""
        hidden = [output["last_hidden_state"] for output in outputs]
        vectors = [
            pooling.pooled(one[None].float(), torch.ones(1, len(one), dtype=torch.int64), self.pooling.way)
            for one in hidden
        ]
        return normalize(torch.cat(vectors), dim=-1)

    def describe(self, folder: Path) -> None:
        """sentence-transformers' files, so that it loads the folder."""
        self.pooling.write(folder, int(self.model.get_text_config().hidden_size))


@dataclasses.dataclass(frozen=True)
class _Archive:
    """Queries, and documents among which each must find its own."""

    queries: torch.Tensor  # [Q, D]
    right: list[list[int]]  # for each query the places of its documents
    documents: dict[str, int]  # text -> place
    vectors: torch.Tensor  # [M, D]

    @classmethod
    def of(cls, rows: list[tuple[Example, torch.Tensor]]) -> _Archive:
        """All texts of held-out rows, each once.

        Args:
            rows: with the vectors [texts, D] of each.
        """
        queries: dict[str, torch.Tensor] = {}
        right: dict[str, dict[int, None]] = {}
        documents: dict[str, int] = {}
        vectors: list[torch.Tensor] = []
        for example, own in rows:
            query, *texts = example["texts"]
            queries.setdefault(query, own[0])
            for text, vector in zip(texts, own[1:], strict=True):
                if text not in documents:
                    documents[text] = len(vectors)
                    vectors.append(vector)
            right.setdefault(query, {})[documents[texts[0]]] = None
        places = [list(own) for own in right.values()]
        return cls(torch.stack([*queries.values()]), places, documents, torch.stack(vectors))

    def measured(self, size: int | None) -> dict[str, float]:
        """Metrics of the cosines of vectors, or of their first so many numbers."""
        documents = normalize(self.vectors[:, :size], dim=-1)
        ranks = []
        for start in range(0, len(self.queries), _QUERIES):
            asked = normalize(self.queries[start : start + _QUERIES, :size], dim=-1)
            ranks += _ranks(asked @ documents.T, self.right[start : start + _QUERIES])
        return metrics.retrieval(ranks)


def _ranks(scores: torch.Tensor, right: list[list[int]]) -> list[list[int]]:
    """The places of the right documents [Q, ...] among all, from 1 on, by scores [Q, M]; of equal ones those that are not right come
    first."""
    found = []
    for own, places in zip(scores, right, strict=True):
        wrong = torch.ones(len(own), dtype=torch.bool)
        wrong[places] = False
        ordered = own[places].sort(descending=True).values
        found.append([int((own[wrong] >= score).sum()) + number for number, score in enumerate(ordered.tolist(), 1)])
    return found


def _row_after_row(batch: TextsBatch) -> list[int]:
    """Where the texts of each row stand among all, one row behind the other."""
    return [text for row in range(len(batch.targets)) for text in batch.texts_of(row)]


def _sides(texts: Any, count: int) -> tuple[Any, Any, Any]:
    """What is of the first texts of a batch, of the second ones, and of the negatives."""
    return texts[:count], texts[count : 2 * count], texts[2 * count :]


def _texts_of(file: sources.DataFile | sources.HubData, named: str | None) -> Iterable[str]:
    """The document of each row.

    Args:
        named: what the column of documents is called among the rows that are trained on.

    Raises:
        DataError: a row cannot be read, or has no text.
    """
    for row in file.rows():
        if row.problem is not None:
            raise DataError(f"task.corpus: {file.name} row {row.number}: {row.problem}")
        text = next((row.values[name] for name in (named, "document", "positive", "text") if name in row.values), None)
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"task.corpus: {file.name} row {row.number}: has the columns {', '.join(row.values)}; each row needs a text in "
                "document, positive or text, or in what data.columns calls positive."
            )
        yield text


def _reads_forward_only(config: PretrainedConfig) -> bool:
    """Whether a model sees of a text only what comes before each token."""
    import transformers

    return type(config) not in transformers.AutoModelForMaskedLM._model_mapping
