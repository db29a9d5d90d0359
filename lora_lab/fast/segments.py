"""Attention for examples that lie end to end in one row: each attends to itself only, and no mask is ever built.

The plain twin is one forward pass per example (`train.packing=false`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lora_lab.adapters.attach import base_of
from lora_lab.errors import TrainingError
from lora_lab.fast import attention, varlen

if TYPE_CHECKING:
    from peft import PeftModel

IMPLEMENTATION = "lora_lab_segments"  # the name under which transformers finds `_segment_attention`


def _segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, T, head size]
    key: torch.Tensor,  # [1, key heads, T, head size]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    segment_lengths: list[int] | None = None,  # None: one segment
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    block_attention: bool = False,
    segment_starts: torch.Tensor | None = None,  # [rows + 1] int32: where all go in one call, see `varlen.py`
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment. Signature and result ([1, T, heads, head size]) are transformers'."""
    if softcap is not None or s_aux is not None:
        raise TrainingError("this model cannot be packed (attention with soft capping or sinks).")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths, window = segment_lengths or [query.shape[2]], sliding_window or sys.maxsize
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if block_attention and on_cpu and not dropout and max(lengths) <= window:
        out = attention.SegmentAttention.apply(query[0], key[0], value[0], tuple(lengths), scale)[None]
        return out.transpose(1, 2).contiguous(), None
    if segment_starts is not None and varlen.takes(query, value, dropout):
        seen = None if max(lengths) <= window else window
        return varlen.attend(query, key, value, segment_starts, max(lengths), scale, seen), None
    pieces = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        length = q.shape[2]
        mask = _window_mask(length, window, q.device) if window < length else None
        pieces.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int, device: torch.device) -> torch.Tensor:
    """[T, T] bool: each token sees itself and the `window` - 1 tokens before it."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


AttentionInterface.register(IMPLEMENTATION, _segment_attention)


def implementation(model: PeftModel) -> str:
    """The name of the model's attention."""
    return base_of(model).config._attn_implementation


@contextlib.contextmanager
def attending(model: PeftModel, name: str | None = IMPLEMENTATION) -> Iterator[None]:
    """Use the attention of this name inside the block; by default the one above.

    Backward passes belong into the block as well: with activation checkpointing they run the forward again.
    """
    base, before = base_of(model), implementation(model)
    if before == name:
        yield
        return
    base.set_attn_implementation(name)  # type: ignore[arg-type]  # it takes None as well: its own choice
    try:
        yield
    finally:
        base.set_attn_implementation(before)
