"""From a conversation to token ids and an exact mask of the tokens that are trained on.

The text is the model's own chat template, rendered once for the whole conversation. What is supervised follows from
rendered prefixes: the template rendered up to an answer, with its generation prompt, is exactly what the model will
see before it answers; what the full text adds after that prefix, up to and including the end-of-turn token, is the
answer. Each prefix must really be a prefix of the full text, or the row is refused.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from lora_lab.config import DataConfig
from lora_lab.data import formats
from lora_lab.data.formats import Message
from lora_lab.data.sources import Rows
from lora_lab.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One row as the model sees it."""

    input_ids: np.ndarray  # [T] int64
    supervised: np.ndarray  # [T] bool: this token is a target (never the first one)
    messages: list[Message]
    origin: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """All examples of `data.train` or `data.eval`, and what became of the rows that are not among them."""

    key: str
    examples: list[Example]
    rows_read: int
    formats: list[str]  # of each file
    dropped: int  # rows above data.max_tokens under too_long=drop
    truncated: int  # rows whose prompt was cut under too_long=truncate_prompt
    files: dict[str, str]  # file -> SHA-256

    def __len__(self) -> int:
        return len(self.examples)

    def __str__(self) -> str:
        tokens = sum(len(example.input_ids) for example in self.examples)
        supervised = sum(int(example.supervised.sum()) for example in self.examples)
        longest = max(len(example.input_ids) for example in self.examples)
        return (
            f"{self.rows_read} rows read as {', '.join(dict.fromkeys(self.formats))}: {len(self.examples)} used, "
            f"{self.dropped} dropped and {self.truncated} prompts truncated as too long; {tokens:,} tokens, longest row "
            f"{longest}, {100 * supervised / tokens:.0f} % supervised"
        )


def encode(rows: Rows, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Encode all rows; what is too long is treated as `data.too_long` says, and counted.

    Raises:
        DataError: a row that cannot be used, or no row left.
    """
    names = formats.detect(rows, config.format)
    examples, dropped, truncated = [], 0, 0
    for row in rows.rows:
        messages = formats.conversation(row, names[row.file])
        example = encode_messages(messages, row.origin, tokenizer, config.supervise)
        if len(example.input_ids) <= config.max_tokens:
            examples.append(example)
        elif config.too_long == "drop":
            dropped += 1
        elif config.too_long == "truncate_prompt":
            examples.append(_truncate_prompt(example, config, tokenizer))
            truncated += 1
        else:
            raise DataError(
                f"{rows.key}: {row.origin} has {len(example.input_ids)} tokens, more than data.max_tokens="
                f"{config.max_tokens}. Raise data.max_tokens, or choose data.too_long=drop or truncate_prompt."
            )
    if not examples:
        raise DataError(
            f"{rows.key}: all {dropped} rows have more than data.max_tokens={config.max_tokens} tokens and were dropped. "
            "Raise data.max_tokens."
        )
    return Dataset(rows.key, examples, len(rows.rows), names, dropped, truncated, rows.files)


def encode_messages(
    messages: list[Message], origin: str, tokenizer: PreTrainedTokenizerBase, supervise: str = "answer"
) -> Example:
    """Encode one conversation.

    Args:
        supervise: 'answer' (the assistant's turns, each with its end-of-turn token) or 'all'.

    Raises:
        DataError: the template cannot render the row, renders an answer differently once later turns follow, or
            leaves no token to train on.
    """
    text = render(messages, tokenizer, origin)
    spans = [(0, len(text))] if supervise == "all" else _answer_spans(messages, text, tokenizer, origin)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], np.asarray(encoded["offset_mapping"]).reshape(-1, 2)
    supervised = np.zeros(len(ids), dtype=bool)
    for start, end in spans:
        supervised |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > start)
    if messages[-1]["role"] == "assistant" and not _ends_with_eos(ids, supervised, tokenizer):
        ids, supervised = [*ids, tokenizer.eos_token_id], np.append(supervised, True)  # a template without an end token
    supervised[:1] = False  # nothing predicts the first token
    if not supervised.any():
        raise DataError(f"{origin}: every label is masked, so there is nothing to learn. Remove the row.")
    return Example(np.asarray(ids, dtype=np.int64), supervised, messages, origin)


def render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, origin: str, add_generation_prompt: bool = False
) -> str:
    """The conversation as text by the model's template: the only way to text for training, evaluation and chat."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(f"{origin}: the model's chat template cannot render it ({error}).") from error


def _answer_spans(
    messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase, origin: str
) -> list[tuple[int, int]]:
    """Character spans [start, end) of the answers in the rendered text, each up to its end-of-turn token."""
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prefix = render(messages[:turn], tokenizer, origin, add_generation_prompt=True)
        through = render(messages[: turn + 1], tokenizer, origin)
        if not (text.startswith(prefix) and text.startswith(through) and through.startswith(prefix)):
            raise DataError(
                f"{origin}: the model's chat template renders turn {turn + 1} differently once later turns follow, so "
                "training would not see what inference sees. Split the conversation so that this answer comes last."
            )
        spans.append((len(prefix), len(through.rstrip())))
    return spans


def _ends_with_eos(ids: list[int], supervised: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last supervised token ends the turn: the end of sequence, or a special token of the template."""
    last = np.flatnonzero(supervised)[-1:]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return bool(len(last)) and ids[last[0]] in special | {tokenizer.eos_token_id}


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: the token that training puts there, and the end of sequence."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    example = encode_messages(probe, "probe", tokenizer)
    return sorted({int(example.input_ids[example.supervised][-1]), tokenizer.eos_token_id})


def _truncate_prompt(example: Example, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Cut the start of the longest message that is not an answer until the row fits; template and answers stay whole."""
    messages = [dict(message) for message in example.messages]
    cuttable = [
        message for message in messages if message["role"] != "assistant" and isinstance(message["content"], str)
    ]
    while len(example.input_ids) > config.max_tokens:
        longest = max(cuttable, key=lambda message: len(message["content"]), default={"content": ""})
        tokens = tokenizer(longest["content"], add_special_tokens=False)["input_ids"]
        excess = len(example.input_ids) - config.max_tokens
        if excess >= len(tokens):
            raise DataError(
                f"{example.origin}: its answers and template alone need more than data.max_tokens={config.max_tokens} "
                "tokens. Raise data.max_tokens or choose data.too_long=drop."
            )
        longest["content"] = tokenizer.decode(tokens[excess:]).lstrip("\ufffd")  # a cut character is no character
        example = encode_messages(messages, example.origin, tokenizer, config.supervise)
    return example
