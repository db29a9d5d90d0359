"""When a step does not fit into memory: the same step again, in a way that needs less.

Dequantized weights that are kept go first: that costs only time. Then smaller micro-batches and checkpointing; which of them comes first
depends on the device. On a GPU, kept activations are offloaded to host RAM last. Rows, their order and the step's loss stay what they
are. What was changed is part of the member's state, so that a resumed run goes on in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_lab.adapters.attach import base_of
from lora_lab.runtime import ranks

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_lab.data.encode import Example
    from lora_lab.training.cohort import Member

# Tokens from which on a pass fills a GPU. A smaller one costs nearly as much, because it reads (and dequantizes) all weights too: so
# there activations are recomputed before passes fall below. A CPU computes as long for a token in small passes as in large ones.
_FULL_PASS = 2000


def apply(member: Member) -> None:
    """Bring a member's plan and model to what its state says."""
    state = member.state
    if state.dequantizing:
        member.task.forward.drop_kept_weights()
    if state.micro_batch_size is not None:
        member.plan = dataclasses.replace(member.plan, micro_batch_size=state.micro_batch_size)
    if state.micro_batch_tokens is not None:
        member.plan = dataclasses.replace(member.plan, micro_batch_tokens=state.micro_batch_tokens)
    if _checkpointed(member):
        every = 1 if state.checkpointing else member.config.train.recompute_every
        recompute(member.model, every, _offloaded(member))


def recompute(model: PeftModel, every: int, offload: bool) -> None:
    """Let every so-many-th layer keep its input only, and compute the rest again in the backward pass."""
    base = base_of(model)
    offload = offload and base.device.type == "cuda"  # on a CPU everything is there already
    base.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every, offload=offload)
    base.disable_input_require_grads()  # without reentrance not needed, and backward ends at the lowest adapted layer


def step_down(member: Member, passes: Sequence[Sequence[Example]], on_gpu: bool) -> str | None:
    """Let the member's steps need less memory; what was done, or None if nothing is left to do.

    Args:
        passes: the examples of each of the step's micro-batches.
    """
    dropped = drop_kept_weights([member])
    if dropped:
        return dropped
    packed = member.task.config.packed
    largest = max(passes, key=lambda part: _tokens(part, packed))
    tokens = _tokens(largest, packed)
    if on_gpu and tokens < 2 * _FULL_PASS:
        done = _recompute(member) or _halve(member, largest, tokens)
    else:
        done = _halve(member, largest, tokens) or _recompute(member)
    return done or _offload(member, on_gpu)


def _tokens(part: Sequence[Example], packed: bool) -> int:
    """Of a pass, padding among them."""
    lengths = [example.num_tokens for example in part]
    return sum(lengths) if packed else len(lengths) * max(lengths)


def drop_kept_weights(members: Sequence[Member]) -> str | None:
    """Dequantize in every pass from now on, for all members of one model; None where no weights are kept."""
    freed = max(ranks.gather(members[0].task.forward.drop_kept_weights()))  # who had more room may keep some
    if not freed:
        return None
    for member in members:
        member.state.dequantizing = True
    return f"weights are dequantized in every pass, which gives back {freed / 2**30:.2f} GiB (speed.dequantize=always)"


def _halve(member: Member, largest: Sequence[Example], tokens: int) -> str | None:
    """Passes of half as many rows, or of half as many tokens where they are counted."""
    state, plan = member.state, member.plan
    if len(largest) == 1 or not member.task.forward.together:
        return None
    if plan.micro_batch_tokens is None:
        whole, unit = min(plan.micro_batch_size, len(largest)), "rows"
    else:
        whole, unit = min(plan.micro_batch_tokens, tokens), "tokens"
    if whole == 1:  # what is left is one item of several short texts
        return None
    if unit == "rows":
        state.micro_batch_size = whole // 2
    else:
        state.micro_batch_tokens = whole // 2
    apply(member)
    return f"micro-batches of {whole // 2} instead of {whole} {unit}"


def _recompute(member: Member) -> str | None:
    state = member.state
    if member.config.adapter.against_checkpointing:
        return None
    if _checkpointed(member) and (state.checkpointing or member.config.train.recompute_every == 1):
        return None
    state.checkpointing = True
    apply(member)
    return "activations are recomputed in the backward pass (train.gradient_checkpointing=true)"


def _offload(member: Member, on_gpu: bool) -> str | None:
    if not on_gpu or not _checkpointed(member) or _offloaded(member):
        return None
    member.state.offloading = True
    apply(member)
    return "kept activations are offloaded to host RAM (train.offload_activations=true)"


def _checkpointed(member: Member) -> bool:
    return member.state.checkpointing or member.config.train.gradient_checkpointing


def _offloaded(member: Member) -> bool:
    return member.state.offloading or member.config.train.offload_activations
