"""Put an adapter on the base model, and prove that it sits where the user said."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lora_lab.adapters import files
from lora_lab.adapters.layers import expert_weights, linear_layers
from lora_lab.base.load import ModelKind
from lora_lab.errors import AdapterError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from lora_lab.adapters.base import AdapterSection


_HARMLESS = (  # of what peft warns where it is meant so
    "Failed to load the CUDA extension",  # BOFT, which then has one butterfly factor, as it is told here
    "Setting boft_n_butterfly_factor to 1",
    "Unsupported layer type",  # LN tuning of a normalization that is no torch.nn.LayerNorm; it needs no size
)


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Where an adapter sits."""

    matched: int  # adapted layers
    linear_layers: int  # all linear layers of the base, the output head included
    trainable_parameters: int
    base_parameters: int
    matched_experts: int = 0  # adapted weights of experts and routers
    experts: int = 0  # all of them
    matched_others: int = 0  # adapted normalizations and embeddings
    virtual_tokens: int = 0  # before each row

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / self.base_parameters
        experts = (
            f" and {self.matched_experts} of {self.experts} weights of experts and routers" if self.experts else ""
        )
        linear = f"{self.matched} of {self.linear_layers} linear layers{experts}"
        others = f"{self.matched_others} normalizations, blocks and embeddings"
        adapted = [linear] * bool(self.matched or not self.matched_others) + [others] * bool(self.matched_others)
        where = (
            f"{self.virtual_tokens} virtual tokens before each row"
            if self.virtual_tokens
            else f"{' and '.join(adapted)} adapted"
        )
        return f"{where}, {self.trainable_parameters:,} trainable parameters ({share:.2f} % of the base's {self.base_parameters:,})"


def base_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """The model that adapters lie on, which peft calls no more than a module; of a model without any, itself."""
    whole: Any = model
    return cast("PreTrainedModel", whole.get_base_model() if hasattr(whole, "get_base_model") else whole)


def attach(
    model: PreTrainedModel | PeftModel, adapter: AdapterSection, name: str, kind: ModelKind, seed: int
) -> PeftModel:
    """Add a fresh adapter under `name`; its float32 weights are drawn with `seed`, and only they and a copy of each new
    module, in float32 too, are trainable. What is made of the base's weights or of rows, its section's `begin` gives it later.

    A fresh adapter leaves the base's outputs unchanged, unless its section says why not.
    """
    from peft import PeftModel

    base = base_of(model) if isinstance(model, PeftModel) else model
    model = _put(model, fresh_settings(base, adapter, kind), name, seed)
    adapter.shape(model, name)
    return model


def beside(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of their own over the same weights, for adapters that cannot lie on the same modules as others.

    Args:
        model: without adapters.
    """
    from bitsandbytes.nn import Linear8bitLt

    weights: dict[int, Any] = {id(one): one for one in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # what bitsandbytes keeps beside them
        kept = [vars(module).get("quant_state")]
        if isinstance(module, Linear8bitLt):
            if getattr(module.weight, "CB", None) is not None:  # it moves them from the weight at its first pass
                module.init_8bit_state()
            kept += [module.state.CB, module.state.SCB]
        weights |= {id(one): one for one in kept if one is not None}
    return copy.deepcopy(model, weights)


def fresh_settings(base: PreTrainedModel, adapter: AdapterSection, kind: ModelKind) -> PeftConfig:
    """peft's settings of a fresh adapter on this base (which may be on the meta device).

    Of families whose experts peft knows, 'all-linear' and the names that experts had before transformers 5 mean their weights.

    Raises:
        AdapterError: an option that is not defined for experts.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    by_name = adapter.needs_names(base, kind.unadapted)
    targets = adapter.targets(base, kind.unadapted) if by_name else None
    config = adapter.peft_config(kind.peft_task_type, targets)
    if kind.whole and not hasattr(config, "modules_to_save"):
        raise AdapterError(
            f"adapter.method={adapter.method}: peft saves no module that trains whole beside it, and {kind.whole[0]} would. Use adapter=lora."
        )
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = list(kind.whole) or None
    convert_peft_config_for_transformers(config, base, None)
    experts, told = getattr(config, "target_parameters", None), adapter.undefined_for_experts
    if experts and told:
        raise AdapterError(
            f"adapter.{told[0]}: not defined for the weights of experts ({', '.join(sorted(experts))}). Drop it, or "
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
    # some methods let peft train one adapter only, so of those that are there only one may say that it trains; `set_adapter` trains
    # whichever it is. A prompt's network is not made then
    others = [*model.peft_config.values()] if isinstance(model, PeftModel) else []
    for one in (*others[1:], config):
        one.inference_mode = bool(others) and not one.is_prompt_learning
    if hasattr(config, "fan_in_fan_out"):  # as this base lies, not another
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    try:
        with warnings.catch_warnings():
            for told in _HARMLESS:
                warnings.filterwarnings("ignore", told)
            if getattr(config, "target_parameters", None):  # peft looks for patterns of experts among the layers alone
                warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
            else:
                model = get_peft_model(model, config, adapter_name=name)
    except (ValueError, NotImplementedError) as error:
        raise AdapterError(f"adapter: peft refuses it on this base ({error}).") from error
    model.set_adapter(name)
    for one in (*others, config):
        one.inference_mode = False
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model


@contextlib.contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Inside the block the model is the base. Unlike peft's own, blocks may lie within each other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    if layer is not None and layer.disable_adapters:
        yield
        return
    with model.disable_adapter():
        yield


def trainable(model: PeftModel) -> dict[str, nn.Parameter]:
    """The active adapter's parameters by name. peft lets those of virtual tokens have gradients in every adapter."""
    other = tuple(f"prompt_encoder.{name}." for name in model.peft_config if name != model.active_adapter)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(other)
    }


def _parameters(model: PeftModel) -> int:
    """How many numbers the parameters stand for: two in each byte of 4-bit storage, which is a plain tensor where the base is sharded."""
    from bitsandbytes.nn import Params4bit

    found: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            described = name == "weight" and getattr(module, "quant_state", None) is not None
            packed = described or isinstance(parameter, Params4bit)
            found[id(parameter)] = parameter.numel() * (2 * parameter.element_size() if packed else 1)
    return sum(found.values())


def coverage(model: PeftModel, name: str) -> Coverage:
    """Where the adapter `name` sits. Quantized weights count as the parameters that they stand for."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer) and name in m.active_adapters}
    own = sum(parameter.numel() for parameter in trainable(model).values())
    total = _parameters(model)
    layers = [layer for layer in linear_layers(model) if ".modules_to_save." not in layer]
    # peft's wrapper of a weight; some families' routers are linear layers all the same
    experts = [n for n, m in adapted.items() if hasattr(m, "parameter_name") and n not in layers]
    others = adapted.keys() - {*layers, *experts}
    return Coverage(
        len(adapted) - len(experts) - len(others),
        len(layers),
        own,
        total - own,
        len(experts),
        len(expert_weights(model)),
        len(others),
        getattr(model.peft_config[name], "num_virtual_tokens", 0),
    )
