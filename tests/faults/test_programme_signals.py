"""SIGINT, SIGTERM and SIGHUP in every stage: saved, the exit code of the signal, resumed to the same bytes."""

from __future__ import annotations

import itertools
import signal

import pytest

from tests.faults.launcher import STAGES
from tests.faults.programme import (
    SIGNALS,
    Tally,
    World,
    differences,
    folder_digests,
    last_logged,
    litter,
    newest_step,
    run_digests,
    spread,
)

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ENTRIES = {"data": (1, 40), "forward": (1, 12), "backward": (2, 13), "save": (3, 9), "eval": (1, 3), "merge": (2, 9)}
TRIES = spread(list(itertools.product((0, 1), STAGES, NUMBERS)), SIGNALS)


def _saved(world: World, name: str, what: str, tally: Tally) -> bool:
    """Whether every finished step was saved."""
    run = world.root / name
    newest, logged = newest_step(run), last_logged(run)
    if newest < logged:
        tally.add("lost", f"{what}: step {logged} was made, {newest} saved")
    return newest >= logged


@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_arrives(stage, world, tally):
    counted, run, settings = tally("R10"), world.root / "run", world.settings("run")
    if stage == "merge":
        world.must("train", *settings)
    argv = ["merge", f"run={run}"] if stage == "merge" else ["train", *settings]
    world.keep()
    world.must(*argv)
    expected = folder_digests(run / "merged") if stage == "merge" else run_digests(run)
    for second, _, number in (one for one in TRIES if one[1] == stage):
        world.restore()
        nth = _ENTRIES[stage][second]
        what = f"{number.name} at {stage} {nth}"
        done = world.run(*argv, stage=stage, signal=int(number), nth=nth, roots=[str(world.root)])
        if done.rc != 128 + number or "Traceback" in done.said:
            counted.add("traces" if done.trace else "lost", f"{what}: exit {done.rc}: {done.last_line}")
            continue
        begun = (run / "config.yaml").is_file()
        if begun and "lora-lab resume" not in done.err and stage != "merge":
            counted.note(f"no word of how to go on after {what}")
        if stage != "merge" and not _saved(world, "run", what, counted):
            continue
        again = world.run("resume", f"run={run}") if begun and stage != "merge" else world.run(*argv)
        found = folder_digests(run / "merged") if stage == "merge" else run_digests(run)
        if again.rc != 0:
            counted.add("traces" if again.trace else "lost", f"{what}: then: {again.last_line}")
        elif other := differences(found, expected):
            counted.add("silent", f"{what}: then other bytes in {other}")
        elif left := litter(world.root):
            counted.add("lost", f"{what}: litter {left}")
        else:
            counted.add("recovered")
    assert not counted.problems, "\n".join(counted.problems)
