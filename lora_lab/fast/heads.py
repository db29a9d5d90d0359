"""Modules that are trained whole, such as a new head, where several members share a pass: each member's own sees its rows only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper

from lora_lab.errors import TrainingError
from lora_lab.fast.routing import Routing


def forward_of(module: ModulesToSaveWrapper, routing: Routing) -> Callable[..., torch.Tensor]:
    """What replaces the forward of peft's wrapper around members' copies of a module."""
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        if not routing.routes:
            return plain(*args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
            raise TrainingError(f"{type(module.original_module).__name__} is called with more than one tensor")
        [x] = args
        dims = x.dim() - 1 if x.is_floating_point() else x.dim()  # token ids have no features
        outs = []
        for part, own in routing.split(x, dims):
            with routing.alone(part.route):
                outs.append(_of(module, part.route.member)(own))
        return routing.joined(outs, x.shape[:dims])

    return forward


def _of(module: ModulesToSaveWrapper, member: str) -> Callable[[torch.Tensor], torch.Tensor]:
    copies = module.modules_to_save
    return copies[member] if member in copies else module.original_module  # noqa: SIM401  (a ModuleDict has no `get`)
