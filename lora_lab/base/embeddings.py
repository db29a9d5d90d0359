"""A model's input embeddings: what they give can be changed on the way, and frozen ones can lie in main memory beside a card.

A step needs the rows of its own tokens only. The rows are the same numbers wherever they lie, so a run learns the same; each forward pass
waits once for its tokens, and copies its rows to the card.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from lora_lab.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_KEY = "hardware.offload_embeddings=true"


@contextlib.contextmanager
def changed(
    model: PreTrainedModel, change: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor | None]
) -> Iterator[None]:
    """Inside the block, what the input embeddings give is what `change` makes of it.

    Args:
        model: the base, adapted or not.
        change: (module, token ids, embeddings [..., D]) -> other embeddings; None: they stay.
    """
    table: Any = model.get_input_embeddings()
    shared = table.weight  # an encoder-decoder has several modules with one weight
    tables = [m for m in model.modules() if m is table or (isinstance(m, nn.Embedding) and m.weight is shared)]

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        return change(module, inputs[0], output)

    with contextlib.ExitStack() as stack:
        for module in tables:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@dataclasses.dataclass(frozen=True, eq=False)
class _Held:
    """A weight that moves with no module, and of which a copied module has no copy."""

    weight: torch.Tensor

    def __deepcopy__(self, _: object) -> Self:
        return self


class HostEmbedding(nn.Embedding):
    """[...] token ids on any device -> [..., D] there, from a weight in main memory. Made by `offload`."""

    held: _Held

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """[V, D], in main memory; no parameter, so it stays where it is when the model is moved."""
        return self.held.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.embedding(input.to(self.weight.device), self.weight)
        return rows.to(input.device, non_blocking=True)


def check(model: PreTrainedModel, changed: Collection[str], settings: PeftConfig) -> None:
    """Refuse input embeddings that are needed on the device.

    Args:
        model: on the meta device.
        changed: modules that are adapted, or trained whole.
        settings: of the adapter.

    Raises:
        ConfigError: they are the output layer too, are trained, or are of a kind of their own.
    """
    table: Any = model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    head = names.get(model.get_output_embeddings())
    if head is not None and f"{head}.weight" in (model.all_tied_weights_keys or {}):
        raise ConfigError(
            f"{_KEY}: the output layer of this base ({head}) has the same weight, and needs it on the card. Drop it."
        )
    if type(table) is not nn.Embedding:
        raise ConfigError(
            f"{_KEY}: the input embeddings of this base are a {type(table).__name__}, which does more. Drop it."
        )
    own = names[table]
    tokens = getattr(settings, "trainable_token_indices", None) or getattr(settings, "token_indices", None)
    if any(name == own or own.endswith(f".{name}") for name in changed) or tokens or settings.is_prompt_learning:
        raise ConfigError(
            f"{_KEY}: this adapter trains or reads the input embeddings ({own}). Drop it, or take adapter=lora."
        )


def offload(model: PreTrainedModel) -> None:
    """Move the input embeddings of a frozen model to main memory, for as long as it lives."""
    table: Any = model.get_input_embeddings()
    weight = table.weight
    held = _Held(weight.detach().to("cpu"))
    for module in model.modules():
        if type(module) is nn.Embedding and module.weight is weight:  # an encoder-decoder has several
            del module.weight
            module.__class__ = HostEmbedding
            module.held = held  # type: ignore[assignment]
            # transformers reads a model's type and device from its first parameter
            module.register_parameter("place", nn.Parameter(weight.new_empty(0), requires_grad=False))
