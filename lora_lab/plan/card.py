"""A card that does not exist: tensors that say they are on `cuda:0`, have a shape and a type, and no content.

Inside `pretended` all code takes the ways that it takes on a card, forward and backward, on any machine: no CUDA build, no driver
and no compiler is needed. Three things are counted: what the tensors take, in blocks as torch's allocator hands them out; where
the host would wait for the card; and which operations mix devices, which is an error here as it is there.

torch's C++ parts ask each tensor for its device. They are told `xla`, since of that kind torch asks for nothing that only a CUDA
build has, and autocast treats it as it treats CUDA. All Python code is told `cuda:0`.

Not seen: numbers (a value that is read from the card is 0, a question is answered by no), limits of single kernels, several streams,
and fragmentation.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional
import numpy as np
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lora_lab.verify import layers

CARD = torch.device("cuda:0")
_TOLD = torch.device("xla:0")  # what C++ is told instead
_BLOCK = 512  # bytes: torch's allocator rounds up to whole ones
# cuBLAS' workspace on cards before Hopper (aten/src/ATen/cuda/CublasHandlePool.cpp), taken at the first product
PRODUCTS_BYTES = 8320 * 2**10
_LIBRARY = str(Path(os.__file__).parent) + os.sep  # Python's own
_PACKAGE = str(Path(__file__).parents[1]) + os.sep

_aten = torch.ops.aten
_PRODUCT = torch.ops.bitsandbytes.int8_scaled_mm.default
_MIXED_PRODUCT = torch.ops.bitsandbytes.int8_mixed_scaled_mm.default
_QUANTIZE_ROWS = torch.ops.bitsandbytes.int8_vectorwise_quant.default
_DEQUANTIZE_INTO = torch.ops.bitsandbytes.dequantize_4bit.out
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.addmm_.default}
_FLASH_BACKWARD = _aten._scaled_dot_product_flash_attention_backward.default
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_MIXED = {*_COPIES, _aten._foreach_copy_.default}  # operations that are made to mix devices


class MixedDevices(RuntimeError):
    """An operation was given tensors of the host and of the card."""


@dataclasses.dataclass(frozen=True)
class Wait:
    """A place where the host waits for the card."""

    kind: str  # 'copy': to the card, from memory that is not pinned; 'read': of something that was computed there
    where: str  # file:line

    def __str__(self) -> str:
        return f"{self.kind} at {self.where}"


class Card(TorchDispatchMode):
    """What happens on the card inside the block. All figures are bytes."""

    def __init__(self, mode: FakeTensorMode, size: int) -> None:
        super().__init__()
        self.mode, self.size = mode, size
        self.allocated = self.peak = 0
        self.waits: list[Wait] = []
        self.peaks: dict[str, int] = {}  # of each phase
        self._blocks: set[int] = set()
        self._free_workspace = PRODUCTS_BYTES

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the most that is allocated inside the block, what was there before it among that."""
        before, self.peak = self.peak, self.allocated
        try:
            yield
        finally:
            self.peaks[name] = max(self.peaks.get(name, 0), self.peak)
            self.peak = max(before, self.peak)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            device = args[0].fake_device
            return _TOLD if device == CARD else device
        if isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type in ("cuda", "xla"):
            kwargs = {**kwargs, "device": CARD}
        given = [*_tensors(args), *_tensors(kwargs.values())]
        on_card = any(isinstance(one, FakeTensor) for one in given)
        if not on_card and kwargs.get("device") != CARD:
            kwargs.pop("pin_memory", None)  # which a machine without CUDA cannot
            with _disable_current_modes():
                return func(*args, **kwargs)  # what the host computes by itself is real
        if func in _ANSWERS:
            self._wait("read")
            return _ANSWERS[func](*args)
        if func is _DEQUANTIZE_INTO:  # its own check compares a list with a torch.Size
            return None
        if func is _QUANTIZE_ROWS and (len(args) > 1 or kwargs):  # the number of outliers would be read: there are none
            self._wait("read")
            args, kwargs = args[:1], {}
        if func is _MIXED_PRODUCT:  # the product beside the outliers is all of it
            x, *factors = args[:5]
            return self.__torch_dispatch__(_PRODUCT, types, (*factors, *args[6:]), {"dtype": x.dtype}), None
        if func not in _MIXED:
            _refuse_mixed(func, given)
        if func in _COPIES and (host := self._copied(func, args, kwargs)) is not None:
            return host
        result = func(*args, **kwargs)
        if func in _PRODUCTS and self._free_workspace and on_card:
            self._take(self._free_workspace)
            self._free_workspace = 0
        if func is _FLASH_BACKWARD:
            self._take(size := _flash_workspace(args))
            self._drop(size)
        for tensor in (result,) if isinstance(result, torch.Tensor) else _tensors(result or ()):
            self._follow(tensor)
        if func in _CONCLUSIONS and (said := _conclude(func, args, kwargs)) is not None:
            result.card_says = said
        return result

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were there before the block."""
        for tensor in tensors:
            self._follow(tensor)

    def _follow(self, tensor: torch.Tensor) -> None:
        if not isinstance(tensor, FakeTensor) or tensor.fake_device != CARD:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._blocks:
            size = -(-storage.nbytes() // _BLOCK) * _BLOCK
            self._blocks.add(key)
            self._take(size)
            weakref.finalize(storage, self._given_back, key, size)

    def _given_back(self, key: int, size: int) -> None:
        self._blocks.discard(key)
        self._drop(size)

    def _take(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def _drop(self, size: int) -> None:
        self.allocated -= size

    def _copied(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Note a copy between the host and the card; what the host has then, if it is one to the host."""
        made = func is _aten._to_copy.default
        source, target = (
            (args[0].device, kwargs.get("device") or args[0].device) if made else (args[1].device, args[0].device)
        )
        if source.type == target.type:
            return None
        if not kwargs.get("non_blocking"):
            self._wait("copy" if target == CARD else "read")
        if target == CARD:
            return None
        return _nothing(args[0], kwargs.get("dtype")) if made else args[0]

    def _wait(self, kind: str) -> None:
        self.waits.append(Wait(kind, _where()))


def _where() -> str:
    """The innermost line that is no library's."""
    frame, library = sys._getframe(2), ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__:
            place = f"{file.removeprefix(_PACKAGE)}:{frame.f_lineno}"
            if "site-packages" not in file and not file.startswith(_LIBRARY):
                return place
            library = library or place
        frame = frame.f_back
    return library


def _tensors(things: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Tensors among arguments, and in lists among them."""
    for one in things:
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from _tensors(one)


def _refuse_mixed(func: Any, given: list[torch.Tensor]) -> None:
    """Refuse tensors of the host beside tensors of the card; single numbers may come from anywhere. Indices from the host work on a
    card, but are copied there unsaid."""
    if len(given) > 1 and {"cpu", "cuda"} <= {one.device.type for one in given if one.dim()}:
        raise MixedDevices(f"{func} is given tensors of the CPU and of the card, at {_where()}")


def _flash_workspace(args: tuple) -> int:
    """What the backward pass of FlashAttention takes inside: gradients of the queries in float32, and of keys and values for each query
    head (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp)."""
    _, query, key = args[:3]
    rows, heads, tokens, size = query.shape
    found = 4 * rows * heads * -(-tokens // 128) * 128 * -(-size // 32) * 32
    if key.shape[1] != heads:
        found += 2 * rows * heads * key.shape[2] * size * key.element_size()
    return found


# -- values that are not there ------------------------------------------------------------------------------------------


def _alone(function: Callable) -> Callable:
    """Outside of all modes: what is computed is real."""

    @functools.wraps(function)
    def answer(*args: Any) -> Any:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args)

    return answer


def _number(tensor: torch.Tensor) -> float | bool:
    """A single number that is read: what is known of it, else 0."""
    return _known(tensor) or torch.zeros((), dtype=tensor.dtype).item()


_SMALL = 2**20  # numbers


@_alone
def _nothing(like: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """What the host has after a copy from the card. Large ones, such as activations that are kept there, take no memory."""
    zero = torch.zeros((), dtype=dtype or like.dtype)
    return zero.expand(like.shape).clone() if like.numel() <= _SMALL else zero.expand(like.shape)


def _known(tensor: Any) -> Any:
    """What every element of a tensor is, where that is known without content, as of `torch.ones`; else None."""
    return getattr(tensor, "card_says", None) if isinstance(tensor, torch.Tensor) else tensor


def _concluded(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What every element of a result is. That is enough for a generation to end where its length ends it."""
    if func in _FILLED:
        return _FILLED[func](args)
    known = [_known(one) for one in args]
    if func in _DECIDED and _DECIDED[func] in known:
        return _DECIDED[func]
    if any(one is None for one in known):
        return None
    ones = [
        torch.full((1,), said, dtype=one.dtype) if isinstance(one, torch.Tensor) else one
        for one, said in zip(args, known, strict=True)
    ]
    return func(*ones, **kwargs).item()


_FILLED: dict[Any, Callable[[tuple], Any]] = {
    _aten.full.default: lambda args: args[1],
    _aten.ones.default: lambda _: 1,
}
_DECIDED = {
    _aten.bitwise_or.Tensor: True,
    _aten.logical_or.default: True,
    _aten.bitwise_and.Tensor: 0,
    _aten.logical_and.default: False,
}
_CONCLUSIONS = {
    *_FILLED, *_DECIDED, _aten.bitwise_not.default, _aten.logical_not.default, _aten.max.default, _aten.eq.Scalar, _aten.all.default
}  # fmt: skip


_ANSWERS: dict[Any, Callable[..., Any]] = {
    _aten.equal.default: lambda *_: True,
    _aten.allclose.default: lambda *_: True,
    _aten._local_scalar_dense.default: _alone(_number),
}
_conclude = _alone(_concluded)


class _Functions(TorchFunctionMode):
    """What is decided before an operation is dispatched, where C++ would ask for the device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        own = _FUNCTIONS.get(func)
        if own is not None and isinstance(args[0], FakeTensor):
            return own(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _to(tensor: torch.Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
    """Tensor.to: the tensor itself where nothing changes."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    here = device is None or torch.device(device) in (tensor.device, torch.device(tensor.device.type))
    if here and dtype in (None, tensor.dtype) and not copy:
        return tensor
    if here and dtype is not None and tensor.device == CARD:
        return torch.Tensor.to(tensor, dtype, copy=copy)
    return torch.Tensor.to(tensor, *args, copy=copy, **kwargs)  # type: ignore[call-overload]


def _deepcopy(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """A copy on the card."""
    new = tensor.detach().clone()
    memo[id(tensor)] = new = (
        torch.nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else new
    )
    return new


def _listed(tensor: torch.Tensor) -> Any:
    """Tensor.tolist: the host waits once for all numbers."""
    return np.full(tensor.shape, tensor.flatten()[0].item() if tensor.numel() else 0).tolist()


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    """torch.isfinite, of which the answer is yes."""
    found: Any = tensor.abs() != float("inf")
    found.card_says = True
    return found


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The kernel that torch would choose on a card of the Ampere generation or a newer one (aten/src/ATen/native/transformers/cuda/
    sdp_utils.cpp); beside these two there is the plain product of matrices."""
    plain = functools.partial(torch._C._nn.scaled_dot_product_attention, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda") and query.device == CARD:
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    size, options = query.shape[-1], {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    same_size = size == key.shape[-1] == value.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device != CARD or query.dim() != 4:
        return plain(query, key, value, attn_mask, **options)
    scale = size**-0.5 if scale is None else scale
    if attn_mask is None and half and same_size and size <= 256:
        pad = -size % 8
        parts = [torch.nn.functional.pad(x, (0, pad)) if pad else x for x in (query, key, value)]
        out = _aten._scaled_dot_product_flash_attention.default(*parts, dropout_p, is_causal, scale=scale)[0]
        return out[..., :size]
    if query.shape[1] == key.shape[1] and not (size | value.shape[-1]) % (8 if half else 4):
        if attn_mask is not None:
            attn_mask = _as_bias(attn_mask, query, key)
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        return _aten._scaled_dot_product_efficient_attention.default(
            query, key, value, attn_mask, keep, dropout_p, is_causal, scale=scale
        )[0]
    return plain(query, key, value, attn_mask, **options)


def _as_bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask as numbers that are added, [B, H, T, S]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return mask.expand(*query.shape[:3], key.shape[2])


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.cuda: lambda tensor, *_, **__: tensor.to(CARD),
    torch.Tensor.is_cuda.__get__: lambda tensor, *_: tensor.device.type == "cuda",
    torch.Tensor.__deepcopy__: _deepcopy,
    torch.Tensor.isfinite: _finite,
    torch.isfinite: _finite,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}


# -- the machine --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pretended(size: int = 24 * 2**30) -> Iterator[Card]:
    """Inside the block tensors are made without content, and `cuda:0` is there; gives what counts on it.

    Args:
        size: bytes that are free on the empty card, which decides what is kept there; nothing is refused for lack of them.
    """
    with (
        _guarded(),
        _put(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),  # else autocast for cards is off
        _put(torch.cuda, "is_bf16_supported", lambda *_: True),
        _put(torch.nn.Module, "_apply", _apply),
        _put(torch.autograd, "_engine_run_backward", _backward),
        torch.autograd.set_multithreading_enabled(False),  # in threads of its own torch asks CUDA for streams
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
        Card(mode, size) as card,
        _put(torch.cuda, "synchronize", lambda *_: card._wait("read")),
        _put(FakeTensor, "tolist", _listed),
        _put(bitsandbytes.functional, "name2qmap", {}),  # what it keeps of a table is for the card alone
        _put(layers._Pass, "run", lambda thread: _run_there(thread, mode, card)),
        _put(torch.cuda, "reset_peak_memory_stats", lambda *_: None),
        _put(torch.cuda, "max_memory_allocated", lambda *_: card.peak),
        _put(torch.cuda, "max_memory_reserved", lambda *_: card.peak),
        _put(torch.cuda, "mem_get_info", lambda *_: (max(size - card.allocated, 0), size)),
        _Functions(),
    ):
        yield card


_run = layers._Pass.run


def _run_there(thread: layers._Pass, mode: FakeTensorMode, card: Card) -> None:
    """A pass in a thread of its own, which begins without modes."""
    with mode, card, _Functions():
        _run(thread)


class Precision:
    """What a training loop asks of an `accelerate.Accelerator`, on the card."""

    def __init__(self, dtype: str):
        """
        Args:
            dtype: as `model.dtype`.
        """
        self._dtype = None if dtype == "float32" else getattr(torch, dtype)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cuda", self._dtype, enabled=self._dtype is not None)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """torch's C++ asks each kind of device for its current stream, and knows none of this kind: the CPU's answer will do, which has none.
    The table lies in libc10."""
    library = ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/libc10.*"))))
    table = (ctypes.c_void_p * 16).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    kinds = torch._C._autograd.DeviceType
    places = (
        kinds.XLA.value,
        kinds.CUDA.value,
    )  # some operations ask for the device that they are told to make a tensor on
    before = [table[place] for place in places]
    for place in places:
        table[place] = table[place] or table[kinds.CPU.value]
    try:
        yield
    finally:
        for place, own in zip(places, before, strict=True):
            table[place] = own


_run_backward = torch.autograd._engine_run_backward


def _backward(*args: Any, **kwargs: Any) -> Any:
    """A mode is off while it handles `backward`, and checkpointing calls functions from there."""
    with _Functions():
        return _run_backward(*args, **kwargs)


@contextlib.contextmanager
def _put(place: Any, name: str, value: Any) -> Iterator[None]:
    """Another attribute inside the block."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def _apply(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """Module._apply, what `to` and its like are made of: torch exchanges contents, and here there are none."""
    for child in module.children() if recurse else ():
        _apply(child, change)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                new = change(parameter)
            if new is not parameter:
                module._parameters[name] = torch.nn.Parameter(new, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = change(buffer)
    return module
