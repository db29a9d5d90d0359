"""Put an adapter on the base model, and prove that it sits where the user said."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.adapters.lora import LoraAdapter
from lora_lab.errors import AdapterError, nearest

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Where an adapter sits."""

    matched: int  # adapted layers
    linear_layers: int  # all linear layers of the base, the output head included
    trainable_parameters: int
    base_parameters: int

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / self.base_parameters
        return (
            f"{self.matched} of {self.linear_layers} linear layers adapted, "
            f"{self.trainable_parameters:,} trainable parameters ({share:.2f} % of the base's {self.base_parameters:,})"
        )


def check_targets(folder: Path, adapter: LoraAdapter) -> None:
    """Check every name in the adapter's settings against the model's layers, before any weight is loaded.

    Raises:
        AdapterError: a name in `target_modules`, `exclude_modules`, `rank_pattern` or `alpha_pattern` that matches
            nothing (even if others match), a layer number that does not exist, or a tied output head.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = linear_layers(model)
    targets = adapter.target_modules
    if targets != "all-linear":
        _check_names("adapter.target_modules", targets, layers)
    _check_names("adapter.exclude_modules", adapter.exclude_modules or [], layers)
    for key in ("rank_pattern", "alpha_pattern"):
        for name in getattr(adapter, key) or {}:
            _check_names(f"adapter.{key}", rf"(.*\.)?({name})", layers, shown=name)
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    for number in adapter.layers_to_transform or []:
        if depth is not None and not 0 <= number < depth:
            raise AdapterError(f"adapter.layers_to_transform={number}: the model's layers are 0 to {depth - 1}.")
    _refuse_tied_head(model, config, targets, layers)


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers (also quantized ones, and transformers' `Conv1D`)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]


def _check_names(key: str, names: str | list[str], layers: list[str], shown: str | None = None) -> None:
    """peft's rule: a list holds exact names or endings after a dot, a single text is a regular expression."""
    if isinstance(names, str):
        try:
            matched = any(re.fullmatch(names, layer) for layer in layers)
        except re.error as error:
            raise AdapterError(f"{key}={shown or names}: not a regular expression ({error}).") from error
        missing = [] if matched else [shown or names]
    else:
        missing = [n for n in names if not any(layer == n or layer.endswith(f".{n}") for layer in layers)]
    if missing or (not names and key == "adapter.target_modules"):
        endings = sorted({layer.rpartition(".")[2] for layer in layers})
        found = f"{', '.join(missing)} matches no linear layer" if missing else "the list is empty"
        raise AdapterError(
            f"{key}: {found}.{nearest(missing[0], endings) if missing else ''} The model has: {', '.join(endings)}."
        )


def _refuse_tied_head(model: PreTrainedModel, config, targets: str | list[str], layers: list[str]) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not config.get_text_config().tie_word_embeddings or targets == "all-linear":
        return
    name = next(name for name, module in model.named_modules() if module is head)
    hit = (
        re.fullmatch(targets, name)
        if isinstance(targets, str)
        else any(name == t or name.endswith(f".{t}") for t in targets)
    )
    if hit and embedding is not None:
        raise AdapterError(
            f"adapter.target_modules: '{name}' shares its weights with the input embeddings, so merging would change "
            "both. Leave it out."
        )


def attach(model: PreTrainedModel | PeftModel, adapter: LoraAdapter, name: str, task_type: str, seed: int) -> PeftModel:
    """Add a fresh adapter under `name`; its float32 weights are drawn with `seed`, and only they are trainable.

    A fresh adapter leaves the base's outputs unchanged.
    """
    import torch
    from peft import PeftModel, get_peft_model

    torch.manual_seed(seed)
    config = adapter.peft_config(task_type)
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise AdapterError(f"adapter: peft refuses it on this base ({error}).") from error
    model.set_adapter(name)
    return model


def trainable(model: PeftModel) -> dict[str, nn.Parameter]:
    """The active adapter's parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def coverage(model: PeftModel, name: str) -> Coverage:
    """Where the adapter `name` sits. Quantized weights count as the parameters that they stand for."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and name in m.active_adapters]
    own = sum(parameter.numel() for parameter in trainable(model).values())
    _, total = model.get_nb_trainable_parameters()  # counts two weights in each byte of 4-bit storage
    inner = {n for n in linear_layers(model) if ".lora_" not in n and not n.endswith(".base_layer")}
    return Coverage(len(adapted), len(inner) + len(adapted), own, total - own)
