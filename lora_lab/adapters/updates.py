"""What a saved adapter adds to each weight, read from its files alone: no model is loaded."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_lab.adapters import files
from lora_lab.adapters.files import WEIGHTS
from lora_lab.errors import AdapterError

if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Update:
    """The update of one layer's weight [N, D]: up @ down, and for DoRA what the sum's rows are scaled to."""

    down: torch.Tensor  # [r, D] float32, LoRA's A
    up: torch.Tensor  # [N, r] float32, LoRA's B with the scale
    magnitude: torch.Tensor | None = None  # [N] float32: norm of each row of the adapted weight (arXiv:2402.09353)

    @property
    def rank(self) -> int:
        return len(self.down)

    def __add__(self, other: Update) -> Update:
        """The exact sum, of the ranks' sum."""
        return Update(torch.cat([self.down, other.down]), torch.cat([self.up, other.up], 1))

    def __rmul__(self, weight: float) -> Update:
        return dataclasses.replace(self, up=weight * self.up)

    def filled(self, rank: int) -> Update:
        """The same of a higher rank, with zeros."""
        pad, missing = torch.nn.functional.pad, rank - self.rank
        return dataclasses.replace(self, down=pad(self.down, (0, 0, 0, missing)), up=pad(self.up, (0, missing)))

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [N, D] with the update, float32."""
        found = weight.to(torch.float32, copy=True).addmm_(self.up, self.down)
        if self.magnitude is None:
            return found
        return found.mul_((self.magnitude / torch.linalg.norm(found, dim=1))[:, None])

    def truncated(self, rank: int) -> tuple[Update, float]:
        """The nearest update of a rank (Eckart and Young 1936), and the share of the squared norm that it keeps. DoRA's
        magnitudes stay.

        Two QR decompositions leave an r x r matrix to be decomposed, so that its cost does not grow with the layer.
        """
        q_up, r_up = torch.linalg.qr(self.up.double())
        q_down, r_down = torch.linalg.qr(self.down.double().T)
        u, s, v = torch.linalg.svd(r_up @ r_down.T)
        energy = s.square().sum()
        kept = float(s[:rank].square().sum() / energy) if energy > 0 else 1.0
        half = s[:rank].sqrt()
        down, up = half[:, None] * (v[:rank] @ q_down.T), q_up @ u[:, :rank] * half
        return Update(down.float(), up.float(), self.magnitude), kept


def factored(dense: torch.Tensor, rank: int) -> tuple[Update, float]:
    """A matrix [N, D] as an update of a rank, and the share of its squared norm that is kept (randomized singular values,
    Halko et al., arXiv:0909.4061)."""
    if not dense.any():
        return Update(dense.new_zeros(rank, dense.shape[1]), dense.new_zeros(len(dense), rank)), 1.0
    u, s, v = torch.svd_lowrank(dense, q=min(rank + 8, *dense.shape), niter=4)
    half = s[:rank].sqrt()
    kept = float(s[:rank].square().sum() / dense.square().sum())
    return Update(half[:, None] * v[:, :rank].T, u[:, :rank] * half), kept


@dataclasses.dataclass(frozen=True)
class Updates:
    """A whole adapter."""

    layers: dict[str, Update]  # by the layer's name in the base
    whole: dict[str, torch.Tensor]  # tensors of modules that were trained whole, by their names in the base

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(update.rank for update in self.layers.values())

    def tensors(self, rank: int) -> dict[str, torch.Tensor]:
        """By peft's names, the tensors of an adapter of scale 1 and one rank; lower ranks are filled with zeros."""
        found = {f"{_PREFIX}{name}": tensor for name, tensor in self.whole.items()}
        for name, update in self.layers.items():
            same = update.filled(rank)
            found |= {f"{_PREFIX}{name}.lora_A.weight": same.down, f"{_PREFIX}{name}.lora_B.weight": same.up}
            if update.magnitude is not None:
                found[f"{_PREFIX}{name}.lora_magnitude_vector"] = update.magnitude
        return found


def read(folder: Path) -> Updates:
    """The adapter in a verified folder (peft's layout).

    Raises:
        AdapterError: another method than LoRA, half an update, or another rank than the settings say.
    """
    from safetensors.torch import load_file

    config = files.settings(folder)
    if config.target_parameters:
        raise AdapterError(
            f"{folder}: reaches into experts ({', '.join(sorted(config.target_parameters))}), whose updates are no single matrices. "
            "Merge it: lora-lab merge, or export hf, gguf or quantized."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    whole = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        layer, kind = _split(name.removeprefix(_PREFIX))
        if kind:
            parts.setdefault(layer, {})[kind] = tensor.float()
        else:
            whole[layer] = tensor
    layers = {}
    for layer, part in parts.items():
        if not {"lora_A", "lora_B"} <= part.keys():
            raise AdapterError(f"{folder / WEIGHTS}: {layer} has {', '.join(sorted(part))} only. Copy it again.")
        rank, scale = _rank_and_scale(config, layer)
        if part["lora_A"].shape[0] != rank or part["lora_B"].shape[1] != rank:
            found = part["lora_A"].shape[0]
            raise AdapterError(
                f"{folder / WEIGHTS}: {layer} has rank {found}, and adapter_config.json says {rank}. Restore the one that was changed."
            )
        layers[layer] = Update(part["lora_A"], scale * part["lora_B"], part.get("lora_magnitude_vector"))
    return Updates(layers, whole)


def _split(name: str) -> tuple[str, str]:
    """Name of the layer and which part of the adapter it is; no part for what was trained whole."""
    for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
        layer, found, _ = name.partition(f".{kind}")
        if found:
            return layer, kind
    return name, ""


def _rank_and_scale(config: LoraConfig, layer: str) -> tuple[int, float]:
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern, config.alpha_pattern
    rank = ranks.get(get_pattern_key(ranks.keys(), layer), config.r)
    alpha = alphas.get(get_pattern_key(alphas.keys(), layer), config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
