"""A vector for each row, of the base alone: the mean of its last hidden states, of length 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from lora_lab.base.pooling import pooled
from lora_lab.data.encode import Example
from lora_lab.runtime import console

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_lab.tasks.base import AnyTask, PaddedTask

_TOKENS = 2048  # of one pass, with padding


@torch.no_grad()
def features(model: PreTrainedModel, task: AnyTask, examples: Sequence[Example], title: str) -> np.ndarray:
    """[n, D] float32 of length 1.

    Args:
        model: the base, of whichever kind; adapters on it are off.
        task: of one class for each row, and so with padded rows.
        title: of the progress bar.
    """
    padded = cast("PaddedTask[Any, Any]", task)
    order = sorted(range(len(examples)), key=lambda place: examples[place].num_tokens)
    found: dict[int, np.ndarray] = {}
    with console.steps(title, len(examples)) as progress:
        for places in _groups(order, examples):
            own = [examples[place] for place in places]
            inputs = padded.inputs([one.input_ids for one in own], [one.own.get("pair_start", 0) for one in own])
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            out = model(**inputs, output_hidden_states=True)
            hidden = (out.hidden_states if "hidden_states" in out else out.encoder_hidden_states)[-1].float()
            vectors = pooled(hidden, inputs["attention_mask"], "mean")
            found.update(zip(places, torch.nn.functional.normalize(vectors, dim=1).cpu().numpy(), strict=True))
            progress.advance(len(places))
    return np.stack([found[place] for place in range(len(examples))])


def _groups(order: Sequence[int], examples: Sequence[Example]) -> list[list[int]]:
    """Places of the examples of each pass; in `order` lengths rise."""
    groups: list[list[int]] = []
    for place in order:
        if not groups or (len(groups[-1]) + 1) * examples[place].num_tokens > _TOKENS:
            groups.append([])
        groups[-1].append(place)
    return groups
