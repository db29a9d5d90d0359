"""What the field adds to a forward and backward pass against overfitting: NEFTune and FGM (R-Drop is part of a task's loss)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch

from lora_lab.adapters.attach import base_of
from lora_lab.base import embeddings
from lora_lab.data.collate import Batch, PackedBatch, PaddedBatch
from lora_lab.errors import TrainingError

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_lab.config.train import TrainConfig

T = TypeVar("T")


def learn(config: TrainConfig, model: PeftModel, batch: Batch, passed: Callable[[], T]) -> T:
    """Make a pass, forward and backward, with what `train` adds to it.

    Args:
        batch: what the pass is over.
        passed: makes it; what it gives is given back.
    """
    noise = _changed(model, _noise(config.neftune_alpha, batch)) if config.neftune_alpha else contextlib.nullcontext()
    seen: list[torch.Tensor] = []
    watch = _changed(model, _keep(seen)) if config.fgm_epsilon else contextlib.nullcontext()
    with noise, watch:
        found = passed()
    if config.fgm_epsilon:
        shifts = iter([_adversarial(_gradient(embedded), config.fgm_epsilon, batch) for embedded in seen])
        with _changed(model, lambda embedded: embedded + next(shifts)):
            passed()
    return found


@contextlib.contextmanager
def _changed(model: PeftModel, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside the block, what the input embeddings give [B, T, D] is changed, where it is learned from: neither in evaluation
    nor for a reference model."""

    reached = []

    def learned(module: torch.nn.Module, ids: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor | None:
        if not (module.training and torch.is_grad_enabled()):
            return None
        reached.append(module)
        return change(embedded)

    with embeddings.changed(base_of(model), learned):
        yield
    if not reached:
        raise TrainingError(
            "train.neftune_alpha, train.fgm_epsilon: this model does not use its input embeddings as a module, so they would "
            "have no effect. Set them to null."
        )


def _noise(alpha: float, batch: Batch) -> Callable[[torch.Tensor], torch.Tensor]:
    """NEFTune (arXiv:2310.05914): uniform noise in [-1, 1] times alpha / sqrt(T D), T being each row's own length."""

    def change(embedded: torch.Tensor) -> torch.Tensor:
        scale = alpha / torch.sqrt(_lengths(batch, embedded) * embedded.shape[-1])
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * scale.to(embedded.dtype)

    return change


def _keep(seen: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Let gradients reach the embeddings' output, and remember where they will be."""

    def change(embedded: torch.Tensor) -> torch.Tensor:
        embedded = embedded.detach().requires_grad_()
        seen.append(embedded)
        return embedded

    return change


def _gradient(embedded: torch.Tensor) -> torch.Tensor:
    """What the backward pass has left at what `_keep` has seen."""
    assert embedded.grad is not None
    return embedded.grad


def _adversarial(gradient: torch.Tensor, epsilon: float, batch: Batch) -> torch.Tensor:
    """FGM (arXiv:1605.07725): the step of L2 norm epsilon, for each row, that raises its loss most. [B, T, D]"""
    squares = gradient.float().square().sum(-1)  # [B, T]
    if isinstance(batch, PackedBatch):
        norms = _over_rows(batch, squares[0]).sqrt()[None]
    else:
        norms = squares.sum(1, keepdim=True).sqrt()
    return (epsilon * gradient.float() / norms.clamp_min(1e-30).unsqueeze(-1)).to(gradient.dtype)


def _lengths(batch: Batch, embedded: torch.Tensor) -> torch.Tensor:
    """[B, T, 1] or [B, 1, 1] float32: the number of tokens of the row that each token is in."""
    if isinstance(batch, PaddedBatch):
        mask = batch.inputs["attention_mask"]
        own = mask if embedded.shape[1] == mask.shape[1] else torch.ones(embedded.shape[:2], device=embedded.device)
        return own.sum(1)[:, None, None].float()
    assert isinstance(batch, PackedBatch)  # the only other kind
    return _over_rows(batch, torch.ones(embedded.shape[1], device=embedded.device))[None, :, None]


def _over_rows(batch: PackedBatch, values: torch.Tensor) -> torch.Tensor:
    """[T] -> [T]: for each token the sum over the tokens of its row. Rows are found where the tokens are, so a GPU is not waited for."""
    owner = (batch.position_ids[0] == 0).cumsum(0) - 1
    return values.new_zeros(len(batch.lengths)).index_add(0, owner, values)[owner]
