"""Conversations as a language model sees them: rendered by its chat template, with an exact weight for each token."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lora_lab.base.tokenizer import decode
from lora_lab.config.data import DataConfig
from lora_lab.data.clean import clean
from lora_lab.data.columns import JSON
from lora_lab.data.conversations import refuse_lost_reasoning
from lora_lab.data.encode import TOO_LONG, Encoded, Encoder, Example
from lora_lab.data.formats import Message, Record, RowError, class_name, promised
from lora_lab.data.template import ChatTemplate, Rendered
from lora_lab.errors import DataError
from lora_lab.tasks.section import TaskSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatEncoder(Encoder):
    """Encodes conversations, and plain texts as answers to nothing."""

    chat = True

    def __init__(
        self, config: DataConfig, task: TaskSection, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
    ):
        super().__init__(config, task, tokenizer, vocab_size)
        self.supervise = config.supervise
        self.template = ChatTemplate(tokenizer, config.chat_template_kwargs)
        self.template.begin_with(self.marks)
        self._alone = functools.lru_cache(maxsize=4096)(self._ids_alone)
        self._special_ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The conversation that the tokens were made from; None for plain text."""
        return {"messages": JSON, "tools": JSON}

    def examples(self, records: list[Record], origins: list[str]) -> list[Encoded | RowError]:
        renderings: list[list[Rendered] | RowError] = []
        for record in records:
            try:
                renderings.append(self._rendered(record))
            except RowError as error:
                renderings.append(error)
        tokenized = iter(self._tokenized([text for found in renderings if isinstance(found, list) for text in found]))
        return [
            found if isinstance(found, RowError) else self._encoded([next(tokenized) for _ in found], origin)
            for found, origin in zip(renderings, origins, strict=True)
        ]

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
        """What the model is given to answer a conversation that was typed, not read from rows."""
        return self.template.typed(cleaned(messages, self.config), tools, prompt=True)

    @property
    def day(self) -> str | None:
        return self.template.of_today()

    def end_tokens(self) -> list[int]:
        """Ids that end an answer: the token that training puts there, and the end of sequence."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            [found] = self._tokenized(self.template.examples(Record(messages=probe), "answers"))
        except RowError as error:
            raise DataError(f"The conversation of one question and one answer cannot be rendered: {error}") from error
        if isinstance(found, RowError):
            return [self.tokenizer.eos_token_id]
        [tokens] = found
        return sorted({self.tokenizer.eos_token_id, int(tokens.ids[tokens.weights > 0][-1])})

    def _rendered(self, record: Record) -> list[Rendered]:
        if isinstance(record.label, int) and record.label < 0:
            class_name(record.label)  # hidden labels are often written as -1
        if record.messages is None:
            text = clean(self.unmarked(promised(record.text)), self.config.clean, self.config.clean_language)
            if not text.strip():
                raise RowError("empty", "nothing is left of the text after cleaning.")
            return [Rendered(text, [(0, len(text), 1.0)], end_missing=True, plain=True)]
        refuse_lost_reasoning(record.messages, self.tokenizer.chat_template)
        messages = cleaned(record.messages, self.config)
        return self.template.examples(dataclasses.replace(record, messages=messages), self.supervise)

    def _tokenized(self, texts: list[Rendered]) -> list[list[_Tokens] | RowError]:
        found: list[list[_Tokens] | RowError] = [[]] * len(texts)
        for plain in (False, True):
            places = [i for i, rendered in enumerate(texts) if rendered.plain is plain]
            if not places:
                continue
            encoded = self.tokenizer(
                [texts[i].text for i in places],
                add_special_tokens=plain,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for i, ids, offsets in zip(places, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                try:
                    found[i] = self._weighted(texts[i], ids, np.asarray(offsets, dtype=np.int64).reshape(-1, 2))
                except RowError as error:
                    found[i] = error
        return found

    def _weighted(self, rendered: Rendered, ids: list[int], offsets: np.ndarray) -> list[_Tokens]:
        """Give every token its weight. Where a prompt tokenizes differently on its own, prompt and
        answer are tokenized apart, so that training sees the ids that inference sees; that can be done for one answer of a
        text only, so each has an example of its own."""
        if rendered.plain or not rendered.turns or not self._borders(rendered, ids, offsets):
            return [self._tokens(rendered, ids, offsets)]
        return [self._apart(part) for part in rendered.single_answers()]

    def _tokens(self, rendered: Rendered, ids: list[int], offsets: np.ndarray, apart: bool = False) -> _Tokens:
        if rendered.end_missing and ids[-1:] != [self.tokenizer.eos_token_id]:
            ids, weight_of_end = [*ids, self.tokenizer.eos_token_id], rendered.spans[-1][2]
        else:
            weight_of_end = None
        numbers, (starts, ends) = np.asarray(ids, dtype=np.int64), offsets.T
        weights = np.zeros(len(numbers), dtype=np.float32)
        of_text = weights[: len(offsets)]
        for start, end, weight in rendered.spans:
            of_text[(starts >= start) & (ends <= end) & (ends > starts)] = weight
        if rendered.plain:  # what the tokenizer adds around a text has no place in it, and is learned as well
            of_text[:] = 1.0
        if weight_of_end is not None:
            weights[-1] = weight_of_end
        for mark in self.marks.unlearned:  # a text's beginning, wherever a row puts it, is nothing to say
            weights[numbers == mark] = 0
        weights[:1] = 0  # nothing predicts the first token
        return _Tokens(rendered, numbers, weights, apart)

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
                "border", "prompt and answer share a token that cannot be split as inference would split it."
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

    def _encoded(self, texts: list[list[_Tokens] | RowError], origin: str) -> Encoded | RowError:
        truncated, bordered, examples = False, False, []
        try:
            for parts in texts:
                if isinstance(parts, RowError):
                    raise parts
                for part in parts:
                    tokens = self._fitted(part)
                    truncated |= tokens is not part
                    bordered |= part.apart
                    examples.append(self._example(tokens, origin))
        except RowError as error:
            return error
        return Encoded(examples, truncated, bordered)

    def _example(self, tokens: _Tokens, origin: str) -> Example:
        if not (tokens.weights > 0).any():
            raise RowError("masked", "every label is masked, so there is nothing to learn. Remove the row.")
        rendered = tokens.rendered
        messages = None if rendered.plain else rendered.messages
        return Example(tokens.ids, tokens.weights, origin, {"messages": messages, "tools": rendered.tools})

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
        messages = [dict(message) for message in promised(rendered.messages)]
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
            longest["content"] = decode(self.tokenizer, content[excess:]).lstrip("\ufffd")  # a cut character is none
            record = Record(messages=messages, tools=rendered.tools)
            again = [
                r for r in self.template.examples(record, self.supervise) if len(promised(r.messages)) == len(messages)
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
