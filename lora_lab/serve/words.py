"""An answer while it is written: the next token is chosen, and becomes text as soon as nothing later can change it."""

from __future__ import annotations

import copy
import dataclasses
import math
import secrets
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from lora_lab.serve.wishes import RequestError

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Wish:
    """How an answer is to be written."""

    max_tokens: int
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0
    seed: int | None = None  # None: another one each time
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = (
        None  # so many likely tokens are told beside each chosen one; None: no probabilities at all
    )
    streams: bool = False


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A token, and how likely it and others were in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of an answer."""

    text: str
    chosen: tuple[Chosen, ...]


@dataclasses.dataclass(frozen=True)
class End:
    """There is no more of it."""

    reason: str  # stop or length
    prompt_tokens: int
    tokens: int


Event = Piece | End | RequestError


class Text:
    """Tokens as text, piece by piece. Together the pieces are what the tokenizer makes of all tokens, up to the first of `stops`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], streams: bool):
        """`streams`: pieces are wanted before the end."""
        self._tokenizer, self._stops = tokenizer, stops
        self._follows = streams or bool(stops)
        self._ids: list[int] = []
        self._begin = self._read = 0  # of the tokens that the next one is read with, and of those not yet read
        self._found = ""  # all text that is final
        self._sent = 0  # characters of it
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is final now and was not before."""
        self._ids.append(token)
        if not self._follows or self.stopped:
            return ""
        before, now = self._decoded(self._ids[self._begin : self._read]), self._decoded(self._ids[self._begin :])
        if not now.startswith(before) or len(now) == len(before) or now.endswith("\ufffd"):
            return ""  # half a character, or a mark that is not shown
        self._begin, self._read = self._read, len(self._ids)
        self._found += now[len(before) :]
        return self._released(final=False)

    def end(self) -> str:
        """The rest."""
        if not self.stopped:
            whole = self._decoded(self._ids)
            if whole.startswith(self._found[: self._sent]):
                self._found = whole
        return self._released(final=True)

    def _released(self, final: bool) -> str:
        places = [place for stop in self._stops if (place := self._found.find(stop)) >= 0]
        if places:
            self.stopped = True
            self._found = self._found[: min(places)]
        held = 0 if final or self.stopped else max((_overlap(self._found, stop) for stop in self._stops), default=0)
        piece = self._found[self._sent : len(self._found) - held]
        self._sent += len(piece)
        return piece

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


class Row:
    """An answer that is being written, in a batch with others or by itself; nothing of it depends on the others."""

    def __init__(
        self,
        prompt: list[int],
        wish: Wish,
        end_tokens: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        send: Callable[[Event], None],
        adapter: str = "",
        processors: LogitsProcessorList | None = None,
    ):
        """
        Args:
            adapter: its name among the modules; '': the base.
            send: called by the thread that writes, with each piece and the end.
            processors: what the base's own generation settings do to the scores, such as a repetition penalty.
        """
        self.prompt, self.wish, self.adapter = prompt, wish, adapter
        self.ids: list[int] = []  # of the answer
        self.done = self.cancelled = False
        self._ends = frozenset(end_tokens)
        self._text = Text(tokenizer, wish.stops, wish.streams)
        self._send, self._processors = send, processors
        seed = secrets.randbits(32) if wish.seed is None else wish.seed
        self._generator = torch.Generator().manual_seed(seed) if wish.temperature > 0 else None
        self._unsent: list[Chosen] = []

    @property
    def most_tokens(self) -> int:
        """That its prompt and answer may become."""
        return len(self.prompt) + self.wish.max_tokens

    @property
    def last(self) -> int:
        """The token that the model reads next."""
        return self.ids[-1]

    def go_on(self, logits: torch.Tensor) -> None:
        """Choose the next token of scores [V] float32, and send what it says."""
        if not math.isfinite(float(logits.max())) or bool(logits.isnan().any()):
            self.fail(RequestError(500, "The model's outputs are not finite for this prompt.", "server_error"))
            return
        scores = logits
        if self._processors:
            seen: Any = torch.tensor([[*self.prompt, *self.ids]], device=logits.device)
            scores = self._processors(seen, cast(Any, logits[None].clone()))[0]
        token = self._choose(scores)
        self.ids.append(token)
        if self.wish.top_logprobs is not None:
            self._unsent.append(_told(logits, token, self.wish.top_logprobs))
        ended = token in self._ends
        piece = self._text.add(token)
        if ended or self._text.stopped or len(self.ids) == self.wish.max_tokens:
            piece += self._text.end()
            self._send_piece(piece)
            self.done = True
            self._send(End("stop" if ended or self._text.stopped else "length", len(self.prompt), len(self.ids)))
        elif piece and self.wish.streams:
            self._send_piece(piece)
        elif piece:
            self._waiting += piece

    _waiting = ""

    def _send_piece(self, piece: str) -> None:
        self._send(Piece(self._waiting + piece, tuple(self._unsent)))
        self._waiting, self._unsent = "", []

    def fail(self, error: RequestError) -> None:
        """End it without an answer."""
        if not self.done:
            self.done = True
            self._send(error)

    def _choose(self, scores: torch.Tensor) -> int:
        if self._generator is None:
            return int(scores.argmax())
        shares, order = (scores.double().cpu() / self.wish.temperature).softmax(-1).sort(descending=True, stable=True)
        sums = shares.cumsum(-1)
        kept = int((sums - shares < self.wish.top_p).sum())  # the likeliest is always among them
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * sums[kept - 1]
        return int(order[min(int((sums[:kept] <= drawn).sum()), kept - 1)])


def _told(logits: torch.Tensor, token: int, count: int) -> Chosen:
    shares = logits.log_softmax(-1)
    best = shares.topk(count) if count else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Chosen(token, float(shares[token]), top)


def generation_settings(base: PreTrainedModel, end_tokens: Sequence[int], pad: int | None) -> GenerationConfig:
    """What `generate` would go by for a greedy answer: the base's own settings, such as a repetition penalty."""
    made: Any = base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings of the base that are for drawing
        found, _ = made._prepare_generation_config(
            None, do_sample=False, num_beams=1, eos_token_id=list(end_tokens), pad_token_id=pad
        )
        made._prepare_special_tokens(found, kwargs_has_attention_mask=True, device=_device(base))
    settings: GenerationConfig = found
    return settings


def _device(base: PreTrainedModel) -> torch.device:
    """Of numbers beside a model, which may have no content itself."""
    return torch.device("cpu") if base.device.type == "meta" else base.device


def processors_of(
    base: PreTrainedModel, settings: GenerationConfig, prompt_tokens: int, max_tokens: int
) -> LogitsProcessorList:
    """What these settings do to the scores of a prompt's answer, by transformers' own classes."""
    own = copy.copy(settings)
    own.max_new_tokens, own.max_length = max_tokens, prompt_tokens + max_tokens
    made: Any = base
    found: LogitsProcessorList = made._get_logits_processor(
        generation_config=own, input_ids_seq_length=prompt_tokens, device=_device(base), model_kwargs={}
    )
    return found
