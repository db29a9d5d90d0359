"""Answers as the Tinker API draws them: tokens and their log-probabilities, stops kept, no text in between."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import torch

from lora_lab.serve.tinker import wire
from lora_lab.serve.tinker.told import SamplingParams, stops
from lora_lab.serve.tinker.wire import Answered
from lora_lab.serve.wishes import RequestError
from lora_lab.serve.words import End, Event, Row, Wish

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lora_lab.serve.group import Group

_SEEDS = 2**63


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How answers are drawn."""

    wish: Wish
    top_k: int  # 0: all tokens
    texts: tuple[str, ...]  # that end an answer
    ends: frozenset[int]  # tokens that do
    likeliest: int  # so many are told in each place; 0: none


def drawing(told: SamplingParams, most: int, likeliest: int, end_tokens: Sequence[int]) -> Drawing:
    """What sampling parameters mean.

    Args:
        most: tokens that there is room for.

    Raises:
        RequestError: stops that cannot be.
    """
    texts, tokens, own = stops(told.stop)
    wish = Wish(min(most, told.max_tokens or most), told.temperature, told.top_p, told.seed)
    ends = tokens | (frozenset(end_tokens) if own else frozenset())
    return Drawing(wish, max(told.top_k, 0), texts, ends, likeliest)


class Drawn(Row):
    """An answer of tokens."""

    def __init__(
        self,
        prompt: list[int],
        how: Drawing,
        tokenizer: PreTrainedTokenizerBase,
        send: Callable[[Event], None],
        adapter: str,
        place: int,
    ):
        """`place`: among the answers to one prompt, which a seed draws differently."""
        wish = how.wish
        if wish.seed is not None:
            wish = dataclasses.replace(wish, seed=(wish.seed + place * 0x9E3779B97F4A7C15) % _SEEDS)
        super().__init__(prompt, wish, sorted(how.ends), tokenizer, send, adapter)
        self._how, self._tokenizer = how, tokenizer
        self._logprobs: list[float] = []
        self._likeliest: list[list[tuple[int, float]]] = []
        self._reason = wire.LENGTH

    def go_on(self, logits: torch.Tensor) -> None:
        """Choose the next token of scores [V] float32."""
        if not math.isfinite(float(logits.max())) or bool(logits.isnan().any()):
            self.fail(RequestError(400, "The model's outputs are not finite for this prompt."))
            return
        scores = logits
        if 0 < self._how.top_k < len(logits):
            scores = logits.masked_fill(logits < logits.topk(self._how.top_k).values[-1], -math.inf)
        token = self._choose(scores)
        shares = logits.log_softmax(-1)
        self.ids.append(token)
        self._logprobs.append(float(shares[token]))
        if self._how.likeliest:
            best = shares.topk(self._how.likeliest)
            self._likeliest.append(list(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
        stopped = token in self._how.ends or self._stopped()
        if stopped or len(self.ids) == self.wish.max_tokens:
            self._reason = wire.STOP if stopped else wire.LENGTH
            self.done = True
            self._send(End("stop" if stopped else "length", len(self.prompt), len(self.ids)))

    def _stopped(self) -> bool:
        """Whether a text that ends it has just been written; it stays in the answer."""
        if not self._how.texts:
            return False
        longest = max(map(len, self._how.texts))
        end = self.ids[-(4 * longest + 8) :]  # a character may be four tokens
        text = str(self._tokenizer.decode(end, skip_special_tokens=False))
        return any(stop in text for stop in self._how.texts)

    @property
    def answered(self) -> Answered:
        """What it came to."""
        return Answered(self.ids, self._logprobs, self._reason, self._likeliest if self._how.likeliest else None)


@torch.no_grad()
def scores(
    group: Group, key: str, tokens: Sequence[int], places: Sequence[int], most: int
) -> list[tuple[float, list[tuple[int, float]]]]:
    """How likely the tokens at these places of a prompt are after what is before them, and the likeliest ones there.

    Args:
        key: of the adapter; '': the base.
        places: from 1.
        most: so many of the likeliest.
    """
    if not places:
        return []
    model = cast("PreTrainedModel", group.model)
    with group.inside(key):
        logits = model(input_ids=torch.tensor([tokens[:-1]], device=group.base.device), use_cache=False).logits[0]
    found = logits[torch.tensor(places, device=logits.device) - 1].float().log_softmax(-1)
    own = found.gather(1, torch.tensor([[tokens[place]] for place in places], device=found.device))[:, 0].tolist()
    if not most:
        return [(value, []) for value in own]
    best = found.topk(most)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(value, list(zip(*row, strict=True))) for value, row in zip(own, rows, strict=True)]
