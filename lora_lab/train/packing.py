"""Attention for examples that lie end to end in one row: each attends to itself only, and no mask is ever built.

The plain twin is one forward pass per example (`train.packing=false`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from lora_lab.data.collate import PackedBatch, pack
from lora_lab.data.encode import Example
from lora_lab.errors import BaseModelError, TrainingError
from lora_lab.fast import attention, prefix, rows

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_lab.tasks.base import PaddedTask

# How much logits may move, as a share of their norm, for another reason than rows seeing each other. Measured on
# SmolLM2-135M: 0.0 in bfloat16 and NF4, 0.06 in int8 (LLM.int8() chooses its outlier columns per batch); a real leak
# moves them by 0.13 or more.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, "int8": 0.1}

_SPREAD = 4  # rows of different lengths that are padded to see what that changes

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
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment. Signature and result ([1, T, heads, head size]) are transformers'."""
    if softcap is not None or s_aux is not None:
        raise _unpackable("attention with soft capping or sinks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths, window = segment_lengths or [query.shape[2]], sliding_window or math.inf
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if block_attention and on_cpu and not dropout and max(lengths) <= window:
        out = attention.SegmentAttention.apply(query[0], key[0], value[0], tuple(lengths), scale)[None]
        return out.transpose(1, 2).contiguous(), None
    pieces = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        length = q.shape[2]
        mask = _window_mask(length, sliding_window, q.device) if window < length else None
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


@contextlib.contextmanager
def segment_attention(model: PeftModel) -> Iterator[None]:
    """Use per-segment attention inside the block.

    Backward passes belong into the block as well: with activation checkpointing they run the forward again.
    """
    base = model.get_base_model()
    before = base.config._attn_implementation
    if before == IMPLEMENTATION:
        yield
        return
    base.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def logits(model: PeftModel, batch: PackedBatch, block_attention: bool = False) -> torch.Tensor:
    """Logits [S, V] at the supervised positions of a packed batch, all other positions skipped in the output head.

    Args:
        block_attention: see `fast.attention`.
    """
    packed = len(batch.lengths) > 1 or block_attention
    extra: dict[str, Any] = {}  # of a row alone the model counts positions itself: some begin elsewhere than at 0
    if packed:
        extra = {
            "segment_lengths": batch.lengths,
            "block_attention": block_attention,
            "position_ids": batch.position_ids,
        }
    if packed and prefix.installed(model.get_base_model()):
        extra["row_keys"] = prefix.row_keys(batch.input_ids, batch.lengths)
    if rows.installed(model.get_base_model()):
        extra["wanted_positions"] = batch.logit_positions
    else:
        extra["logits_to_keep"] = batch.logit_positions
    try:
        with segment_attention(model) if packed else contextlib.nullcontext():
            outputs = model(input_ids=batch.input_ids, use_cache=False, **extra)
    except TypeError as error:
        if packed and "unexpected keyword argument" in str(error):  # a forward that passes nothing on to its attention
            raise _unpackable(str(error)) from error
        raise
    found = outputs.logits[0]
    # A first token is never predicted, so that there are fewer wanted positions than tokens: some models give all of them.
    return found[batch.logit_positions] if len(found) == batch.num_tokens else found


def _unpackable(why: str) -> TrainingError:
    return TrainingError(f"this model cannot be packed ({why}).")


def check_isolation(model: PeftModel, examples: list[Example]) -> None:
    """Prove on two real examples (or one, twice) that packing changes nothing for this model, or refuse it.

    Some architectures mix tokens outside attention (state-space layers, convolutions), ignore positions, or do not count them from 0.

    Raises:
        TrainingError: packed logits differ from those of each example alone by more than rounding.
        BaseModelError: the model's logits are not finite, packed or not.
    """
    # The first may end on a supervised token that the second must not see; both are cut short to be quick.
    pair = [tail(example) for example in examples[:2]]
    if len(pair) == 1:
        pair *= 2
    device = model.get_base_model().device
    with torch.no_grad():
        packed = logits(model, pack(pair, device)).float()
        alone = torch.cat([logits(model, pack([example], device)).float() for example in pair])
    if not alone.isfinite().all():
        wider = "" if model.get_base_model().dtype == torch.float32 else ", or try model.dtype=float32"
        raise BaseModelError(
            f"The model's outputs are not finite (NaN or infinite) before any training. Copy the base again{wider}."
        )
    gap = ((packed - alone).norm() / alone.norm()).item()
    if not gap <= _limit(model):
        raise TrainingError(
            f"packed rows change this model's logits by {gap:.1e} of their norm (allowed: {_limit(model):.0e}), so rows would see each other."
        )


def check_padding(task: PaddedTask, model: PeftModel, examples: list[Example]) -> None:
    """Prove on real examples, from the shortest to the longest, that padding changes nothing for this model, or refuse it.

    Some architectures look at what is beside a token whatever the attention mask says (convolutions), count positions from the
    padding, or choose the tokens to attend to before they mask.

    Raises:
        TrainingError: the outputs for padded rows differ from those for each row alone by more than rounding.
    """
    ordered = sorted(examples, key=lambda example: example.num_tokens)
    if ordered[0].num_tokens == ordered[-1].num_tokens:
        return
    spread = [ordered[place] for place in np.unique(np.linspace(0, len(ordered) - 1, _SPREAD).astype(int))]
    together, alone = (_outputs(task, model, parts) for parts in ([spread], [[example] for example in spread]))
    apart, norm = (together - alone).norm().item(), alone.norm().item()
    if not apart <= _limit(model) * norm:
        raise TrainingError(
            f"padding changes this model's outputs by {apart:.1e}, their norm being {norm:.1e} (allowed: {_limit(model):.0e} of it), so "
            "rows would not be read as they are alone."
        )


@torch.no_grad()
def _outputs(task: PaddedTask, model: PeftModel, parts: list[list[Example]]) -> torch.Tensor:
    """What the model says of all rows, flat."""
    rng = np.random.default_rng(0)
    batches = [task.collate(examples, rng).to(model.device) for examples in parts]
    return torch.cat([task.row_outputs(model, batch) for batch in batches])


def _limit(model: PeftModel) -> float:
    """How much outputs may move by rounding alone, as a share of their norm."""
    return _ROUNDING["int8" if getattr(model, "is_loaded_in_8bit", False) else model.get_base_model().dtype]


def tail(example: Example, tokens: int = 48) -> Example:
    """The last tokens of an example, the answer's end among them, as an example of their own."""
    ids, weights = example.input_ids[-tokens:], example.weights[-tokens:].copy()
    weights[0], weights[-1] = 0, 1
    return Example(ids, weights, example.origin)
