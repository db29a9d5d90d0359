"""When a step does not fit into memory: the same step again, in a way that needs less.

Smaller micro-batches first, then checkpointing, then, on a GPU, checkpoints kept in the machine's memory. Rows, their order and the
step's loss stay what they are. What was changed is part of the member's state, so that a resumed run goes on in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lora_lab.train.cohort import Member


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def apply(member: Member) -> None:
    """Bring a member's plan and model to what its state says."""
    state = member.state
    if state.micro_batch_size is not None:
        member.plan = dataclasses.replace(member.plan, micro_batch_size=state.micro_batch_size)
    if _checkpointed(member):
        # not reentrant: that needs no gradient on the inputs, so backward still stops at the lowest adapted layer
        base = member.model.get_base_model()
        # transformers renamed it on the way to 5.23
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def step_down(member: Member) -> str | None:
    """Let the member's steps need less memory; what was done, or None if nothing is left to do."""
    state, size = member.state, member.plan.micro_batch_size
    if size > 1 and member.config.train.packing is not False:
        state.micro_batch_size = size // 2
        apply(member)
        return f"micro-batches of {state.micro_batch_size} instead of {size} rows"
    if not _checkpointed(member):
        state.checkpointing = True
        apply(member)
        return "activations are computed again in the backward pass (train.gradient_checkpointing=true)"
    if member.model.device.type == "cuda" and not state.offloading:
        state.offloading = True
        return "what the backward pass needs is kept in the machine's memory"
    return None


def offloaded(member: Member) -> contextlib.AbstractContextManager:
    """Inside the block, what is saved for the backward pass goes to the machine's memory if the state says so."""
    return torch.autograd.graph.save_on_cpu(pin_memory=True) if member.state.offloading else contextlib.nullcontext()


def _checkpointed(member: Member) -> bool:
    return member.state.checkpointing or member.config.train.gradient_checkpointing
