"""Which training rows taught an adapter what it says of a row, by gradients of the adapter's weights alone.

A step on one row changes the loss of another by minus the learning rate times the dot product of both gradients. TracIn (Pruthi et al. 2020,
arXiv:2002.08484) sums that over checkpoints; here it is the mean over the kept checkpoints and the adapter. Two things are put right first:

- Each gradient has length 1, because rows with large gradients, which are long ones and outliers, would come first for every question.
- What many rows teach is shared out among them. Dot products alone name any row of the right class. So a row's *share* is its weight where the
  training rows' gradients together make up the question's: ridge regression with a penalty of 1, which is TRAK's kernel in its dual form (Park et al. 2023,
  arXiv:2303.14186).

Gradients are projected to 4,096 numbers by random signs (count sketch, Charikar et al. 2002), which keeps dot products to about 1.6 %.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from lora_lab.adapters import files
from lora_lab.adapters.attach import trainable
from lora_lab.data.encode import Example
from lora_lab.errors import LoraLabError
from lora_lab.explain import variants
from lora_lab.fast.isolation import allowed_gap
from lora_lab.run.setup import ADAPTER, Live
from lora_lab.runtime import console, storage

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_lab.data.collate import Batch
    from lora_lab.run.run_dir import RunDir
    from lora_lab.tasks.base import AnyTask

_TOKENS, _TWINS, _BYTES = 2048, 16, 2**28  # of one pass: tokens, rows, and bytes of their gradients
_SIZE = 4096  # numbers that a gradient is projected to
_LEAST = 1e-30  # of a gradient's length
_SCALE = 2.0**12  # of a loss in float16, whose gradients would be too small


@dataclasses.dataclass(frozen=True)
class Influence:
    """How much each training example taught what is said of some rows: mean over the states."""

    shares: np.ndarray  # [rows, training examples] float32: its weight among all that make up the row's gradient
    cosines: np.ndarray  # [rows, training examples] float32: of the two gradients alone
    states: list[str]  # of the adapter, by name
    reason: str  # why rows did not share passes; '': they did


def states(run: RunDir) -> dict[str, Path]:
    """The kept states of a run's adapter: its checkpoints, and the trained adapter, unless that is one of them. Damaged ones are left out."""
    step = storage.verify(run.adapter)["step"]
    found: dict[str, Path] = {}
    for folder in sorted(run.checkpoints.glob("step-*"), key=lambda one: one.stat().st_mtime):
        try:
            own = storage.verify(folder)["step"]
        except LoraLabError as error:
            console.say("skipped", error)
            continue
        if own != step:
            found[folder.name] = folder
    return {**found, "adapter": run.adapter}


def influence(live: Live, asked: Sequence[Example], train: Sequence[Example], kept: dict[str, Path]) -> Influence:
    """How much each training example taught the labels, or answers, of the asked ones.

    Args:
        kept: see `states`; the last one is left loaded.
    """
    reason = variants.reason_against(live.setup)
    if not reason:
        reason = variants.compared(lambda: _gap_of_sharing(live, [*asked, *train][:2]))
    gradients: Gradients = in_turns if reason else together
    sketch = Sketch(sum(one.numel() for one in _own(trainable(live.model)).values()), live.model.device)
    shares, cosines = np.zeros((2, len(asked), len(train)))
    with console.steps("rows", len(kept) * (len(asked) + len(train))) as progress:
        for folder in kept.values():
            files.read_into(folder, live.model, ADAPTER)
            questions, rows = (
                _sketched(gradients(live, examples), len(examples), sketch, progress) for examples in (asked, train)
            )
            shares += shares_of(questions, rows) / len(kept)
            cosines += (questions @ rows.T) / len(kept)
    return Influence(shares.astype(np.float32), cosines.astype(np.float32), [*kept], reason)


def shares_of(questions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[q, n] the weights by which rows [n, D] together make up questions [q, D], with a ridge penalty of 1; all of length 1."""
    kernel = rows.astype(np.float64) @ rows.T
    kernel[np.diag_indices(len(rows))] += 1.0
    found: np.ndarray = np.linalg.solve(kernel, (rows @ questions.T).astype(np.float64)).T
    return found


class Sketch:
    """A projection of vectors of `size` numbers to few, always the same; shorter ones stay as they are."""

    def __init__(self, size: int, device: torch.device):
        self._small = size <= _SIZE
        draw = torch.Generator().manual_seed(0)
        self._places = torch.randint(_SIZE, (0 if self._small else size,), generator=draw).to(device)
        self._signs = (torch.randint(2, self._places.shape, generator=draw) * 2.0 - 1).to(device)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[K, P] -> [K, D] float32, of length 1."""
        if not self._small:
            rows = rows.new_zeros(len(rows), _SIZE).index_add_(1, self._places, rows * self._signs)
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(_LEAST)


def _sketched(
    gradients: Iterator[tuple[list[int], torch.Tensor]], count: int, sketch: Sketch, progress: console.Steps
) -> np.ndarray:
    found = np.zeros((0, 0), dtype=np.float32)
    for places, rows in gradients:
        short = sketch(rows).cpu().numpy()
        found = found if found.size else np.zeros((count, short.shape[1]), dtype=np.float32)
        found[places] = short
        progress.advance(len(places))
    return found


Gradients = Callable[[Live, Sequence[Example]], Iterator[tuple[list[int], torch.Tensor]]]


def in_turns(live: Live, examples: Sequence[Example]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """The gradient of the loss of each example by the adapter's weights, [1, P] float32, one pass for each; with its place."""
    task, model = live.setup.task, live.model.eval()
    parameters = _own(trainable(model))
    for place, example in enumerate(examples):
        with torch.enable_grad(), live.autocast():
            loss = task.loss(model, _batch(task, model, example).to(model.device)).loss
        yield [place], _gradients(live, loss, [parameters])


def together(live: Live, examples: Sequence[Example]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """As `in_turns`, [K, P] of K examples in one pass: each goes through a twin of the adapter."""
    task, model = live.setup.task, live.model.eval()
    size = sum(parameter.numel() for parameter in _own(trainable(model)).values())
    groups = _groups([example.num_tokens for example in examples], max(1, min(_TWINS, _BYTES // (4 * size))))
    with variants.twins(model, [()] * max(map(len, groups), default=0)) as twins:
        for places in groups:
            with torch.enable_grad(), live.autocast():
                batches = [_batch(task, model, examples[place]) for place in places]
                found = variants.losses_of(task, model, twins[: len(places)], batches)
                total = torch.stack([one.loss for one in found]).sum()
            yield places, _gradients(live, total, [_own(one.parameters) for one in twins[: len(places)]])


def _own(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Those of the adapter itself, unless there are none: gradients of a head that is trained whole tell classes apart, not rows."""
    return {name: one for name, one in parameters.items() if ".modules_to_save." not in name} or parameters


def _batch(task: AnyTask, model: PeftModel, example: Example) -> Batch:
    """The example alone, with the same draws whatever is beside it."""
    [batch] = task.step(model, [[example]], np.random.default_rng(0)).batches
    return cast("Batch", batch)


def _groups(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Places of the examples of each pass: of like length, so many at most, and so many tokens with padding."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or len(groups[-1]) >= most or (len(groups[-1]) + 1) * lengths[place] > _TOKENS:
            groups.append([])
        groups[-1].append(place)
    return groups


def _gradients(live: Live, loss: torch.Tensor, parameters: Sequence[dict[str, Any]]) -> torch.Tensor:
    """[K, P] float32 by each of some sets of parameters."""
    scale = _SCALE if live.model.dtype == torch.float16 else 1.0
    flat = [one for own in parameters for one in own.values()]
    found = torch.autograd.grad(loss * scale, flat, allow_unused=True, materialize_grads=True)
    return torch.cat([one.float().flatten() for one in found]).view(len(parameters), -1)


def _gap_of_sharing(live: Live, examples: list[Example]) -> str:
    """Why passes are not shared, by the gradients of some examples."""
    found: list[list[torch.Tensor]] = []
    for gradients in (together, in_turns):
        own = sorted(
            ((places[k], row) for places, rows in gradients(live, examples) for k, row in enumerate(rows)),
            key=lambda one: one[0],
        )
        found.append([row for _, row in own])
    moved, limit = variants.gap(*found), allowed_gap(live.model)
    return "" if moved <= limit else f"gradients would move by {moved:.1e} of their norm (allowed: {limit:.0e})"
