"""Which layers of a decoder can go: those without which the loss on some rows is least, found one after another.

Each layer is left out in turn, and the loss measured (Gromov et al., arXiv:2403.17887, and Men et al., arXiv:2403.03853, rate layers
by how little they turn what passes through them, which costs one pass, and misjudges layers whose small change matters). All that is
before the layer is the same whichever goes, so it is computed once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lora_lab.data.collate import Batch
from lora_lab.data.encode import Example
from lora_lab.errors import ConfigError
from lora_lab.fast import isolation
from lora_lab.runtime import console
from lora_lab.tasks.base import AnyTask, eval_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 512  # of a pass, unless a row has more: more takes memory, and is hardly faster


@dataclasses.dataclass(frozen=True)
class Choice:
    """A layer that goes."""

    layer: int  # its number in the base, from 0
    loss: float  # without it and those before it, nats per token
    others: dict[int, float]  # the loss where another had gone instead


@dataclasses.dataclass(frozen=True)
class Layers:
    """What was found out."""

    total: int
    whole: float  # the base's loss
    dropped: tuple[Choice, ...]

    @property
    def kept(self) -> list[int]:
        """Numbers of the layers that stay."""
        gone = {one.layer for one in self.dropped}
        return [number for number in range(self.total) if number not in gone]


def name_of(model: PreTrainedModel) -> str:
    """The name of a model's list of layers.

    Raises:
        ConfigError: it is not made of one list of layers, each of which changes what the one before gave.
    """
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [name for name, one in model.named_modules() if isinstance(one, nn.ModuleList) and len(one) == count]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1 or getattr(model.config, "is_encoder_decoder", False) or model.config.sub_configs:
        raise ConfigError(
            f"trim.layers: {type(model).__name__} is not one list of layers, so none can simply be left out. Set trim.layers=0."
        )
    return outer[0]


class Stack:
    """The layers of a model, of which some can be passed by."""

    def __init__(self, layers: nn.ModuleList):
        self.layers = list(layers)
        self._tuples: dict[
            int, tuple[Any, ...] | None
        ] = {}  # what a layer gives beside hidden states; None: it gives these alone

    @contextlib.contextmanager
    def given(self, hidden: Mapping[int, torch.Tensor | None]) -> Iterator[None]:
        """Inside the block, each of these layers gives the hidden states that are named, or those that it is given itself (None), and
        computes nothing."""
        for number, states in hidden.items():
            self.layers[number].forward = self._instead(number, states)
        try:
            yield
        finally:
            for number in hidden:
                del self.layers[number].forward

    def _instead(self, number: int, states: torch.Tensor | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            passed = (args[0] if args else kwargs["hidden_states"]) if states is None else states
            rest = self._tuples.get(number)
            return passed if rest is None else (passed, *rest)

        return forward

    @contextlib.contextmanager
    def noted(self) -> Iterator[dict[int, torch.Tensor]]:
        """Inside the block, what each layer is given in one pass is noted; those that are passed by too."""
        seen: dict[int, torch.Tensor] = {}

        def note(number: int) -> Callable[..., None]:
            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> None:
                seen[number] = args[0] if args else kwargs["hidden_states"]
                self._tuples.setdefault(number, given[1:] if isinstance(given, tuple) else None)

            return before

        handles = [
            layer.register_forward_hook(note(number), with_kwargs=True) for number, layer in enumerate(self.layers)
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def passes(model: PreTrainedModel, task: AnyTask, examples: Sequence[Example]) -> list[list[Example]]:
    """The rows of each pass, in which they lie end to end where two of them prove that the model reads each as it would alone."""
    reason = isolation.reason_against(
        lambda: isolation.check_isolation(model, list(examples))  # type: ignore[arg-type]  # no adapter lies on it
    )
    task.forward.together = not reason
    if reason:
        console.say("packing", f"rows one by one: {reason}")
    lengths = np.array([example.num_tokens for example in examples])
    return [[examples[place] for place in places] for places in eval_batches(lengths, not reason, _TOKENS)]


def choose(
    model: PreTrainedModel,
    stack: Stack,
    task: AnyTask,
    parts: Sequence[list[Example]],
    count: int | None,
    limit: float,
) -> Layers:
    """The layers that go, the first that goes first.

    Args:
        parts: to measure on, see `passes`; not held-out ones.
        count: how many; None: as many as `limit` allows.
        limit: how far the loss may rise in all, where `count` is None.
    """
    total = len(stack.layers)
    rounds = total - 1 if count is None else count
    most = sum(total - done for done in range(rounds))
    gone: list[int] = []
    found: list[Choice] = []
    whole = 0.0
    with console.steps("layers", most * sum(map(len, parts))) as steps:
        for place in range(rounds):
            now, losses = without_each(model, stack, task, parts, gone, steps.advance)
            whole = now if place == 0 else whole
            best = min(losses, key=lambda number: losses[number])
            if count is None and not losses[best] - whole <= limit:
                break
            gone.append(best)
            found.append(Choice(best, losses.pop(best), losses))
    return Layers(total, whole, tuple(found))


@torch.no_grad()
def without_each(
    model: PreTrainedModel,
    stack: Stack,
    task: AnyTask,
    parts: Sequence[list[Example]],
    gone: Sequence[int],
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[float, dict[int, float]]:
    """The mean loss without the layers that are gone already, and where one more goes: for each of the others.

    The plain way would be a whole pass for each. Here what a layer was given in the pass of all is given to the one behind it, which is
    the same numbers.
    """
    left = [number for number in range(len(stack.layers)) if number not in gone]
    passed: dict[int, torch.Tensor | None] = dict.fromkeys(gone)
    sums = np.zeros((len(left) + 1, 2))
    for part in parts:
        [batch] = task.step(model, [part], np.random.default_rng(0)).batches  # type: ignore[arg-type]  # no adapter lies on it
        batch = batch.to(model.device)
        with stack.given(passed), stack.noted() as seen:
            sums[0] += _summed(model, task, batch)
        for place, number in enumerate(left, 1):
            before: dict[int, torch.Tensor | None] = dict.fromkeys(left[: place - 1])
            with stack.given({**passed, **before, number: seen[number]}):
                sums[place] += _summed(model, task, batch)
        advance(len(left) * len(part))
    means = sums[:, 0] / sums[:, 1]
    return float(means[0]), dict(zip(left, means[1:].tolist(), strict=True))


def _summed(model: PreTrainedModel, task: AnyTask, batch: Batch) -> np.ndarray:
    """[2] the summed loss of a pass, and the weight by which the mean divides."""
    found = task.loss(model, batch)  # type: ignore[arg-type]
    return np.array([found.loss.item(), found.weight])
