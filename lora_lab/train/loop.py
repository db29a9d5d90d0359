"""The only training loop. It trains a cohort step by step on one frozen base: members share passes, or take turns.

Order within a step: forward and backward over the micro-batches, check, clip, update, log, evaluate, save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_lab.adapters import files
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.errors import CheckpointError, Interrupted, RunError, TrainingError
from lora_lab.runtime import console, signals
from lora_lab.train import checkpoint, diagnose, joint, oom, packing, regularize
from lora_lab.train.cohort import Member

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lora_lab.data.encode import Example
    from lora_lab.fast.roster import Roster
    from lora_lab.tasks.base import Task

_WARM_UP_STEPS = 2  # left out of tokens_per_second
_ENOUGH_TOKENS = {"cpu": 256, "cuda": 8192}  # of a forward pass that another one beside it is worth its start


@dataclasses.dataclass
class Clock:
    """Speed of the steps since the start or the resume, evaluation and saving left out."""

    warm_up: int = _WARM_UP_STEPS
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        self.steps += 1
        if self.steps > self.warm_up:
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


@dataclasses.dataclass
class Step:
    """What a member learned in the step that it is in."""

    parts: list[list[Example]]
    loss: float  # weighted sum
    weight: float  # what it is divided by
    tokens: int
    supervised: int


@dataclasses.dataclass
class Loop:
    """What all steps of a cohort share."""

    train: Dataset | Stream
    held_out: Dataset | None
    task: Task
    accelerator: Accelerator
    arrived: list[int]  # signals
    progress: console.Steps
    clock: Clock
    roster: Roster | None  # None: members take turns
    width: int  # members in one pass, at most


def fit(
    members: list[Member],
    train: Dataset | Stream,
    held_out: Dataset | None,
    task: Task,
    accelerator: Accelerator,
    roster: Roster | None = None,
    width: int = 1,
    used_up: Callable[[], bool] = lambda: False,
) -> Clock:
    """Train every member to where it stops; those at their end are left with their best or last adapter loaded
    (`train.keep_best`).

    A member that fails leaves the others as they are: its error is in `member.failure`. The only member's error is raised.

    Args:
        roster: of the model's modules, for members that share passes; None: they take turns.
        width: how many members share a pass, at most.
        used_up: whether the members should rest where they are; asked after each of them made a step.

    Raises:
        TrainingError: a non-finite loss or gradient of the only member; the last good state is saved.
        Interrupted: Ctrl-C or SIGTERM; the last finished steps are saved.
    """
    todo = sum(member.stop_at - member.state.step for member in members)
    with (
        signals.held() as arrived,
        packing.segment_attention(members[0].model) if task.packed and task.together else contextlib.nullcontext(),
        console.steps("train", sum(m.stop_at for m in members), sum(m.state.step for m in members)) as progress,
    ):
        loop = Loop(
            train, held_out, task, accelerator, arrived, progress, Clock(_WARM_UP_STEPS * len(members)), roster, width
        )
        if todo:
            _prepare(members, loop)
        while running := [member for member in members if not member.resting]:
            width = loop.width if loop.roster else 1
            for start in range(0, len(running), width):
                _step_and_save(running[start : start + width], loop, alone=len(members) == 1)
                if arrived:
                    _save_all(members)
                    raise _interruption(arrived[0], members)
            if used_up():
                _save_all(running)
                break
    for member in members:
        if member.done and member.failure is None:
            _load_best(member)
            member.log.close()
    return loop.clock


def _interruption(signum: int, members: list[Member]) -> Interrupted:
    """The interruption, with how far the members came."""
    interrupted = Interrupted(signum)
    interrupted.steps = sum(one.state.step for one in members), sum(one.stop_at for one in members)
    return interrupted


def _prepare(members: list[Member], loop: Loop) -> None:
    for member in members:
        oom.apply(member)
    if loop.roster is not None:
        joint.check(members, loop.train, loop.task, loop.roster, loop.accelerator)


def _step_and_save(members: list[Member], loop: Loop, alone: bool) -> None:
    """One optimizer step of each of these members, and what is due after it."""
    started = time.perf_counter()
    try:
        learned = _learn_together(members, loop) if len(members) > 1 else _learn_in_memory(members[0], loop)
    except Exception as error:
        if len(members) == 1:
            _fail(members[0], error, alone)
            return
        console.say("joint", f"a shared step failed ({error}); running its members one at a time")
        for member in members:
            member.optimizer.zero_grad()
            _step_and_save([member], loop, alone)
        return
    if learned is None:  # a signal arrived: nothing has changed
        return
    shared = (time.perf_counter() - started) / len(members)
    for member, step in zip(members, learned, strict=True):
        started = time.perf_counter()
        try:
            _update(member, step, loop)
            _log(member, step, loop, shared + time.perf_counter() - started)
            _evaluate_and_save(member, loop.held_out, loop.task, loop.accelerator)
            _stop_unlogged(member)
        except Exception as error:
            _fail(member, error, alone)


def _fail(member: Member, error: Exception, alone: bool) -> None:
    """Leave a member out from now on; the only one's error goes up."""
    member.optimizer.zero_grad()
    if alone:
        raise error
    member.failure = error
    console.say("failed", f"{member.run.path}: {error}")


def _learn_together(members: list[Member], loop: Loop) -> list[Step] | None:
    """The gradients of each member's coming step, in shared passes of fewer members if they do not fit into memory."""
    shares = [joint.share(member, _parts(member, loop.train, loop.task)) for member in members]
    members[0].model.train()
    while True:
        try:
            for start in range(0, len(shares), loop.width):
                if loop.arrived:
                    for member in members:
                        member.optimizer.zero_grad()
                    return None
                joint.learn(shares[start : start + loop.width], loop.task, loop.roster, loop.accelerator)
            return [Step(one.parts, one.loss, one.weight, one.tokens, one.supervised) for one in shares]
        except (RuntimeError, MemoryError) as error:
            if not oom.is_out_of_memory(error) or loop.width == 1:
                raise
            error.__traceback__ = None  # it holds the activations that did not fit
            loop.width = (loop.width + 1) // 2
            console.say("memory", f"passes of {loop.width} members from now on; the steps themselves stay the same")
            for member in members:
                member.optimizer.zero_grad()


def _learn_in_memory(member: Member, loop: Loop) -> list[Step] | None:
    """The gradients of the coming step, in smaller parts as long as it does not fit; None when a signal arrived."""
    with member.turn():
        while True:
            parts = _parts(member, loop.train, loop.task)
            try:
                return _learn(member, parts, loop)
            except (RuntimeError, MemoryError) as error:
                member.optimizer.zero_grad()
                _need_less(member, error)


def _learn(member: Member, parts: list[list[Example]], loop: Loop) -> list[Step] | None:
    """Forward and backward: the step's loss is the weighted mean over all that it learns from, however it is split."""
    seed, task = member.plan.dropout_seed(member.state.step), loop.task
    batches = task.batches(parts, np.random.default_rng(seed))
    step = Step(parts, 0.0, sum(batch.weight for batch in batches), 0, 0)
    torch.manual_seed(seed)
    member.model.train()
    with loop.accelerator.autocast():
        task.begin(member.model, batches)
    for batch in batches:
        if loop.arrived:
            member.optimizer.zero_grad()
            return None
        out = regularize.learn(member, task, batch.to(member.model.device), step.weight, loop.accelerator)
        step.loss, step.tokens = step.loss + out.loss.item(), step.tokens + batch.num_tokens
        step.supervised += out.num_items
    return [step]


def _update(member: Member, step: Step, loop: Loop) -> None:
    """Check, clip, update."""
    state, config = member.state, member.config
    if not step.tokens:  # nothing to learn from in this step
        member.schedule.step()
        state.step += 1
        member.log.write(state.step, loss=None, tokens=state.tokens)
        return
    limit = math.inf if config.optim.max_grad_norm is None else config.optim.max_grad_norm
    grad_norm = float(loop.accelerator.clip_grad_norm_(list(member.parameters.values()), limit))
    if not (math.isfinite(step.loss) and math.isfinite(grad_norm)):
        member.optimizer.zero_grad()
        _stop_non_finite(member, step.loss / step.weight, grad_norm, step.parts, loop.task, loop.accelerator)
    lr = member.schedule.get_last_lr()[0]
    member.optimizer.step()
    member.schedule.step()
    member.optimizer.zero_grad()
    state.step += 1
    member.measured = None
    state.tokens += step.tokens
    state.supervised_tokens += step.supervised
    member.log.write(state.step, loss=step.loss / step.weight, grad_norm=grad_norm, lr=lr, tokens=state.tokens)


def _log(member: Member, step: Step, loop: Loop, seconds: float) -> None:
    if not step.tokens:
        loop.progress.advance(loss="no rows")
        return
    member.seconds += seconds
    loop.clock.add(seconds, step.tokens)
    speed = loop.clock.tokens_per_second or step.tokens / seconds
    loop.progress.advance(
        loss=f"{step.loss / step.weight:.4f}",
        lr=f"{member.schedule.get_last_lr()[0]:.2e}",
        **{"tok/s": f"{speed:.0f}", "GiB": f"{peak_memory_gib():.1f}"},
    )


def _need_less(member: Member, error: Exception) -> None:
    """After a failed allocation, make the member need less memory; other errors go on."""
    if not oom.is_out_of_memory(error):
        raise error
    error.__traceback__ = None  # it holds the activations that did not fit
    done = oom.step_down(member)
    if done is None:
        raise TrainingError(
            f"Step {member.state.step + 1} does not fit into memory, one row at a time and checkpointed. Set a smaller "
            "data.max_tokens, quant=nf4 or speed.dequantize=always; lora-lab plan shows what needs how much."
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    console.say("memory", f"step {member.state.step + 1} does not fit: {done}; the step itself stays the same")


def _parts(member: Member, train: Dataset | Stream, task: Task) -> list[list[Example]]:
    """The examples of the coming step's micro-batches; for padded batches, rows of like length together."""
    chosen = member.plan.step(member.state.step)
    parts = [[example for i in part for example in train[int(i)]] for part in chosen]
    if task.packed:
        return parts
    device = member.model.device.type
    return of_like_length([e for part in parts for e in part], member.plan.micro_batch_size, _ENOUGH_TOKENS[device])


def of_like_length(examples: list[Example], most: int, enough_tokens: int) -> list[list[Example]]:
    """The examples in batches of at most so many, ended early where the rest would be mostly padding. A step is the same however
    it is split, so that costs nothing but the start of another forward pass."""
    parts: list[list[Example]] = []
    for example in sorted(examples, key=lambda one: one.num_tokens):
        part = parts[-1] if parts else []
        large = len(part) * example.num_tokens > enough_tokens
        if not part or len(part) == most or (large and example.num_tokens > 1.5 * part[0].num_tokens):
            parts.append([])
        parts[-1].append(example)
    return parts


def _stop_non_finite(
    member: Member, loss: float, grad_norm: float, parts: list[list[Example]], task: Task, accelerator: Accelerator
) -> None:
    examples = [example for part in parts for example in part]
    rows = ", ".join(example.origin for example in examples)
    with member.turn():
        saved = checkpoint.save(member)
        where = diagnose.first_non_finite(member.model, examples, task, accelerator)
    first = (
        f"First not finite: the output of {where}. " if where else "The forward pass is finite, the gradient is not. "
    )
    raise TrainingError(
        f"Step {member.state.step + 1}: loss {loss}, gradient norm {grad_norm}: not finite, so the update was not made. "
        f"{first}Rows of the step: {rows}. Lower optim.lr, set optim.max_grad_norm, or look at the rows. The state before the "
        f"step is in {saved}."
    )


def _evaluate_and_save(member: Member, held_out: Dataset | None, task: Task, accelerator: Accelerator) -> None:
    state, config = member.state, member.config.train
    measures, better = held_out is not None and member.due(config.eval_steps), False
    if not (measures or member.due(config.save_steps)):
        return
    with member.turn():
        if measures:
            member.model.eval()
            with accelerator.autocast():
                member.measured = task.measure(member.model, held_out)
            metrics = member.measured.metrics
            member.log.write(state.step, **{f"eval_{name}": value for name, value in metrics.items()})
            better = math.isfinite(metrics["loss"]) and (state.best_loss is None or metrics["loss"] < state.best_loss)
            if better:
                state.best_loss, state.best_step, state.worse_evaluations = metrics["loss"], state.step, 0
            else:
                state.worse_evaluations += 1
                state.stopped_early = state.worse_evaluations == config.early_stopping_patience
        if better or member.due(config.save_steps):
            checkpoint.save(member)


def _stop_unlogged(member: Member) -> None:
    """Stop if metrics.jsonl cannot be written, after an attempt to save the finished step; the lines go with the checkpoint.

    Raises:
        RunError: naming what is saved.
    """
    problem = member.log.problem
    if problem is None:
        return
    try:
        with member.turn():
            saved = f"Step {member.state.step} is saved in {checkpoint.save(member)}"
    except RunError as error:
        saved = f"Step {member.state.step} could not be saved either ({error})"
    raise RunError(f"{problem} {saved}; resume with: lora-lab resume run={member.run.path}")


def _save_all(members: list[Member]) -> None:
    for member in members:
        if member.failure is None:
            with member.turn():
                checkpoint.save(member)


def _load_best(member: Member) -> None:
    best = member.state.best_step
    if member.config.train.keep_best and best is not None and best != member.state.step:
        folder = member.run.checkpoints / f"step-{best}"
        try:
            files.check_base(folder, member.base)  # it may have been written days ago
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} Resume with the next best one: lora-lab resume run={member.run.path}"
            ) from error
        files.check_settings(folder, member.model.peft_config[member.name])
        files.read_into(folder, member.model, member.name)
        member.measured = None


def peak_memory_gib() -> float:
    """Most memory used so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
