"""From rows to examples: token ids, what is to be learned from each, and what becomes of every row that cannot be used.

What an example is depends on the task: each names a subclass of `Encoder`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias

import numpy as np
import pyarrow as pa

from lora_lab.config.data import DataConfig
from lora_lab.data import formats, personal
from lora_lab.data.augment import AugmentConfig, Augmenter
from lora_lab.data.clean import MASKS, clean
from lora_lab.data.columns import typed
from lora_lab.data.formats import Message, Record, RowError
from lora_lab.data.marks import marks_of
from lora_lab.data.sources import Row
from lora_lab.tasks.section import TaskSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_lab.data.dataset import Dataset

TOO_LONG = "too long"
Told: TypeAlias = tuple[Literal["error", "warning", "note"], str, str]  # how bad, of which key, and the sentence


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One training example as the model sees it: what all tasks have, and what its own task reads, `example["labels"]`."""

    input_ids: np.ndarray  # [T] int64
    weights: np.ndarray  # [T] float32: how much each token counts in the loss; 0: not trained on
    origin: str  # 'orders.jsonl row 3', counted from 1; for messages to the user
    own: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # the task's: a value for each of its encoder's `columns`
    own_tokens: int = 0  # that the model reads beside `input_ids`
    own_items: int = 0  # how many things are learned from them
    copy: int = 0  # 0: the row itself; else a changed copy of it (data.augment)

    def __getitem__(self, column: str) -> Any:
        """A value of the task's own."""
        return self.own[column]

    @property
    def supervised(self) -> np.ndarray:
        """[T] bool: this token is a target."""
        return self.weights > 0

    @property
    def num_items(self) -> int:
        """How many things are learned from it: tokens, or the row as a whole."""
        return int(self.supervised.sum()) + self.own_items or 1

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.input_ids) + self.own_tokens

    @property
    def messages(self) -> list[Message]:
        """The conversation that it was made from; empty for plain text and where the task keeps none."""
        return self.own.get("messages") or []

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """What the conversation may call."""
        return self.own.get("tools")


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
    templated = False  # it encodes no conversations, but renders its texts by the chat template all the same
    blocks = False  # short rows are put together up to data.max_tokens
    task_options: ClassVar[tuple[str, ...]] = ()  # fields of the task's section that decide what an example is
    kept_together: ClassVar[str | None] = None  # of its own columns: rows that are equal there are held out together
    token_columns: ClassVar[tuple[str, ...]] = ()  # of its own columns, those of token ids that the model reads too

    def __init__(
        self, config: DataConfig, task: TaskSection, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
    ):
        """`vocab_size`: rows of the model's embedding, which no token id may reach."""
        self.config, self.task, self.tokenizer, self.vocab_size = config, task, tokenizer, vocab_size
        self.augmenter = Augmenter(config.augment) if config.augment.methods else None
        self.marks = marks_of(tokenizer)

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The task's own columns: what an example has beside tokens and weights, by name, each in the type that it is kept as.

        `Example.own` has a value for each of them, which is what `lora_lab.data.columns` says of its type: numbers are never
        text, and what `collate` reads is never JSON. Whatever is no text, such as a picture or a sound, is a column of paths:
        the file is opened in `collate`, and nothing but its name is in the table.
        """
        return {}

    def shown(self, example: Example) -> str:
        """What is learned of an example that is no token of its text, for people: its label, its tags, its answer."""
        return ""

    @property
    def day(self) -> str | None:
        """The day whose date is in its texts: on another they are encoded anew; None: no text has it."""
        return None

    def findings(self, train: Dataset | None, held_out: Dataset | None) -> list[Told]:
        """What `lora-lab data` should say of rows that only the task can see."""
        return []

    def sequences(self, example: Example) -> list[np.ndarray]:
        """All token ids that the model reads, each sequence for itself."""
        further = (example.own.get(column) for column in self.token_columns)
        return [example.input_ids, *(ids for ids in further if ids is not None)]

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
        outcomes: dict[int, Outcome] = {}  # by place
        waiting: list[tuple[int, int, Record]] = []  # (place, digest, record)
        for place, row in enumerate(rows):
            try:
                if row.problem:
                    raise RowError("unreadable", row.problem)
                record = self.bare(formats.read(row.values, format_name, self.config.label_names))
                record = _masked(record) if MASKS in self.config.clean else record
                waiting.append((place, _digest(record), record))
            except RowError as error:
                outcomes[place] = Outcome(row.number, problem=error.kind, sentence=str(error))
        origins = [f"{name} row {rows[place].number}" for place, _, _ in waiting]
        found = self._completed([record for _, _, record in waiting], origins)
        for (place, digest, record), one in zip(waiting, found, strict=True):
            outcome = self._outcome(rows[place].number, record.label, digest, one)
            unread = [name for name in formats.unread(rows[place].values, format_name) if name != self.config.stratify]
            outcomes[place] = dataclasses.replace(outcome, unread=tuple(unread), notes=record.notes)
        if self.augmenter is not None:
            self._add_copies(self.augmenter, outcomes, waiting, origins)
        return [outcomes[place] for place in range(len(rows))]

    def _outcome(self, row: int, label: Any, digest: int, found: Encoded | RowError) -> Outcome:
        if isinstance(found, RowError):
            return Outcome(row, problem=found.kind, sentence=str(found), label=label, digest=digest)
        return Outcome(row, found.examples, None, "", found.truncated, found.cut_at_border, label, digest)

    def _completed(self, records: list[Record], origins: list[str]) -> list[Encoded | RowError]:
        """`examples`, each as it will come back from a file: rows that are read as they are needed give the same."""
        found: list[Encoded | RowError] = []
        kinds = self.columns
        for one in self.examples(records, origins):
            try:
                if isinstance(one, RowError):
                    raise one
                found.append(
                    dataclasses.replace(one, examples=[self._whole(example, kinds) for example in one.examples])
                )
            except RowError as error:
                found.append(error)
        return found

    def _whole(self, example: Example, kinds: dict[str, pa.DataType]) -> Example:
        """The example with its own values typed, and its own tokens counted.

        Raises:
            RowError: a token is none of the model's.
        """
        assert example.own.keys() == kinds.keys(), f"{type(self).__name__}: {[*example.own]} are not {[*kinds]}"
        own = {name: typed(example[name], kind) for name, kind in kinds.items()}
        example = dataclasses.replace(example, own=own)
        sequences = self.sequences(example)
        self._check_vocabulary(sequences)
        if len(sequences) == 1:
            return example
        return dataclasses.replace(example, own_tokens=sum(map(len, sequences[1:])))

    def _check_vocabulary(self, sequences: list[np.ndarray]) -> None:
        highest = max((int(ids.max()) for ids in sequences if len(ids)), default=0)
        if self.vocab_size is not None and highest >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise RowError(
                "vocabulary",
                f"token {token!r} has id {highest}, and the model's embedding has {self.vocab_size} rows: the tokenizer does "
                "not belong to this model, or the model must be resized first.",
            )

    def _add_copies(
        self,
        augmenter: Augmenter,
        outcomes: dict[int, Outcome],
        waiting: list[tuple[int, int, Record]],
        origins: list[str],
    ) -> None:
        """Changed copies of the usable rows (`data.augment`) become further examples of theirs; one that cannot be used is
        left out."""
        usable = [i for i, (place, _, _) in enumerate(waiting) if outcomes[place].problem is None]
        copies = augmenter.copies([_input(waiting[i][2]) for i in usable], [waiting[i][1] for i in usable])
        for i, texts in zip(usable, copies, strict=True):
            place, _, record = waiting[i]
            found = self._completed([_with_input(record, text) for text in texts], [origins[i]] * len(texts))
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


def _masked(record: Record) -> Record:
    """The record without personal data in what is to be answered; what is given is masked as it is cleaned."""

    def answers(messages: list[Message] | None) -> list[Message] | None:
        if messages is None:
            return None
        return [personal.masked_within(one)[0] if one["role"] == "assistant" else one for one in messages]

    target = None if record.target is None else personal.masked(record.target)[0]
    return dataclasses.replace(
        record, messages=answers(record.messages), rejected=answers(record.rejected), target=target
    )


def _digest(record: Record) -> int:
    return int.from_bytes(
        hashlib.blake2b(record.canonical().encode("utf-8", "replace"), digest_size=8).digest(), "little"
    )


def _input(record: Record) -> str:
    """The text of a record that may be changed: what the model is given, never what it is to answer."""
    if record.text is not None:
        return record.text
    return next((m["content"] for m in reversed(formats.promised(record.messages)) if m["role"] == "user"), "")


def _with_input(record: Record, text: str) -> Record:
    """The record with another such text."""
    old, messages = _input(record), record.messages
    if messages is not None:
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        messages = [
            {**m, "content": m["content"].replace(old, text, 1)} if i == last else m for i, m in enumerate(messages)
        ]
    return dataclasses.replace(record, messages=messages, text=None if record.text is None else text)
