"""AdaLoRA's part in a step: its orthogonality term, and ranks that go to the layers where they matter most (arXiv:2303.10512).

peft's allocator decides; what it remembers from step to step lies in tensors of ours, which a checkpoint holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_lab.adapters.base import Step

_PLACE = "lora_lab_allocations"  # attribute of the model
_SUMS = ("exp_avg_ipt", "exp_avg_unc")  # of peft's allocator: importance and its uncertainty, smoothed


def keep_orthogonal(parameters: Mapping[str, nn.Parameter], weight: float) -> None:
    """Add the gradient of weight times the mean of |P P^T - I| over the singular vectors P of all layers, as peft adds it to a loss."""
    factors = [
        one if ".lora_A." in name else one.T
        for name, one in parameters.items()
        if ".lora_A." in name or ".lora_B." in name
    ]
    with torch.enable_grad():
        gaps = [torch.linalg.norm(one @ one.T - torch.eye(len(one), device=one.device)) for one in factors]
        (weight * torch.stack(gaps).mean()).backward()


class _Seen:
    """An adapter's parameters as peft's allocator asks a model for them; by their names it would take those of 'member10' for those of
    'member1' as well."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self._parameters = parameters

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._parameters.items()


@dataclasses.dataclass
class Allocation:
    """What is remembered of one adapter."""

    sums: dict[str, dict[str, torch.Tensor]]  # of `_SUMS`, by the parameters' names
    held: dict[str, torch.Tensor]  # 1 for each rank that a layer still has, by the names of its singular values

    @classmethod
    def begin(cls, model: PeftModel, name: str) -> None:
        """Begin to remember, for an adapter that was just attached."""
        own = {
            key: one
            for key, one in model.named_parameters()
            if "lora_" in key and key.endswith(f".{name}") and "ranknum" not in key
        }
        sums = {kind: {key: torch.zeros_like(one) for key, one in own.items()} for kind in _SUMS}
        held = {key: torch.ones_like(one) for key, one in own.items() if ".lora_E." in key}
        model.__dict__.setdefault(_PLACE, {})[name] = cls(sums, held)

    @classmethod
    def of(cls, model: PeftModel, name: str) -> Allocation:
        found: Allocation = model.__dict__[_PLACE][name]
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of it, by name."""
        found = {f"held.{key}": one for key, one in self.held.items()}
        return found | {f"{kind}.{key}": one for kind in _SUMS for key, one in self.sums[kind].items()}

    @torch.no_grad()
    def allocate(self, step: Step, first: int, last: int) -> None:
        """Take ranks away, as the schedule says, after an update whose gradients are still there.

        Args:
            first: peft's `tinit`.
            last: peft's `tfinal`.
        """
        from peft.tuners.adalora.layer import RankAllocator

        final = step.total - last
        own: Any = step.model.peft_config[step.name]  # AdaLoRA's
        settings = dataclasses.replace(own, tinit=first, tfinal=last, total_step=step.total, inference_mode=False)
        seen = _Seen(step.parameters)
        if step.number <= final:
            for parameter in step.parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            allocator = RankAllocator(seen, settings, step.name)
            allocator.ipt = dict(self.sums[_SUMS[0]])  # the names that it knows; their values it computes anew
            for kind in _SUMS:
                setattr(allocator, kind, dict(self.sums[kind]))
            _, pattern = allocator.update_and_allocate(seen, step.number, force_mask=step.number == final)
            for kind in _SUMS:
                for key, value in getattr(allocator, kind).items():
                    self.sums[kind][key].copy_(value)
            for key, kept in (pattern or {}).items():
                self.held[key].copy_(torch.tensor(kept)[:, None])
        else:
            for key, held in self.held.items():
                step.parameters[key].mul_(held)
