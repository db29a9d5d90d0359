"""Causal attention by matrix products, for short rows on a CPU.

torch's fused attention is made for long rows; on a CPU its backward pass in bfloat16 takes about twice as long as the plain
products for rows of up to some hundred tokens. Nothing of size T x T is kept: backward computes it again.
"""

from __future__ import annotations

import torch

LONGEST = 512  # tokens of a row; torch's own is faster beyond


class ShortAttention(torch.autograd.Function):
    """q [H, T, d], k and v [H_kv, T, d] -> [H, T, d]; the query heads of one key head stand one under another."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float):
        stacked = (q * scale).reshape(len(k), -1, q.shape[-1])
        ctx.scale, ctx.shape = scale, q.shape
        ctx.save_for_backward(stacked, k, v)
        return torch.bmm(_probabilities(stacked, k), v).view(q.shape)

    @staticmethod
    def backward(ctx, dout: torch.Tensor):
        q, k, v = ctx.saved_tensors
        dout = dout.reshape(q.shape)
        p = _probabilities(q, k)
        dv = torch.bmm(p.transpose(1, 2), dout)
        dp = torch.bmm(dout, v.transpose(1, 2))
        dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
        dq = torch.bmm(dscores, k).mul_(ctx.scale).view(ctx.shape)
        return dq, torch.bmm(dscores.transpose(1, 2), q), dv, None


def _probabilities(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[H_kv, G T, T] of scaled q [H_kv, G T, d] and k [H_kv, T, d]."""
    length = k.shape[1]
    scores = torch.bmm(q, k.transpose(1, 2))
    future = torch.full((length, length), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    scores.view(len(k), -1, length, length).add_(future)
    return torch.softmax(scores, -1)
