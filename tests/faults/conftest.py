"""Fixtures of the fault programme."""

from __future__ import annotations

import pytest


@pytest.fixture
def tally(request, record_property):
    """`tally('R2')`: what the test tried; goes into the table of `make test-faults`, whatever the test ends with."""
    from tests.faults.programme import Tally

    made = []

    def make(programme: str) -> Tally:
        made.append(Tally(programme))
        return made[-1]

    yield make
    for one in made:
        record_property("faults", one.record())


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    """A warm process that has imported everything that a run and a merge import."""
    from tests.faults.programme import World, Zygote

    root = tmp_path_factory.mktemp("zygote")
    warm = Zygote(root / "cache")
    world = World(root, warm)
    for argv in (["train", *world.settings("run")], ["merge", f"run={world.root}/run"]):
        done = warm.warm_up(*argv, cwd=str(root), env=world.environment())
        assert done.rc == 0, done.said
    yield warm
    warm.close()


@pytest.fixture
def world(tmp_path, zygote):
    from tests.faults.programme import World

    return World(tmp_path, zygote)
