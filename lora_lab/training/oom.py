"""When a step does not fit into memory: the same step again, in a way that needs less.

Smaller micro-batches first, then checkpointing, then, on a GPU, kept activations offloaded to host RAM. Rows, their order and the
step's loss stay what they are. What was changed is part of the member's state, so that a resumed run goes on in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lora_lab.adapters.attach import base_of
from lora_lab.runtime.memory import is_out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_lab.training.cohort import Member


class Attempt:
    """A block that a lack of memory ends quietly."""

    fitted = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> bool:
        self.fitted = error is None
        if error is None or not is_out_of_memory(error):
            return False
        error.__traceback__ = None  # it holds the activations that did not fit
        return True


def attempts(need_less: Callable[[], None]) -> Iterator[Attempt]:
    """Attempts at a block, one after another until it fits into memory: `for attempt in attempts(...): with attempt: ...`.

    Args:
        need_less: called between two of them; raises if nothing is left to do.
    """
    while True:
        attempt = Attempt()
        yield attempt
        if attempt.fitted:
            return
        need_less()


def apply(member: Member) -> None:
    """Bring a member's plan and model to what its state says."""
    state = member.state
    if state.micro_batch_size is not None:
        member.plan = dataclasses.replace(member.plan, micro_batch_size=state.micro_batch_size)
    if _checkpointed(member):
        every = 1 if state.checkpointing else member.config.train.recompute_every
        recompute(member.model, every, _offloaded(member))


def recompute(model: PeftModel, every: int, offload: bool) -> None:
    """Let every so-many-th layer keep its input only, and compute the rest again in the backward pass."""
    base = base_of(model)
    offload = offload and base.device.type == "cuda"  # on a CPU everything is there already
    base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every, offload=offload)
    base.disable_input_require_grads()  # without reentrance not needed, and backward ends at the lowest adapted layer


def step_down(member: Member) -> str | None:
    """Let the member's steps need less memory; what was done, or None if nothing is left to do."""
    state, size = member.state, member.plan.micro_batch_size
    apart = member.config.train.packing is False or member.config.adapter.against_packing
    if size > 1 and not apart:
        state.micro_batch_size = size // 2
        apply(member)
        return f"micro-batches of {state.micro_batch_size} instead of {size} rows"
    if member.config.adapter.against_checkpointing:
        return None
    if not _checkpointed(member) or (not state.checkpointing and member.config.train.recompute_every > 1):
        state.checkpointing = True
        apply(member)
        return "activations are recomputed in the backward pass (train.gradient_checkpointing=true)"
    if member.model.device.type == "cuda" and not _offloaded(member):
        state.offloading = True
        apply(member)
        return "kept activations are offloaded to host RAM (train.offload_activations=true)"
    return None


def _checkpointed(member: Member) -> bool:
    return member.state.checkpointing or member.config.train.gradient_checkpointing


def _offloaded(member: Member) -> bool:
    return member.state.offloading or member.config.train.offload_activations
