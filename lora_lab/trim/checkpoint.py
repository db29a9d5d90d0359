"""The folder of a smaller base: configuration, and tensors read, cut and written one by one in the types that they have."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_lab.base import load
from lora_lab.base.load import BaseFiles, ModelKind
from lora_lab.base.weights import Weights
from lora_lab.base.weights import write as write_tensors
from lora_lab.errors import BaseModelError
from lora_lab.runtime import console, storage
from lora_lab.trim import layers
from lora_lab.trim.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONFIG, _GENERATION = "config.json", "generation_config.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the new checkpoint."""

    source: str  # its name in the base
    axis: int | None  # along which tokens lie; None: along none


@dataclasses.dataclass(frozen=True)
class Cut:
    """What of a base stays."""

    base: BaseFiles
    kind: ModelKind
    vocabulary: Vocabulary | None  # None: every token
    kept: list[int] | None  # numbers of layers; None: every layer

    def write_config(self, folder: Path) -> None:
        """Write `config.json` and `generation_config.json`: sizes, lists with a value for each layer, and ids of tokens."""
        skeleton = load.skeleton(self.base.folder, self.kind)
        config = self._read(_CONFIG)
        if self.vocabulary is not None:
            config = self.vocabulary.renumbered(config, self.base.folder / _CONFIG)
            config["vocab_size"] = len(self.vocabulary.rows(_rows(skeleton)))
        if self.kept is not None:
            total = skeleton.config.num_hidden_layers
            names = {
                key
                for key, value in config.items()
                if "layer" in key and isinstance(value, list) and len(value) == total
            }
            config |= {name: [config[name][number] for number in self.kept] for name in names}
            config[skeleton.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(self.kept)
        (folder / _CONFIG).write_text(storage.dump_json(config), encoding="utf-8")
        if (self.base.folder / _GENERATION).is_file():
            generation = self._read(_GENERATION)
            if self.vocabulary is not None:
                generation = self.vocabulary.renumbered(generation, self.base.folder / _GENERATION)
            (folder / _GENERATION).write_text(storage.dump_json(generation), encoding="utf-8")

    def _read(self, name: str) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads((self.base.folder / name).read_text(encoding="utf-8"))
        return tree

    def write_weights(self, folder: Path, shard_size: str) -> None:
        """Write the tensors that stay, and the licence."""
        weights = Weights(self.base.folder)
        tensors, left_out = self._tensors(weights)
        if left_out:
            console.say(
                "left out",
                f"{', '.join(sorted(left_out)[:3])}: not of the model that this task reads ({len(left_out)} tensors)",
            )
        rows = (
            None
            if self.vocabulary is None
            else torch.from_numpy(self.vocabulary.rows(self._row_count(weights, tensors)))
        )

        def shape(one: Tensor) -> torch.Size:
            sizes = list(weights.shapes[one.source])
            if one.axis is not None and rows is not None:
                sizes[one.axis] = len(rows)
            return torch.Size(sizes)

        def read(name: str) -> torch.Tensor:
            one = tensors[name]
            tensor = weights[one.source]
            return tensor if one.axis is None or rows is None else tensor.index_select(one.axis, rows)

        told = {name: (shape(one), weights.dtypes[one.source]) for name, one in tensors.items()}
        write_tensors(folder, told, read, shard_size)
        for licence in self.base.folder.glob("LICENSE*"):
            shutil.copy(licence, folder)

    def _row_count(self, weights: Weights, tensors: Mapping[str, Tensor]) -> int:
        return next(weights.shapes[one.source][one.axis] for one in tensors.values() if one.axis is not None)

    def _tensors(self, weights: Weights) -> tuple[dict[str, Tensor], list[str]]:
        """The new checkpoint's tensors by name, in the base's order, and the base's that the model does not know."""
        skeleton = load.skeleton(self.base.folder, self.kind)
        axes = self._axes(skeleton)
        own = f"{skeleton.base_model_prefix}."
        known = {name.removeprefix(own) for name in _legacy(skeleton.state_dict())}
        there = {name.removeprefix(own) for name in weights}
        tied = {a.removeprefix(own) for a, b in skeleton.all_tied_weights_keys.items() if b.removeprefix(own) in there}
        stack = None if self.kept is None else layers.name_of(skeleton).removeprefix(own)
        found: dict[str, Tensor] = {}
        left_out = []
        for name in weights:
            plain = name.removeprefix(own)
            if plain in tied:  # it is the other one again
                continue
            if plain not in known:
                left_out.append(name)
                continue
            new = name if stack is None else self._renumbered(name, stack)
            if new is not None:
                found[new] = Tensor(name, axes.get(plain))
        return found, left_out

    def _renumbered(self, name: str, stack: str) -> str | None:
        """The name of a tensor by its layer's new number; None: its layer goes."""
        assert self.kept is not None
        parts = re.fullmatch(rf"((?:.*\.)?{re.escape(stack)}\.)(\d+)(\..*)", name)
        if parts is None:
            return name
        number = int(parts[2])
        return f"{parts[1]}{self.kept.index(number)}{parts[3]}" if number in self.kept else None

    def _axes(self, skeleton: PreTrainedModel) -> dict[str, int]:
        """Along which axis of which tensor tokens lie: what is longer in a model of one more token.

        Raises:
            BaseModelError: nothing is.
        """
        if self.vocabulary is None:
            return {}
        own = f"{skeleton.base_model_prefix}."
        settings = {**self.kind.settings, "vocab_size": _rows(skeleton) + 1}
        larger = load.skeleton(self.base.folder, dataclasses.replace(self.kind, settings=settings)).state_dict()
        found = {}
        for name, one in _legacy(skeleton.state_dict()).items():
            longer = [axis for axis, size in enumerate(one.shape) if _legacy(larger)[name].shape[axis] == size + 1]
            if longer:
                found[name.removeprefix(own)] = longer[0]
        if not found:
            raise BaseModelError(
                f"{self.base.folder}: no tensor of {type(skeleton).__name__} grows with vocab_size, so its embedding is not known. Leave "
                "trim.vocabulary out."
            )
        return found


def _rows(skeleton: PreTrainedModel) -> int:
    """Tokens of a model's embedding."""
    table: Any = skeleton.get_input_embeddings()
    return int(table.weight.shape[0])


def _legacy(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the names that older checkpoints have for the same."""
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): one
        for name, one in tensors.items()
    }
    return {**tensors, **older}
