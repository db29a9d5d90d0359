"""Jobs that share a base, trained as one cohort: base loaded and rows read once, each job in a run folder of its own."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import resource
from collections.abc import Callable
from typing import Any

from lora_lab.config.sweep import SweepConfig
from lora_lab.data.dataset import first_examples
from lora_lab.errors import ConfigError, LoraLabError, RunError, nearest
from lora_lab.run import run_dir
from lora_lab.run.pipeline import finish, measure_base
from lora_lab.run.prepared import prepare
from lora_lab.run.setup import Live, Setup
from lora_lab.runtime import console, storage
from lora_lab.runtime.reading import reading
from lora_lab.sweep import halving, ranking
from lora_lab.sweep.budget import Budget
from lora_lab.sweep.jobs import Job, groups, why_apart
from lora_lab.tasks.base import EvalResult
from lora_lab.training import checkpoint, sharing
from lora_lab.training.cohort import Member
from lora_lab.training.loop import Clock, fit


def train(jobs: list[Job]) -> None:
    """Train all jobs that are not finished, group by group; a job that fails has its error, and leaves the others alone.

    Raises:
        Interrupted: after the state of every member was saved.
    """
    parts, budget = groups(opened(jobs)), Budget.of(jobs[0].config.sweep.budget)
    for number, part in enumerate(parts):
        if number:
            console.say("group", f"{len(part)} runs of their own: other {why_apart(parts[0][0], part[0])}")
        _train_group(part, budget)
        for job in part:
            _leave_failure(job)


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
        jobs = _those(jobs, lambda job: stack.enter_context(job.run.locked()))
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
    begun = next((job.run for job in jobs if job.run.manifest.exists()), None)
    setup = prepare(jobs[0].config, begun=begun)
    skeleton = setup.skeleton()
    jobs = _those(jobs, lambda job: job.config.adapter.targets(skeleton, setup.kind.whole))
    if not jobs:
        return
    with setup.loaded({_name(place): job.config for place, job in enumerate(jobs)}) as live:
        _train_loaded(jobs, live, budget)


def _train_loaded(jobs: list[Job], live: Live, budget: Budget) -> None:
    before = measure_base(live)
    _check_metric(jobs[0].config.sweep, before)
    members: dict[str, Member] = {}
    for place, job in enumerate(jobs):
        _those([job], functools.partial(_join, members=members, name=_name(place), live=live))
    _train_members([(job, members[job.title]) for job in jobs if job.error is None], live, before, budget)


def _those(jobs: list[Job], action: Callable[[Job], Any]) -> list[Job]:
    """The jobs with which the action goes well; the others have its error."""
    for job in jobs:
        try:
            action(job)
        except Exception as error:
            job.error = error
            console.say("failed", f"{job.title}: {error}")
    return [job for job in jobs if job.error is None]


def _name(place: int) -> str:
    return f"member{place}"


def _check_metric(sweep: SweepConfig, before: EvalResult) -> None:
    """What depends on the rows themselves, such as whether tags are entities; `ranking.check` has said the rest before."""
    if before.metrics and sweep.metric not in before.metrics:
        raise ConfigError(
            f"sweep.metric={sweep.metric}: not measured here.{nearest(sweep.metric, before.metrics)} There are: "
            f"{', '.join(before.metrics)}."
        )


def _join(job: Job, members: dict[str, Member], name: str, live: Live) -> None:
    members[job.title] = _member(name, job, live)


def _member(name: str, job: Job, live: Live) -> Member:
    """The job's member, resumed from its newest valid checkpoint."""
    setup = live.setup
    live.model.set_adapter(name)
    member = Member(name, job.config, job.run, setup.base, live.model, setup.training_rows(), setup.task.learned)
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


def _train_members(pairs: list[tuple[Job, Member]], live: Live, before: EvalResult, budget: Budget) -> None:
    if not pairs:
        return
    sweep, members = pairs[0][0].config.sweep, [member for _, member in pairs]
    width = _width(members, live.setup, sweep)
    budget.members += members
    clock = Clock()
    with live.setup.stages("train"):
        for rung in halving.rungs(members, sweep):
            alive = [member for member in rung.members if member.failure is None]
            if not alive:
                break
            clock = _fit(alive, live.setup, width, budget)
            rung.choose(alive)
    budget.settle()
    for job, member in pairs:
        job.error = member.failure
        if member.done and member.failure is None:
            _those([job], functools.partial(_finish, member=member, live=live, before=before, clock=clock))
        elif member.failure is None:
            step, score = member.state.step, halving.score_at(member, member.state.step)
            job.stopped, job.stopped_at = f"stopped at step {step} of {member.total_steps}", step
            job.stopped_score = score if math.isfinite(score) else None


def _fit(members: list[Member], setup: Setup, width: int, budget: Budget) -> Clock:
    data, task = (setup.training_rows(), setup.held_out), setup.task
    try:
        return fit(members, *data, task, setup.accelerator, width, budget.used_up)
    except Exception as error:
        if len(members) > 1:
            raise
        members[0].failure = error  # the others of the sweep have stopped before
        return Clock()


def _finish(job: Job, member: Member, live: Live, before: EvalResult, clock: Clock) -> None:
    result = finish(member, live, before, clock, show=False)
    storage.write_text(job.run.result, storage.dump_json(result))


def _width(members: list[Member], setup: Setup, sweep: SweepConfig) -> int:
    """How many members share a pass; 1: they take turns."""
    if len(members) == 1 or sweep.execution == "interleaved":
        return 1
    against = sharing.reason_against(setup.task, members)
    if against and sweep.execution == "batched":
        raise ConfigError(f"sweep.execution=batched: {against}. Set sweep.execution=interleaved.")
    if against:
        console.say("cohort", f"{len(members)} runs take turns on one base: {against}")
        return 1
    rows = first_examples(setup.training_rows(), 64)
    tokens = (
        sum(len(row.input_ids) for row in rows) / len(rows) * max(member.plan.micro_batch_size for member in members)
    )
    width = max(1, min(len(members), int(sweep.joint_tokens // tokens)))
    if width == 1:
        console.say(
            "cohort", f"{len(members)} runs take turns: one micro-batch fills sweep.joint_tokens={sweep.joint_tokens}"
        )
        return 1
    console.say("cohort", f"{len(members)} runs on one base, {width} in each pass")
    return width
