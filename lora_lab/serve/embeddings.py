"""Vectors of texts by the base itself, if it was published with a description of how its hidden states become one (`modules.json` and
a `Pooling` folder, as sentence-transformers writes them)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lora_lab.base.pooling import Pooling, pooled
from lora_lab.data.collate import of_like_length, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS, _ENOUGH_TOKENS = 32, 256


class Embedder:
    """The base as it makes vectors."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling,
        positions: int | None,
        inside: Callable[[], contextlib.AbstractContextManager[None]],
    ):
        """
        Args:
            model: gives hidden states.
            positions: tokens that it can read.
            inside: what a pass runs in.
        """
        self._inside = inside
        self._model, self._tokenizer, self._pooling = model, tokenizer, pooling
        limits = [limit for limit in (pooling.max_tokens, positions) if limit is not None]
        self.most = min(limits) if limits else None

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, cut at the limit as sentence-transformers cuts."""
        if self.most is None:
            return list(self._tokenizer(text, verbose=False)["input_ids"])
        return list(self._tokenizer(text, truncation=True, max_length=self.most, verbose=False)["input_ids"])

    @torch.no_grad()
    def vectors(self, rows: list[list[int]]) -> list[list[float]]:
        """[N, D] of rows of tokens."""
        found: dict[int, list[float]] = {}
        for group in of_like_length([len(row) for row in rows], _ROWS, _ENOUGH_TOKENS):
            ids = pad([rows[place] for place in group], self._tokenizer.pad_token_id or 0)
            lengths = torch.tensor([len(rows[place]) for place in group])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            device = self._model.device
            with self._inside():
                hidden = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float()
            vectors = pooled(hidden, mask.to(device), self._pooling.way)
            if self._pooling.normalizes:
                vectors = torch.nn.functional.normalize(vectors, dim=-1)
            found.update(zip(group, vectors.cpu().tolist(), strict=True))
        return [found[place] for place in range(len(rows))]
