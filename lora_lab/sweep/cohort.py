"""Jobs that share a base, trained as one cohort: base loaded and rows read once, each job in a run folder of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_lab.config.run import parse
from lora_lab.config.sweep import SweepConfig
from lora_lab.data.dataset import first_examples
from lora_lab.errors import ConfigError, LoraLabError, NoRoomError, ProcessError, RunError, nearest
from lora_lab.run import parallel, run_dir
from lora_lab.run.pipeline import finish, measure_base
from lora_lab.run.prepared import check_adapter, prepare
from lora_lab.run.run_dir import RunDir
from lora_lab.run.setup import Live, Setup
from lora_lab.runtime import console, ranks, storage
from lora_lab.runtime.reading import reading
from lora_lab.sweep import halving, ranking
from lora_lab.sweep.budget import Budget
from lora_lab.sweep.jobs import Job, by_method, groups, why_apart
from lora_lab.tasks.base import EvalResult
from lora_lab.training import checkpoint, sharing
from lora_lab.training.cohort import Member
from lora_lab.training.loop import Clock, by_model, fit


@dataclasses.dataclass(frozen=True)
class _Joined:
    """A job whose adapter lies on a loaded base."""

    job: Job
    member: Member
    live: Live


def train(jobs: list[Job]) -> None:
    """Train all jobs that are not finished, group by group; a job that fails has its error, and leaves the others alone.

    Raises:
        Interrupted: after the state of every member was saved.
    """
    waiting = opened(jobs)
    if waiting:
        _handed_out(waiting, None)
        _train(waiting)


def follow(own: Path) -> None:
    """Train along with process 0, which has the sweep, until it has no more jobs.

    Args:
        own: a folder for what this process has to itself.
    """
    for turn in itertools.count():
        jobs = _handed_out([], own / str(turn))
        if not jobs:
            return
        _train(jobs)


def no_more() -> None:
    """Let the other processes go, once the sweep is ranked."""
    _handed_out([], None)


def _handed_out(jobs: list[Job], own: Path | None) -> list[Job]:
    """The jobs that process 0 has; in any other one they have folders of its own."""
    folders = parallel.copies_of([str(job.run.path) for job in jobs], own)
    told = ranks.from_main([dataclasses.asdict(job.config) for job in jobs])
    if own is None:
        return jobs
    moved = [dataclasses.replace(parse(one), run_dir=folder) for one, folder in zip(told, folders, strict=True)]
    return [Job(parallel.own_configuration(one, own), {}) for one in moved]


def _train(jobs: list[Job]) -> None:
    parts, budget = groups(jobs), Budget.of(jobs[0].config.sweep.budget)
    for number, part in enumerate(parts):
        if number:
            console.say("group", f"{len(part)} runs of their own: other {why_apart(parts[0][0], part[0])}")
        _train_group(part, budget)
        for job in part:
            _leave_failure(job)
        for job in part:
            if isinstance(job.error, ProcessError):  # nobody is there to train the other groups with
                raise ProcessError(f"{job.error} Resume with: lora-lab resume sweep={job.run.path.parent}")


def opened(jobs: list[Job]) -> list[Job]:
    """Make the jobs' folders; those that are neither finished nor refused."""
    for job in jobs:
        _those([job], _open)
        if job.damage:
            console.say(
                "damaged", f"{job.title} is not finished after all, and resumes from its checkpoint: {job.damage}"
            )
    waiting = [job for job in jobs if job.error is None and job.result is None]
    finished = sum(job.result is not None for job in jobs)
    if finished:
        console.say("sweep", f"{finished} of {len(jobs)} runs are finished already")
    return waiting


def _open(job: Job) -> None:
    """Make the job's run folder; an existing one is resumed."""
    if job.result is None:
        ranking.check(job.config)
    if job.from_folder:
        return
    if os.path.lexists(job.run.config):
        with reading(job.run.config, RunError):
            run_dir.check_same(job.run, job.config)
    else:
        run_dir.create(job.config)


def _leave_failure(job: Job) -> None:
    """Its error in its folder; where that cannot be written, the other runs still go on."""
    try:
        job.write_failure()
    except (LoraLabError, OSError) as error:
        console.say("failed", f"{job.title}: its error cannot be kept: {error}")


def _train_group(jobs: list[Job], budget: Budget) -> None:
    """Train jobs that share a base. What goes wrong with what they share is the error of each."""
    _allow_files(len(jobs))
    with contextlib.ExitStack() as stack:
        jobs = _those(jobs, lambda job: ranks.agreed(lambda: stack.enter_context(job.run.locked())))
        try:
            if jobs:
                _train_together(jobs, budget)
        except Exception as error:
            for job in jobs:
                job.error = job.error or (None if job.result else error)


def _allow_files(members: int) -> None:
    """Let the process have as many files open as the members need (a lock and a log each), as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 4 * members + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _train_together(jobs: list[Job], budget: Budget) -> None:
    parallel.enough_to_shard(jobs[0].config)
    begun = next((job.run for job in jobs if job.run.manifest.exists()), None)
    setup = _prepared(by_method(jobs), begun)
    skeleton = setup.skeleton()
    parallel.same_rows(setup.base.recorded(), setup.data_hashes())
    jobs = _those(
        [job for job in jobs if job.error is None],
        lambda job: check_adapter(job.config, setup.base, skeleton, setup.kind),
    )
    if not jobs:
        return
    with contextlib.ExitStack() as stack:
        _train_loaded(jobs, setup.taught(), stack, budget)


def _prepared(parts: Sequence[list[Job]], begun: RunDir | None) -> Setup:
    """What the jobs share, by the first method that this base and these rows allow; jobs of a method before it have its error.

    Raises:
        LoraLabError: no method is allowed.
    """
    for part in parts[:-1]:
        try:
            return prepare(part[0].config, begun=begun)
        except LoraLabError as error:
            _fail(part, error)
    return prepare(parts[-1][0].config, begun=begun)


def _train_loaded(jobs: list[Job], setup: Setup, stack: contextlib.ExitStack, budget: Budget) -> None:
    """Train them on a base that is loaded once; `stack` lets it go."""
    parts, lives = by_method(jobs), list[Live]()
    if len(parts) > 1:
        told = ", ".join(dict.fromkeys(part[0].config.adapter.label for part in parts))
        console.say("methods", f"{told} take turns on one base, because they cannot lie on the same modules")
    for part, base in zip(parts, setup.bases(len(parts)), strict=True):
        own = setup.for_other(part[0].config) if lives else setup
        try:
            lives.append(
                stack.enter_context(own.on(base, {_name(place): job.config for place, job in enumerate(part)}))
            )
        except Exception as error:
            _fail(part, error)
    if not lives:
        return
    before = measure_base(lives[0])
    _check_metric(jobs[0].config.sweep, before)
    joined: list[_Joined] = []
    for part, live in zip((part for part in parts if part[0].error is None), lives, strict=True):
        for place, job in enumerate(part):
            _those([job], functools.partial(_join, joined=joined, name=_name(place), live=live))
    _train_members(joined, setup, before, budget)


def _name(place: int) -> str:
    return f"member{place}"


def _fail(jobs: Sequence[Job], error: Exception) -> None:
    for job in jobs:
        job.error = error
        console.say("failed", f"{job.title}: {error}")


def _those(jobs: list[Job], action: Callable[[Job], Any]) -> list[Job]:
    """The jobs with which the action goes well; the others have its error."""
    for job in jobs:
        try:
            action(job)
        except Exception as error:
            _fail([job], error)
    return [job for job in jobs if job.error is None]


def _check_metric(sweep: SweepConfig, before: EvalResult) -> None:
    """What depends on the rows themselves, such as whether tags are entities; `ranking.check` has said the rest before."""
    if before.metrics and sweep.metric not in before.metrics:
        raise ConfigError(
            f"sweep.metric={sweep.metric}: not measured here.{nearest(sweep.metric, before.metrics)} There are: "
            f"{', '.join(before.metrics)}."
        )


def _join(job: Job, joined: list[_Joined], name: str, live: Live) -> None:
    member = ranks.agreed(lambda: _member(name, job, live))
    joined.append(_Joined(job, member, live))


def _member(name: str, job: Job, live: Live) -> Member:
    """The job's member, resumed from its newest valid checkpoint."""
    setup = live.setup
    live.model.set_adapter(name)
    member = Member(name, job.config, job.run, setup.base, live.model, setup.training_rows(), setup.task)
    run_dir.check_manifest(job.run, setup.base, setup.data_hashes())
    if run_dir.read_manifest(job.run) is None:
        run_dir.write_manifest(job.run, job.config, setup.base, setup.data_hashes())
    found, skipped = checkpoint.newest_valid(job.run.checkpoints)
    for line in skipped:
        console.say("skipped", line)
    if found is not None:
        checkpoint.restore(member, found)
        console.say("resume", f"{job.title} from {found}")
    member.log.rewind(member.state.step)
    return member


def _train_members(joined: list[_Joined], setup: Setup, before: EvalResult, budget: Budget) -> None:
    if not joined:
        return
    sweep, members = joined[0].job.config.sweep, [one.member for one in joined]
    for on_one in by_model(members):
        on_one[0].task.forward.members = _width(on_one, setup, sweep)
    budget.members += members
    clock = Clock()
    with setup.stages("train"):
        for rung in halving.rungs(members, sweep):
            alive = [member for member in rung.members if member.failure is None]
            if not alive:
                break
            clock = _fit(alive, setup, budget)
            rung.choose(alive)
    budget.settle()
    for one in joined:
        job, member = one.job, one.member
        job.error = member.failure
        if member.done and member.failure is None:
            _those([job], functools.partial(_finish, member=member, live=one.live, before=before, clock=clock))
        elif member.failure is None:
            step, score = member.state.step, halving.score_at(member, member.state.step)
            job.stopped, job.stopped_at = f"stopped at step {step} of {member.total_steps}", step
            job.stopped_score = score if math.isfinite(score) else None


def _fit(members: list[Member], setup: Setup, budget: Budget) -> Clock:
    try:
        return fit(members, setup.training_rows(), setup.held_out, setup.accelerator, budget.used_up)
    except Exception as error:
        if len(members) > 1:
            raise
        members[0].failure = error  # the others of the sweep have stopped before
        return Clock()


def _finish(job: Job, member: Member, live: Live, before: EvalResult, clock: Clock) -> None:
    result = finish(member, live, before, clock, show=False)
    ranks.agreed(lambda: storage.write_text(job.run.result, storage.dump_json(result)))
    for text in result.get("unmade", {}).values():
        raise NoRoomError(text)


def _width(members: list[Member], setup: Setup, sweep: SweepConfig) -> int:
    """How many members of one model share a pass; 1: they take turns."""
    if len(members) == 1 or sweep.execution == "interleaved":
        return 1
    against = sharing.reason_against(members)
    if against and sweep.execution == "batched":
        raise ConfigError(f"sweep.execution=batched: {against}. Set sweep.execution=interleaved.")
    if against:
        console.say("cohort", f"{len(members)} runs take turns on one base: {against}")
        return 1
    rows = first_examples(setup.training_rows(), 64)
    mean = sum(len(row.input_ids) for row in rows) / len(rows)
    tokens = max(_tokens_of_a_pass(member, mean) for member in members)
    width = max(1, min(len(members), int(sweep.joint_tokens // tokens)))
    if width == 1:
        console.say(
            "cohort", f"{len(members)} runs take turns: one micro-batch fills sweep.joint_tokens={sweep.joint_tokens}"
        )
        return 1
    console.say("cohort", f"{len(members)} runs on one base, {width} in each pass")
    return width


def _tokens_of_a_pass(member: Member, mean: float) -> float:
    """About how many tokens a micro-batch has, of rows of this mean length."""
    tokens = mean * member.plan.micro_batch_size
    most = member.plan.micro_batch_tokens
    return tokens if most is None else min(tokens, max(mean, most))
