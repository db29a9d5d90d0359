"""Rows whose answers are written together, a token at a time: they come and go between two tokens, and none depends on the others.

Rows end where they end, so padding stands before them; each has positions and a mask of its own. Keys and values of what was read are
kept in one tensor for each layer, which grows by a column with each token.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from lora_lab.data.collate import of_like_length
from lora_lab.fast.routing import Route, Routing
from lora_lab.serve.words import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOGETHER, _ENOUGH_TOKENS = 16, 256  # prompts that are read in one pass: at most, and so many tokens are worth one


class Batch:
    """Rows of one model."""

    def __init__(
        self,
        base: PreTrainedModel,
        inside: Callable[[str], contextlib.AbstractContextManager[Any]],
        routing: Routing | None = None,
        grows: bool = True,
        read: Callable[[Row], tuple[torch.Tensor, Any]] | None = None,
    ):
        """
        Args:
            base: what is called, adapters and all.
            inside: what a pass runs in: precision, and the adapter that is active, told by its name.
            routing: tells modules whose rows are whose; None: all rows are of one adapter.
            grows: whether rows may lie beside one another; else there is one, and its cache is the model's own.
            read: reads the prompt of a row that has one by itself, such as behind virtual tokens; None: the base does.
        """
        self.rows: list[Row] = []
        self._base, self._inside, self._routing, self._grows, self._read = base, inside, routing, grows, read
        self._cache: Any = None
        self._lengths: list[int] = []  # of each row's keys
        self._takes = inspect.signature(type(base).forward).parameters

    @torch.no_grad()
    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of new rows, and say the first token of each."""
        caches, order, lengths = [self._cache] if self.rows else [], list(self.rows), list(self._lengths)
        for part in self._parts(rows):
            logits, cache, own = self._prompts(part)
            for row, scores in zip(part, logits, strict=True):
                row.go_on(scores)
            caches.append(cache)
            order += part
            lengths += own
        if not self._grows:
            self.rows, self._lengths, self._cache = order, lengths, caches[0]
            self._drop()
            return
        places = sorted(range(len(order)), key=lambda place: order[place].adapter)
        self.rows, self._lengths = [order[place] for place in places], [lengths[place] for place in places]
        self._cache = _joined(caches, torch.tensor(places, device=self._base.device))
        self._drop()

    @torch.no_grad()
    def step(self) -> None:
        """Say the next token of each row; rows that are done are gone then."""
        self._drop()
        if not self.rows:
            return
        device, longest = self._base.device, max(self._lengths)
        ids = torch.tensor([[row.last] for row in self.rows], device=device)
        lengths = torch.tensor(self._lengths, device=device)
        mask = _seen(lengths + 1, longest + 1)
        logits, self._cache = self._pass(self.rows, ids, mask, lengths[:, None], self._cache, 1)
        self._lengths = [length + 1 for length in self._lengths]
        for row, scores in zip(self.rows, logits, strict=True):
            row.go_on(scores)
        self._drop()

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values of a row; 0: something else is kept."""
        layers: list[Any] = list(getattr(self._cache, "layers", ()))
        if not self.rows or not all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
            return 0
        return sum((one.keys.nbytes + one.values.nbytes) // one.keys[:, 0, :, 0].numel() for one in layers)

    def clear(self) -> list[Row]:
        """Let all rows go; which they were."""
        gone, self.rows, self._lengths, self._cache = self.rows, [], [], None
        return gone

    def _parts(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows whose prompts are read in one pass."""
        if self._read is not None or not self._grows:
            return [[row] for row in rows]
        groups = of_like_length([len(row.prompt) for row in rows], _TOGETHER, _ENOUGH_TOKENS)
        return [sorted((rows[place] for place in group), key=lambda row: row.adapter) for group in groups]

    def _prompts(self, rows: list[Row]) -> tuple[torch.Tensor, Any, list[int]]:
        if self._read is not None and rows[0].adapter:
            with self._inside(rows[0].adapter):
                logits, cache = self._read(rows[0])
            return logits, cache, [cache.get_seq_length()]
        own, device = [len(row.prompt) for row in rows], self._base.device
        longest = max(own)
        ids = torch.tensor([[0] * (longest - len(row.prompt)) + row.prompt for row in rows], device=device)
        lengths = torch.tensor(own, device=device)
        mask = _seen(lengths, longest)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        logits, cache = self._pass(rows, ids, mask, positions, DynamicCache() if self._grows else None, longest)
        return logits, cache, own

    def _pass(
        self, rows: list[Row], ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any, tokens: int
    ) -> tuple[torch.Tensor, Any]:
        """Scores [B, V] float32 of what follows, and the cache."""
        told: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        told = {name: value for name, value in told.items() if name in self._takes}
        with self._inside(rows[0].adapter), self._routed(rows, tokens):
            out = self._base(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **told)
        return out.logits[:, -1].float(), out.past_key_values

    def _routed(self, rows: list[Row], tokens: int) -> contextlib.AbstractContextManager[None]:
        if self._routing is None:
            return contextlib.nullcontext()
        counts = [(name, len(list(own))) for name, own in itertools.groupby(rows, key=lambda row: row.adapter)]
        return self._routing.routed([Route(name, count * tokens, count, None) for name, count in counts])

    def _drop(self) -> None:
        """Let rows go that are done."""
        kept = [place for place, row in enumerate(self.rows) if not (row.done or row.cancelled)]
        if len(kept) == len(self.rows):
            return
        if not kept:
            self.clear()
            return
        self.rows, self._lengths = [self.rows[place] for place in kept], [self._lengths[place] for place in kept]
        self._cache = _joined([self._cache], torch.tensor(kept, device=self._base.device), max(self._lengths))


def _seen(lengths: torch.Tensor, longest: int) -> torch.Tensor:
    """[B, T] int64: 1 for a row's own tokens, which stand at its end."""
    return (torch.arange(longest, device=lengths.device) >= longest - lengths[:, None]).long()


def _joined(caches: Sequence[Any], places: torch.Tensor, columns: int | None = None) -> DynamicCache:
    """The rows of several caches that lie at `places` when these lie one below another.

    Args:
        columns: so many are kept, from the end; None: all.
    """
    longest = max(cache.get_seq_length() for cache in caches)
    found = DynamicCache()
    for number in range(len(caches[0].layers)):
        keys, values = (
            torch.cat([_padded(getattr(cache.layers[number], name), longest) for cache in caches])[places]
            for name in ("keys", "values")
        )
        if columns is not None:
            keys, values = keys[:, :, -columns:].contiguous(), values[:, :, -columns:].contiguous()
        found.update(keys, values, number)
    return found


def _padded(kept: torch.Tensor, columns: int) -> torch.Tensor:
    """[B, H, T, D] with `columns` columns, the new ones in front."""
    lacking = columns - kept.shape[2]
    return kept if not lacking else torch.nn.functional.pad(kept, (0, 0, lacking, 0))
