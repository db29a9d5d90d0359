"""The only training loop. It trains a cohort: members take turns on one frozen base, step by step.

Order within a step: forward and backward over the micro-batches, check, clip, update, log, evaluate, save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import resource
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_lab import console, signals
from lora_lab.adapters import files
from lora_lab.data.dataset import Dataset, Stream, first_examples
from lora_lab.errors import Interrupted, TrainingError
from lora_lab.train import checkpoint, diagnose, oom, packing, regularize
from lora_lab.train.cohort import Member

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lora_lab.data.encode import Example
    from lora_lab.tasks.base import Task

_WARM_UP_STEPS = 2  # left out of tokens_per_second
_ENOUGH_TOKENS = {"cpu": 256, "cuda": 8192}  # of a forward pass that another one beside it is worth its start


@dataclasses.dataclass
class Clock:
    """Speed of the steps since the start or the resume, evaluation and saving left out."""

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0

    def add(self, seconds: float, tokens: int) -> None:
        self.steps += 1
        if self.steps > _WARM_UP_STEPS:
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None


def fit(
    members: list[Member], train: Dataset | Stream, held_out: Dataset | None, task: Task, accelerator: Accelerator
) -> Clock:
    """Train every member to its end; each is left with its best or last adapter loaded (`train.keep_best`).

    Raises:
        TrainingError: a non-finite loss or gradient; the last good state is saved.
        Interrupted: Ctrl-C or SIGTERM; the last finished step is saved.
    """
    clock = Clock()
    _prepare(members, train, task, accelerator)
    with (
        signals.held() as arrived,
        packing.segment_attention(members[0].model) if task.packed and task.together else contextlib.nullcontext(),
        console.steps("train", sum(m.total_steps for m in members), sum(m.state.step for m in members)) as progress,
    ):
        while running := [member for member in members if not member.done]:
            for member in running:
                with member.turn():
                    finished = _train_step(member, train, task, accelerator, clock, progress, arrived)
                    if finished:
                        _evaluate_and_save(member, held_out, task, accelerator)
                if arrived:
                    _save_all(members)
                    raise Interrupted(arrived[0])
    for member in members:
        _load_best(member)
        member.log.close()
    return clock


def _prepare(members: list[Member], train: Dataset | Stream, task: Task, accelerator: Accelerator) -> None:
    model = members[0].model
    for member in members:
        oom.apply(member)
    if task.packed and task.together:
        model.eval()
        with members[0].turn(), accelerator.autocast():
            packing.check_isolation(model, first_examples(train, 2))


def _train_step(
    member: Member,
    train: Dataset | Stream,
    task: Task,
    accelerator: Accelerator,
    clock: Clock,
    progress: console.Steps,
    arrived: list[int],
) -> bool:
    """One optimizer step. False when a signal arrived before the update: then nothing has changed."""
    state, config = member.state, member.config
    started = time.perf_counter()
    seed = member.plan.dropout_seed(state.step)

    # forward and backward: the step's loss is the weighted mean over all that it learns from, however it is split
    parts, learned = _learn_in_memory(member, train, task, accelerator, seed, arrived)
    if learned is None:
        return False
    loss_sum, total, tokens, supervised = learned

    if not tokens:  # nothing to learn from in this step
        member.schedule.step()
        state.step += 1
        member.log.write(state.step, loss=None, tokens=state.tokens)
        progress.advance(loss="no rows")
        return True

    # check, clip, update
    limit = math.inf if config.optim.max_grad_norm is None else config.optim.max_grad_norm
    grad_norm = float(accelerator.clip_grad_norm_(list(member.parameters.values()), limit))
    if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
        member.optimizer.zero_grad()
        _stop_non_finite(member, loss_sum / total, grad_norm, parts, task, accelerator)
    lr = member.schedule.get_last_lr()[0]
    member.optimizer.step()
    member.schedule.step()
    member.optimizer.zero_grad()

    # log
    state.step += 1
    state.tokens += tokens
    state.supervised_tokens += supervised
    clock.add(time.perf_counter() - started, tokens)
    speed = tokens / (time.perf_counter() - started)
    member.log.write(state.step, loss=loss_sum / total, grad_norm=grad_norm, lr=lr, tokens=state.tokens)
    progress.advance(
        loss=f"{loss_sum / total:.4f}",
        lr=f"{lr:.2e}",
        **{"tok/s": f"{clock.tokens_per_second or speed:.0f}", "GiB": f"{peak_memory_gib():.1f}"},
    )
    return True


def _learn_in_memory(
    member: Member, train: Dataset | Stream, task: Task, accelerator: Accelerator, seed: int, arrived: list[int]
) -> tuple[list[list[Example]], tuple[float, float, int, int] | None]:
    """`_learn` on the coming step, in smaller parts as long as it does not fit; the parts, and what `_learn` gives."""
    while True:
        parts = _parts(member, train, task)
        try:
            return parts, _learn(member, parts, task, accelerator, seed, arrived)
        except (RuntimeError, MemoryError) as error:
            member.optimizer.zero_grad()
            _need_less(member, error)


def _learn(
    member: Member, parts: list[list[Example]], task: Task, accelerator: Accelerator, seed: int, arrived: list[int]
) -> tuple[float, float, int, int] | None:
    """Add the gradients of a step: its summed loss, weight, tokens and supervised items. None when a signal arrived."""
    batches = task.batches(parts, np.random.default_rng(seed))
    total = sum(batch.weight for batch in batches)
    torch.manual_seed(seed)
    member.model.train()
    loss_sum, tokens, supervised = 0.0, 0, 0
    with accelerator.autocast():
        task.begin(member.model, batches)
    for batch in batches:
        if arrived:
            member.optimizer.zero_grad()
            return None
        out = regularize.learn(member, task, batch.to(member.model.device), total, accelerator)
        loss_sum, tokens = loss_sum + out.loss.item(), tokens + batch.num_tokens
        supervised += out.num_items
    return loss_sum, total, tokens, supervised


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
    saved = checkpoint.save(member)
    examples = [example for part in parts for example in part]
    rows = ", ".join(example.origin for example in examples)
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
    better = False
    if held_out is not None and member.due(config.eval_steps):
        member.model.eval()
        with accelerator.autocast():
            metrics = task.measure(member.model, held_out).metrics
        member.log.write(state.step, **{f"eval_{name}": value for name, value in metrics.items()})
        better = math.isfinite(metrics["loss"]) and (state.best_loss is None or metrics["loss"] < state.best_loss)
        if better:
            state.best_loss, state.best_step, state.worse_evaluations = metrics["loss"], state.step, 0
        else:
            state.worse_evaluations += 1
            state.stopped_early = state.worse_evaluations == config.early_stopping_patience
    if better or member.due(config.save_steps):
        checkpoint.save(member)


def _save_all(members: list[Member]) -> None:
    for member in members:
        with member.turn():
            checkpoint.save(member)


def _load_best(member: Member) -> None:
    best = member.state.best_step
    if member.config.train.keep_best and best is not None and best != member.state.step:
        folder = member.run.checkpoints / f"step-{best}"
        files.check_base(folder, member.base)  # it may have been written days ago
        files.read_into(folder, member.model, member.name)


def peak_memory_gib() -> float:
    """Most memory used so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
