"""Killed with SIGKILL at random moments and around every call that changes the file system, renames of folders included.

A try: a process is killed; the next start must use the newest valid checkpoint, lose no more than one save interval, leave no
litter, and end with the same bytes as a run that nobody killed.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from typing import Any

import pytest

from tests.faults.programme import (
    KILLS,
    SAVE_STEPS,
    SHARES,
    Done,
    Tally,
    World,
    differences,
    folder_digests,
    last_logged,
    litter,
    newest_step,
    run_digests,
    share,
    spread,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]

TRAIN, RESUME, AGAIN, MERGE, EXPORT, SWEEP = (
    max(4, KILLS * part // 240) for part in (96, 40, 20, 44, 16, 24)
)  # tries of each kind
_FOLDER_EVENTS = ("rename", "exchange", "rmdir")


def moments(events: Sequence[tuple[str, str, str]], wanted: int, seconds: float) -> list[dict[str, Any]]:
    """So many ways of being killed: a third around renames, a third around other calls, the rest at random times."""
    numbered = list(enumerate(events, start=1))
    renames = [n for n, (event, _, _) in numbered if event in _FOLDER_EVENTS]
    others = [n for n, (event, _, _) in numbered if event not in _FOLDER_EVENTS]
    third = max(1, wanted // 3)
    chosen = [{"kill_at": n} for n in spread(renames, third)]
    chosen += [{"kill_at": n, "torn": i % 2 == 0} for i, n in enumerate(spread(others, third))]
    draw = random.Random(len(events))
    return chosen + [{"kill_after": draw.uniform(0.02, seconds)} for _ in range(wanted - len(chosen))]


def described(moment: dict[str, Any], events: Sequence[tuple[str, str, str]]) -> str:
    if "kill_at" not in moment:
        return f"killed after {moment['kill_after']:.3f} s"
    event, phase, path = events[moment["kill_at"] - 1]
    return f"killed {phase} {event} of {path}{' (torn)' if moment.get('torn') else ''}"


def go_on(world: World, name: str, settings: list[str]) -> Done:
    """What its user would do next: resume the run, or start it again where there is none yet."""
    if (world.root / name / "config.yaml").is_file():
        return world.run("resume", f"run={world.root}/{name}")
    return world.run("train", *settings)


def used(done: Done) -> int:
    """The step that a resume went on from. It may be later than any that was there: one that was whole but not renamed yet."""
    found = re.search(r"resume\s+from .*step-(\d+)", done.out)
    return int(found[1]) if found else 0


def judge(tally: Tally, world: World, name: str, done: Done, newest: int, expected: dict[str, str], what: str) -> None:
    """Count a try by what the next start did."""
    run = world.root / name
    if done.trace or done.hang:
        return tally.add("traces", f"{what}: {done.last_line}")
    if done.rc != 0:
        return tally.add("lost", f"{what}: the next start ends with {done.rc}: {done.last_line}")
    if newest > used(done) and "is finished; nothing to do" not in done.said:
        return tally.add("lost", f"{what}: step-{newest} was valid, and it went on from step {used(done)}")
    if other := differences(run_digests(run), expected):
        return tally.add("silent", f"{what}: other bytes in {other}")
    if left := litter(world.root):
        return tally.add("lost", f"{what}: litter {left}")
    return tally.add("recovered")


def killed(world: World, argv: list[str], moment: dict[str, Any]) -> bool:
    """Run it and kill it; False when it was quicker."""
    return world.run(*argv, roots=[str(world.root)], **moment).rc == -9


@pytest.mark.parametrize("part", range(SHARES))
def test_training_is_killed(part, world, tally):
    counted, settings = tally("R2"), world.settings("run")
    world.keep()
    done, events = world.zygote.events(
        "train", *settings, roots=[world.root], cwd=str(world.root), env=world.environment()
    )
    assert done.rc == 0, done.said
    expected = run_digests(world.root / "run")
    for moment in share(moments(events, TRAIN, done.seconds), part):
        world.restore()
        if not killed(world, ["train", *settings], moment):
            continue
        what, run = described(moment, events), world.root / "run"
        newest, logged = newest_step(run), last_logged(run)
        if newest < logged - SAVE_STEPS:
            counted.add("lost", f"{what}: step {logged} was reached and {newest} saved")
            continue
        judge(counted, world, "run", go_on(world, "run", settings), newest, expected, what)
    assert not counted.problems, "\n".join(counted.problems)


def _stopped(world: World) -> tuple[list[str], dict[str, str]]:
    """A run that was killed in the middle, and what it must end with."""
    settings = world.settings("run")
    world.must("train", *settings)
    expected = run_digests(world.root / "run")
    shutil.rmtree(world.root / "run")
    stopped = world.run("train", *settings, stage="forward", signal=9, nth=11)
    assert stopped.rc == -9, stopped.said
    assert newest_step(world.root / "run") == 4
    world.keep()
    return settings, expected


@pytest.mark.parametrize("part", range(2))
def test_a_resume_is_killed(part, world, tally):
    counted, (settings, expected) = tally("R2"), _stopped(world)
    argv = ["resume", f"run={world.root}/run"]
    done, events = world.zygote.events(*argv, roots=[world.root], cwd=str(world.root), env=world.environment())
    assert done.rc == 0, done.said
    judge(counted, world, "run", done, 4, expected, "killed in a forward pass")
    for moment in share(moments(events, RESUME, done.seconds), part, 2):
        world.restore()
        if killed(world, argv, moment):
            newest = newest_step(world.root / "run")
            assert newest >= 4
            again = go_on(world, "run", settings)
            judge(counted, world, "run", again, newest, expected, f"resume {described(moment, events)}")
    assert not counted.problems, "\n".join(counted.problems)


def test_a_run_is_killed_again_and_again(world, tally):
    """The same run, until it is finished nevertheless: nothing piles up."""
    counted, (settings, expected) = tally("R2"), _stopped(world)
    draw, what = random.Random(5), "killed again and again"
    for _ in range(AGAIN):
        before = newest_step(world.root / "run")
        if not killed(world, ["resume", f"run={world.root}/run"], {"kill_after": draw.uniform(0.05, 0.8)}):
            break
        if newest_step(world.root / "run") < before:
            counted.add("lost", f"{what}: step {before} was there and is gone")
        else:
            counted.add("recovered")
    newest = newest_step(world.root / "run")
    done = go_on(world, "run", settings)
    judge(counted, world, "run", done, 0 if "nothing to do" in done.out else newest, expected, what)
    assert not counted.problems, "\n".join(counted.problems)


@pytest.mark.parametrize("verb", ["merge", "export"])
@pytest.mark.parametrize("part", range(2))
def test_what_replaces_a_folder_is_killed(verb, part, world, tally):
    """There is a checkpoint already, made otherwise; a process that makes it anew is killed. One of the two is there afterwards."""
    counted, run = tally("R2"), world.root / "run"
    world.must("train", *world.settings("run"))
    first = {"merge": ["export.dtype=bfloat16"], "export": ["export.targets=[adapter]"]}[verb]
    then = {"merge": ["export.dtype=float32"], "export": ["export.targets=[adapter]", "export.dtype=float32"]}[verb]
    folder = {"merge": run / "merged", "export": run / "export/adapter"}[verb]
    world.must(verb, f"run={run}", *first)
    world.keep()
    old, argv = folder_digests(folder), [verb, f"run={run}", *then]
    done, events = world.zygote.events(*argv, roots=[run], cwd=str(world.root), env=world.environment())
    assert done.rc == 0, done.said
    new = folder_digests(folder)
    late = [event for event in events if event[0] != "mkdir"]
    for moment in share(moments(late, {"merge": MERGE, "export": EXPORT}[verb], done.seconds), part, 2):
        world.restore()
        if "kill_at" in moment:
            moment = {**moment, "kill_at": 1 + events.index(late[moment["kill_at"] - 1])}
        if world.run(*argv, roots=[str(run)], **moment).rc == -9:
            _judge_folder(counted, world, argv, folder, (old, new), f"{verb} {described(moment, events)}")
    assert not counted.problems, "\n".join(counted.problems)


def _judge_folder(tally: Tally, world: World, argv: list[str], folder: Any, made: tuple[dict, dict], what: str) -> None:
    from lora_lab.errors import LoraLabError
    from lora_lab.runtime import storage

    opened = world.run("resume", f"run={world.root}/run")  # a finished run: nothing to do but to clean up
    if opened.rc != 0:
        return tally.add("traces" if opened.trace else "lost", f"{what}: then resume: {opened.last_line}")
    try:
        storage.verify(folder)
    except LoraLabError as error:
        return tally.add("lost", f"{what}: {error}")
    if folder_digests(folder) not in made:
        return tally.add("silent", f"{what}: a folder that nobody made")
    if left := litter(world.root):
        return tally.add("lost", f"{what}: litter {left}")
    again = world.run(*argv)
    if again.rc != 0:
        return tally.add("traces" if again.trace else "lost", f"{what}: then again: {again.last_line}")
    if other := differences(folder_digests(folder), made[1]):
        return tally.add("silent", f"{what}: made again, other bytes in {other}")
    return tally.add("recovered")


def test_what_a_killed_merge_started_ends(world, tally):
    """The process that reloads the checkpoint does not live on alone."""
    counted, run = tally("R2"), world.root / "run"
    world.must("train", *world.settings("run"))
    world.keep()
    for seconds in (1.5, 2.5, 3.5):
        world.restore()
        done = world.run("merge", f"run={run}", reload="process", kill_after=seconds)
        if done.rc == -9:
            counted.add("lost" if done.orphans else "recovered", f"killed after {seconds} s: a process of it lives on")
    assert not counted.problems, "\n".join(counted.problems)


@pytest.mark.parametrize("part", range(2))
def test_a_sweep_is_killed(part, world, tally):
    counted, folder = tally("R2"), world.root / "sweep"
    argv = ["train", "-m", *world.settings("x")[:-1], "adapter.r=2,4", "optim.lr=0.01,0.02"]
    argv += ["sweep.execution=interleaved", f"hydra.sweep.dir={folder}"]
    world.keep()
    done, events = world.zygote.events(*argv, roots=[world.root], cwd=str(world.root), env=world.environment())
    assert done.rc == 0, done.said
    members = sorted(one.parent.name for one in folder.glob("*/config.yaml"))
    expected = {name: run_digests(folder / name) for name in members}
    for moment in share(moments(events, SWEEP, done.seconds), part, 2):
        world.restore()
        if not killed(world, argv, moment):
            continue
        what = f"sweep {described(moment, events)}"
        begun = all((folder / name / "config.yaml").is_file() for name in members)
        again = world.run("resume", f"sweep={folder}") if begun else world.run(*argv)
        if again.rc != 0 or again.hang:
            counted.add("traces" if again.trace or again.hang else "lost", f"{what}: then: {again.last_line}")
            continue
        other = {name: differences(run_digests(folder / name), expected[name]) for name in members}
        if any(other.values()) or not (folder / "ranking.json").is_file():
            counted.add("silent", f"{what}: other bytes: {other}")
        elif left := litter(world.root):
            counted.add("lost", f"{what}: litter {left}")
        else:
            counted.add("recovered")
    assert not counted.problems, "\n".join(counted.problems)
