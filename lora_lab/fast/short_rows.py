"""Attention of short rows that are padded, by plain matrix products, for a CPU.

torch's fused attention is made for long rows: of 16 rows of 14 tokens its backward takes several times what the products and a
softmax take. Here the probabilities are kept for backward, which is little as long as rows are short; everything else goes
to transformers' own `sdpa`, the plain twin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_lab.fast.dropout import kept
from lora_lab.fast.dropout import scale as dropped_scale
from lora_lab.fast.unpadded import found_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_lab.fast.forward import Forward

IMPLEMENTATION = "lora_lab_short_rows"  # the name under which transformers finds `_attention`
_PLAIN = "sdpa"
LONGEST = 128  # tokens, of queries and of keys


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, T, d]; [1, H, N, d] of rows that lie end to end, see `unpadded.py`
    key: torch.Tensor,  # [B, H, K, d]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Signature and result ([B, T, H, d]) are transformers'."""
    rows = found_in(attention_mask)
    if rows is None:
        return _padded(module, query, key, value, attention_mask, dropout, scaling, position_bias, kwargs), None
    parts = []
    for tokens, group in rows.alike:
        q, k, v = (group.put(x[:, :, tokens].transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
        parts.append(group.take(_padded(module, q, k, v, group.mask, dropout, scaling, position_bias, kwargs)))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).index_select(1, rows.back), None


def _padded(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    bias: torch.Tensor | None,
    others: dict[str, Any],
) -> torch.Tensor:
    if not _fits(module, query, key, value, mask, bias, dropout, others):
        told = {"dropout": dropout, "scaling": scaling, "position_bias": bias, **others}
        return sdpa_attention_forward(module, query, key, value, mask, **told)[0]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = ShortRows.apply(query, key, value, _added(mask, bias, query.dtype), dropout, scale)
    return out.transpose(1, 2).contiguous()


def attend(model: PreTrainedModel, forward: Forward) -> bool:
    """Let a model attend so from now on, if its rows are padded and it would attend by `sdpa`; whether it does."""
    if forward.packed or model.device.type != "cpu" or model.config._attn_implementation != _PLAIN:
        return False
    model.set_attn_implementation(IMPLEMENTATION)
    return True


def attend_plainly(model: PreTrainedModel) -> None:
    """Give a model its own attention back."""
    model.set_attn_implementation(_PLAIN)


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def _fits(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout: float,
    others: dict[str, Any],
) -> bool:
    """Whether it is attention of short rows with gradients, and nothing more is asked for."""
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return (
        torch.is_grad_enabled()
        and query.device.type == "cpu"
        and (dropout > 0 or query.dtype == torch.bfloat16)  # float32 without dropout is as fast there
        and max(query.shape[2], key.shape[2]) <= LONGEST
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and not (causal and mask is None)
        and not (bias is not None and bias.requires_grad)
        and all(others.get(name) is None for name in ("softcap", "s_aux", "cache"))
    )


def _added(mask: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scores."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    if mask is None or bias is None:
        return bias if mask is None else mask
    return mask + bias


class ShortRows(torch.autograd.Function):
    """q [B, H, T, d], k and v [B, H, K, d], what is added to the scores, the share that is dropped, a scale -> [B, H, T, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        added: torch.Tensor | None,
        dropout: float,
        scale: float,
    ) -> torch.Tensor:
        shape = q.shape
        q, k, v = ((x * scale if x is q else x).flatten(0, 1) for x in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2))
        if added is not None:
            scores.view(*shape[:2], *scores.shape[1:]).add_(added)
        p = torch.softmax(scores, -1)
        keep = kept(p.shape, dropout, p.device) if dropout else None
        ctx.scale, ctx.keep_scale, ctx.shape = scale, dropped_scale(dropout), shape
        ctx.save_for_backward(q, k, v, p, keep)
        return torch.bmm(_dropped(p, keep, ctx.keep_scale), v).view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, p, keep = ctx.saved_tensors
        dout = dout.flatten(0, 1)
        dv = torch.bmm(_dropped(p, keep, ctx.keep_scale).transpose(1, 2), dout)
        dp = _dropped(torch.bmm(dout, v.transpose(1, 2)), keep, ctx.keep_scale)
        dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq, dk = torch.bmm(dscores, k).mul_(ctx.scale), torch.bmm(dscores.transpose(1, 2), q)
        shape = ctx.shape[:2]
        return *(x.unflatten(0, shape) for x in (dq, dk, dv)), None, None, None


def _dropped(x: torch.Tensor, keep: torch.Tensor | None, scale: float) -> torch.Tensor:
    return x if keep is None else (x * keep).mul_(scale)
