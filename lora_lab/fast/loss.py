"""Next-token losses from hidden states, in chunks: all logits never exist at once.

The gradient of each token's loss is computed together with it, in place of its logits, and is scaled by what comes in backward:
each loss depends on its own hidden state only. The plain twin is the output layer and torch's cross-entropy, or the loss as it is of
all logits. (The idea of
chunks with the gradient at once: Liger, arXiv:2410.10989.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK_BYTES = 64 * 2**20  # of logits at once, in float32
_COPIES = 4  # of a chunk's logits that a loss may have at once
_CACHED_BYTES = 4 * 2**20  # what a CPU's caches hold while it goes over them several times


class TokenLosses(torch.autograd.Function):
    """Hidden states [S, D], the frozen output layer's weight [V, D] and bias [V] or None, targets [S] -> losses [S] float32 and
    the likeliest tokens [S]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        learn, vocab = ctx.needs_input_grad[0], len(weight)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        likeliest = torch.empty_like(targets)
        gradient = torch.empty_like(hidden if learn else hidden[:0])
        rows = max(64, _CHUNK_BYTES // (4 * vocab))
        cached = max(1, _CACHED_BYTES // (4 * vocab)) if hidden.device.type == "cpu" else rows
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = linear(hidden[chunk], weight, bias)
            for part, target, loss, best in zip(
                *(tensor.split(cached) for tensor in (logits, targets[chunk], losses[chunk], likeliest[chunk])),
                strict=True,
            ):
                _losses(part, target, smoothing, loss, best, learn)
            if learn:
                torch.mm(logits, weight, out=gradient[chunk])
        ctx.mark_non_differentiable(likeliest)
        if learn:
            ctx.save_for_backward(gradient)
        return losses, likeliest

    @staticmethod
    def backward(ctx: Any, dlosses: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * dlosses[:, None].to(gradient.dtype), None, None, None, None


class LossesInChunks(torch.autograd.Function):
    """As `TokenLosses`, of any loss that is made of the logits of its own token, whose gradient torch finds in each chunk.

    Hidden states [S, D], the frozen output layer's weight [V, D] and bias [V] or None, and what gives of the logits [s, V] of a slice of
    the tokens their losses [s] and what is kept of them [s, K], both float32 -> losses [S], kept [S, K].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        losses_of: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        learn = ctx.needs_input_grad[0]
        losses, kept = [], []
        gradient = torch.empty_like(hidden if learn else hidden[:0])
        rows = max(16, _CHUNK_BYTES // (4 * _COPIES * len(weight)))
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = linear(hidden[chunk], weight, bias).requires_grad_(learn)
            with torch.set_grad_enabled(learn):
                own, seen = losses_of(logits.float(), chunk)
                total = own.sum()
            losses.append(own.detach())
            kept.append(seen.detach())
            if learn:
                (moved,) = torch.autograd.grad(total, logits)
                torch.mm(moved, weight, out=gradient[chunk])
        ctx.mark_non_differentiable(whole := torch.cat(kept))
        if learn:
            ctx.save_for_backward(gradient)
        return torch.cat(losses), whole

    @staticmethod
    def backward(ctx: Any, dlosses: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * dlosses[:, None].to(gradient.dtype), None, None, None


def _losses(
    logits: torch.Tensor,
    targets: torch.Tensor,
    smoothing: float,
    losses: torch.Tensor,
    likeliest: torch.Tensor,
    learn: bool,
) -> None:
    """Write the losses and the likeliest tokens of some logits [S, V], and the losses' gradients over the logits themselves."""
    wide = logits.float()  # the logits themselves, if they are float32
    right = wide.gather(1, targets[:, None])
    highest, best = wide.max(1, keepdim=True)
    likeliest.copy_(best[:, 0])
    mean = wide.mean(1, keepdim=True) if smoothing else 0.0
    total = wide.sub_(highest).exp_().sum(1, keepdim=True)
    log_sum = total.log() + highest
    losses.copy_((log_sum - (1 - smoothing) * right - smoothing * mean)[:, 0])
    if learn:
        wide.div_(total)
        if smoothing:
            wide.sub_(smoothing / wide.shape[1])
        wide.scatter_add_(1, targets[:, None], torch.full_like(right, smoothing - 1))
        logits.copy_(wide)


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The output layer, if it is a frozen, unquantized linear layer without an adapter."""
    head = model.get_output_embeddings()
    return head if type(head) is nn.Linear and not head.weight.requires_grad else None


@contextlib.contextmanager
def without_head(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model gives the hidden states that its output layer would read, in place of logits."""
    head = model.get_output_embeddings()
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward
