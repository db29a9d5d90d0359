"""Give a query and a document read together a score that is higher for documents that answer the query."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.nn.utils.rnn import pad_sequence

from lora_lab.base.tokenizer import decode
from lora_lab.config.data import DataConfig
from lora_lab.config.run import RunConfig
from lora_lab.data.chat import ChatEncoder
from lora_lab.data.collate import PaddedBatch
from lora_lab.data.columns import TEXTS, TOKENS
from lora_lab.data.dataset import Dataset
from lora_lab.data.encode import Encoded, Encoder, Example, Told
from lora_lab.data.formats import Message, Record, RowError, promised
from lora_lab.errors import BaseModelError, ConfigError
from lora_lab.tasks import bm25, metrics
from lora_lab.tasks.base import (
    TRIED_TOKENS,
    EvalResult,
    LossSum,
    PaddedTask,
    Pass,
    Predictions,
    another,
    is_encoder,
    logits_at,
)
from lora_lab.tasks.embedding.looks import look
from lora_lab.tasks.metrics import reports
from lora_lab.tasks.reranker.config import RerankerConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class CandidatesEncoder(Encoder):
    """The query beside each document of its row, as pairs of texts: what should be found first."""

    kept_together = "document"

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The tokens of the pairs behind the first, end to end, and how many each has; where each pair's document begins; the query and
        all documents; the one that should be found."""
        return {
            "other_ids": TOKENS,
            "other_lengths": TOKENS,
            "starts": TOKENS,
            "texts": TEXTS,
            "document": pa.string(),
        }

    def shown(self, example: Example) -> str:
        return " | not: ".join(example["texts"][1:])

    def findings(self, train: Dataset | None, held_out: Dataset | None) -> list[Told]:
        return look(train, held_out)

    def sequences(self, example: Example) -> list[np.ndarray]:
        if not len(example["other_lengths"]):
            return [example.input_ids]
        return [example.input_ids, *np.split(example["other_ids"], np.cumsum(example["other_lengths"])[:-1])]

    def example(self, record: Record, origin: str) -> Encoded:
        query, positive, *negatives = (
            self.cleaned(text) for text in (promised(record.text), promised(record.pair), *record.label)
        )
        if not negatives:
            raise RowError(
                "label",
                "the row has no negatives, so its document cannot be told from any other. Give some in 'negatives', such as what a search "
                "finds beside it.",
            )
        if positive in negatives:
            raise RowError("label", "a negative is the positive after cleaning. Remove it.")
        found = [self._pair(query, document) for document in (positive, *negatives)]
        (ids, _, _), *others = found
        own = {
            "other_ids": np.concatenate([one for one, _, _ in others]),
            "other_lengths": [len(one) for one, _, _ in others],
            "starts": [start for _, start, _ in found],
            "texts": [query, positive, *negatives],
            "document": positive,
        }
        cut = any(truncated for *_, truncated in found)
        return Encoded([Example(ids, np.zeros(len(ids), dtype=np.float32), origin, own)], cut)

    def _pair(self, query: str, document: str) -> tuple[np.ndarray, int, bool]:
        """Tokens, where the document begins (0: nowhere in particular), and whether its end was cut off."""
        found, limit = self.tokenizer(query, document, verbose=False), self.config.max_tokens
        cut = self._must_be_cut(len(found["input_ids"]))
        if cut:
            queried = len(self.tokenizer(query, verbose=False)["input_ids"])
            if queried >= limit:
                raise self._no_room(queried)
            found = self.tokenizer(query, document, truncation="only_second", max_length=limit, verbose=False)
        return np.asarray(found["input_ids"], dtype=np.int64), found.sequence_ids().index(1), cut

    def _must_be_cut(self, count: int) -> bool:
        """Whether so many tokens are too many.

        Raises:
            RowError: they are, and nothing may be cut.
        """
        if count <= self.config.max_tokens:
            return False
        if self.config.too_long == "truncate_prompt":
            return True
        raise self.too_long(
            count,
            "Raise data.max_tokens, or choose data.too_long=drop or truncate_prompt, which cuts the document's end off.",
        )

    def _no_room(self, queried: int) -> RowError:
        return RowError(
            "query",
            f"the query alone has {queried} tokens, and data.max_tokens={self.config.max_tokens}. Raise that, or remove the row.",
        )


_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "{yes}" or "{no}".'
)
_USER = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"


class QuestionEncoder(CandidatesEncoder):
    """The query and each document of its row in a question that is answered with yes or no, as Qwen3-Reranker is asked
    (arXiv:2506.05176), rendered by the base's own chat template up to where the answer begins."""

    task: RerankerConfig
    templated = True
    task_options = ("score", "yes_word", "no_word", "instruction")

    def __init__(
        self,
        config: DataConfig,
        task: RerankerConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int | None = None,
    ):
        """
        Raises:
            BaseModelError: the base has no chat template.
            ConfigError: yes or no is not one token.
        """
        super().__init__(config, task, tokenizer, vocab_size)
        if tokenizer.chat_template is None:
            raise BaseModelError(
                "task.score=yes_no: the base has no chat template, in which it would be asked. Use a base that was made for chats, or "
                "task.score=head."
            )
        self.rendering = ChatEncoder(config, task, tokenizer, vocab_size)
        self.answers = self._answer("yes_word"), self._answer("no_word")
        if len(set(self.answers)) == 1:
            raise ConfigError(
                f"task.no_word={task.no_word}: is the same token as task.yes_word={task.yes_word}. Name two answers."
            )

    def _answer(self, name: str) -> int:
        """The token of an answer."""
        text = getattr(self.task, name)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1:
            parts = self.tokenizer.convert_ids_to_tokens(ids)
            raise ConfigError(
                f"task.{name}={text}: becomes {len(ids)} tokens ({', '.join(parts)}), and an answer is one. Choose a word that the base's "
                "tokenizer has."
            )
        return int(ids[0])

    def _pair(self, query: str, document: str) -> tuple[np.ndarray, int, bool]:
        ids = self._asked(query, document)
        cut = self._must_be_cut(len(ids))
        left = self.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] if cut else []
        while len(ids) > self.config.max_tokens:
            excess = len(ids) - self.config.max_tokens
            if excess >= len(left):
                raise self._no_room(len(ids) - len(left))
            left = left[:-excess]
            ids = self._asked(query, decode(self.tokenizer, left).rstrip("\ufffd"))  # a cut character is none
        return ids, 0, cut

    def _asked(self, query: str, document: str) -> np.ndarray:
        system = _SYSTEM.format(yes=self.task.yes_word, no=self.task.no_word)
        user = _USER.format(instruction=self.task.instruction, query=query, document=document)
        messages: list[Message] = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = self.rendering.template.text(messages, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class CandidatesBatch(PaddedBatch):
    """The pairs of some rows, one row behind the other, in each what should be found first. An item is a row."""

    counts: list[int]  # pairs of each row


class Reranker(PaddedTask[RerankerConfig, CandidatesBatch]):
    """`task=reranker`."""

    encoder_class: ClassVar[type[Encoder]] = CandidatesEncoder
    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    head: ClassVar[Literal["none", "always", "missing"]] = "always"
    one_place = True

    @classmethod
    def settings(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, learned: dict[str, Any]) -> dict[str, Any]:
        return {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}

    def collate(self, examples: list[Example], rng: np.random.Generator) -> CandidatesBatch:
        pairs = [self.encoder.sequences(example) for example in examples]
        rows = [ids for own in pairs for ids in own]
        return CandidatesBatch(
            inputs=self.inputs(rows, [int(start) for example in examples for start in example["starts"]]),
            lengths=[len(row) for row in rows],
            places=None,
            targets=torch.zeros(len(examples), dtype=torch.int64),
            weights=None,
            origins=[example.origin for example in examples],
            counts=[len(own) for own in pairs],
        )

    def shortened(self, example: Example) -> Example:
        pairs = self.encoder.sequences(example)
        cuts = np.array([max(0, len(ids) - TRIED_TOKENS) for ids in pairs])
        first, *others = (ids[cut:] for ids, cut in zip(pairs, cuts, strict=True))
        own = {
            **example.own,
            "other_ids": np.concatenate([example["other_ids"][:0], *others]),
            "other_lengths": np.array([len(ids) for ids in others]),
            "starts": np.maximum(example["starts"] - cuts, 0),
        }
        weights = example.weights[cuts[0] :]
        return dataclasses.replace(example, input_ids=first, weights=weights, own=own, own_tokens=sum(map(len, others)))

    def loss(self, model: PeftModel, batch: CandidatesBatch, rdrop_alpha: float | None = None) -> LossSum:
        logits = self.logits(model, batch)
        each = _binary if self.config.loss == "binary" else _listwise
        return LossSum(each(logits[:, 0], batch.counts).sum(), batch.weight, len(batch.targets), logits.detach())

    explains = "score of the right document"

    def explained(self, model: PeftModel, batch: CandidatesBatch) -> torch.Tensor:
        return torch.stack([own[0] for own in self.logits(model, batch)[:, 0].split(batch.counts)]).sum()

    def observed(self, examples: list[Example], logits: torch.Tensor, batch: CandidatesBatch) -> Predictions:
        return Predictions(examples, logits.cpu(), np.zeros(len(examples)), batch.targets.cpu().numpy())

    @reports(metrics.retrieval, lower=("loss",))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        """Where each row's document comes among those of its row; of equal scores the wrong one comes first."""
        ranks = []
        for one in seen:
            counts = [len(example["texts"]) - 1 for example in one.examples]
            ranks += [_rank(scores.numpy()) for scores in one.logits[:, 0].split(counts)]
        return EvalResult({"loss": loss, **metrics.retrieval(ranks)})

    def baselines(self, data: Dataset) -> dict[str, EvalResult]:
        """BM25 on the same candidates."""
        texts = [example["texts"] for example in data]
        documents = list(dict.fromkeys(text for own in texts for text in own[1:]))
        index, places = bm25.BM25([bm25.words(text) for text in documents]), {t: n for n, t in enumerate(documents)}
        ranks = [
            _rank(index.scores(bm25.words(query))[[places[text] for text in candidates]])
            for query, *candidates in texts
        ]
        return {"bm25": EvalResult(metrics.retrieval(ranks))}

    def unlabelled(self, row: dict[str, Any]) -> dict[str, Any]:
        """`query` and `document`, beside another that the encoder wants to see."""
        document = row.get("document", row.get("positive"))
        if row.get("query") is None or document is None:
            raise RowError("empty", f"has the columns {', '.join(row)}; give query and document.")
        return {"query": row["query"], "positive": document, "negatives": [another(document)]}

    def without_label(self, example: Example) -> Example:
        """The first pair alone."""
        own = {
            **example.own,
            "other_ids": example["other_ids"][:0],
            "other_lengths": example["other_lengths"][:0],
            "starts": example["starts"][:1],
            "texts": example["texts"][:2],
        }
        return dataclasses.replace(example, own=own, own_tokens=0)

    @torch.no_grad()
    def predict(self, model: PeftModel, examples: list[Example]) -> list[tuple[float, dict[str, Any]]]:
        """`score`: higher for a document that answers the query better; only scores for one query compare."""
        batch = self.collate(examples, np.random.default_rng(0)).to(model.device)
        scores = self.logits(model, batch)[:, 0].split(batch.counts)
        return [(1.0, {"score": own[0].item()}) for own in scores]

    def passes(self, example: Example) -> list[Pass]:
        return [
            Pass(self.inputs([ids], [int(start)]), None)
            for ids, start in zip(self.encoder.sequences(example), example["starts"], strict=True)
        ]

    def compared_targets(self, example: Example) -> torch.Tensor:
        """[pairs] 1 for what should be found, 0 for the others."""
        return torch.tensor([1.0, *(0.0 for _ in example["texts"][2:])])

    def compared(self, outputs: list[dict[str, torch.Tensor]], example: Example) -> torch.Tensor:
        return torch.stack([output["logits"] for output in outputs])


class YesNoReranker(Reranker):
    """`task=reranker` with `task.score=yes_no`: a score is the log-odds of a decoder's next token being yes rather than no."""

    encoder_class = QuestionEncoder
    encoder: QuestionEncoder
    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    head = "none"
    one_place = False

    @classmethod
    def check_base(cls, config: PretrainedConfig) -> None:
        if is_encoder(config):
            raise BaseModelError(
                f"task.score=yes_no: {config.model_type} is no decoder, and says no next token. Leave it out: task.score=head."
            )
        super().check_base(config)

    @classmethod
    def settings(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, learned: dict[str, Any]) -> dict[str, Any]:
        return {}

    def logits(self, model: PeftModel, batch: CandidatesBatch) -> torch.Tensor:
        """[pairs, 1] float32; the output layer reads the last token of each pair alone."""
        last = torch.tensor(batch.lengths, device=model.device) - 1
        found = logits_at(model, batch.inputs, (torch.arange(len(last), device=model.device), last))
        yes, no = self.encoder.answers
        return found[:, yes, None] - found[:, no, None]

    def passes(self, example: Example) -> list[Pass]:
        """Of the right document, of which checkpoints must say the same as any language models."""
        ids = example.input_ids
        return [Pass({"input_ids": torch.from_numpy(ids)[None]}, torch.tensor([len(ids) - 1]))]

    def compared_targets(self, example: Example) -> torch.Tensor:
        """[1] yes."""
        return torch.tensor(self.encoder.answers[:1])

    def compared(self, outputs: list[dict[str, torch.Tensor]], example: Example) -> torch.Tensor:
        return outputs[0]["logits"]


def _listwise(scores: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[rows] how badly the first of each row's scores is told from the others."""
    table = pad_sequence(list(scores.split(counts)), batch_first=True, padding_value=float("-inf"))
    return cross_entropy(table, torch.zeros(len(counts), dtype=torch.int64, device=scores.device), reduction="none")


def _binary(scores: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """[rows] the mean over each row's scores of how badly they say that the first is right and the others are wrong."""
    found = []
    for own in scores.split(counts):
        right = torch.zeros_like(own)
        right[0] = 1
        found.append(binary_cross_entropy_with_logits(own, right))
    return torch.stack(found)


def _rank(scores: np.ndarray) -> list[int]:
    """The place of the first among all, from 1 on."""
    return [1 + int((scores[1:] >= scores[0]).sum())]
