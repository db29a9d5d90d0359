"""The layers that a model is a stack of."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def layers_of(model: nn.Module) -> list[nn.Module]:
    """What the outermost lists of modules hold, in order."""
    from torch.nn import ModuleList

    found: list[nn.Module] = []
    for module in model.children():
        parts = list(module) if isinstance(module, ModuleList) else [module]
        for part in parts:
            listed = isinstance(module, ModuleList) and not isinstance(part, ModuleList)
            found += [part] if listed else layers_of(part)
    return found
