"""From rows to examples: token ids, what is to be learned from each, and what becomes of every row that cannot be used.

What an example is depends on the task: each names a subclass of `Encoder`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from lora_lab.config.data import DataConfig
from lora_lab.data import formats
from lora_lab.data.augment import AugmentConfig, Augmenter
from lora_lab.data.clean import clean
from lora_lab.data.formats import Message, Record, RowError
from lora_lab.data.marks import marks_of
from lora_lab.data.sources import Row
from lora_lab.tasks.section import TaskSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "too long"


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One training example as the model sees it. Which of the later fields there are depends on the task."""

    input_ids: np.ndarray  # [T] int64
    weights: np.ndarray  # [T] float32: how much each token counts in the loss; 0: not trained on
    origin: str  # 'orders.jsonl row 3', counted from 1; for messages to the user
    content: str = ""  # JSON of what the tokens were made from; a conversation has {"messages", "tools"}
    labels: tuple[str, ...] = ()  # of the row, or of each token that is trained on
    pair_start: int = 0  # where the second text begins; 0: there is one text
    second_ids: np.ndarray | None = None  # [U] int64: the worse answer, or the target of a sequence-to-sequence model
    second_weights: np.ndarray | None = None  # [U] float32
    copy: int = 0  # 0: the row itself; else a changed copy of it (data.augment)

    @property
    def supervised(self) -> np.ndarray:
        """[T] bool: this token is a target."""
        return self.weights > 0

    @property
    def num_items(self) -> int:
        """How many things are learned from it: tokens, or the row as a whole."""
        tokens = int(self.supervised.sum())
        if self.second_weights is not None:
            tokens += int((self.second_weights > 0).sum())
        return tokens or 1

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.input_ids) + (0 if self.second_ids is None else len(self.second_ids))

    @property
    def fields(self) -> dict[str, Any]:
        """What the tokens were made from; empty for plain text."""
        return json.loads(self.content) if self.content else {}

    @property
    def messages(self) -> list[Message]:
        return self.fields.get("messages", [])

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        return self.fields.get("tools")


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A row that can be used."""

    examples: list[Example]
    truncated: bool = False
    cut_at_border: bool = False  # prompt and answer are tokenized apart


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one row: its examples, or the kind of problem that keeps it from being used."""

    row: int
    examples: list[Example] = dataclasses.field(default_factory=list)
    problem: str | None = None  # kind: 'too long', 'empty', 'masked', 'role', ...
    sentence: str = ""
    truncated: bool = False
    cut_at_border: bool = False
    label: Any = None
    digest: int = 0  # of the row's content, 64 bits: equal rows have equal digests
    unread: tuple[str, ...] = ()  # columns that are never read
    notes: tuple[str, ...] = ()  # how the row was read, where that is worth saying


class Encoder:
    """Encodes rows by one configuration, with one tokenizer."""

    chat = False  # it renders conversations
    blocks = False  # short rows are put together up to data.max_tokens
    task_options: ClassVar[tuple[str, ...]] = ()  # fields of the task's section that decide what an example is

    def __init__(
        self, config: DataConfig, task: TaskSection, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
    ):
        """`vocab_size`: rows of the model's embedding, which no token id may reach."""
        self.config, self.task, self.tokenizer, self.vocab_size = config, task, tokenizer, vocab_size
        self.augmenter = Augmenter(config.augment) if config.augment.methods else None
        self.marks = marks_of(tokenizer)

    def examples(self, records: list[Record], origins: list[str]) -> list[Encoded | RowError]:
        """What each record is to the model, or why it cannot be used."""
        return [self._one(record, origin) for record, origin in zip(records, origins, strict=True)]

    def example(self, record: Record, origin: str) -> Encoded:
        """The same for one record, where nothing is gained by tokenizing many together.

        Raises:
            RowError: it cannot be used.
        """
        raise NotImplementedError

    def _one(self, record: Record, origin: str) -> Encoded | RowError:
        try:
            return self.example(record, origin)
        except RowError as error:
            return error

    def for_held_out(self) -> Self:
        """The encoder of held-out rows, of which there are no changed copies."""
        if self.augmenter is None:
            return self
        plain = dataclasses.replace(self.config, augment=AugmentConfig())
        return type(self)(plain, self.task, self.tokenizer, self.vocab_size)

    def encode(self, rows: Sequence[Row], name: str, format_name: str) -> list[Outcome]:
        """Encode some rows together.

        Args:
            name: of the file, for messages.
            format_name: a key of `formats.FORMATS`.
        """
        outcomes: list[Outcome | None] = [None] * len(rows)
        waiting: list[tuple[int, int, Record]] = []  # (place, digest, record)
        for place, row in enumerate(rows):
            try:
                if row.problem:
                    raise RowError("unreadable", row.problem)
                record = self.bare(formats.read(row.values, format_name, self.config.label_names))
                waiting.append((place, _digest(record), record))
            except RowError as error:
                outcomes[place] = Outcome(row.number, problem=error.kind, sentence=str(error))
        origins = [f"{name} row {rows[place].number}" for place, _, _ in waiting]
        found = self.examples([record for _, _, record in waiting], origins)
        for (place, digest, record), one in zip(waiting, found, strict=True):
            outcome = self._outcome(rows[place].number, record.label, digest, one)
            unread = [name for name in formats.unread(rows[place].values, format_name) if name != self.config.stratify]
            outcomes[place] = dataclasses.replace(outcome, unread=tuple(unread), notes=record.notes)
        if self.augmenter is not None:
            self._add_copies(outcomes, waiting, origins)
        return outcomes

    def _outcome(self, row: int, label: Any, digest: int, found: Encoded | RowError) -> Outcome:
        try:
            if isinstance(found, RowError):
                raise found
            for example in found.examples:
                self._check_vocabulary(example)
        except RowError as error:
            return Outcome(row, problem=error.kind, sentence=str(error), label=label, digest=digest)
        return Outcome(row, found.examples, None, "", found.truncated, found.cut_at_border, label, digest)

    def _check_vocabulary(self, example: Example) -> None:
        highest = max(
            (int(ids.max()) for ids in (example.input_ids, example.second_ids) if ids is not None and len(ids)),
            default=0,
        )
        if self.vocab_size is not None and highest >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise RowError(
                "vocabulary",
                f"token {token!r} has id {highest}, and the model's embedding has {self.vocab_size} rows: the tokenizer does "
                "not belong to this model, or the model must be resized first.",
            )

    def _add_copies(self, outcomes: list[Outcome], waiting: list[tuple[int, int, Record]], origins: list[str]) -> None:
        """Changed copies of the usable rows (`data.augment`) become further examples of theirs; one that cannot be used is
        left out."""
        usable = [i for i, (place, _, _) in enumerate(waiting) if outcomes[place].problem is None]
        copies = self.augmenter.copies([_input(waiting[i][2]) for i in usable], [waiting[i][1] for i in usable])
        for i, texts in zip(usable, copies, strict=True):
            place, _, record = waiting[i]
            found = self.examples([_with_input(record, text) for text in texts], [origins[i]] * len(texts))
            good = [one for one in found if isinstance(one, Encoded)]
            outcomes[place].examples.extend(
                dataclasses.replace(example, copy=number)
                for number, one in enumerate(good, start=1)
                for example in one.examples
            )

    def cleaned(self, text: str) -> str:
        """A text after `data.clean`, without marks that the tokenizer puts around it anyway.

        Raises:
            RowError: nothing is left.
        """
        text = self.unmarked(text)
        if not self.config.clean:
            return text
        text = clean(text, self.config.clean, self.config.clean_language)
        if not text.strip():
            raise RowError("empty", "nothing is left of the text after cleaning.")
        return text

    def unmarked(self, text: str) -> str:
        """A text without the marks that it brings itself and that the tokenizer puts around every text: each stands there once.

        Raises:
            RowError: nothing is left.
        """
        bare = self.marks.without(text)
        if bare != text and not bare.strip():
            raise RowError("empty", "the text is nothing but the tokenizer's own marks. Remove the row.")
        return bare

    def bare(self, record: Record) -> Record:
        """A record without such marks, for a task whose labels belong to places of the text and move with it.

        Raises:
            RowError: nothing is left.
        """
        return record

    def too_long(self, count: int, way_out: str) -> RowError:
        """Why a row of `count` tokens cannot be used."""
        return RowError(TOO_LONG, f"{count} tokens, more than data.max_tokens={self.config.max_tokens}. {way_out}")


def _digest(record: Record) -> int:
    return int.from_bytes(
        hashlib.blake2b(record.canonical().encode("utf-8", "replace"), digest_size=8).digest(), "little"
    )


def _input(record: Record) -> str:
    """The text of a record that may be changed: what the model is given, never what it is to answer."""
    if record.text is not None:
        return record.text
    return next((m["content"] for m in reversed(record.messages) if m["role"] == "user"), "")


def _with_input(record: Record, text: str) -> Record:
    """The record with another such text."""
    old, messages = _input(record), record.messages
    if messages is not None:
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        messages = [
            {**m, "content": m["content"].replace(old, text, 1)} if i == last else m for i, m in enumerate(messages)
        ]
    return dataclasses.replace(record, messages=messages, text=None if record.text is None else text)


def to_json(value: Any) -> str:
    """JSON in which every language can be read."""
    return json.dumps(value, ensure_ascii=False)
