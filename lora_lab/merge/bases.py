"""What an adapter that was trained on a quantized base is merged into.

`full_precision` is the base as it was published; `dequantized` is what training saw, read back from its 4 or 8 bits; `corrected`
is the published base plus the largest part, by singular values, of what quantizing did to each layer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lab.adapters.deltas import factored
from lora_lab.base import weight_only
from lora_lab.base.load import BaseFiles, load_model
from lora_lab.base.load import skeleton as load_skeleton
from lora_lab.base.weights import Weights
from lora_lab.config.model import QuantConfig
from lora_lab.config.run import RunConfig
from lora_lab.run.setup import Setup
from lora_lab.verify import layers

_WORTH_A_FILE = 2**16  # bytes of a tensor
# where the conversions of weights in few bits are defined
_READING = ("transformers.integrations.bitsandbytes", "transformers.integrations.torchao")

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def policies(config: RunConfig, base: BaseFiles) -> tuple[str, ...]:
    """The bases to be measured."""
    if base.published is not None:  # nothing else is there
        return ("dequantized",)
    if config.quant.method == "none":
        return ("full_precision",)
    return ("dequantized", "full_precision") if config.merge.base == "auto" else (config.merge.base,)


class Drawer:
    """Puts tensors into files of a folder and gives them back mapped from there, so that they need no memory of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same numbers on the CPU; of small tensors, the tensor itself."""
        tensor = tensor.detach().cpu()
        if tensor.nbytes < _WORTH_A_FILE:
            return tensor
        file = self._folder / f"{self._count}.safetensors"
        self._count += 1
        save_file({"weight": tensor.contiguous()}, file)
        return load_file(file)["weight"]


def as_a_whole(setup: Setup) -> bool:
    """Whether the unquantized base is loaded as a whole onto the run's device; else its weights stay in files."""
    config = setup.config
    skeleton = load_skeleton(setup.base.folder, setup.kind, config.export.dtype)
    return layers.fits(layers.size(skeleton), layers.free_on(setup.device))


def load(policy: str, setup: Setup, drawer: Drawer | None = None) -> PreTrainedModel:
    """The base that a policy names, at `export.dtype`, every parameter frozen.

    Args:
        drawer: the base's weights are mapped from files, its own where they are of that type, else the drawer's, and lie on the CPU;
            None: they are in the memory of the run's device.
    """
    config = setup.config
    if policy == "full_precision":
        return _published(setup, drawer)
    as_trained = _dequantized(setup, drawer)
    _forget_reading(as_trained)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # peft's IA3 goes by them
        vars(as_trained).pop(flag, None)
    _turn_back(as_trained, setup.skeleton(), drawer)
    if policy == "dequantized":
        return as_trained
    model = _published(setup, drawer)
    torch.manual_seed(config.seed)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            seen: Any = as_trained.get_submodule(name).weight
            weight = _corrected(module.weight, seen, config.merge.correction_rank)
            layers.forget([module.weight, seen])
            module.weight.data = weight if drawer is None else drawer(weight)
    return model


def _published(setup: Setup, drawer: Drawer | None) -> PreTrainedModel:
    """The unquantized base."""
    config, none = setup.config, QuantConfig()
    if drawer is None:
        return load_model(setup.base, setup.kind, config.export.dtype, none, setup.device, config.seed)
    stored = Weights(setup.base.folder).dtype or config.export.dtype
    model = load_model(setup.base, setup.kind, stored, none, torch.device("cpu"), config.seed)
    return _moved(model, config.export.dtype, drawer)


def _dequantized(setup: Setup, drawer: Drawer | None) -> PreTrainedModel:
    """The base as training saw it."""
    config, dtype = setup.config, getattr(torch, setup.config.export.dtype)
    quantized = load_model(setup.base, setup.kind, config.model.dtype, config.quant, setup.device, config.seed)
    if config.quant.method == "torchao_int8":
        model = weight_only.dequantize(quantized, dtype, drawer)
    elif drawer is None:
        model = quantized.dequantize(dtype=dtype)
    else:
        model = _read_back(quantized, dtype, drawer)
    model = model.to(dtype) if drawer is None else _moved(model, config.export.dtype, drawer)
    return model.requires_grad_(False).eval()


def _read_back(model: PreTrainedModel, dtype: torch.dtype, drawer: Drawer) -> PreTrainedModel:
    """A model that bitsandbytes quantized, dequantized layer by layer; transformers' own way has all of them in memory."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for name, module in list(model.named_modules()):
        if not isinstance(module, Linear4bit | Linear8bitLt):
            continue
        weight = dequantize_bnb_weight(module.weight, module.state if isinstance(module, Linear8bitLt) else None)
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(drawer(weight.to(dtype)), requires_grad=False)
        plain.bias = module.bias
        model.set_submodule(name, plain)
    quantizer: Any = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    return model


def _moved(model: PreTrainedModel, dtype: str, drawer: Drawer) -> PreTrainedModel:
    """A model with its weights on the CPU at a type, but for those that its family computes in float32."""
    target = getattr(torch, dtype)
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(target)]
    for name, parameter in model.named_parameters():
        own = torch.float32 if any(pattern.search(name) for pattern in kept) else target
        if parameter.device.type != "cpu" or parameter.dtype != own:
            moved = drawer(parameter.data.to(own))
            layers.forget([parameter.data])
            parameter.data = moved
    for buffer in model.buffers():
        buffer.data = buffer.data.cpu()
    return model


def _forget_reading(model: PreTrainedModel) -> None:
    """Keep transformers, when it saves a dequantized model, from undoing how it read weights that were published in few bits: it has
    no way back, and none is needed."""
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [
        one
        for one in conversions
        if not any(type(step).__module__ in _READING for step in getattr(one, "operations", ()))
    ] or None


def _turn_back(model: PreTrainedModel, published: PreTrainedModel, drawer: Drawer | None) -> None:
    """Give a dequantized model the layers that it was published with: bitsandbytes makes a Linear of GPT-2's `Conv1D`, whose weight
    lies the other way round."""
    for name, module in published.named_modules():
        own = model.get_submodule(name)
        if isinstance(module, Conv1D) and isinstance(own, nn.Linear):
            turned = Conv1D(own.out_features, own.in_features)
            weight = own.weight.data.T.contiguous()
            turned.weight = nn.Parameter(weight if drawer is None else drawer(weight), requires_grad=False)
            turned.bias = own.bias
            model.set_submodule(name, turned)


@torch.no_grad()
def _corrected(weight: torch.Tensor, seen: torch.Tensor, rank: int) -> torch.Tensor:
    """A weight [N, D], moved by the part of rank `rank` of its way to what training saw."""
    error = seen.float() - weight.float()
    return factored(error, rank)[0].added_to(weight).to(weight.dtype)
