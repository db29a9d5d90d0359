"""From rows to token ids and an exact weight for each token: what is trained on, and what becomes of every other row."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lab.config import DataConfig
from lora_lab.data import formats
from lora_lab.data.clean import clean
from lora_lab.data.formats import Message, Record, RowError
from lora_lab.data.sources import Row
from lora_lab.data.template import ChatTemplate, Rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "too long"


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One training example as the model sees it."""

    input_ids: np.ndarray  # [T] int64
    weights: np.ndarray  # [T] float32: how much each token counts in the loss; 0: not trained on (always so the first)
    origin: str  # 'orders.jsonl row 3', counted from 1; for messages to the user
    conversation: str = ""  # JSON of {"messages", "tools"}: what the text was rendered from; '' for plain text

    @property
    def supervised(self) -> np.ndarray:
        """[T] bool: this token is a target."""
        return self.weights > 0

    @property
    def messages(self) -> list[Message]:
        return json.loads(self.conversation)["messages"] if self.conversation else []

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        return json.loads(self.conversation)["tools"] if self.conversation else None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one row: its examples, or the kind of problem that keeps it from being used."""

    row: int
    examples: list[Example] = dataclasses.field(default_factory=list)
    problem: str | None = None  # kind: 'too long', 'empty', 'masked', 'role', ...
    sentence: str = ""
    truncated: bool = False
    cut_at_border: bool = False  # prompt and answer are tokenized apart
    label: Any = None
    digest: int = 0  # of the row's content, 64 bits: equal rows have equal digests


class Encoder:
    """Encodes rows by one configuration, with one tokenizer."""

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None):
        """`vocab_size`: rows of the model's embedding, which no token id may reach."""
        self.config = config
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, config.chat_template_kwargs)
        self.vocab_size = vocab_size
        self._alone = functools.lru_cache(maxsize=4096)(self._ids_alone)
        self._special_ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    def encode(self, rows: Sequence[Row], name: str, format_name: str) -> list[Outcome]:
        """Encode some rows together; texts are tokenized on all cores.

        Args:
            name: of the file, for messages.
            format_name: a key of `formats.FORMATS`.
        """
        outcomes: list[Outcome | None] = []
        waiting: list[tuple[int, Record, int, list[Rendered]]] = []  # (place, record, digest, renderings)
        for place, row in enumerate(rows):
            outcomes.append(None)
            digest = 0
            try:
                if row.problem:
                    raise RowError("unreadable", row.problem)
                record = formats.read(row.values, format_name, self.config.label_names)
                digest = _digest(record)
                waiting.append((place, record, digest, self._rendered(record)))
            except RowError as error:
                outcomes[place] = Outcome(row.number, problem=error.kind, sentence=str(error), digest=digest)
        texts = [rendered for _, _, _, renderings in waiting for rendered in renderings]
        tokenized = iter(self._tokenized(texts))
        for place, record, digest, renderings in waiting:
            parts = [next(tokenized) for _ in renderings]
            outcomes[place] = self._outcome(rows[place].number, name, record, digest, parts)
        return outcomes

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """What the model is given to answer a conversation that was typed, not read from rows."""
        return self.template.text(cleaned(messages, self.config), tools, add_generation_prompt=True)

    def end_tokens(self) -> list[int]:
        """Ids that end an answer: the token that training puts there, and the end of sequence."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        [found] = self._tokenized(self.template.examples(Record(messages=probe), "answers"))
        if isinstance(found, RowError):
            return [self.tokenizer.eos_token_id]
        [tokens] = found
        return sorted({self.tokenizer.eos_token_id, int(tokens.ids[tokens.weights > 0][-1])})

    def _rendered(self, record: Record) -> list[Rendered]:
        if record.tokens is not None:
            raise RowError("task", "rows with a label for each word are not for task=causal_lm.")
        if record.text is not None:
            text = clean(record.text, self.config.clean, self.config.clean_language)
            if not text.strip():
                raise RowError("empty", "nothing is left of the text after cleaning.")
            return [Rendered(text, [(0, len(text), 1.0)], end_missing=True, plain=True)]
        messages = cleaned(record.messages, self.config)
        return self.template.examples(dataclasses.replace(record, messages=messages), self.config.supervise)

    def _tokenized(self, texts: list[Rendered]) -> list[list[_Tokens] | RowError]:
        found: list[list[_Tokens] | RowError] = [[]] * len(texts)
        for plain in (False, True):
            places = [i for i, rendered in enumerate(texts) if rendered.plain is plain]
            if not places:
                continue
            encoded = self.tokenizer(
                [texts[i].text for i in places], add_special_tokens=plain, return_offsets_mapping=True, verbose=False
            )
            for i, ids, offsets in zip(places, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                try:
                    found[i] = self._weighted(texts[i], ids, np.asarray(offsets, dtype=np.int64).reshape(-1, 2))
                except RowError as error:
                    found[i] = error
        return found

    def _weighted(self, rendered: Rendered, ids: list[int], offsets: np.ndarray) -> list[_Tokens]:
        """Give every token its weight. Where a prompt alone would be tokenized otherwise than within the text, prompt and
        answer are tokenized apart, so that training sees the ids that inference sees; that can be done for one answer of a
        text only, so each has an example of its own."""
        if rendered.plain or not rendered.turns or not self._borders(rendered, ids, offsets):
            return [self._tokens(rendered, ids, offsets)]
        return [self._apart(part) for part in rendered.single_answers()]

    def _tokens(self, rendered: Rendered, ids: list[int], offsets: np.ndarray, apart: bool = False) -> _Tokens:
        weights = np.zeros(len(ids), dtype=np.float32)
        for start, end, weight in rendered.spans:
            weights[(offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])] = weight
        if rendered.plain:  # what the tokenizer adds around a text has no place in it, and is learned as well
            weights[:] = 1.0
        if rendered.end_missing and ids[-1:] != [self.tokenizer.eos_token_id]:
            ids, weights = [*ids, self.tokenizer.eos_token_id], np.append(weights, rendered.spans[-1][2])
        weights[:1] = 0  # nothing predicts the first token
        return _Tokens(rendered, np.asarray(ids, dtype=np.int64), weights.astype(np.float32), apart)

    def _apart(self, rendered: Rendered) -> _Tokens:
        """The tokens of a text whose prompt and answer are tokenized apart."""
        [(start, _, _)] = rendered.spans
        ids: list[int] = []
        offsets: list[np.ndarray] = []
        for begin, piece in ((0, rendered.text[:start]), (start, rendered.text[start:])):
            encoded = self.tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids += encoded["input_ids"]
            offsets.append(np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2) + begin)
        whole = self.tokenizer(rendered.text, add_special_tokens=False, verbose=False)["input_ids"]
        if self.tokenizer.decode(ids) != self.tokenizer.decode(whole):
            raise RowError(
                "border", "prompt and answer share a token that cannot be parted as inference would part it."
            )
        return self._tokens(rendered, ids, np.concatenate(offsets), apart=True)

    def _borders(self, rendered: Rendered, ids: list[int], offsets: np.ndarray) -> list[int]:
        """Starts of answers before which the prompt's tokens are not those of the prompt alone.

        Special tokens part a text for good, so only what follows the last of them is compared.
        """
        found = []
        for start, _, _ in rendered.spans:
            if start == 0:
                continue
            first = int(np.searchsorted(offsets[:, 1], start, side="right"))  # first token that ends behind the border
            anchor = next((i for i in range(first - 1, -1, -1) if ids[i] in self._special_ids), 0)
            begin = int(offsets[anchor, 0]) if ids else 0
            if tuple(ids[anchor:first]) != self._alone(rendered.text[begin:start]):
                found.append(start)
        return found

    def _ids_alone(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _outcome(
        self, row: int, name: str, record: Record, digest: int, texts: list[list[_Tokens] | RowError]
    ) -> Outcome:
        truncated, bordered, examples = False, False, []
        try:
            for parts in texts:
                if isinstance(parts, RowError):
                    raise parts
                for part in parts:
                    tokens = self._fitted(part)
                    truncated |= tokens is not part
                    bordered |= part.apart
                    examples.append(self._example(tokens, f"{name} row {row}"))
        except RowError as error:
            return Outcome(row, problem=error.kind, sentence=str(error), label=record.label, digest=digest)
        return Outcome(row, examples, None, "", truncated, bordered, record.label, digest)

    def _example(self, tokens: _Tokens, origin: str) -> Example:
        if not (tokens.weights > 0).any():
            raise RowError("masked", "every label is masked, so there is nothing to learn. Remove the row.")
        highest = int(tokens.ids.max())
        if self.vocab_size is not None and highest >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise RowError(
                "vocabulary",
                f"token {token!r} has id {highest}, and the model's embedding has {self.vocab_size} rows: the tokenizer does "
                "not belong to this model, or the model must be resized first.",
            )
        rendered = tokens.rendered
        conversation = "" if rendered.plain else _json({"messages": rendered.messages, "tools": rendered.tools})
        return Example(tokens.ids, tokens.weights, origin, conversation)

    def _fitted(self, tokens: _Tokens) -> _Tokens:
        """The tokens as they are, or of the conversation with its longest prompts cut (`data.too_long`)."""
        limit, count = self.config.max_tokens, len(tokens.ids)
        if count <= limit:
            return tokens
        if self.config.too_long != "truncate_prompt" or tokens.rendered.plain:
            raise RowError(
                TOO_LONG,
                f"{count} tokens, more than data.max_tokens={limit}. Raise data.max_tokens, or choose data.too_long=drop"
                + ("." if tokens.rendered.plain else " or truncate_prompt."),
            )
        return self._truncate_prompt(tokens)

    def _truncate_prompt(self, tokens: _Tokens) -> _Tokens:
        """Cut the start of the longest message that is no answer until all fits; template and answers stay whole."""
        rendered, limit = tokens.rendered, self.config.max_tokens
        messages = [dict(message) for message in rendered.messages]
        cuttable = [m for m in messages if m["role"] != "assistant" and isinstance(m.get("content"), str)]
        while len(tokens.ids) > limit:
            longest = max(cuttable, key=lambda message: len(message["content"]), default={"content": ""})
            content = self.tokenizer(longest["content"], add_special_tokens=False, verbose=False)["input_ids"]
            excess = len(tokens.ids) - limit
            if excess >= len(content):
                raise RowError(
                    TOO_LONG,
                    f"its answers and template alone need more than data.max_tokens={limit} tokens. Raise data.max_tokens or "
                    "choose data.too_long=drop.",
                )
            longest["content"] = self.tokenizer.decode(content[excess:]).lstrip("\ufffd")  # a cut character is none
            record = Record(messages=messages, tools=rendered.tools)
            again = [
                r for r in self.template.examples(record, self.config.supervise) if len(r.messages) == len(messages)
            ]
            found = self._tokenized(again)[0]
            if isinstance(found, RowError):
                raise found
            tokens = found[-1]
        return tokens


@dataclasses.dataclass(frozen=True)
class _Tokens:
    rendered: Rendered
    ids: np.ndarray
    weights: np.ndarray
    apart: bool  # prompt and answer were tokenized apart


def cleaned(messages: list[Message], config: DataConfig) -> list[Message]:
    """The conversation after `data.clean`: what the model is given is changed, what it answers never is."""
    if not config.clean:
        return messages
    return [
        {**message, "content": clean(message["content"], config.clean, config.clean_language)}
        if message["role"] != "assistant" and isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _digest(record: Record) -> int:
    return int.from_bytes(
        hashlib.blake2b(record.canonical().encode("utf-8", "replace"), digest_size=8).digest(), "little"
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
