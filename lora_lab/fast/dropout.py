"""Dropout whose masks cost little to draw on a CPU.

torch draws a floating-point number for each element there. Here 64 random bits make the masks of four: 15 bits say whether one is kept.
The mask depends on the generator and the number of elements only, not on the type that is computed in, so that a plain layer, a fused
one, a recomputed one and one in a shared pass see the same.
"""

from __future__ import annotations

import torch
from torch import nn

from lora_lab.fast.routing import Routing, current, spread

_BITS = 15


def kept(shape: torch.Size, p: float, device: torch.device, generator: torch.Generator | None = None) -> torch.Tensor:
    """[shape] int16: 1 for what is kept, 0 for the share `p` that is dropped, on a CPU rounded to 2**-15.

    Args:
        generator: that draws; torch's own of the device by default.
    """
    count = shape.numel()
    if device.type != "cpu":  # one kernel
        return torch.empty(shape, dtype=torch.int16, device=device).bernoulli_(1 - p, generator=generator)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    drawn = words.view(torch.int16)[:count].bitwise_right_shift_(16 - _BITS)  # of [-2**14, 2**14)
    drawn.sub_(round(p * 2**_BITS) - 2 ** (_BITS - 1))  # below zero: dropped
    return drawn.bitwise_right_shift_(15).add_(1).view(shape)


def scale(p: float) -> float:
    """What the kept elements are multiplied by."""
    return 1 / (1 - p) if p < 1 else 0.0


def kept_of_members(routing: Routing, shape: torch.Size, p: float, device: torch.device) -> torch.Tensor:
    """[shape] int16: what dropout leaves of each member's rows, drawn by its generator as in a pass of its own."""
    masks = [
        spread(
            kept(torch.Size([*part.alone, shape[-1]]), p, device, part.route.generator),
            part.rows.stop - part.rows.start,
        )
        for part in routing.parts(shape[:-1])
    ]
    return torch.cat(masks).view(shape)


class Dropout(nn.Dropout):
    """torch's, with masks from `kept` on a CPU; on a card its own kernel draws and multiplies at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return super().forward(x)
        shared = current()
        mask = kept(x.shape, self.p, x.device) if shared is None else kept_of_members(shared, x.shape, self.p, x.device)
        return (x * mask).mul_(scale(self.p))


def install(model: nn.Module) -> None:
    """Let a model's dropout modules draw their masks so."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            own = Dropout(module.p)
            model.set_submodule(name, own.train(module.training))
