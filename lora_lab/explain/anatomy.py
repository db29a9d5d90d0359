"""How large an adapter's update of each weight is, and how many directions it uses."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.integrations import dequantize_module_weight

from lora_lab.adapters.deltas import Deltas
from lora_lab.adapters.layers import layer_number
from lora_lab.explain import variants
from lora_lab.fast.frozen import QUANTIZED, FrozenWeight, Scratch

if TYPE_CHECKING:
    from peft import PeftModel


@dataclasses.dataclass(frozen=True)
class Update:
    """The update of one weight."""

    module: str  # its name in the base
    layer: int | None  # that it is in
    norm: float  # Frobenius
    weight_norm: float  # of the weight as the run has it, dequantized
    rank: int  # that it may have
    effective_rank: float  # exp of the entropy of its singular values' shares (Roy and Vetterli 2007)
    top_energy: float  # share of its squared norm that the largest singular value has
    energy: float  # share of the whole adapter's squared norm

    @property
    def size(self) -> float:
        """Of the update against the weight."""
        return self.norm / self.weight_norm if self.weight_norm else 0.0


def updates(model: PeftModel, deltas: Deltas) -> list[Update]:
    """Each weight's update, in the order of the model.

    For DoRA, which scales the rows of the sum, norms are those of all that changes; ranks are those of what is added before.

    Args:
        model: the base with the adapter, loaded.
        deltas: the adapter.
    """
    scratch, found = Scratch(), []
    for name, module in variants.adapted(model).items():
        if name not in deltas.layers:
            continue
        delta, weight = deltas.layers[name], _weight(module.get_base_layer(), scratch)
        values = delta.singular_values()
        norm = float(values.square().sum().sqrt())
        if delta.magnitude is not None:
            norm = float(torch.linalg.norm(delta.added_to(weight.cpu()) - weight.cpu()))
        found.append(
            Update(
                name, layer_number(name), norm, float(torch.linalg.norm(weight)), delta.rank, *_spectrum(values), 0.0
            )
        )
    total = sum(one.norm**2 for one in found)
    return [dataclasses.replace(one, energy=one.norm**2 / total if total else 0.0) for one in found]


def _weight(layer: Any, scratch: Scratch) -> torch.Tensor:
    """[N, D] float32, of the layer's own or dequantized."""
    if isinstance(layer, QUANTIZED):
        return FrozenWeight([layer], scratch).dense(torch.float32)
    weight: torch.Tensor = dequantize_module_weight(layer).detach().float()
    return weight if weight.shape[0] == getattr(layer, "out_features", weight.shape[0]) else weight.T


def _spectrum(values: torch.Tensor) -> tuple[float, float]:
    """Effective rank, and the largest one's energy."""
    if not values.any():
        return 0.0, 0.0
    shares = values / values.sum()
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum()
    return float(entropy.exp()), float(values[0] ** 2 / values.square().sum())
