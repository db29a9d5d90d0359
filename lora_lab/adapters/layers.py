"""Which layers of a base an adapter can sit on, and which of them the names in a configuration mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lora_lab.errors import AdapterError, nearest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# How transformers names what reads no texts, in configurations and in models, and how deep in a model it stands.
_OTHER_SENSES = re.compile(r"vision|visual|audio|speech|image|video|multi_?modal|(^|_)mm_|aligner")
_DEPTH = 3
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")  # peft refuses `out_proj` there
_gives_other: dict[type, bool] = {}  # classes of linear layers: whether they give something else than one


class Size(NamedTuple):
    """How many numbers a linear layer reads and gives for each token."""

    inputs: int
    outputs: int


def size_of(layer: nn.Module) -> Size:
    """The size of a linear layer, which may be quantized."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(layer, nn.Linear):
        return Size(layer.in_features, layer.out_features)
    first, second = layer.get_parameter("weight").shape
    return Size(first, second) if isinstance(layer, Conv1D) else Size(second, first)


def targeted(
    model: PreTrainedModel, told: str | list[str], names: str | list[str], new_modules: Sequence[str] = ()
) -> list[str]:
    """The linear layers of a base that `adapter.target_modules` means.

    Args:
        told: the value itself.
        names: the same as peft's rule reads it.
        new_modules: what is trained whole, and so gets no adapter.

    Raises:
        AdapterError: a name that matches no layer (even if others match); a tied output head; a layer that is read past its module.
    """
    whole = tuple(f"{name}." for name in (*new_modules, *towers(model)))
    layers = [name for name in linear_layers(model) if not f"{name}.".startswith(whole)]
    head = model.get_output_embeddings()
    unread, shared = bypassed(model), tied(model)
    if told == "all-linear":  # peft leaves out the output head
        return [name for name in layers if model.get_submodule(name) is not head and name not in {*unread, *shared}]
    found = matching("adapter.target_modules", names, layers)
    _refuse_tied_head(model, found)
    _refuse_tied([name for name in found if name in shared])
    _refuse_bypassed(model, [name for name in found if name in unread])
    return found


def in_layers(model: PreTrainedModel, targeted: list[str], numbers: Sequence[int] | None) -> list[str]:
    """The targets in the layers of these numbers (`adapter.layers_to_transform`); None: all.

    Raises:
        AdapterError: a layer that does not exist, or none left.
    """
    if numbers is None:
        return targeted
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for number in numbers:
        if depth is not None and not 0 <= number < depth:
            raise AdapterError(f"adapter.layers_to_transform={number}: the model's layers are 0 to {depth - 1}.")
    found = [name for name in targeted if layer_number(name) in numbers]
    if not found:
        raise AdapterError(f"adapter.layers_to_transform={numbers}: no layer is left to adapt.")
    return found


def towers(model: nn.Module) -> list[str]:
    """Names of the parts of a base that only pictures, sound or video reach: a run on texts never calls them."""
    config = getattr(model, "config", None)
    if not any(_OTHER_SENSES.search(name) for name in getattr(config, "sub_configs", ())):
        return []
    found: list[str] = []
    for name, _ in model.named_modules():
        inside = any(name.startswith(f"{tower}.") for tower in found)
        if not inside and name.count(".") < _DEPTH and _OTHER_SENSES.search(name.rpartition(".")[2]):
            found.append(name)
    return found


def bypassed(model: PreTrainedModel) -> list[str]:
    """Layers whose weights fast kernels read past the module, and so past an adapter on it: the last of Mamba's mixers, in the
    families for which peft says so."""
    if getattr(model.config, "model_type", None) not in _MAMBA:
        return []
    return [name for name in linear_layers(model) if name.endswith((".mixer.out_proj", ".mamba.out_proj"))]


def tied(model: PreTrainedModel) -> list[str]:
    """Linear layers, but for the output head, that share their weight with another module: what is added to one in training would be
    added to both in a merge."""
    pairs = model.all_tied_weights_keys
    names = {name.removesuffix(".weight") for pair in pairs.items() for name in pair}
    head = model.get_output_embeddings()
    return [name for name in linear_layers(model) if name in names and model.get_submodule(name) is not head]


def sharing(model: PreTrainedModel) -> set[str]:
    """All modules that share their weight with another one."""
    return {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}


def leaves(model: PreTrainedModel, key: str, names: Sequence[str]) -> list[str]:
    """The modules without parts, such as embeddings and norms, that endings of names mean.

    Raises:
        AdapterError: a name that matches none.
    """
    there = [
        name
        for name, module in model.named_modules()
        if not any(True for _ in module.children()) and any(True for _ in module.parameters())
    ]
    for name in names:
        if not any(one == name or one.endswith(f".{name}") for one in there):
            endings = sorted({one.rpartition(".")[2] for one in there if not one.rpartition(".")[2].isdecimal()})
            raise AdapterError(
                f"{key}: {name} matches no module that can be trained whole.{nearest(name, endings)} The model has: {', '.join(endings)}."
            )
    return [one for one in there if any(one == name or one.endswith(f".{name}") for name in names)]


def _refuse_tied(named: list[str]) -> None:
    if named:
        raise AdapterError(
            f"adapter.target_modules: '{named[0]}' shares its weights with another module, so merging would change both. Leave it out, or "
            "set adapter.target_modules=all-linear, which does."
        )


def _refuse_bypassed(model: PreTrainedModel, named: list[str]) -> None:
    if named:
        raise AdapterError(
            f"adapter.target_modules: {named[0]}: the kernels of {model.config.model_type} read its weight past the module, and so past an "
            "adapter on it. Leave it out, or set adapter.target_modules=all-linear, which does."
        )


def layer_number(name: str) -> int | None:
    """The layer that a module is in, by peft's rule: the last number in its name."""
    found = re.match(r".*\.[^.]*\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else None


def linear_layers(model: nn.Module) -> list[str]:
    """Names of all linear layers of a base (also quantized or adapted ones, and transformers' `Conv1D`)."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return [name for name, layer in _modules(model) if isinstance(layer, (nn.Linear, Conv1D)) and not is_router(layer)]


def normalizations(model: nn.Module) -> list[str]:
    """Names of all normalizations of a base that have weights (also adapted ones), whatever their class: modules that are named so and
    hold vectors only."""
    return [
        name
        for name, module in _modules(model)
        if "norm" in type(module).__name__.lower()
        and getattr(module, "weight", None) is not None
        and all(one.dim() == 1 for one in module.parameters())
    ]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a base by name; of an adapted one itself, in place of what adapters put there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        adapted = isinstance(module, BaseTunerLayer)
        inside = f"{name}." if adapted else inside
        yield name, module.get_base_layer() if adapted else module


def is_router(module: nn.Module) -> bool:
    """Whether a module is a linear layer by its class, but gives something else than one (Llama 4's router)."""
    from torch import nn

    own = type(module)
    if (
        not isinstance(module, nn.Linear)
        or own.forward is nn.Linear.forward
        or not own.__module__.startswith("transformers.models.")
    ):
        return False
    if own not in _gives_other:
        _gives_other[own] = not _gives_one_tensor(module)
    return _gives_other[own]


def _gives_one_tensor(module: nn.Linear) -> bool:
    """Whether a class of its own still computes what a linear layer does; tried without content."""
    import torch

    state = {name: one.detach().to("meta") for name, one in module.named_parameters()}
    try:
        found = torch.func.functional_call(
            module, state, torch.empty(1, module.in_features, dtype=module.weight.dtype, device="meta")
        )
    except (
        TypeError,
        ValueError,
        RuntimeError,
        IndexError,
        AttributeError,
    ):  # it is called otherwise than a linear layer
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, module.out_features)


def expert_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a mixture's experts, which lie in one tensor [experts, ...], and of the routers beside them; of an adapted model
    the base's."""
    from torch import nn

    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)
    experts, others = {}, {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if parameter.dim() == 3 and not isinstance(module, convolutions):
            experts[name] = parameter
        elif parameter.dim() == 2 and (not isinstance(module, (nn.Linear, nn.Embedding)) or is_router(module)):
            others[name] = parameter
    blocks = {block_of(name) for name in experts}
    return {**experts, **{name: one for name, one in others.items() if block_of(name) in blocks}}


def block_of(name: str) -> str:
    """The module that holds the module of a parameter, whatever wraps that."""
    return name.replace(".base_layer", "").rpartition(".")[0].rpartition(".")[0]


def matching(key: str, names: str | list[str], layers: list[str], shown: str | None = None) -> list[str]:
    """The layers that names match, by peft's rule: a list holds exact names or endings after a dot, a single text is a
    regular expression. Every name must match some layer."""
    if isinstance(names, str):
        try:
            found = {shown or names: [layer for layer in layers if re.fullmatch(names, layer)]}
        except re.error as error:
            raise AdapterError(f"{key}={shown or names}: not a regular expression ({error}).") from error
    else:
        found = {name: [layer for layer in layers if layer == name or layer.endswith(f".{name}")] for name in names}
    missing = [name for name, matched in found.items() if not matched]
    if missing or (not found and key == "adapter.target_modules"):
        endings = sorted({layer.rpartition(".")[2] for layer in layers})
        reason = f"{', '.join(missing)} matches no linear layer" if missing else "the list is empty"
        where = "The model has" if key == "adapter.target_modules" else "Adapted are"
        hint = nearest(missing[0], endings) if missing else ""
        if isinstance(names, str) and shown is None:
            hint = f" One text is a regular expression for whole names, such as '{layers[0]}'; endings are a list, such as [q_proj]."
        raise AdapterError(f"{key}: {reason}.{hint} {where}: {', '.join(endings)}.")
    return [layer for layer in layers if any(layer in matched for matched in found.values())]


def _refuse_tied_head(model: PreTrainedModel, targeted: list[str]) -> None:
    head = model.get_output_embeddings()
    if not model.config.get_text_config().tie_word_embeddings:
        return
    for name in targeted:
        if model.get_submodule(name) is head:
            raise AdapterError(
                f"adapter.target_modules: '{name}' shares its weights with the input embeddings, so merging would change "
                "both. Leave it out."
            )
