"""Causal attention of rows that lie end to end in one call for a layer: torch's own flash kernels for rows of unlike length.

Flash knows half precision on CUDA, no dropout, and heads of up to 256 in steps of 8. What it does not take goes row by row
(`segments.py`), which is the plain twin.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16)
_WIDEST_HEAD = 256


@functools.cache
def kernel() -> Callable[..., torch.Tensor] | None:
    """torch's function, or None where this torch has none, or one without a scale and a window."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    attention: Any = varlen.varlen_attn
    names = inspect.signature(attention).parameters
    if not {"scale", "window_size"} <= names.keys():
        return None
    # Some want to be told that key heads are shared. Others pass them on to the same kernels, which know it.
    return functools.partial(attention, enable_gqa=True) if "enable_gqa" in names else attention


def takes(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether the kernels take such heads [..., d]."""
    size = query.shape[-1]
    return (
        query.device.type in DEVICES
        and query.dtype in DTYPES
        and query.dtype == value.dtype
        and not dropout
        and size % 8 == 0
        and size <= _WIDEST_HEAD
        and value.shape[-1] == size
        and kernel() is not None
    )


def starts(position_ids: torch.Tensor, rows: int) -> torch.Tensor:
    """Where the rows of a packed batch begin, and where the last one ends: [rows + 1] int32.

    Made on the device from what is there already, so that nothing is copied to it and nobody waits.

    Args:
        position_ids: [1, T], from 0 in each row.
    """
    positions = position_ids.flatten()
    begins = torch.nonzero_static(positions == 0, size=rows + 1, fill_value=len(positions))
    return begins.flatten().to(torch.int32)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    begins: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """q [1, H, T, d], k and v [1, H_kv, T, d] -> [1, T, H, d].

    Args:
        begins: of the rows, see `starts`.
        longest: tokens of the longest row.
        window: tokens that each token sees, itself among them; None: all before it.
    """
    own = kernel()
    assert own is not None, "takes() is asked first"
    q, k, v = (heads.squeeze(0).transpose(0, 1) for heads in (query, key, value))
    behind = -1 if window is None else window - 1
    return own(q, k, v, begins, begins, longest, longest, scale=scale, window_size=(behind, 0)).unsqueeze(0)
