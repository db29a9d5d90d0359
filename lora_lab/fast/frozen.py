"""Weights that never change, of linear layers that read the same input, as one matrix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.nn.functional import linear

from lora_lab.base.weight_only import Int8Linear

QUANTIZED = (Linear4bit, Int8Linear)  # layers whose weight is dequantized here
FUSED_DEVICES = ("cuda",)  # where bitsandbytes multiplies by 4-bit weights without dequantizing them
FEW = (
    128  # rows, up to which that is ahead on some card; bitsandbytes chooses for its own, and dequantizes above (0.50)
)


class Scratch:
    """One buffer for everybody who needs a dequantized weight for a moment."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def like(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[rows, columns], valid until the next call."""
        count, own = rows * columns, self._buffer
        if own is None or own.numel() < count or own.dtype != dtype or own.device != device:
            self._buffer = own = torch.empty(count, dtype=dtype, device=device)
        return own[:count].view(rows, columns)


class FrozenWeight:
    """The weights [N_i, D] of some layers, one under another, [N, D].

    The parameters of unquantized layers become views of the whole, so nothing is held twice. Quantized layers are dequantized:
    every time into a shared buffer, or once and kept (`keep`), which is the same numbers in more memory and less time.
    """

    def __init__(self, layers: list[nn.Linear], scratch: Scratch):
        self.sizes = [layer.out_features for layer in layers]
        self.in_features = layers[0].in_features
        self.keep = False
        self.fused = False  # few rows that nobody learns from are multiplied without dequantizing
        self._layers, self._scratch = layers, scratch
        self._quantized = [isinstance(layer, QUANTIZED) for layer in layers]
        self._dense: torch.Tensor | None = None
        self.joined_bytes = 0  # of unquantized weights that were copied together
        self._bias = _joined_bias(layers)
        if not any(self._quantized):
            self._dense = layers[0].weight.data
            if len(layers) > 1:
                self._dense = torch.cat([layer.weight.data for layer in layers])
                self.joined_bytes = self._dense.numel() * self._dense.element_size()
                for layer, part in zip(layers, self._dense.split(self.sizes), strict=True):
                    layer.weight.data = part

    @property
    def quantized(self) -> bool:
        return any(self._quantized)

    @property
    def device(self) -> torch.device:
        return self._layers[0].weight.device

    def drop(self) -> int:
        """Dequantize in every pass from now on; the bytes that this gives back."""
        if not (self.quantized and self.keep):
            return 0
        size = self._dense.nbytes if self._dense is not None else 0
        self.keep, self._dense = False, None
        return size

    def num_bytes(self, dtype: torch.dtype) -> int:
        """What keeping it dequantized takes."""
        return sum(self.sizes) * self.in_features * dtype.itemsize if self.quantized else 0

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, D] in `dtype`, valid until the next call of anybody."""
        if self._dense is not None:
            return self._dense.to(dtype)
        device = self.device
        shape = (sum(self.sizes), self.in_features)
        whole = (
            torch.empty(shape, dtype=dtype, device=device) if self.keep else self._scratch.like(*shape, dtype, device)
        )
        for layer, part in zip(self._layers, whole.split(self.sizes), strict=True):
            _write(layer, part) if isinstance(layer, QUANTIZED) else part.copy_(layer.weight)
        if self.keep:
            self._dense = whole
        return whole

    @property
    def fusible(self) -> bool:
        """Whether bitsandbytes has a kernel for this: 4 bits throughout, and rows of whole blocks."""
        if self.device.type not in FUSED_DEVICES or not all(isinstance(layer, Linear4bit) for layer in self._layers):
            return False
        weights: list[Any] = [layer.weight for layer in self._layers]  # bitsandbytes' own kind of parameter
        return all(self.in_features % weight.quant_state.blocksize == 0 for weight in weights)

    def times(self, x: torch.Tensor, learned: bool = True) -> torch.Tensor:
        """x [T, D] -> [T, N], with the biases.

        Args:
            learned: whether somebody may learn from it: then the numbers are always those of the dequantized weight.
        """
        if learned or not self.fused or len(x) > FEW:
            return linear(x, self.dense(x.dtype), self.bias(x.dtype))
        layers: list[Any] = self._layers
        parts = [matmul_4bit(x, layer.weight, quant_state=layer.weight.quant_state) for layer in layers]
        y, bias = torch.cat(parts, 1) if len(parts) > 1 else parts[0], self.bias(x.dtype)
        return y if bias is None else y + bias

    @contextlib.contextmanager
    def held(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside the block, in which no other weight is asked for, it is dequantized once."""
        kept = self._dense
        if kept is None:
            self._dense = self.dense(dtype)
        try:
            yield
        finally:
            if not self.keep:
                self._dense = kept

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self._bias is None else self._bias.to(dtype)


def _write(layer: Linear4bit | Int8Linear, out: torch.Tensor) -> None:
    if isinstance(layer, Int8Linear):
        out.copy_(layer.dequantized(out.dtype))
        return
    weight: Any = layer.weight  # bitsandbytes' own kind of parameter
    state, data = weight.quant_state, weight.data.view(-1, 1)
    if state.dtype == out.dtype and out.device.type == "cuda":  # bitsandbytes writes in place there only
        dequantize_4bit(data, state, out=out)
    else:
        out.copy_(dequantize_4bit(data, state))


def _joined_bias(layers: list[nn.Linear]) -> torch.Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [
        torch.zeros(layer.out_features, device=layer.weight.device) if layer.bias is None else layer.bias.data
        for layer in layers
    ]
    return torch.cat([part.float() for part in parts])
