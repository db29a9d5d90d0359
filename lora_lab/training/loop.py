"""The only training loop. It trains a cohort step by step on one frozen base: members share passes, or take turns.

`_step` is the step, whole: forward and backward over the micro-batches, check, clip, update, log, evaluate, save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lora_lab.adapters import files
from lora_lab.data.collate import of_like_length
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.errors import CheckpointError, Interrupted, NoRoomError, ProcessError, RunError, TrainingError
from lora_lab.runtime import console, memory, ranks, signals
from lora_lab.training import checkpoint, diagnose, oom, sharing
from lora_lab.training.batches import filled
from lora_lab.training.cohort import Member, Share, learn, learning, share
from lora_lab.training.learned import Learned

if TYPE_CHECKING:
    from accelerate import Accelerator

    from lora_lab.data.encode import Example
    from lora_lab.training.batches import BatchPlan

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
class Loop:
    """What all steps of a cohort share."""

    train: Dataset | Stream
    held_out: Dataset | None
    accelerator: Accelerator
    arrived: list[int]  # signals
    progress: console.Steps
    clock: Clock
    alone: bool  # whether there is one member only


def fit(
    members: list[Member],
    train: Dataset | Stream,
    held_out: Dataset | None,
    accelerator: Accelerator,
    used_up: Callable[[], bool] = lambda: False,
) -> Clock:
    """Train every member to where it stops; those at their end are left with their best or last adapter loaded
    (`train.keep_best`).

    A member that fails leaves the others as they are: its error is in `member.failure`. The only member's error is raised.

    Args:
        used_up: whether the members should rest where they are; asked after each of them made a step.

    Raises:
        TrainingError: a non-finite loss or gradient of the only member; the last good state is saved.
        Interrupted: Ctrl-C or SIGTERM; the last finished steps are saved.
    """
    clock, alone = Clock(_WARM_UP_STEPS * len(members)), len(members) == 1
    with (
        signals.held() as arrived,
        contextlib.ExitStack() as passes,
        console.steps("train", sum(m.stop_at for m in members), sum(m.state.step for m in members)) as progress,
    ):
        for on_one in by_model(members):
            passes.enter_context(on_one[0].task.forward.segments(on_one[0].model))
        for member in members:
            checkpoint.hand_out(member)
        try:
            _steps(members, Loop(train, held_out, accelerator, arrived, progress, clock, alone), used_up)
        except ProcessError:
            _save_alone(members)
            raise
    for member in members:
        if member.done and member.failure is None:
            _load_best(member)
            member.log.close()
    return clock


def _steps(members: list[Member], loop: Loop, used_up: Callable[[], bool]) -> None:
    """Step after step of all members, until each of them rests."""
    if any(member.state.step < member.stop_at for member in members):
        for member in members:
            oom.apply(member)
        for on_one in by_model(members):
            if on_one[0].task.forward.members > 1:
                sharing.check(on_one, loop.train, loop.accelerator)
    for member in members:
        if member.state.unmeasured:
            with _left_out_if_it_fails(member, loop):
                _save(member, _evaluate(member, loop))
    while running := [member for member in members if not member.resting]:
        spent = False
        for together in _together(running):
            _step_or_fail(together, loop)
            every = ranks.gather((loop.arrived[:1], used_up()))
            if signums := [signum for arrived, _ in every for signum in arrived]:
                _save_all(members)
                raise _interruption(signums[0], members)
            spent = any(used for _, used in every)
        if spent:
            _save_all(running)
            break


def by_model(members: Sequence[Member]) -> list[list[Member]]:
    """The members that are on one model, together, in order."""
    found: dict[int, list[Member]] = {}
    for member in members:
        found.setdefault(id(member.model), []).append(member)
    return list(found.values())


def _together(members: Sequence[Member]) -> list[list[Member]]:
    """The members in groups that share passes."""
    groups = []
    for on_one in by_model(members):
        width = on_one[0].task.forward.members
        groups += [on_one[start : start + width] for start in range(0, len(on_one), width)]
    return groups


def _interruption(signum: int, members: list[Member]) -> Interrupted:
    """The interruption, with how far the members came."""
    interrupted = Interrupted(signum)
    interrupted.steps = sum(one.state.step for one in members), sum(one.stop_at for one in members)
    return interrupted


# -- the step -----------------------------------------------------------------------------------------------------------


def _step(members: list[Member], loop: Loop) -> None:
    """One optimizer step of members that share its passes, from their rows to what is saved; mostly it is one member."""
    started, alone = time.perf_counter(), len(members) == 1
    for attempt in memory.attempts(lambda lacked: _need_less(members, loop, lacked), together=True):
        with attempt, learning(members):
            shares = [_share(member, loop, alone) for member in members]
            finished = _passes(shares, loop)
            learned = Learned.of(shares, finished)
            attempt.told = learned.told
    if not all(one.finished for one in attempt.heard):
        _forget(members)
        return
    learned.sum(attempt.heard)
    passes = (time.perf_counter() - started) / len(members)
    for one in shares:
        with _left_out_if_it_fails(one.member, loop):
            started = time.perf_counter()
            norm = _gradient_norm(one)
            size = one.read(norm)
            if _again_with_less(one, size):
                _step([one.member], loop)
                continue
            _check(one, size, loop)
            _clip(one, norm)
            lr = _update(one)
            _log(one, size, lr, passes + time.perf_counter() - started, loop)
            better = _evaluate(one.member, loop)
            _save(one.member, better)


def _passes(shares: list[Share], loop: Loop) -> bool:
    """Forward and backward over this process's part of the step's micro-batches; whether no signal ended that."""
    width = shares[0].member.task.forward.members
    for start in range(0, len(shares), width):
        together = shares[start : start + width]
        longest = max(len(one.batches) for one in together)
        own, others = ranks.own_and_others([sum(one.tokens_at(place) for one in together) for place in range(longest)])
        for number, place in enumerate([*others, *own], start=1):
            if _stopped(loop):
                return False
            learn(together, place, loop.accelerator)
            if number == len(others):
                _forget_passes(together)
    return True


def _stopped(loop: Loop) -> bool:
    """Whether a signal ends the step; where processes keep step, it does so in all of them at once."""
    return ranks.any_of(bool(loop.arrived)) if ranks.in_step() else bool(loop.arrived)


def _forget_passes(shares: list[Share]) -> None:
    """Drop what was learned in passes that are made because others make theirs."""
    _forget([one.member for one in shares])
    for one in shares:
        one.forget()


# -- its parts ----------------------------------------------------------------------------------------------------------


def _share(member: Member, loop: Loop, alone: bool) -> Share:
    """What a member brings into its coming step."""
    parts, seed = _parts(member, loop.train), member.plan.dropout_seed(member.state.step)
    return share(member, parts, seed, loop.accelerator, alone)


def _parts(member: Member, train: Dataset | Stream) -> list[list[Example]]:
    """The examples of the coming step's micro-batches; where padding costs something, rows of like length together."""
    plan, packed = member.plan, member.task.config.packed
    chosen = [[train[int(i)] for i in part] for part in plan.step(member.state.step)]
    if plan.micro_batch_tokens is not None:
        return _filled([item for part in chosen for item in part], plan, packed)
    parts = [[example for item in part for example in item] for part in chosen]
    if packed or member.task.forward.unpadded:
        return parts
    device = member.model.device.type
    examples = [example for part in parts for example in part]
    groups = of_like_length([e.num_tokens for e in examples], plan.micro_batch_size, _ENOUGH_TOKENS[device])
    return [[examples[place] for place in group] for group in groups]


def _filled(items: list[list[Example]], plan: BatchPlan, packed: bool) -> list[list[Example]]:
    """The examples of some items in passes of at most `plan.micro_batch_tokens`; of those that are padded, rows of like length together."""
    assert plan.micro_batch_tokens is not None
    sized = [(sum(example.num_tokens for example in item), item) for item in items]
    if not packed:
        sized.sort(key=lambda one: one[0])
    cuts = filled([size for size, _ in sized], plan.micro_batch_size, plan.micro_batch_tokens, padded=not packed)
    return [[example for _, item in sized[cut] for example in item] for cut in cuts]


def _forget(members: list[Member]) -> None:
    """Drop what a step has gathered so far."""
    for member in members:
        member.optimizer.zero_grad()


def _need_less(members: list[Member], loop: Loop, lacked: str) -> None:
    """After a failed allocation: no kept weights, passes of fewer members, or less memory for the only one.

    Args:
        lacked: what the allocation said.

    Raises:
        TrainingError: nothing is left to do.
    """
    _forget(members)
    if len(members) > 1:
        forward = members[0].task.forward
        if dropped := oom.drop_kept_weights(members):
            console.say("memory", f"{dropped}; the steps themselves stay the same")
            return
        if forward.members == 1:
            raise TrainingError("one member's pass does not fit into memory")
        forward.members = (forward.members + 1) // 2
        console.say("memory", f"passes of {forward.members} members from now on; the steps themselves stay the same")
        return
    [member] = members
    done = oom.step_down(member, _parts(member, loop.train), member.model.device.type == "cuda")
    if done is None:
        raise NoRoomError(
            f"Step {member.state.step + 1} does not fit into memory, one row at a time and checkpointed ({lacked}). Set a smaller "
            "data.max_tokens, quant=nf4 or speed.dequantize=always; lora-lab plan shows what needs how much."
        )
    console.say("memory", f"step {member.state.step + 1} does not fit: {done}; the step itself stays the same")


def _gradient_norm(one: Share) -> torch.Tensor:
    """The norm of all of a member's gradients together, with what its adapter adds to them."""
    member = one.member
    member.unscale()
    if one.tokens:
        member.config.adapter.before_update(member.coming)
    return get_total_norm([p.grad for p in member.parameters.values() if p.grad is not None])


def _again_with_less(one: Share, norm: float) -> bool:
    """Whether the gradient alone is too large, and only because of the loss's scale, which is lowered: the step is made again."""
    if one.member.state.loss_scale is None or not math.isfinite(one.loss):
        return False
    if math.isfinite(norm) or not one.member.lower_scale():
        return False
    one.member.optimizer.zero_grad()
    scale = one.member.state.loss_scale
    console.say(
        "float16",
        f"step {one.member.state.step + 1}: a gradient is beyond float16; made again, the loss times {scale:g}",
    )
    return True


def _check(one: Share, norm: float, loop: Loop) -> None:
    """Stop before the update if the numbers cannot be used; the state before the step is saved.

    Raises:
        TrainingError: naming the first module that is not finite, and the step's rows; or no gradient reaches the adapter.
    """
    if one.member.state.step == 0 and one.tokens and norm == 0:
        raise TrainingError(
            "Step 1: the gradient is zero, so nothing would ever be learned: no gradient reaches the adapter, or nothing of these "
            "rows depends on it. Choose another adapter, other adapter.target_modules or other rows."
        )
    if math.isfinite(one.loss) and math.isfinite(norm):
        return
    member, examples = one.member, [example for part in one.parts for example in part]
    member.optimizer.zero_grad()
    rows = ", ".join(example.origin for example in examples)
    with member.active():
        saved = checkpoint.save(member)
        where = diagnose.first_non_finite(member.model, examples, member.task, loop.accelerator)
    first = (
        f"First not finite: the output of {where}. " if where else "The forward pass is finite, the gradient is not. "
    )
    raise TrainingError(
        f"Step {member.state.step + 1}: loss {one.loss / one.weight}, gradient norm {norm}: not finite, so the update was not "
        f"made. {first}Rows of the step: {rows}. Lower optim.lr, set optim.max_grad_norm, or look at the rows. The state before "
        f"the step is in {saved}."
    )


def _clip(one: Share, norm: torch.Tensor) -> None:
    most = one.member.config.optim.max_grad_norm
    if most is not None:
        clip_grads_with_norm_(one.member.parameters.values(), most, norm)


def _update(one: Share) -> float:
    """The optimizer's step, and the learning rate that it was made with; without rows nothing is learned."""
    member, state = one.member, one.member.state
    lr = float(member.schedule.get_last_lr()[0])
    if one.tokens:
        member.optimizer.step()
        member.config.adapter.after_update(member.coming)
        member.raise_scale()
        member.measured = None
    member.schedule.step()
    member.optimizer.zero_grad()
    state.step += 1
    state.tokens += one.tokens
    state.supervised_tokens += one.supervised
    return lr


def _log(one: Share, norm: float, lr: float, seconds: float, loop: Loop) -> None:
    member, state = one.member, one.member.state
    if not one.tokens:
        member.log.write(state.step, loss=None, tokens=state.tokens)
        loop.progress.advance(loss="no rows")
        return
    loss, figures = one.mean_loss(), one.mean_figures()
    member.log.write(state.step, loss=loss, grad_norm=norm, lr=lr, tokens=state.tokens, **figures)
    member.seconds += seconds
    loop.clock.add(seconds, one.tokens)
    speed = loop.clock.tokens_per_second or one.tokens / seconds
    loop.progress.advance(
        loss=f"{loss:.4f}",
        lr=f"{member.schedule.get_last_lr()[0]:.2e}",
        **{"tok/s": f"{speed:.0f}", "GiB": f"{memory.peak_gib(member.model.device):.1f}"},
    )


def _evaluate(member: Member, loop: Loop) -> bool:
    """Measure the held-out rows if that is due, and stop where it has not helped for long; whether it was the best so far."""
    state, config = member.state, member.config.train
    if loop.held_out is None or not member.due(config.eval_steps):
        return False
    state.unmeasured = True
    try:
        with member.active(), loop.accelerator.autocast():
            member.measured = member.task.measure(member.model.eval(), loop.held_out)
    except (
        NoRoomError
    ) as error:  # the base was measured on the same rows; what is trained shall not be lost for their sake
        console.say("evaluate", f"step {state.step}: not measured: {error}")
        state.unmeasured = False
        return False
    state.unmeasured = False
    metrics = member.measured.metrics
    member.log.write(state.step, **{f"eval_{name}": value for name, value in metrics.items()})
    better = math.isfinite(metrics["loss"]) and (state.best_loss is None or metrics["loss"] < state.best_loss)
    if better:
        state.best_loss, state.best_step, state.worse_evaluations = metrics["loss"], state.step, 0
    else:
        state.worse_evaluations += 1
        state.stopped_early = state.worse_evaluations == config.early_stopping_patience
    return better


def _save(member: Member, better: bool) -> None:
    """Write a checkpoint if it is due, or better than all before, and stop if metrics.jsonl cannot be written."""
    if better or member.due(member.config.train.save_steps):
        with member.active():
            checkpoint.save(member)
    _stop_unlogged(member)


def _stop_unlogged(member: Member) -> None:
    """Stop if metrics.jsonl cannot be written, after an attempt to save the finished step; the lines go with the checkpoint.

    Raises:
        RunError: naming what is saved.
    """
    problem = ranks.from_main(member.log.problem)
    if problem is None:
        return
    try:
        with member.active():
            saved = f"Step {member.state.step} is saved in {checkpoint.save(member)}"
    except RunError as error:
        saved = f"Step {member.state.step} could not be saved either ({error})"
    raise RunError(f"{problem} {saved}; resume with: lora-lab resume run={member.run.path}")


# -- members that fail --------------------------------------------------------------------------------------------------


def _step_or_fail(members: list[Member], loop: Loop) -> None:
    """A step of these members; if a shared one fails, each takes it by itself."""
    try:
        _step(members, loop)
    except ProcessError:  # none of the others is there, or they are not the same any more
        raise
    except Exception as error:
        if len(members) == 1:
            _fail(members[0], error, loop)
            return
        console.say("batched", f"a shared step failed ({error}); running its members one at a time")
        _forget(members)
        for member in members:
            _step_or_fail([member], loop)


@contextlib.contextmanager
def _left_out_if_it_fails(member: Member, loop: Loop) -> Iterator[None]:
    """What goes wrong inside the block is of this member only."""
    try:
        yield
    except ProcessError:
        raise
    except Exception as error:
        _fail(member, error, loop)


def _fail(member: Member, error: Exception, loop: Loop) -> None:
    """Leave a member out from now on; the only one's error goes up."""
    member.optimizer.zero_grad()
    if loop.alone:
        raise error
    member.failure = error
    console.say("failed", f"{member.run.path}: {error}")


# -- the end ------------------------------------------------------------------------------------------------------------


def _save_alone(members: list[Member]) -> None:
    """Save the last finished step although another process was lost: the update is made after the last word that they exchange."""
    if not ranks.lost() or not ranks.main():
        return
    ranks.leave()
    _forget(members)
    _save_all([member for member in members if not member.resting])


def _save_all(members: list[Member]) -> None:
    for member in members:
        if member.failure is None:
            with member.active():
                checkpoint.save(member)


def _load_best(member: Member) -> None:
    best = member.state.best_step
    if member.config.train.keep_best and best is not None and best != member.state.step:
        ranks.on_main(lambda: _read_best(member, member.run.checkpoints / f"step-{best}"))
        checkpoint.hand_out(member)
        member.measured = None


def _read_best(member: Member, folder: Path) -> None:
    try:
        files.check_base(folder, member.base)  # it may have been written days ago
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Resume with the next best one: lora-lab resume run={member.run.path}"
        ) from error
    files.check_settings(folder, member.model.peft_config[member.name])
    files.read_into(folder, member.model, member.name)
