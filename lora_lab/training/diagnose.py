"""Where a model's numbers first stop being finite."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_lab.adapters.attach import base_of
from lora_lab.data.encode import Example

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

    from lora_lab.tasks.base import AnyTask


@torch.no_grad()
def first_non_finite(model: PeftModel, examples: list[Example], task: AnyTask, accelerator: Accelerator) -> str | None:
    """The first module, in the order of the forward pass, whose output holds NaN or infinity, with its type; else None."""
    found: list[str] = []
    hooks = [
        module.register_forward_hook(_Watch(name, found))
        for name, module in base_of(model).named_modules()
        if not any(module.children())
    ]
    with task.forward.plain(model), contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        for example in examples:
            with accelerator.autocast():
                for batch in task.step(model, [[example]], np.random.default_rng(0)).batches:
                    task.loss(model, batch.to(model.device))
            if found:
                return f"{found[0]} in {example.origin}"
    return None


class _Watch:
    """A forward hook that notes its module once the output is not finite."""

    def __init__(self, name: str, found: list[str]):
        self.name, self.found = name, found

    def __call__(self, module: torch.nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and not output.isfinite().all():
            self.found.append(f"{self.name} ({str(output.dtype).removeprefix('torch.')})")
