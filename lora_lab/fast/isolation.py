"""Proof, on a model's own rows, that rows which share a forward pass are read as they would be alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_lab.adapters.attach import base_of
from lora_lab.data.collate import pack
from lora_lab.data.encode import Example
from lora_lab.errors import BaseModelError, TrainingError
from lora_lab.fast.forward import Forward
from lora_lab.runtime.memory import is_out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_lab.tasks.base import PaddedTask

# How much logits may move, as a share of their norm, for another reason than rows seeing each other. Measured on
# SmolLM2-135M: 0.0 in bfloat16 and NF4, 0.06 in int8 (LLM.int8() chooses its outlier columns per batch); a real leak
# moves them by 0.13 or more.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2, "int8": 0.1}

_SPREAD = 4  # rows of different lengths that are padded to see what that changes


def reason_against(check: Callable[[], None]) -> str:
    """Why rows cannot share a pass, as a check of this file finds it; empty: they can.

    Raises:
        BaseModelError: the model's outputs are not finite.
    """
    try:
        check()
    except BaseModelError:
        raise
    except Exception as error:  # whatever a model of another make raises here is about packing alone
        if is_out_of_memory(error):
            raise
        reason = str(error) if isinstance(error, TrainingError) else f"{type(error).__name__}: {error}"
        return reason.strip().partition("\n")[0]
    return ""


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
    device, plain = base_of(model).device, Forward()
    with torch.no_grad():
        packed = plain.logits(model, pack(pair, device)).float()
        alone = torch.cat([plain.logits(model, pack([example], device)).float() for example in pair])
    if not alone.isfinite().all():
        wider = "" if base_of(model).dtype == torch.float32 else ", or try model.dtype=float32"
        raise BaseModelError(
            f"The model's outputs are not finite (NaN or infinite) before any training. Copy the base again{wider}."
        )
    gap = ((packed - alone).norm() / alone.norm()).item()
    if not gap <= allowed_gap(model):
        raise TrainingError(
            f"packed rows change this model's logits by {gap:.1e} of their norm (allowed: {allowed_gap(model):.0e}), so rows would see each other."
        )


def check_padding(task: PaddedTask[Any, Any], model: PeftModel, examples: list[Example]) -> None:
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
    if not apart <= allowed_gap(model) * norm:
        raise TrainingError(
            f"padding changes this model's outputs by {apart:.1e}, their norm being {norm:.1e} (allowed: {allowed_gap(model):.0e} of it), so "
            "rows would not be read as they are alone."
        )


@torch.no_grad()
def _outputs(task: PaddedTask[Any, Any], model: PeftModel, parts: list[list[Example]]) -> torch.Tensor:
    """What the model says of all rows, flat."""
    rng = np.random.default_rng(0)
    batches = [task.collate(examples, rng).to(model.device) for examples in parts]
    return torch.cat([task.row_outputs(model, batch) for batch in batches])


def allowed_gap(model: PreTrainedModel | PeftModel) -> float:
    """How much outputs may move by rounding alone, as a share of their norm."""
    return _ROUNDING["int8" if getattr(model, "is_loaded_in_8bit", False) else model.dtype]


def tail(example: Example, tokens: int = 48) -> Example:
    """The last tokens of an example, the answer's end among them, as an example of their own."""
    ids, weights = example.input_ids[-tokens:], example.weights[-tokens:].copy()
    weights[0], weights[-1] = 0, 1
    return Example(ids, weights, example.origin)
