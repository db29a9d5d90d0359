"""Greedy answers to many prompts at once, in which rows whose answer has ended leave the batch.

transformers' `generate` computes every row to the end of the longest answer. Here it is stopped each time that half of its rows have
ended, and goes on with the rest and their part of the key-value cache. A row's numbers depend on no other row, but for the rounding of
products of fewer rows, as in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from lora_lab.adapters.attach import base_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_GREEDY = frozenset(("do_sample", "max_new_tokens", "num_beams", "eos_token_id", "pad_token_id"))
# what a base's own generation_config.json may ask for that counts from where `generate` is called
_COUNTED = (
    "min_length",
    "min_new_tokens",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "max_time",
    "prompt_lookup_num_tokens",
    "cache_implementation",
)


def possible(model: PreTrainedModel, settings: dict[str, Any]) -> bool:
    """Whether answers are the same where `generate` is stopped and called again.

    Args:
        settings: of transformers' `generate`.
    """
    greedy = settings.keys() <= _GREEDY and not settings["do_sample"] and settings["num_beams"] == 1
    asked = model.generation_config
    counted = asked is not None and any(getattr(asked, name, None) for name in _COUNTED)
    return greedy and not counted and not getattr(model, "_is_stateful", False)


def generate(model: PeftModel, ids: torch.Tensor, mask: torch.Tensor, settings: dict[str, Any]) -> list[list[int]]:
    """The tokens of each answer, its end among them.

    Args:
        ids: [B, T] prompts, padded before a decoder's and behind an encoder's.
        mask: [B, T], 0 where padding is.
        settings: of transformers' `generate`, for which this is `possible`.
    """
    answers: list[list[int]] = [[] for _ in ids]
    rows = list(range(len(ids)))  # that are still in the batch
    ends = settings["eos_token_id"]
    told = _Told(model, ids, mask)
    most = told.answered + settings["max_new_tokens"]
    half = True
    while rows:
        stop = [_HalfEnded(torch.tensor(ends, device=ids.device), told.answered)] if half and len(rows) > 1 else []
        limit = {"max_new_tokens": most - told.length}
        made: Any = model.generate(
            **told.inputs(),
            stopping_criteria=StoppingCriteriaList(stop),
            return_dict_in_generate=True,
            **settings | limit,
        )
        cache: Any = getattr(made, "past_key_values", None)
        over = made.sequences.shape[1] >= most
        if not over and cache is None:  # a cache of another make: from the beginning, all to the end
            half = False
            continue
        found = [_cut(row, ends) for row in made.sequences[:, told.answered :].tolist()]
        left = [place for place, row in enumerate(found) if row[-1] not in ends]
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
        if over or not left:
            break
        half = _selectable(cache)
        rows = [rows[place] for place in left] if half else rows
        told.go_on(made.sequences, cache, torch.tensor(left, device=ids.device) if half else None)
    return answers


class _Told:
    """What `generate` is called with: at first the prompts, then also what was generated."""

    def __init__(self, model: PeftModel, ids: torch.Tensor, mask: torch.Tensor):
        self._mask = mask
        self._encoded: Any = None
        self._more: dict[str, Any] = {}
        base: Any = base_of(model)
        if base.config.is_encoder_decoder:
            self._encoded = base.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
            ids = ids.new_full((len(ids), 1), _first_token(base))
        self._ids = ids
        self.answered = ids.shape[1]  # where answers begin

    @property
    def length(self) -> int:
        return self._ids.shape[1]

    def inputs(self) -> dict[str, Any]:
        if self._encoded is None:
            return {"input_ids": self._ids, "attention_mask": self._mask, **self._more}
        encoded = {"encoder_outputs": self._encoded, "decoder_input_ids": self._ids}
        return {**encoded, "attention_mask": self._mask, **self._more}

    def go_on(self, ids: torch.Tensor, cache: Cache, rows: torch.Tensor | None) -> None:
        """Go on behind these tokens.

        Args:
            rows: places of those that stay; None: all do.
        """
        if rows is not None:
            cache.batch_select_indices(rows)
            ids, self._mask = ids[rows], self._mask[rows]
            if self._encoded is not None:
                self._encoded = type(self._encoded)(last_hidden_state=self._encoded.last_hidden_state[rows])
        self._ids, self._more = ids, {"past_key_values": cache}
        if self._encoded is None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), ids.shape[1] - self._mask.shape[1])], 1)
        else:  # without it all tokens would be computed once more, behind themselves
            self._more["decoder_attention_mask"] = torch.ones_like(ids)


class _HalfEnded(StoppingCriteria):
    """Stops all rows once half of them have ended."""

    def __init__(self, ends: torch.Tensor, start: int):
        self._ends, self._start = ends, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ended = torch.isin(input_ids[:, self._start :], self._ends).any(1)
        return (2 * ended.sum() >= len(ended)).expand(len(ended))


def _selectable(cache: Cache) -> bool:
    """Whether each row's part of a cache stands by itself."""
    if isinstance(cache, EncoderDecoderCache):
        return _selectable(cache.self_attention_cache) and _selectable(cache.cross_attention_cache)
    return all(isinstance(layer, DynamicLayer) for layer in cache.layers)


def _cut(answer: list[int], ends: Sequence[int]) -> list[int]:
    """An answer up to its first end."""
    return answer[: next((place + 1 for place, token in enumerate(answer) if token in ends), None)]


def _first_token(base: PreTrainedModel) -> int:
    """What an encoder-decoder's answers begin with."""
    first = getattr(base.generation_config, "decoder_start_token_id", None)
    return int(base.config.decoder_start_token_id if first is None else first)
