"""How much each token of a row contributes to what the model says: integrated gradients, and gradient times input, on the input embeddings.

Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) go from a row whose tokens say nothing to the row itself. What all tokens
get adds up to the difference between both outputs; by how much it does not is the completeness error, which is the integral's error.

Tokens say nothing where their embedding is the mask token's, or the mean over all tokens where there is no such token: not zero, because
behind a root mean square norm a row of zeros has no direction, and a row of anything near zero has one. The tokenizer's own marks, and the answer of a
model that writes, stay as they are and so get nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lora_lab.adapters.attach import base_of
from lora_lab.base import embeddings
from lora_lab.data.collate import Batch, PackedBatch
from lora_lab.data.encode import Example
from lora_lab.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_lab.run.setup import Live
    from lora_lab.tasks.base import AnyTask

STEPS = (16, 64, 256)  # of the integral: more where fewer leave too large an error
ENOUGH = 0.01  # completeness error, as a share of what all tokens get
_TOKENS = 1024  # of one pass
_CHUNK = 4096  # tokens whose mean is taken at once


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What the tokens of one row contribute to one number of a model."""

    output: float  # the number
    empty: float  # the same of the row whose tokens say nothing
    tokens: list[np.ndarray]  # [T] int64 of each sequence that the model reads, without padding
    integrated: list[np.ndarray]  # [T] float32 of each
    gradient_input: list[np.ndarray]  # [T] float32 of each: gradient times embedding
    steps: int  # of the integral

    @property
    def error(self) -> float:
        """What the tokens get, less what they should get together."""
        return float(sum(one.sum() for one in self.integrated)) - (self.output - self.empty)

    @property
    def relative_error(self) -> float:
        """Its size as a share of the sizes of all that tokens get."""
        size = float(sum(np.abs(one).sum() for one in self.integrated))
        return abs(self.error) / size if size else 0.0


def explain(live: Live, example: Example) -> Attribution:
    """What the tokens of an example contribute to the task's `explained`, for the model as it is; with as many steps as the error asks for.

    Raises:
        ConfigError: the model reads its tokens past its input embeddings.
    """
    task, model = live.setup.task, live.model
    with task.forward.plain(model), live.autocast():
        row = _Row(task, model, example)
        for steps in STEPS:
            found = row.attribution(steps)
            if found.relative_error <= ENOUGH:
                break
    return found


def nodes(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in (0, 1) and weights [steps] of Gauss and Legendre's quadrature, which captum takes too."""
    places, weights = np.polynomial.legendre.leggauss(steps)
    return (1 + places) / 2, weights / 2


@dataclasses.dataclass
class _Call:
    """One call of the input embeddings in a pass."""

    ids: torch.Tensor  # [N, T]
    given: torch.Tensor  # [N, T, D] what they give
    empty: torch.Tensor  # [N, T, D] the same of tokens that say nothing


class _Row:
    """An example, and how it goes through a model."""

    def __init__(self, task: AnyTask, model: PeftModel, example: Example):
        self._task, self._model, self._example = task, model, example
        self._batch = self._collated(1)
        self._calls: list[_Call] = []
        with torch.no_grad(), embeddings.changed(base_of(model), self._note):
            self.output = float(task.explained(model, self._batch))
        if not self._calls:
            raise ConfigError(
                "run: the base reads its tokens past its input embeddings, or the adapter trains them, so tokens cannot be told apart."
            )
        if base_of(model).config.is_encoder_decoder:
            del self._calls[1:]  # what the decoder reads is the answer, which stays
        self.empty = self._passed([call.empty for call in self._calls])

    def _collated(self, copies: int) -> Batch:
        batch: Batch = self._task.collate([self._example] * copies, np.random.default_rng(0))
        return batch.to(self._model.device)

    def _note(self, module: nn.Module, ids: torch.Tensor, given: torch.Tensor) -> None:
        given = given.detach().clone()
        nothing = _nothing(self._task, module, given)
        self._calls.append(_Call(ids, given, torch.where(self._stays(ids)[..., None], given, nothing)))

    def _stays(self, ids: torch.Tensor) -> torch.Tensor:
        """[N, T] bool: the tokenizer's marks, and the answer of a model that writes."""
        marks = torch.tensor(sorted(set(self._task.tokenizer.all_special_ids)), device=ids.device)
        stays = torch.isin(ids, marks)
        answers = torch.zeros_like(stays)
        if isinstance(self._batch, PackedBatch) and ids.shape == self._batch.input_ids.shape:
            answers[0, self._batch.logit_positions + 1] = True
        with_answers = stays | answers
        return (
            stays if bool(with_answers.all()) else with_answers
        )  # of a text that is learned as a whole no token is asked

    def _passed(self, points: Sequence[torch.Tensor]) -> float:
        with torch.no_grad(), embeddings.changed(base_of(self._model), _in_turn(points)):
            return float(self._task.explained(self._model, self._batch))

    def _gradients(self, points: Sequence[torch.Tensor], batch: Batch) -> list[torch.Tensor]:
        """Of what is explained, by the embeddings at these points; float32."""
        points = [point.detach().requires_grad_() for point in points]
        with torch.enable_grad(), embeddings.changed(base_of(self._model), _in_turn(points)):
            output = self._task.explained(self._model, batch)
            return [one.float() for one in torch.autograd.grad(output, points)]

    def attribution(self, steps: int) -> Attribution:
        places, weights = nodes(steps)
        sums = [torch.zeros_like(call.given, dtype=torch.float32) for call in self._calls]
        size = self._copies
        for start in range(0, steps, size):
            part = slice(start, start + size)
            for total, one in zip(sums, self._weighted(places[part], weights[part]), strict=True):
                total += one
        integrated = [
            (total * (call.given - call.empty).float()).sum(-1) for total, call in zip(sums, self._calls, strict=True)
        ]
        at_row = self._gradients([call.given for call in self._calls], self._batch)
        products = [(one * call.given.float()).sum(-1) for one, call in zip(at_row, self._calls, strict=True)]
        return Attribution(
            self.output, self.empty, self._rows([call.ids for call in self._calls]), self._rows(integrated),
            self._rows(products), steps,
        )  # fmt: skip

    @property
    def _copies(self) -> int:
        """How many copies of the row go through a pass, each at a point of its own; more than one only where a batch of copies is the row, again
        and again."""
        if len(self._calls) > 1 or len(self._calls[0].ids) > 1 or not self._task.forward.together:
            return 1
        size = max(1, _TOKENS // self._calls[0].ids.shape[1])
        return size if size == 1 or self._repeats(2) else 1

    def _repeats(self, copies: int) -> bool:
        one, several = _ids(self._batch), _ids(self._collated(copies))
        return several.numel() == copies * one.numel() and torch.equal(
            several.view(copies, -1), one.view(1, -1).expand(copies, -1)
        )

    def _weighted(self, places: np.ndarray, weights: np.ndarray) -> list[torch.Tensor]:
        """The sum over some points of the path of the gradient there, times the point's weight."""
        if self._copies == 1:
            [place], [weight] = places, weights
            each = self._gradients([_between(call, float(place)) for call in self._calls], self._batch)
            return [float(weight) * one for one in each]
        [call], batch = self._calls, self._collated(len(places))
        points = torch.cat([_between(call, float(place)) for place in places])  # [P, T, D]
        packed = isinstance(batch, PackedBatch)
        [found] = self._gradients([points.flatten(0, 1)[None] if packed else points], batch)
        scale = torch.tensor(weights, dtype=torch.float32, device=found.device)
        return [(found.view(points.shape) * scale[:, None, None]).sum(0, keepdim=True)]

    def _rows(self, values: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """What is not padding, row by row."""
        pad = self._task.tokenizer.pad_token_id
        found = []
        for call, one in zip(self._calls, values, strict=True):
            for ids, row in zip(call.ids.cpu(), one.cpu(), strict=True):
                real = np.flatnonzero((ids != pad).numpy())
                end = int(real[-1]) + 1 if len(real) and not isinstance(self._batch, PackedBatch) else len(ids)
                found.append(row[:end].numpy())
        return found


def _ids(batch: Any) -> torch.Tensor:
    found: torch.Tensor = batch.input_ids if isinstance(batch, PackedBatch) else batch.inputs["input_ids"]
    return found


def _between(call: _Call, place: float) -> torch.Tensor:
    return call.empty + place * (call.given - call.empty)


def _in_turn(points: Sequence[torch.Tensor]) -> Callable[..., torch.Tensor | None]:
    """What the calls of the input embeddings give instead; those beyond stay as they are."""
    left = iter(points)
    return lambda module, ids, given: next(left, None)


def _nothing(task: AnyTask, module: Any, given: torch.Tensor) -> torch.Tensor:
    """[D] the embedding of a token that says nothing. `forward` calls no hooks, of which one is asking."""
    mask = task.tokenizer.mask_token_id
    if mask is not None:
        return module.forward(torch.tensor([mask], device=given.device))[0].to(given.dtype)
    count = module.weight.shape[0]
    total = torch.zeros(given.shape[-1], dtype=torch.float32, device=given.device)
    for start in range(0, count, _CHUNK):
        ids = torch.arange(start, min(start + _CHUNK, count), device=given.device)
        total += module.forward(ids).float().sum(0)
    return (total / count).to(given.dtype)
