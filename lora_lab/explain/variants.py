"""One adapter in several forms: without some layers, or as twins that share its weights and have gradients of their own.

A twin is a further name in the modules that the adapter sits on. So rows of several twins go through one pass as rows of several members of
a sweep do (`fast/routing.py`): each row sees the adapter without other layers, or gets a gradient of its own.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_lab.adapters.attach import base_of, trainable
from lora_lab.adapters.layers import layer_number
from lora_lab.errors import LoraLabError
from lora_lab.fast.routing import Route
from lora_lab.runtime.memory import is_out_of_memory
from lora_lab.training.sharing import reason_of_rows

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_lab.data.collate import Batch
    from lora_lab.run.setup import Setup
    from lora_lab.tasks.base import AnyTask, LossSum


@dataclasses.dataclass(frozen=True)
class Twin:
    """A further name of an adapter."""

    name: str
    parameters: dict[str, nn.Parameter]  # what is trained, by the adapter's own names; the memory is the adapter's


def adapted(model: PeftModel) -> dict[str, Any]:
    """peft's layers around the modules of a base that are adapted, or trained whole, by the names of those."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return {name: module for name, module in base_of(model).named_modules() if isinstance(module, kinds)}


def parts(model: PeftModel) -> dict[str, list[str]]:
    """The names of adapted modules by the part of the model that they are in: a layer, or the module itself where it is in none."""
    found: dict[str, list[str]] = {}
    for name in adapted(model):
        number = layer_number(name)
        found.setdefault(name if number is None else f"layer {number}", []).append(name)
    return found


@contextlib.contextmanager
def off(model: PeftModel, names: Collection[str]) -> Iterator[None]:
    """Inside the block the adapter does nothing in these modules (see `adapted`)."""
    modules = [module for name, module in adapted(model).items() if name in names]
    for module in modules:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in modules:
            module.enable_adapters(True)


@contextlib.contextmanager
def twins(model: PeftModel, without: Sequence[Collection[str]]) -> Iterator[list[Twin]]:
    """Inside the block the active adapter has so many twins.

    Args:
        without: for each the modules that it is missing in (see `adapted`).
    """
    own = str(model.active_adapter)
    found = [Twin(f"{own}-twin-{number}", {}) for number in range(len(without))]
    memory = [_Memory(model, twin) for twin in found]
    added: list[tuple[Any, str]] = []
    try:
        for name, module in adapted(model).items():
            for held in _held(module, own):
                for twin, memo, missing in zip(found, memory, without, strict=True):
                    if name not in missing:
                        held[twin.name] = memo.copied(held[own])
                        added.append((held, twin.name))
        yield found
    finally:
        for held, name in added:
            del held[name]


def _held(module: Any, name: str) -> list[Any]:
    """What one of peft's layers keeps by the names of adapters: modules, parameters, settings."""
    names = (*module.adapter_layer_names, *getattr(module, "other_param_names", ()))
    kept = [getattr(module, one) for one in names]
    return [one for one in kept if isinstance(one, dict | nn.ModuleDict | nn.ParameterDict) and name in one]


class _Memory:
    """What of an adapter is the same in a twin: all tensors; parameters that are trained become others over the same memory."""

    def __init__(self, model: PeftModel, twin: Twin) -> None:
        self._memo: dict[int, Any] = {}
        for name, parameter in trainable(model).items():
            twin.parameters[name] = nn.Parameter(parameter.detach())
            self._memo[id(parameter)] = twin.parameters[name]

    def copied(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            for tensor in (*value.parameters(), *value.buffers()):
                self._memo.setdefault(id(tensor), tensor)
        return copy.deepcopy(value, self._memo)


def reason_against(setup: Setup) -> str:
    """Why rows of several twins cannot go through one pass of a loaded model; empty if they can."""
    return reason_of_rows(setup.config, setup.task) or setup.task.forward.unshareable


def losses_of(task: AnyTask, model: PeftModel, found: Sequence[Twin], batches: Sequence[Batch]) -> list[LossSum]:
    """The summed loss of each twin's batch, from one pass over all of them."""
    moved = [batch.to(model.device) for batch in batches]
    routes = [
        Route(twin.name, batch.num_tokens, batch.num_places, None, batch.shapes)
        for twin, batch in zip(found, moved, strict=True)
    ]
    with task.forward.routing.routed(routes):
        losses: list[LossSum] = task.losses_of_members(model, moved)
    return losses


def gap(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """How far tensors are from others, as a share of their norm."""
    apart = sum(float((one - other).square().sum()) for one, other in zip(ones, others, strict=True))
    norm = sum(float(other.square().sum()) for other in others)
    return float((apart / norm) ** 0.5) if norm else float(apart**0.5)


def compared(compare: Callable[[], str]) -> str:
    """What a comparison says is wrong, or the error that it ends with: whatever a model of another make raises of what it is given. Only a
    lack of memory goes on."""
    try:
        return compare()
    except LoraLabError as error:
        return str(error)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
