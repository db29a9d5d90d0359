"""Put an adapter on the base model, and prove that it sits where the user said."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.adapters import files
from lora_lab.adapters.lora import LoraAdapter
from lora_lab.base.load import ModelKind
from lora_lab.errors import AdapterError, nearest

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel


# How transformers names what reads no texts, in configurations and in models, and how deep in a model it stands.
_OTHER_SENSES = re.compile(r"vision|visual|audio|speech|image|video|multi_?modal|(^|_)mm_|aligner")
_DEPTH = 3
_MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")  # peft refuses `out_proj` there
_gives_other: dict[type, bool] = {}  # classes of linear layers: whether they give something else than one


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Where an adapter sits."""

    matched: int  # adapted layers
    linear_layers: int  # all linear layers of the base, the output head included
    trainable_parameters: int
    base_parameters: int
    matched_experts: int = 0  # adapted weights of experts and routers
    experts: int = 0  # all of them

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / self.base_parameters
        experts = (
            f" and {self.matched_experts} of {self.experts} weights of experts and routers" if self.experts else ""
        )
        return (
            f"{self.matched} of {self.linear_layers} linear layers{experts} adapted, "
            f"{self.trainable_parameters:,} trainable parameters ({share:.2f} % of the base's {self.base_parameters:,})"
        )


def check_targets(model: PreTrainedModel, adapter: LoraAdapter, new_modules: Sequence[str] = ()) -> list[str]:
    """Check every name in the adapter's settings against the layers of a model without weights.

    Args:
        new_modules: what is trained whole, and so gets no adapter.

    Returns:
        The names of the layers that will be adapted.

    Raises:
        AdapterError: a name in `target_modules` that matches no layer (even if others match); a name in
            `exclude_modules`, `rank_pattern` or `alpha_pattern` that matches no targeted layer; a layer number that does
            not exist; a tied output head, a layer that is read past its module.
    """
    whole = tuple(f"{name}." for name in (*new_modules, *towers(model)))
    layers = [name for name in linear_layers(model) if not f"{name}.".startswith(whole)]
    head = model.get_output_embeddings()
    unread, shared = bypassed(model), tied(model)
    if adapter.target_modules == "all-linear":  # peft leaves out the output head
        targeted = [name for name in layers if model.get_submodule(name) is not head and name not in {*unread, *shared}]
    else:
        targeted = _matching("adapter.target_modules", adapter.targets, layers)
        _refuse_tied_head(model, targeted)
        _refuse_tied([name for name in targeted if name in shared])
        _refuse_bypassed(model, [name for name in targeted if name in unread])
    excluded = _matching("adapter.exclude_modules", adapter.exclude_modules or [], targeted)
    targeted = [name for name in targeted if name not in excluded]
    for key in ("rank_pattern", "alpha_pattern"):
        for name in getattr(adapter, key) or {}:
            _matching(f"adapter.{key}", rf"(.*\.)?({name})", targeted, shown=name)
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for number in adapter.layers_to_transform or []:
        if depth is not None and not 0 <= number < depth:
            raise AdapterError(f"adapter.layers_to_transform={number}: the model's layers are 0 to {depth - 1}.")
    if adapter.layers_to_transform is not None:
        targeted = [name for name in targeted if layer_number(name) in adapter.layers_to_transform]
        if not targeted:
            raise AdapterError(f"adapter.layers_to_transform={adapter.layers_to_transform}: no layer is left to adapt.")
    return targeted


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
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found, inside = [], None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        adapted = isinstance(module, BaseTunerLayer)
        inside = f"{name}." if adapted else inside
        layer = module.get_base_layer() if adapted else module
        if isinstance(layer, (nn.Linear, Conv1D)) and not _is_router(layer):
            found.append(name)
    return found


def _is_router(module: nn.Module) -> bool:
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
        elif parameter.dim() == 2 and (not isinstance(module, (nn.Linear, nn.Embedding)) or _is_router(module)):
            others[name] = parameter
    blocks = {_block(name) for name in experts}
    return {**experts, **{name: one for name, one in others.items() if _block(name) in blocks}}


def _block(name: str) -> str:
    """The module that holds the module of a parameter, whatever wraps that."""
    return name.replace(".base_layer", "").rpartition(".")[0].rpartition(".")[0]


def _matching(key: str, names: str | list[str], layers: list[str], shown: str | None = None) -> list[str]:
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


def attach(
    model: PreTrainedModel | PeftModel, adapter: LoraAdapter, name: str, kind: ModelKind, seed: int
) -> PeftModel:
    """Add a fresh adapter under `name`; its float32 weights are drawn with `seed`, and only they and a copy of each new
    module, in float32 too, are trainable.

    A fresh adapter leaves the base's outputs unchanged.
    """
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return _put(model, fresh_settings(base, adapter, kind), name, seed)


def fresh_settings(base: PreTrainedModel, adapter: LoraAdapter, kind: ModelKind) -> PeftConfig:
    """peft's settings of a fresh adapter on this base (which may be on the meta device).

    Of families whose experts peft knows, 'all-linear' and the names that experts had before transformers 5 mean their weights.

    Raises:
        AdapterError: an option that is not defined for experts.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = adapter.peft_config(kind.peft_task_type)
    config.modules_to_save = list(kind.new_modules) or None
    routers = any(map(_is_router, base.modules()))
    if (
        kind.new_modules
        or adapter.layers_to_transform is not None
        or routers
        or towers(base)
        or bypassed(base)
        or tied(base)
    ):  # peft has no rule that says the same
        config.target_modules = check_targets(base, adapter, kind.new_modules)
        config.exclude_modules = None
    convert_peft_config_for_transformers(config, base, None)
    told = [key for key, value in (("lora_dropout", adapter.lora_dropout), ("use_dora", adapter.use_dora)) if value]
    if config.target_parameters and told:
        raise AdapterError(
            f"adapter.{told[0]}: not defined for the weights of experts ({', '.join(sorted(config.target_parameters))}). Drop it, or "
            "name other adapter.target_modules, such as [q_proj,k_proj,v_proj,o_proj]."
        )
    return config


def attach_trained(model: PreTrainedModel | PeftModel, folder: Path, name: str) -> PeftModel:
    """Add the adapter in a verified folder under `name`: its settings and weights are the folder's alone.

    Raises:
        AdapterError: the folder does not fit this model.
    """
    model = _put(model, files.settings(folder), name, seed=0)
    files.read_into(folder, model, name)
    return model


def _put(model: PreTrainedModel | PeftModel, config: PeftConfig, name: str, seed: int) -> PeftModel:
    import torch
    from peft import PeftModel, get_peft_model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    config.inference_mode = False
    config.fan_in_fan_out = any(
        isinstance(module, Conv1D) for module in model.modules()
    )  # as this base lies, not another
    try:
        with warnings.catch_warnings():
            if config.target_parameters:  # peft looks for its own patterns of experts among the layers alone
                warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
    except (ValueError, NotImplementedError) as error:
        raise AdapterError(f"adapter: peft refuses it on this base ({error}).") from error
    model.set_adapter(name)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model


@contextlib.contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Inside the block the model is the base. Unlike peft's own, blocks may lie within each other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if next(m for m in model.modules() if isinstance(m, BaseTunerLayer)).disable_adapters:
        yield
        return
    with model.disable_adapter():
        yield


def trainable(model: PeftModel) -> dict[str, nn.Parameter]:
    """The active adapter's parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def coverage(model: PeftModel, name: str) -> Coverage:
    """Where the adapter `name` sits. Quantized weights count as the parameters that they stand for."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer) and name in m.active_adapters}
    own = sum(parameter.numel() for parameter in trainable(model).values())
    _, total = model.get_nb_trainable_parameters()  # counts two weights in each byte of 4-bit storage
    layers = [layer for layer in linear_layers(model) if ".modules_to_save." not in layer]
    # peft's wrapper of a weight; some families' routers are linear layers all the same
    experts = [n for n, m in adapted.items() if hasattr(m, "parameter_name") and n not in layers]
    return Coverage(
        len(adapted) - len(experts), len(layers), own, total - own, len(experts), len(expert_weights(model))
    )
