"""What a saved adapter adds to each weight, read from its files alone: no model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_lab.adapters import files
from lora_lab.adapters.files import WEIGHTS
from lora_lab.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_WAY_OUT = "Merge it: lora-lab merge, or export hf, gguf or quantized."


@dataclasses.dataclass(frozen=True)
class Delta:
    """The update of one layer's weight [N, D]: up @ down, and for DoRA what the sum's rows are scaled to."""

    down: torch.Tensor  # [r, D] float32, LoRA's A
    up: torch.Tensor  # [N, r] float32, LoRA's B with the scale
    magnitude: torch.Tensor | None = None  # [N] float32: norm of each row of the adapted weight (arXiv:2402.09353)

    @property
    def rank(self) -> int:
        return len(self.down)

    def __add__(self, other: Delta) -> Delta:
        """The exact sum, of the ranks' sum."""
        return Delta(torch.cat([self.down, other.down]), torch.cat([self.up, other.up], 1))

    def __rmul__(self, weight: float) -> Delta:
        return dataclasses.replace(self, up=weight * self.up)

    def filled(self, rank: int) -> Delta:
        """The same of a higher rank, with zeros."""
        pad, missing = torch.nn.functional.pad, rank - self.rank
        return dataclasses.replace(self, down=pad(self.down, (0, 0, 0, missing)), up=pad(self.up, (0, missing)))

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [N, D] with the update, float32."""
        found = weight.to(torch.float32, copy=True).addmm_(self.up, self.down)
        if self.magnitude is None:
            return found
        return found.mul_((self.magnitude / torch.linalg.norm(found, dim=1))[:, None])

    def singular_values(self) -> torch.Tensor:
        """[r] float64, the largest first; of DoRA's those of what is added before the scaling."""
        _, (_, values, _), _ = self._decomposed()
        return values

    def _decomposed(self) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """Orthonormal columns of `up`, the singular value decomposition of what lies between, and those of `down`'s transpose.

        Two QR decompositions leave an r x r matrix to be decomposed, so that its cost does not grow with the layer.
        """
        q_up, r_up = torch.linalg.qr(self.up.double())
        q_down, r_down = torch.linalg.qr(self.down.double().T)
        u, s, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        return q_up, (u, s, v), q_down

    def truncated(self, rank: int) -> tuple[Delta, float]:
        """The nearest update of a rank (Eckart and Young 1936), and the share of the squared norm that it keeps. DoRA's
        magnitudes stay.
        """
        q_up, (u, s, v), q_down = self._decomposed()
        energy = s.square().sum()
        kept = float(s[:rank].square().sum() / energy) if energy > 0 else 1.0
        half = s[:rank].sqrt()
        down, up = half[:, None] * (v[:rank] @ q_down.T), q_up @ u[:, :rank] * half
        return Delta(down.float(), up.float(), self.magnitude).filled(
            rank
        ), kept  # a layer may be smaller than the rank


def factored(dense: torch.Tensor, rank: int) -> tuple[Delta, float]:
    """A matrix [N, D] as an update of a rank, and the share of its squared norm that is kept (randomized singular values,
    Halko et al., arXiv:0909.4061)."""
    if not dense.any():
        return Delta(dense.new_zeros(rank, dense.shape[1]), dense.new_zeros(len(dense), rank)), 1.0
    u, s, v = torch.svd_lowrank(dense, q=min(rank + 8, *dense.shape), niter=4)
    half = s[:rank].sqrt()
    kept = float(s[:rank].square().sum() / dense.square().sum())
    return Delta(half[:, None] * v[:, :rank].T, u[:, :rank] * half), kept


@dataclasses.dataclass(frozen=True)
class Deltas:
    """A whole adapter."""

    layers: dict[str, Delta]  # by the layer's name in the base
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


def reason_against(folder: Path) -> str:
    """Why the adapter in a verified folder cannot be read as updates; empty if it can."""
    config = files.settings(folder)
    experts = getattr(config, "target_parameters", None)
    if experts:
        return f"it reaches into experts ({', '.join(sorted(experts))}), whose updates are no single matrices"
    if getattr(config, "trainable_token_indices", None):
        return "it trains rows of the embeddings, which are replaced and not added to"
    return files.method_of(config).against_delta


def read(folder: Path, model: PreTrainedModel) -> Deltas:
    """The adapter in a verified folder (peft's layout).

    Args:
        model: its base, which may be on the meta device (see `base.load.skeleton`).

    Raises:
        AdapterError: a method without updates, half an update, or another rank than the settings say.
    """
    from safetensors.torch import load_file

    against = reason_against(folder)
    if against:
        raise AdapterError(f"{folder}: {against}. {_WAY_OUT}")
    config = files.settings(folder)
    try:
        return files.method_of(config).delta(config, load_file(folder / WEIGHTS), model)
    except AdapterError as error:
        raise AdapterError(f"{folder / WEIGHTS}: {error}") from error


def parts_of(
    tensors: dict[str, torch.Tensor], kinds: Sequence[str]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The tensors of a saved adapter by layer and kind, in float32, and beside them what was trained whole, by its name in the base.

    Args:
        kinds: names of a layer's tensors, such as `lora_A`.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    whole = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(_PREFIX)
        kind = next((kind for kind in kinds if f".{kind}" in name), None)
        if kind is None:
            whole[name] = tensor
        else:
            parts.setdefault(name.partition(f".{kind}")[0], {})[kind] = tensor.float()
    return parts, whole
