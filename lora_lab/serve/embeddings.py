"""Vectors of texts by the base itself, if it was published with a description of how its hidden states become one (`modules.json` and
a `Pooling` folder, as sentence-transformers writes them)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_lab.data.collate import of_like_length, pad
from lora_lab.errors import BaseModelError
from lora_lab.runtime.reading import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ROWS, _ENOUGH_TOKENS = 32, 256
_WAYS = {  # names in a Pooling's config.json, and what they mean
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a row's hidden states become one vector."""

    way: str  # cls, mean, max or last
    normalizes: bool
    max_tokens: int | None  # longer texts are cut there

    @classmethod
    def read(cls, folder: Path) -> Pooling:
        """
        Raises:
            BaseModelError: there is no such description, or one of something else.
        """
        if not (folder / "modules.json").is_file():
            raise BaseModelError(
                f"{folder}: the base was published without modules.json and a Pooling folder, so nothing says how its hidden states become "
                "the vector of a text."
            )
        modules = read_json(folder / "modules.json", BaseModelError, of=list)
        kinds = [str(one.get("type", "")).rpartition(".")[2] for one in modules if isinstance(one, dict)]
        if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
            raise BaseModelError(
                f"{folder}/modules.json: {', '.join(kinds)}. Only Transformer, Pooling and Normalize are known."
            )
        own = read_json(_inside(folder, modules[1].get("path")) / "config.json", BaseModelError)
        ways = [way for name, way in _WAYS.items() if own.get(name)] or [own.get("pooling_mode")]
        others = [name for name, on in own.items() if name.startswith("pooling_mode_") and on and name not in _WAYS]
        if len(ways) != 1 or ways[0] not in _WAYS.values() or others:
            raise BaseModelError(f"{folder}: a pooling of {', '.join(map(str, [*ways, *others]))} is not known.")
        most = None
        limits = folder / "sentence_bert_config.json"
        if limits.is_file():
            most = read_json(limits, BaseModelError).get("max_seq_length")
        return cls(str(ways[0]), len(kinds) == 3, most if isinstance(most, int) and most > 0 else None)


def _inside(folder: Path, name: Any) -> Path:
    path = (folder / str(name)).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BaseModelError(f"{folder}/modules.json: names {name!r}, which is not inside the folder.")
    return path


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
            pooled = _pooled(hidden, mask.to(device), self._pooling.way)
            if self._pooling.normalizes:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            found.update(zip(group, pooled.cpu().tolist(), strict=True))
        return [found[place] for place in range(len(rows))]


def _pooled(hidden: torch.Tensor, mask: torch.Tensor, way: str) -> torch.Tensor:
    """[B, T, D] -> [B, D]"""
    shares = mask[:, :, None].to(hidden.dtype)
    if way == "cls":
        return hidden[:, 0]
    if way == "mean":
        return (hidden * shares).sum(1) / shares.sum(1).clamp_min(1e-9)
    if way == "max":
        return hidden.masked_fill(shares == 0, float("-inf")).max(1).values
    return hidden[torch.arange(len(hidden)), mask.sum(1) - 1]
