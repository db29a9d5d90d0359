"""A run's model as lm-eval asks it: how likely texts go on, and what is written after them, in the passes that the run was trained with.

What is asked is turned into tokens as lm-eval's own `HFLM` does, so that both give the same numbers for the same model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.functional import cross_entropy
from transformers import StoppingCriteriaList, StopStringCriteria

from lora_lab.adapters.attach import base_of
from lora_lab.base.positions import usable_positions
from lora_lab.data.collate import PackedBatch
from lora_lab.data.formats import RowError
from lora_lab.errors import ConfigError, DataError, NoRoomError
from lora_lab.run.setup import Live
from lora_lab.runtime import console
from lora_lab.runtime.memory import attempts
from lora_lab.tasks.generation import generate_all
from lora_lab.tasks.section import Generating

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_NEW_TOKENS = 256  # of an answer, where a task says nothing; lm-eval's
_LOOKED_AT = 8  # questions of tasks that only generate, whose likelihoods tell two models apart
_WRITES = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams")


@dataclasses.dataclass(frozen=True)
class Asked:
    """How likely `continuation` comes after `context`."""

    context: list[int]
    continuation: list[int]  # at least one token
    what: str  # for messages

    @functools.cached_property
    def read(self) -> list[int]:
        """The tokens that the model reads: the last one is only said."""
        return (self.context + self.continuation)[:-1]


class AsTrained(TemplateLM):
    """The model of a run with whatever adapter is active.

    Attributes:
        said: the log-likelihood of everything that was asked, in order, by which two models are told apart.
    """

    def __init__(self, live: Live, title: str):
        """
        Args:
            title: of progress bars.
        """
        super().__init__()
        setup = live.setup
        self._live, self._title, self._task = live, title, setup.task
        self._model = live.model.eval()
        self.tokenizer = setup.encoder.tokenizer
        base = base_of(self._model)
        longest = resolve_max_length(base.config, self.tokenizer)
        self.max_length = min(longest, usable_positions(base) or longest) - setup.config.adapter.virtual_tokens
        # whether rows may share a pass was proved on the run's rows, if it has any
        self._together = self._task.forward.together and setup.rows is not None
        self.said: list[float] = []

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that is asked without any context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text; what the tokenizer puts around texts is not put twice."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        found: list[int] = self.tokenizer(string, verbose=False, **options)["input_ids"]
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the run's chats were written in training.

        Raises:
            DataError: the template refuses them, or the task begins the answer itself.
        """
        if not add_generation_prompt:
            raise DataError(
                "evaluate.chat_template=true: a task with gen_prefix begins the answer itself. Set it false."
            )
        encoder: Any = self._live.setup.encoder  # of a task that chats
        try:
            text: str = encoder.template.text(chat_history, add_generation_prompt=True)
        except RowError as error:
            raise DataError(f"evaluate.chat_template=true: {error}") from error
        return text

    # -- likelihoods ----------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._likelihoods([Asked(context, said, repr(pair[1])) for pair, context, said in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of whole texts. One that is too long is read in windows, each token said once."""
        windows = [self._windows(request.args[0]) for request in requests]
        found = iter(self._likelihoods([one for part in windows for one in part]))
        return [sum(next(found)[0] for _ in part) for part in windows]

    def _windows(self, text: str) -> list[Asked]:
        pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
        return [Asked(context, said, repr(text)) for context, said in map(make_disjoint_window, pairs)]

    @torch.no_grad()
    def _likelihoods(self, asked: list[Asked]) -> list[tuple[float, bool]]:
        """The log-likelihood of each, and whether each of its tokens is the likeliest."""
        for one in asked:
            if not one.continuation:
                raise DataError(f"evaluate.suite: an answer has no tokens: {one.what[:200]}")
        found: dict[int, tuple[float, bool]] = {}
        with console.steps(self._title, len(asked)) as progress, self._live.autocast():
            for places, said in self._passes(asked):
                found.update(zip(places, said, strict=True))
                progress.advance(len(places))
        self.said += [found[place][0] for place in range(len(asked))]
        return [found[place] for place in range(len(asked))]

    def _passes(self, asked: list[Asked]) -> Iterator[tuple[list[int], list[tuple[float, bool]]]]:
        """What each pass reads, as places in `asked`, and what it says; those of like length together."""
        order = sorted(range(len(asked)), key=lambda place: len(asked[place].read), reverse=True)
        while order:
            chosen = self._next(asked, order)
            for attempt in attempts(functools.partial(self._halve, chosen, asked)):
                with attempt:
                    said = self._said([asked[place] for place in chosen])
            yield list(chosen), said
            del order[len(order) - len(chosen) :]

    def _next(self, asked: list[Asked], order: list[int]) -> list[int]:
        """The last of `order`, as many as fit into a pass."""
        count, tokens = 1, len(asked[order[-1]].read)
        while self._together and count < len(order):
            tokens += len(asked[order[-count - 1]].read)
            if tokens > self._task.eval_tokens:
                break
            count += 1
        return order[-count:]

    def _halve(self, chosen: list[int], asked: list[Asked], lacked: str) -> None:
        """After a failed allocation: the second half, which stays the end of the order, and so in every pass from now on."""
        if len(chosen) == 1:
            raise NoRoomError(
                f"evaluate.suite: a text of {len(asked[chosen[0]].read)} tokens does not fit into memory, by itself and without gradients "
                f"({lacked}). Set evaluate.few_shot lower, quant=nf4 or speed.dequantize=always."
            )
        del chosen[: len(chosen) // 2]
        self._task.eval_tokens = max(1, sum(len(asked[place].read) for place in chosen))
        console.say("memory", f"{self._task.eval_tokens} tokens in a pass from now on; what is measured stays the same")

    def _said(self, asked: list[Asked]) -> list[tuple[float, bool]]:
        batch = _packed(asked, self.max_length).to(self._model.device)
        forward = self._task.forward
        if forward.chunked_head:
            losses, likeliest = forward.losses_in_chunks(self._model, batch, 0.0)
            greedy = likeliest[:, 0] == batch.targets
        else:
            logits = forward.logits(self._model, batch).float()
            losses, greedy = cross_entropy(logits, batch.targets, reduction="none"), logits.argmax(-1) == batch.targets
        sizes = [len(one.continuation) for one in asked]
        parts = zip(losses.float().cpu().split(sizes), greedy.cpu().split(sizes), strict=True)
        return [(-float(loss.double().sum()), bool(own.all())) for loss, own in parts]

    # -- texts ----------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What is written after each context, up to a stop of its task."""
        if not self.said:  # texts of two models may be the same, and their likelihoods not
            self._likelihoods([one for request in requests[:_LOOKED_AT] for one in self._windows(request.args[0])])
        found: dict[int, str] = {}
        for settings, places in _alike([request.args[1] for request in requests]):
            texts = self._written([requests[place].args[0] for place in places], settings)
            found.update(zip(places, texts, strict=True))
        return [found[place] for place in range(len(requests))]

    def _written(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        told = normalize_gen_kwargs(settings, _NEW_TOKENS)
        end = str(self.tokenizer.decode([self.eot_token_id]))
        stops, longest = handle_stop_sequences(told.pop("until", None), end), int(told.pop("max_gen_toks"))
        if longest >= self.max_length:
            raise ConfigError(
                f"evaluate.suite: a task asks for {longest} new tokens, and the model reads {self.max_length} at most. Lower its max_gen_toks."
            )
        rows = [self.tok_encode(context)[-(self.max_length - longest) :] for context in contexts]
        sampling = {name: told[name] for name in _WRITES if name in told and (told["do_sample"] or name == "num_beams")}
        section = Generating(name=self._task.config.name, max_new_tokens=longest)
        ends = StoppingCriteriaList([StopStringCriteria(self.tokenizer, stops)])
        with self._live.autocast(), self._task.forward.generating(self._model):
            texts = generate_all(
                self._model,
                self.tokenizer,
                rows,
                section,
                [self.eot_token_id],
                self._title,
                stopping_criteria=ends,
                **sampling,
            )
        return [postprocess_generated_text(text, stops, None) for text in texts]


def _packed(asked: Sequence[Asked], longest: int) -> PackedBatch:
    """Texts end to end, of each the last `longest` tokens."""
    rows = [one.read[-longest:] for one in asked]
    lengths = [len(row) for row in rows]
    starts = np.cumsum([0, *lengths[:-1]])
    places = [
        np.arange(start + length - len(one.continuation), start + length)
        for start, length, one in zip(starts, lengths, asked, strict=True)
    ]
    return PackedBatch(
        input_ids=torch.tensor([[token for row in rows for token in row]]),
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        lengths=lengths,
        logit_positions=torch.from_numpy(np.concatenate(places)),
        targets=torch.tensor([token for one in asked for token in one.continuation]),
        weights=None,
        origins=[one.what for one in asked],
    )


def _alike(settings: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[int]]]:
    """Places of requests by what they are generated with."""
    found: list[tuple[dict[str, Any], list[int]]] = []
    for place, one in enumerate(settings):
        known = next((places for other, places in found if other == one), None)
        if known is None:
            found.append((one, [place]))
        else:
            known.append(place)
    return found
