"""How much the loss of held-out rows rises where an adapter is switched off in a part of the model.

Parts are not independent: what one layer does, another may make up for, so rises do not add up to what the adapter gains as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_lab.data.encode import Example
from lora_lab.explain import variants
from lora_lab.fast.isolation import allowed_gap
from lora_lab.runtime import console
from lora_lab.tasks.metrics import paired_margin

if TYPE_CHECKING:
    from lora_lab.data.collate import Batch
    from lora_lab.run.setup import Live

_TOKENS = 2048  # of one pass
_CONFIDENCE = 0.95  # of an interval


def losses(live: Live, examples: list[Example], without: Sequence[Collection[str]]) -> tuple[np.ndarray, str]:
    """[V, n, 2] the loss of each example, and the weight that it is divided by, with the adapter off in some modules; and why these
    variants did not share passes, empty if they did. That they may is proved on the first example.

    Args:
        without: for each variant the names of the modules (see `variants.adapted`).
    """
    reason = variants.reason_against(live.setup)
    if not reason:
        few = [*without[:2], *without[-1:]]
        reason = variants.compared(lambda: _gap_of_sharing(live, examples[:1], few))
    if reason:
        return in_turns(live, examples, without), reason
    return together(live, examples, without), ""


def in_turns(
    live: Live, examples: list[Example], without: Sequence[Collection[str]], title: str = "layers"
) -> np.ndarray:
    """`losses`, one variant after another."""
    found = []
    with console.steps(title, len(without)) as progress, live.autocast():
        for names in without:
            with variants.off(live.model, names):
                found.append(live.setup.task.losses_of(live.model, examples))
            progress.advance()
    return np.stack(found)


def together(
    live: Live, examples: list[Example], without: Sequence[Collection[str]], title: str = "layers"
) -> np.ndarray:
    """`losses`, from passes that variants share: each goes over one example as often as there are variants."""
    task, model = live.setup.task, live.model
    found = np.zeros((len(without), len(examples), 2))
    with torch.no_grad(), live.autocast(), variants.twins(model, without) as twins:
        batches = task.step(model, [[example] for example in examples], np.random.default_rng(0)).batches
        with console.steps(title, len(batches)) as progress:
            for place, batch in enumerate(batches):
                for part in _parts(len(twins), batch):
                    each = variants.losses_of(task, model, [twins[one] for one in part], [batch] * len(part))
                    found[part, place] = [(one.loss.item(), one.weight) for one in each]
                progress.advance()
    return found


def _parts(count: int, batch: Batch) -> list[list[int]]:
    """The variants of each pass."""
    size = max(2, _TOKENS // batch.num_tokens)
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def _gap_of_sharing(live: Live, examples: list[Example], without: Sequence[Collection[str]]) -> str:
    """Why passes are not shared, by what they say of some examples."""
    shared = together(live, examples, without, "try")
    alone = in_turns(live, examples, without, "try")
    moved = variants.gap([torch.from_numpy(shared[..., 0])], [torch.from_numpy(alone[..., 0])])
    limit = allowed_gap(live.model)
    return "" if moved <= limit else f"losses would move by {moved:.1e} of their size (allowed: {limit:.0e})"


def rises(found: np.ndarray, examples: Sequence[Example]) -> list[tuple[float, float]]:
    """How far the mean loss of each variant is above that of the first, with half the width of its 95 % interval over rows (paired,
    Student's t; infinite for a single row)."""
    origins = [example.origin for example in examples]
    means = found[..., 0].sum(1) / found[..., 1].sum(1)
    margins = [paired_margin(one, found[0], origins, (1 + _CONFIDENCE) / 2) for one in found]
    return [(float(mean - means[0]), margin) for mean, margin in zip(means, margins, strict=True)]
