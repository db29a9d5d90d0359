"""What an adapter that was trained on a quantized base is merged into.

`full_precision` is the base as it was published; `dequantized` is what training saw, read back from its 4 or 8 bits; `corrected`
is the published base plus the largest part, by singular values, of what quantizing did to each layer.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lab.adapters.deltas import factored
from lora_lab.base import weight_only
from lora_lab.base.load import BaseFiles, load_model
from lora_lab.config.model import QuantConfig
from lora_lab.config.run import RunConfig
from lora_lab.run.setup import Setup

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


def load(policy: str, setup: Setup) -> PreTrainedModel:
    """The base that a policy names, at `export.dtype`, every parameter frozen."""
    config, base, kind, device = setup.config, setup.base, setup.kind, setup.device
    if policy == "full_precision":
        return load_model(base, kind, config.export.dtype, QuantConfig(), device, config.seed)
    dtype = getattr(torch, config.export.dtype)
    anew = dataclasses.replace(config.quant, cache=False)  # what is kept in 4 bits could not be saved in others
    quantized = load_model(base, kind, config.model.dtype, anew, device, config.seed)
    if config.quant.method == "torchao_int8":
        as_trained = weight_only.dequantize(quantized, dtype).to(dtype)
    else:
        as_trained = quantized.dequantize(dtype=dtype).to(dtype).requires_grad_(False).eval()
    _forget_reading(as_trained)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # peft's IA3 goes by them
        vars(as_trained).pop(flag, None)
    _turn_back(as_trained, setup.skeleton())
    if policy == "dequantized":
        return as_trained
    model = load_model(base, kind, config.export.dtype, QuantConfig(), device, config.seed)
    torch.manual_seed(config.seed)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            _correct(module.weight, as_trained.get_submodule(name).weight, config.merge.correction_rank)
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


def _turn_back(model: PreTrainedModel, published: PreTrainedModel) -> None:
    """Give a dequantized model the layers that it was published with: bitsandbytes makes a Linear of GPT-2's `Conv1D`, whose weight
    lies the other way round."""
    for name, module in published.named_modules():
        own = model.get_submodule(name)
        if isinstance(module, Conv1D) and isinstance(own, nn.Linear):
            turned = Conv1D(own.out_features, own.in_features)
            turned.weight = nn.Parameter(own.weight.data.T.contiguous(), requires_grad=False)
            turned.bias = own.bias
            model.set_submodule(name, turned)


@torch.no_grad()
def _correct(weight: torch.Tensor, seen: torch.Tensor, rank: int) -> None:
    """Move a weight [N, D] by the part of rank `rank` of its way to what training saw."""
    error = seen.float() - weight.float()
    weight.copy_(factored(error, rank)[0].added_to(weight))
