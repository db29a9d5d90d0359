"""The members that train together on one frozen base. A single run is a cohort of one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_lab.adapters.attach import trainable
from lora_lab.base.load import BaseFiles
from lora_lab.config.run import RunConfig
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.run.run_dir import RunDir
from lora_lab.runtime import tracking
from lora_lab.train.batches import plan_of
from lora_lab.train.optim import build_optimizer, build_schedule

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from lora_lab.tasks.base import Measured


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
    micro_batch_size: int | None = None  # these three: what a lack of memory led to, see oom.py
    checkpointing: bool = False
    offloading: bool = False
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
        learned: dict[str, Any],
    ):
        """
        Args:
            model: holds a freshly attached adapter `name`, which must be the active one.
            data: its training rows.
            learned: what its task took from them.
        """
        self.name = name
        self.config = config
        self.run = run
        self.base = base
        self.model = model
        self.learned = learned
        self.parameters: dict[str, torch.nn.Parameter] = trainable(model)
        self.plan = plan_of(config, data)
        self.total_steps = self.plan.total_steps(config.train.epochs, config.train.max_steps)
        self.optimizer = build_optimizer(config.optim, self.parameters.values())
        self.schedule = build_schedule(config.optim, self.optimizer, self.total_steps)
        self.state = State()
        self.stop_at = self.total_steps  # where it rests, which may be before its end
        self.failure: Exception | None = None
        self.measured: Measured | None = None  # its adapter as it is, if it was measured at the last step
        self.seconds = 0.0  # its share of the time that steps took since it was built
        self.log = tracking.open_log(run.path, config.tracker)

    @property
    def memory(self) -> int:
        """Bytes that are there for this member alone: adapter, gradients, optimizer."""
        states = [
            value for state in self.optimizer.state.values() for value in state.values() if hasattr(value, "nbytes")
        ]
        return 2 * sum(parameter.nbytes for parameter in self.parameters.values()) + sum(
            value.nbytes for value in states
        )

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
    def turn(self) -> Iterator[None]:
        """Inside the block this member's adapter is the active one."""
        trained = all(parameter.requires_grad for parameter in self.parameters.values())
        if self.model.active_adapter != self.name or not trained:  # peft goes through every adapter of every layer
            self.model.set_adapter(self.name)
        yield
