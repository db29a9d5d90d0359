"""bitsandbytes' AdamW with states in 8 bits, that lets the host go on while the card computes."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import torch


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """The library's own numbers, to the byte.

    Its `step` (0.50.2, optim/optimizer.py) waits for the card after each tensor, which paged states need: they move by themselves. Others
    stay where they are, and kernels of one stream come one after another.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all tensors that have a gradient; what `closure` gives, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()  # states that were read from a checkpoint
            self.initialized = True
        for place, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, place, index)
                self.update_step(group, parameter, place, index)
        return loss
