"""The members that train together on one frozen base, and what they learn in a step. A single run is a cohort of one.

Several members may share a pass: all their rows go through each frozen weight at once, each adapter sees its own. A member's loss,
and so its gradients, depend on its own rows only, and it learns from the same micro-batches, with the same dropout, as it would
alone; what differs is the order in which products are summed up (float32: 1e-5 after many steps).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lora_lab.adapters.attach import base_of, trainable
from lora_lab.adapters.base import Step
from lora_lab.base.load import BaseFiles
from lora_lab.config.run import RunConfig
from lora_lab.data.collate import Batch
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.data.encode import Example
from lora_lab.fast.routing import Route
from lora_lab.run.run_dir import RunDir
from lora_lab.runtime import ranks, tracking
from lora_lab.training import regularize
from lora_lab.training.batches import pass_seed, plan_of
from lora_lab.training.optim import build_optimizer, build_schedule

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel

    from lora_lab.tasks.base import AnyTask, EvalResult, LossSum, StepBatches


# As torch.amp.GradScaler has them; there the scale has no end
_LOSS_SCALE, _STEPS_AT_SCALE, _MOST_SCALE = 2.0**16, 2000, 2.0**24


@dataclasses.dataclass
class State:
    """Where a member stands; plain numbers, saved with every checkpoint."""

    step: int = 0  # finished optimizer steps
    tokens: int = 0  # real tokens seen
    supervised_tokens: int = 0
    best_loss: float | None = None  # lowest held-out loss
    best_step: int | None = None
    worse_evaluations: int = 0  # in a row
    stopped_early: bool = False
    micro_batch_size: int | None = None  # these five: what a lack of memory led to, see oom.py
    checkpointing: bool = False
    offloading: bool = False
    micro_batch_tokens: int | None = None
    dequantizing: bool = False
    loss_scale: float | None = None  # what the loss is multiplied by, so that no gradient is too small for float16
    steps_at_scale: int = 0  # since it was changed
    unmeasured: bool = (
        False  # whether the held-out rows were due at this step, and another process was lost before that was done
    )
    best_lost: int | None = None  # the step of the best checkpoint that was found damaged, so that another had to do


class Member:
    """One adapter with everything that is its own: optimizer, schedule, row order, randomness, metrics.

    Nothing here depends on other members, so a member trains in a cohort exactly as it would alone.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig,
        run: RunDir,
        base: BaseFiles,
        model: PeftModel,
        data: Dataset | Stream,
        task: AnyTask,
    ):
        """
        Args:
            model: holds a freshly attached adapter `name`, which must be the active one.
            data: its training rows.
            task: what it learns, which knows how batches go through this model.
        """
        self.name = name
        self.config = config
        self.run = run
        self.base = base
        self.model = model
        self.task = task
        self.parameters: dict[str, torch.nn.Parameter] = trainable(model)
        self.plan = plan_of(config, data)
        self.total_steps = self.plan.total_steps(config.train.epochs, config.train.max_steps)
        self.optimizer = build_optimizer(config.optim, self.parameters, config.adapter.second_factor)
        self.schedule = build_schedule(config.optim, self.optimizer, self.total_steps)
        self.state = State(loss_scale=_LOSS_SCALE if config.model.dtype == "float16" else None)
        self.stop_at = self.total_steps  # where it rests, which may be before its end
        self.failure: Exception | None = None
        self.measured: EvalResult | None = None  # its adapter as it is, if it was measured at the last step
        self.seconds = 0.0  # its share of the time that steps took since it was built
        self.log = tracking.open_log(run.path, config.tracker)

    @property
    def memory(self) -> int:
        """Bytes that are there for this member alone: adapter, gradients, optimizer."""
        states: list[torch.Tensor] = [
            value for state in self.optimizer.state.values() for value in state.values() if hasattr(value, "nbytes")
        ]
        kept = self.config.adapter.kept(self.model, self.name).values()
        return 2 * sum(parameter.nbytes for parameter in self.parameters.values()) + sum(
            value.nbytes for value in [*states, *kept]
        )

    def unscale(self) -> None:
        """Give the gradients their own size again; scales are powers of two, so this is exact."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if self.state.loss_scale is not None and gradients:
            torch._foreach_mul_(gradients, 1 / self.state.loss_scale)

    def lower_scale(self) -> bool:
        """Halve the loss's scale, because a gradient was too large for float16; whether there was anything to halve."""
        scale = self.state.loss_scale
        if scale is None or scale <= 1:
            return False
        self.state.loss_scale, self.state.steps_at_scale = scale / 2, 0
        return True

    def raise_scale(self) -> None:
        """After a step whose gradients were finite: double the scale once enough of them were."""
        if self.state.loss_scale is None:
            return
        self.state.steps_at_scale += 1
        if self.state.steps_at_scale == _STEPS_AT_SCALE:
            self.state.loss_scale, self.state.steps_at_scale = min(2 * self.state.loss_scale, _MOST_SCALE), 0

    @property
    def coming(self) -> Step:
        """The step that it makes next, as its adapter's section sees it."""
        return Step(self.model, self.name, self.parameters, self.state.step + 1, self.total_steps)

    @property
    def done(self) -> bool:
        return self.state.step >= self.total_steps or self.state.stopped_early

    @property
    def resting(self) -> bool:
        """Whether it makes no further steps for now."""
        return self.done or self.failure is not None or self.state.step >= self.stop_at

    def due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps (None: every epoch), and at the end, is due now."""
        return self.resting or self.state.step % (every or self.plan.steps_per_epoch) == 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block this member's adapter is the active one."""
        trained = all(parameter.requires_grad for parameter in self.parameters.values())
        if self.model.active_adapter != self.name or not trained:  # peft goes through every adapter of every layer
            self.model.set_adapter(self.name)
        yield


@ranks.said
@dataclasses.dataclass(frozen=True)
class Counts:
    """What one process learned of a member's step."""

    weight: float  # of the whole step, and so the same everywhere
    batches: int  # likewise
    tokens: int
    supervised: int
    figures: dict[str, float]


@dataclasses.dataclass
class Share:
    """What one member brings into a step, and what it learned in it."""

    member: Member
    parts: list[list[Example]]  # of each micro-batch
    batches: StepBatches[Any]
    weight: float  # what the losses of all its batches are divided by, whichever process passes over them
    generator: torch.Generator | None  # draws its dropout in passes that it shares; None: it shares none
    scale: float = 1.0  # what the loss is multiplied by before the backward pass, see `State.loss_scale`
    seed: int = 0  # of everything random in the step
    losses: list[torch.Tensor] = dataclasses.field(default_factory=list)  # of each batch, where they were computed
    tokens: int = 0
    supervised: int = 0
    figures: dict[str, float] = dataclasses.field(default_factory=dict)  # weighted sums
    _loss: float | None = None

    @property
    def loss(self) -> float:
        """The weighted sum of the losses of all batches; waits for the device unless it was `read`."""
        if self._loss is None:
            self._loss = sum(loss.item() for loss in self.losses)
        return self._loss

    def tokens_at(self, place: int) -> int:
        """Of one of its batches; 0 where it has none."""
        return self.batches.batches[place].num_tokens if place < len(self.batches) else 0

    def as_learned(self, loss: torch.Tensor) -> torch.Tensor:
        """A weighted sum of losses as the backward pass starts from it."""
        mean = loss / self.weight
        return mean if self.scale == 1 else mean * self.scale

    def add(self, tokens: int, found: LossSum) -> None:
        """Count what a batch gave."""
        self.losses.append(found.loss.detach())
        self._loss = None
        self.tokens += tokens
        self.supervised += found.num_items
        for name, value in found.figures.items():
            self.figures[name] = self.figures.get(name, 0.0) + value

    def forget(self) -> None:
        """Begin to count anew."""
        self.losses, self.figures, self._loss = [], {}, None
        self.tokens = self.supervised = 0

    @property
    def counts(self) -> Counts:
        """What it learned here, as plain numbers."""
        return Counts(self.weight, len(self.batches), self.tokens, self.supervised, self.figures)

    def receive(self, counts: Sequence[Counts], loss: torch.Tensor) -> None:
        """Take what it learned in all processes.

        Args:
            counts: of each process.
            loss: summed over all of them.
        """
        self.losses, self._loss = [loss], None
        self.tokens, self.supervised = sum(one.tokens for one in counts), sum(one.supervised for one in counts)
        names = dict.fromkeys(name for one in counts for name in one.figures)
        self.figures = {name: sum(one.figures.get(name, 0.0) for one in counts) for name in names}

    def draw_for(self, place: int) -> None:
        """Let what is random in a pass begin as it does in whichever process makes that pass."""
        seed = pass_seed(self.seed, place)
        if self.generator is None:
            torch.manual_seed(seed)
        else:
            self.generator.manual_seed(seed)

    def read(self, norm: torch.Tensor) -> float:
        """The gradient's norm, and `loss` too: nothing else of a step waits for the device."""
        if not self.losses:
            return norm.item()
        *losses, size = torch.stack([*self.losses, norm.to(self.losses[0])]).tolist()
        self._loss = sum(losses)
        return float(size)

    def mean_loss(self) -> float:
        return self.loss / self.weight

    def mean_figures(self) -> dict[str, float]:
        return {name: value / self.weight for name, value in self.figures.items()}


@contextlib.contextmanager
def learning(members: Sequence[Member]) -> Iterator[None]:
    """Inside the block the adapters of these members learn: the only one is active, several are told apart by their routes."""
    if len(members) == 1:
        with members[0].active():
            yield
        return
    for member in members:
        for parameter in member.parameters.values():
            parameter.requires_grad_()  # peft lets only the active adapter have gradients
    yield


def share(member: Member, parts: list[list[Example]], seed: int, accelerator: Accelerator, alone: bool) -> Share:
    """What a member brings into a step.

    Args:
        seed: of everything random in the step.
        alone: whether it has passes of its own.
    """
    torch.manual_seed(seed)
    if not (member.model.training and base_of(member.model).training):  # which goes through every adapter's modules
        member.model.train()
    with accelerator.autocast():
        batches = member.task.step(member.model, parts, np.random.default_rng(seed))
    generator = None if alone else torch.Generator(member.model.device)
    return Share(member, parts, batches, batches.weight, generator, member.state.loss_scale or 1.0, seed)


def learn(shares: Sequence[Share], place: int, accelerator: Accelerator) -> None:
    """Forward and backward over one batch of each share, in one pass of the model that all of them are on. A step's loss is the weighted mean over all that it learns
    from, however it is split.

    Args:
        place: which of its batches; shares that have no such batch have no part in the pass.
    """
    shares = [one for one in shares if place < len(one.batches)]
    for one in shares:
        one.draw_for(place)
    first = shares[0].member
    train, model, task = first.config.train, first.model, first.task
    batches = [one.batches.batches[place].to(model.device) for one in shares]
    routes = [_route(*pair) for pair in zip(shares, batches, strict=True) if pair[0].generator is not None]

    def passed() -> list[LossSum]:
        with accelerator.autocast():
            if routes:
                found = task.losses_of_members(model, batches)
            else:
                found = [task.loss(model, batches[0], train.rdrop_alpha).without_logits()]  # gradients need the room
        accelerator.backward(sum(part.as_learned(one.loss) for one, part in zip(found, shares, strict=True)))
        return found

    if routes:
        with task.forward.routing.routed(routes):
            found = passed()
    elif train.neftune_alpha or train.fgm_epsilon:
        found = regularize.learn(train, model, batches[0], passed)
    else:
        found = passed()
    for one, batch, part in zip(shares, batches, found, strict=True):
        one.add(batch.num_tokens, part)


def _route(one: Share, batch: Batch) -> Route:
    return Route(one.member.name, batch.num_tokens, batch.num_places, one.generator, batch.shapes)
