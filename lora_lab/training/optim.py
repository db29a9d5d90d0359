"""Optimizers and learning-rate schedules: torch's, bitsandbytes' and transformers', chosen by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_lab.config.train import OptimConfig
from lora_lab.errors import ConfigError

if TYPE_CHECKING:
    import torch


def build_optimizer(
    config: OptimConfig, parameters: Mapping[str, torch.nn.Parameter], second_factor: str = ""
) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` names, over the adapter's parameters.

    Args:
        parameters: by name.
        second_factor: part of the names of those that `optim.loraplus_lr_ratio` is about.
    """
    import bitsandbytes
    import torch

    from lora_lab.training.adamw_8bit import AdamW8bit

    classes = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    options = {"fused": True} if config.name == "adamw" else {}  # one kernel for all tensors
    groups: list[dict[str, Any]] = [{"params": list(parameters.values())}]  # the first one's rate is the logged one
    if config.loraplus_lr_ratio is not None:
        faster = {name: one for name, one in parameters.items() if second_factor in name}
        slower = [one for name, one in parameters.items() if name not in faster]
        groups = [{"params": slower}, {"params": list(faster.values()), "lr": config.loraplus_lr_ratio * config.lr}]
    optimizer: torch.optim.Optimizer = classes[config.name](
        groups,
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
        **options,
    )
    return optimizer


def build_schedule(
    config: OptimConfig, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm-up, then the schedule that `optim.schedule` names, over `total_steps` optimizer steps."""
    from transformers import get_scheduler

    warmup = int(config.warmup_steps) if config.warmup_steps >= 1 else round(config.warmup_steps * total_steps)
    if warmup > total_steps:
        raise ConfigError(f"optim.warmup_steps={config.warmup_steps:g}: must be at most the run's {total_steps} steps.")
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps
    )
    return schedule
