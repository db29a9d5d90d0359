"""How a row's hidden states become one vector: as sentence-transformers describes it beside a base (`modules.json`, a `Pooling` folder,
`config_sentence_transformers.json`), read and written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, Self

import torch

from lora_lab.errors import BaseModelError
from lora_lab.runtime import storage
from lora_lab.runtime.reading import read_json

Way = Literal["mean", "cls", "last", "max"]
_WAYS: dict[str, Way] = {  # names in a Pooling's config.json, and what they mean
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
_MODULES, _LIMITS, _PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
_NAMES = {
    "query": ("query",),
    "document": ("document", "passage", "corpus"),
}  # of prompts, as models are published with


@dataclasses.dataclass(frozen=True)
class Pooling:
    """How a row's hidden states become one vector."""

    way: Way
    normalizes: bool
    max_tokens: int | None  # longer texts are cut there
    query_prompt: str = ""  # what stands before a text that is asked with
    document_prompt: str = ""  # what stands before a text that is looked for
    pools_prompts: bool = True  # whether the tokens of these count like those of the text

    @classmethod
    def read(cls, folder: Path) -> Self:
        """
        Raises:
            BaseModelError: there is no such description, or one of something else.
        """
        if not described(folder):
            raise BaseModelError(
                f"{folder}: the base was published without modules.json and a Pooling folder, so nothing says how its hidden states become "
                "the vector of a text."
            )
        modules = read_json(folder / _MODULES, BaseModelError, of=list)
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
        query, document = _prompts(folder)
        most = None
        if (folder / _LIMITS).is_file():
            most = read_json(folder / _LIMITS, BaseModelError).get("max_seq_length")
        limit = most if isinstance(most, int) and most > 0 else None
        return cls(ways[0], len(kinds) == 3, limit, query, document, own.get("include_prompt") is not False)

    def write(self, folder: Path, width: int) -> None:
        """Describe it beside a merged model, so that sentence-transformers loads the folder.

        Args:
            width: numbers of a hidden state.
        """
        names = ["Transformer", "Pooling", *(["Normalize"] if self.normalizes else [])]
        paths = ["", *(f"{place}_{name}" for place, name in enumerate(names[1:], start=1))]
        modules = [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{name}"}
            for place, (name, path) in enumerate(zip(names, paths, strict=True))
        ]
        ways = {name: way == self.way for name, way in _WAYS.items()}
        prompts = {"query": self.query_prompt, "document": self.document_prompt}
        contents: dict[str, Any] = {
            _MODULES: modules,
            f"{paths[1]}/config.json": {"word_embedding_dimension": width, **ways, "include_prompt": True},
            _PROMPTS: {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
            _LIMITS: {"max_seq_length": self.max_tokens, "do_lower_case": False},
        }
        for path in paths[1:]:
            (folder / path).mkdir()
        for name, content in contents.items():
            (folder / name).write_text(storage.dump_json(content), encoding="utf-8")


def described(folder: Path) -> bool:
    """Whether a folder says how hidden states become vectors."""
    return (folder / _MODULES).is_file()


def _prompts(folder: Path) -> tuple[str, str]:
    """What stands before texts that are asked with, and before those that are looked for."""
    if not (folder / _PROMPTS).is_file():
        return "", ""
    given = read_json(folder / _PROMPTS, BaseModelError).get("prompts")
    known = given if isinstance(given, dict) else {}
    found = [next((known[name] for name in names if name in known), "") for names in _NAMES.values()]
    if not all(isinstance(prompt, str) for prompt in found):
        raise BaseModelError(f"{folder}/{_PROMPTS}: a prompt that is no text.")
    return found[0], found[1]


def _inside(folder: Path, name: Any) -> Path:
    path = (folder / str(name)).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise BaseModelError(f"{folder}/modules.json: names {name!r}, which is not inside the folder.")
    return path


def pooled(hidden: torch.Tensor, mask: torch.Tensor, way: Way) -> torch.Tensor:
    """Hidden states [B, T, D] of rows that are padded on the right as one vector each, [B, D].

    Args:
        mask: [B, T], 0 for padding.
    """
    shares = mask[:, :, None].to(hidden.dtype)
    if way == "cls":
        return hidden[:, 0]
    if way == "mean":
        return (hidden * shares).sum(1) / shares.sum(1).clamp_min(1e-9)
    if way == "max":
        return hidden.masked_fill(shares == 0, float("-inf")).max(1).values
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
