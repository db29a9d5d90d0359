"""Attention of short rows that are padded, by plain matrix products, for a CPU.

torch's fused attention is made for long rows: of 16 rows of 14 tokens its backward takes several times what the products and a
softmax take. Here the probabilities are kept for backward, which is little as long as rows are short; everything else goes
to transformers' own `sdpa`, the plain twin.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_lab.errors import TrainingError
from lora_lab.fast.dropout import kept
from lora_lab.fast.dropout import scale as dropped_scale
from lora_lab.fast.routing import Route, Routing, current
from lora_lab.fast.unpadded import Rows, found_in, in_widths

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
    rows, shared = found_in(attention_mask), current() if dropout else None
    keep, longest = None, max(query.shape[2], key.shape[2]) if rows is None else rows.shape[1]
    if shared is not None and not _is_causal(module, kwargs):
        whole = query, key, value, attention_mask, position_bias
        if _fits(module, *whole, dropout, kwargs, longest):  # all members' rows, so that they are attended to together
            keep, shared = _kept_of_members(shared, rows, query, key, dropout), None

    def padded(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        route: Route | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        bias = position_bias if position_bias is None else position_bias[..., : q.shape[2], : k.shape[2]]
        return _padded(module, q, k, v, mask, dropout, scaling, bias, kwargs, shared, route, keep)

    def grouped(group: Rows, route: Route | None = None) -> torch.Tensor:
        q, k, v = (group.gather(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
        own = None if keep is None else keep[group.numbers, :, : group.shape[1], : group.shape[1]]
        return group.take(padded(q, k, v, group.mask, route, own))

    if rows is None:
        if shared is not None:
            return _of_members(shared, query, key, value, attention_mask, padded), None
        return padded(query, key, value, attention_mask, keep=keep), None
    if shared is None:
        parts, back = [grouped(group) for _, group in rows.alike], rows.back
    else:
        pairs = zip(shared.routes, rows.alike_of_members, strict=True)
        parts, back = [grouped(group, route) for route, own in pairs for _, group in own], rows.back_of_members
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).index_select(1, back), None


def _kept_of_members(
    shared: Routing, rows: Rows | None, query: torch.Tensor, key: torch.Tensor, dropout: float
) -> torch.Tensor:
    """[B, H, T, K] int16: what dropout leaves of the shares of attention, drawn for each member as in a pass of its own."""
    heads = query.shape[1]

    def drawn(route: Route, count: int, queries: int, keys: int) -> torch.Tensor:
        shape = torch.Size([count * heads, queries, keys])
        return kept(shape, dropout, query.device, route.generator).view(count, heads, queries, keys)

    if rows is not None:
        most = in_widths(rows.shape[1])
        whole = torch.ones(rows.shape[0], heads, most, most, dtype=torch.int16, device=query.device)
        for route, groups in zip(shared.routes, rows.alike_of_members, strict=True):
            for _, group in groups:
                count, width = group.shape
                whole[group.numbers, :, :width, :width] = drawn(route, count, width, width)
        return whole
    whole = torch.ones(len(query), heads, query.shape[2], key.shape[2], dtype=torch.int16, device=query.device)
    start = 0
    for one, other in zip(*(shared.parts((len(x), x.shape[2])) for x in (query, key)), strict=True):
        (count, queries), (_, keys) = one.alone, other.alone
        whole[start : start + count, :, :queries, :keys] = drawn(one.route, count, queries, keys)
        start += count
    return whole


def _of_members(
    shared: Routing,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    padded: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Attention that drops something, of each member's rows as they are in a pass of its own, [B, T, H, d]."""
    asked, told = (shared.parts((len(x), x.shape[2])) for x in (query, key))
    ends = list(itertools.accumulate(shared.row_counts))
    outs = []
    for start, end, one, other in zip([0, *ends], ends, asked, told, strict=False):
        (_, queries), (_, keys) = one.alone, other.alone
        k, v = (x[start:end, :, :keys] for x in (key, value))
        own = mask if mask is None or len(mask) == 1 else mask[start:end]
        own = None if own is None else _needed(own[..., :queries, :keys])
        outs.append(padded(query[start:end, :, :queries], k, v, own, one.route))
    return shared.joined(outs, (len(query), query.shape[2]))


def _needed(mask: torch.Tensor) -> torch.Tensor | None:
    """A mask [B, 1, T, K], unless it is causal and nothing else: then transformers gives none.

    Raises:
        TrainingError: it cannot be told.
    """
    if mask.dtype != torch.bool:
        raise TrainingError("attention that drops something has a mask that knows no members")
    return None if (mask == torch.ones_like(mask[:1]).tril()).all() else mask


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
    shared: Routing | None,
    route: Route | None,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """Padded rows, of one member (`route`) where a pass is shared and something is dropped."""
    longest = max(query.shape[2], key.shape[2])
    if not _fits(module, query, key, value, mask, bias, dropout, others, longest):
        told = {"dropout": dropout, "scaling": scaling, "position_bias": bias, **others}
        with contextlib.nullcontext() if shared is None or route is None else shared.alone(route):
            return sdpa_attention_forward(module, query, key, value, mask, **told)[0]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    generator = None if route is None else route.generator
    out = ShortRows.apply(query, key, value, _added(mask, bias, query.dtype), dropout, scale, generator, keep)
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


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask, also where rows have no padding and look both ways: they are attended to as beside rows that have some, so that
    they draw the same dropout."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_bidirectional_skip": False})


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _fits(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout: float,
    others: dict[str, Any],
    longest: int,
) -> bool:
    """Whether it is attention of short rows with gradients, and nothing more is asked for."""
    return (
        torch.is_grad_enabled()
        and query.device.type == "cpu"
        and (dropout > 0 or query.dtype == torch.bfloat16)  # float32 without dropout is as fast there
        and longest <= LONGEST
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and not (_is_causal(module, others) and mask is None)
        and not (bias is not None and bias.requires_grad)
        and all(others.get(name) is None for name in ("softcap", "s_aux", "cache"))
    )


def _is_causal(module: torch.nn.Module, others: dict[str, Any]) -> bool:
    told = others.get("is_causal")
    return bool(getattr(module, "is_causal", True) if told is None else told)


def _added(mask: torch.Tensor | None, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What is added to the scores."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    if mask is None or bias is None:
        return bias if mask is None else mask
    return mask + bias


class ShortRows(torch.autograd.Function):
    """Attention, whose softmax is torch's in float32 where rows have whole widths: there that is the fastest on a CPU, for bfloat16 too.

    q [B, H, T, d], k and v [B, H, K, d], what is added to the scores, the share that is dropped, a scale, the generator that draws
    what is dropped (None: torch's own), or what it left [B, H, T, K] -> [B, H, T, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        added: torch.Tensor | None,
        dropout: float,
        scale: float,
        generator: torch.Generator | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        shape = q.shape
        q, k, v = ((x * scale if x is q else x).flatten(0, 1) for x in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2))
        if added is not None:
            scores.view(*shape[:2], *scores.shape[1:]).add_(added)
        ctx.wide = torch.float32 if scores.shape[-1] == in_widths(scores.shape[-1]) else scores.dtype
        p = torch.softmax(scores, -1, dtype=ctx.wide).to(scores.dtype)
        keep = _keeping(p.shape, dropout, p.device, generator, keep)
        ctx.scale, ctx.keep_scale, ctx.shape = scale, dropped_scale(dropout), shape
        ctx.save_for_backward(q, k, v, p, keep)
        return torch.bmm(_dropped(p, keep, ctx.keep_scale), v).view(*shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, p, keep = ctx.saved_tensors
        dout = dout.flatten(0, 1)
        dv = torch.bmm(_dropped(p, keep, ctx.keep_scale).transpose(1, 2), dout)
        dp = _dropped(torch.bmm(dout, v.transpose(1, 2)), keep, ctx.keep_scale)
        dscores = torch._softmax_backward_data(dp.to(ctx.wide), p.to(ctx.wide), -1, ctx.wide).to(p.dtype)
        dq, dk = torch.bmm(dscores, k).mul_(ctx.scale), torch.bmm(dscores.transpose(1, 2), q)
        shape = ctx.shape[:2]
        return *(x.unflatten(0, shape) for x in (dq, dk, dv)), None, None, None, None, None


def _keeping(
    shape: torch.Size, p: float, device: torch.device, generator: torch.Generator | None, drawn: torch.Tensor | None
) -> torch.Tensor | None:
    """[shape] int16: what dropout leaves, if it was not drawn before."""
    if drawn is not None:
        return drawn.reshape(shape)
    return kept(shape, p, device, generator) if p else None


def _dropped(x: torch.Tensor, keep: torch.Tensor | None, scale: float) -> torch.Tensor:
    return x if keep is None else (x * keep).mul_(scale)
