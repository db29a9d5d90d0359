"""What a tokenizer puts around every text by itself, such as a beginning-of-sequence token.

The model has seen them around every text, so they stand there once, whether the tokenizer, a chat template or the row brings them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = ("a", "1", ".", "的")  # one of them is a token, and no mark


@dataclasses.dataclass(frozen=True)
class Marks:
    """Token ids, and the texts that stand for them."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    opening: str  # text of `before`; empty where there is none, or where no text stands for it
    closing: str
    unlearned: tuple[int, ...]  # those of `before` that no model is to say: all but what also ends a text

    def without(self, text: str) -> str:
        """A text without the marks that it brings itself, and that the tokenizer puts there anyway."""
        return text.removeprefix(self.opening).removesuffix(self.closing)

    def of_words(self, words: Sequence[str]) -> tuple[slice, list[str]]:
        """Which words of a text are not marks that it brings itself, and these words."""
        heads = range(1, 1 + len(self.before) if self.opening else 1)
        tails = range(1, 1 + len(self.after) if self.closing else 1)
        first = next((n for n in heads if "".join(words[:n]) == self.opening), 0)
        last = len(words) - next((n for n in tails if "".join(words[first:][-n:]) == self.closing), 0)
        kept = list(words[first:last])
        if kept and not first:
            kept[0] = kept[0].removeprefix(self.opening)
        if kept and last == len(words):
            kept[-1] = kept[-1].removesuffix(self.closing)
        return slice(first, last), kept


def marks_of(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The marks that the tokenizer's own call puts around a text, as that call shows them."""
    before, after = next(filter(any, (_around(tokenizer, probe) for probe in _PROBES)), ((), ()))
    ends = {tokenizer.eos_token_id, *after}
    return Marks(
        before,
        after,
        _text(tokenizer, before),
        _text(tokenizer, after),
        tuple(number for number in before if number not in ends),
    )


def _around(tokenizer: PreTrainedTokenizerBase, probe: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bare = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(probe, verbose=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1) if bare else ():
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return (), ()


def _text(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    """The text that is read as these tokens; empty if none is."""
    text = "".join(tokenizer.convert_ids_to_tokens(list(ids)))
    read = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    return text if tuple(read) == ids else ""
