"""A base as it is stored in memory, quantized or not, without content: on the meta device, then on any device inside a
`FakeTensorMode`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from lora_lab.base import weight_only
from lora_lab.base.layers import layers_of
from lora_lab.base.load import BaseFiles, ModelKind, quantization_config, skeleton
from lora_lab.config.run import RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.quantizers.base import HfQuantizer

_BLOCK, _NESTED_BLOCK = 64, 256  # weights for each scale, and scales for each scale of scales (bitsandbytes' own)


def stored(config: RunConfig, base: BaseFiles, kind: ModelKind) -> tuple[PreTrainedModel, dict[str, int]]:
    """The base on the meta device, frozen and as loading would store it, and its number of weights by name."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quant = base.stored(config.quant)
    quantization = quantization_config(quant, config.model.dtype, kind)
    dtype = getattr(torch, config.model.dtype)
    model = skeleton(base.folder, kind, config.model.dtype)
    with torch.device("meta"):
        weights = {name: parameter.numel() for name, parameter in model.named_parameters()}
        if quantization is not None:
            quantizer = AutoHfQuantizer.from_config(quantization)
            quantizer.preprocess_model(model, device_map={"": "cpu"})
            for module in model.modules():
                if isinstance(module, Linear4bit):
                    module.weight = _weight_4bit(module, dtype)
                    module.support_avx512bf16_for_cpu = False  # as load.py
                elif isinstance(module, Linear8bitLt):
                    module.weight = _weight_8bit(module)
            if quant.method == "torchao_int8":
                _store_by_torchao(model, quantizer, dtype)
            quantizer.postprocess_model(model)
    return model.requires_grad_(False).eval(), weights


def _weight_4bit(module: Linear4bit, dtype: torch.dtype) -> Params4bit:
    """Two weights in a byte; a scale for each 64 weights: float32, or a byte and a float32 for each 256 scales."""
    size, nested = module.in_features * module.out_features, module.weight.compress_statistics
    scales = -(-size // _BLOCK)
    outer = None
    if nested:
        outer = QuantState(
            absmax=torch.empty(-(-scales // _NESTED_BLOCK)), code=torch.empty(256), blocksize=_NESTED_BLOCK, dtype=torch.float32
        )  # fmt: skip
    state = QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size([module.out_features, module.in_features]),
        code=torch.empty(16),
        blocksize=_BLOCK,
        quant_type=module.weight.quant_type,
        dtype=dtype,
        offset=torch.empty(()) if nested else None,
        state2=outer,
    )
    packed = torch.empty((size + 1) // 2, 1, dtype=torch.uint8)
    return Params4bit(
        packed, quant_state=state, compress_statistics=nested, quant_type=state.quant_type, bnb_quantized=True
    )


def _weight_8bit(module: Linear8bitLt) -> Int8Params:
    """A byte for each weight and a float32 scale for each output."""
    data = torch.empty(module.out_features, module.in_features, dtype=torch.int8)
    return Int8Params(
        data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=torch.empty(module.out_features)
    )  # fmt: skip


def _store_by_torchao(model: PreTrainedModel, quantizer: HfQuantizer, dtype: torch.dtype) -> None:
    """Give the layers that torchao would quantize a byte for each weight, and a scale and an offset for each output."""
    model.hf_quantizer = quantizer  # peft asks for it
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and quantizer.param_needs_quantization(model, f"{name}.weight"):
            module.weight = _weight_of_torchao(module.weight, dtype)
    weight_only.own_products(model)


def _weight_of_torchao(old: torch.Tensor, dtype: torch.dtype) -> nn.Parameter:
    from torchao.quantization import Int8Tensor

    rows, columns = old.shape
    kept = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, 1)
    own = Int8Tensor(*kept, [1, columns], dtype, zero_point=torch.empty(rows, 1, dtype=torch.int8))
    return nn.Parameter(own, requires_grad=False)


def tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters, and what quantized parameters carry; code tables are shared by all layers and left out."""
    for parameter in model.parameters():
        if weight_only.is_stored(parameter):
            yield from (parameter.qdata, parameter.scale, parameter.zero_point)
            continue
        yield parameter
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield state.absmax
            if state.nested:
                yield state.state2.absmax
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            scales: Any = module.state.SCB if module.weight.SCB is None else module.weight.SCB
            yield scales


def on_host(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model on the meta device tensors in main memory that take none of it: they are one zero."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros((), dtype=dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def of_layers(model: nn.Module) -> list[int]:
    """Bytes of each layer's parameters, which is what sharding spreads.

    Args:
        model: the base as it is stored, without adapters.
    """
    return [sum(map(nbytes, layer.parameters())) for layer in layers_of(model)]


def for_merging(model: nn.Module, weights: dict[str, int], itemsize: int) -> tuple[int, int]:
    """Bytes of the unquantized base that a comparison of merges holds at once: as a whole, and layer by layer (`verify/layers.py`),
    which is what lies outside the layers and the largest of them.

    Args:
        model: the base as it is stored.
        weights: its number of weights by name.
    """
    within = {id(layer) for layer in layers_of(model)}
    names = [f"{name}." for name, module in model.named_modules() if id(module) in within]
    sizes = [sum(count for one, count in weights.items() if one.startswith(name)) for name in names]
    whole = sum(weights.values())
    return whole * itemsize, (whole - sum(sizes) + max(sizes, default=0)) * itemsize


def largest_layer(model: nn.Module, *kinds: type[nn.Linear]) -> int:
    """Weights of the largest layer of these kinds; 0 without any."""
    return max((m.in_features * m.out_features for m in model.modules() if isinstance(m, kinds)), default=0)


def give_storage(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> None:
    """Move everything from the meta device to a device that exists in `mode` only, so that autocast sees it."""
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keeps the old tensor, so that its id stays taken

    def fake(old: torch.Tensor | None) -> torch.Tensor | None:
        if old is None:
            return None
        if id(old) not in known and weight_only.is_stored(old):
            with device:
                known[id(old)] = (_weight_of_torchao(old, old.dtype), old)
        if id(old) not in known:
            if isinstance(old, Params4bit | Int8Params):
                known[id(old)] = (_parameter(old, mode, device, fake), old)
            else:
                new = torch.empty(old.shape, dtype=old.dtype, device=device)
                parameter = isinstance(old, nn.Parameter)
                known[id(old)] = (nn.Parameter(new, old.requires_grad) if parameter else new, old)
        return known[id(old)][0]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                own[name] = fake(tensor)
        if isinstance(module, Linear8bitLt):  # as after its first forward pass
            module.state.CB = module.weight.data
            module.state.SCB = torch.empty(module.out_features, device=device)
    places: dict[str, torch.Tensor] = getattr(model, "prompt_tokens", {})  # peft keeps them outside of all modules
    for name, tensor in places.items():
        places[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


class _Quantized(FakeTensor):
    """bitsandbytes' own parameters refuse tensors without content. These stand in for them, by their names, which peft asks for."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Quantized:
        new = _without_content(type(self), self, self.fake_mode, self.fake_device)
        new.__dict__.update({name: one for name, one in vars(self).items() if name not in vars(new)})
        return new


_STAND_INS = {name: type(name, (_Quantized,), {}) for name in ("Params4bit", "Int8Params")}


def _parameter(old: Params4bit | Int8Params, mode: FakeTensorMode, device: torch.device, fake: Callable) -> Any:
    new: Any = _without_content(_STAND_INS[type(old).__name__], old, mode, device)
    if isinstance(old, Int8Params):
        new.CB = new.SCB = None  # the layer's state has them
        return new
    for state in filter(None, (old.quant_state, old.quant_state.state2)):
        state.absmax, state.code, state.offset = fake(state.absmax), fake(state.code), fake(state.offset)
    for name in ("quant_state", "quant_type", "blocksize", "compress_statistics"):
        setattr(new, name, getattr(old, name))
    new.bnb_quantized = True
    return new


def _without_content(kind: type[_Quantized], like: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> Any:
    with _disable_current_modes():
        content = torch.empty(like.shape, dtype=like.dtype, device="meta")
    new: Any = kind(mode, content, device)
    new._is_param = True  # torch 2.11 takes it as no argument
    return new
