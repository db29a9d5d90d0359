"""A process of two is killed at each of twenty points of a run, which is then resumed to the same bytes as one that was left alone.

Each process of a run is forked from a warm one of its own (see `tests.faults.zygote`), with what a launcher would tell it.
"""

from __future__ import annotations

import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.parallel import Sources
from tests.faults.programme import Done, Zygote
from tests.parallel.test_processes import ADAPTER_FILE, command_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

FILES = (ADAPTER_FILE, "metrics.jsonl")
POINTS = [  # before which call; a run has 5 steps of 2 passes in each process, 2 evaluations and 2 checkpoints before the last
    *(("step", call) for call in (1, 2, 3, 6, 10)),
    *(("exchange", call) for call in (1, 4, 9)),
    *(("sum", call) for call in (1, 3, 4, 5)),
    *(("update", call) for call in (1, 3, 5)),
    *(("save", call) for call in (1, 2, 3)),
    *(("measure", call) for call in (1, 2)),
]
SHARDED = "hardware.shard=true"


class Pair:
    """Two processes that train together."""

    def __init__(self, cache: Path):
        self.warm = [Zygote(cache) for _ in range(2)]
        for one in self.warm:
            one.ask(**{"import": ["lora_lab.run.pipeline", "tests.parallel.dying", "torch.distributed.fsdp"]})

    def run(self, *told: str, **plan: str) -> list[Done]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with ThreadPoolExecutor(2) as threads:
            return list(
                threads.map(
                    lambda rank: self.warm[rank].run(
                        *told, timeout=180, env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **plan
                    ),
                    range(2),
                )
            )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    found = Pair(tmp_path_factory.mktemp("cache"))
    yield found
    for one in found.warm:
        one.close()


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory, base, pair):
    """The command of a run; runs of two processes that nobody disturbed, whole and sharded."""
    folder = tmp_path_factory.mktemp("left_alone")
    (folder / "sources").mkdir()
    told = [*command_of(Sources.made(folder / "sources", base)), "train.eval_steps=2"]
    runs = {way: folder / way for way in ("whole", "sharded")}
    for way, run in runs.items():
        for done in pair.run(*told, f"run_dir={run}", *([SHARDED] if way == "sharded" else [])):
            assert done.rc == 0, done.said
    return told, runs


def killed(pair: Pair, told: list[str], run: Path, where: str, call: int, rank: int) -> None:
    """The process was killed, the other one ended with a word of it, and the run is resumed."""
    done = pair.run(where, str(call), str(rank), "KILL", *told, f"run_dir={run}", target="tests.parallel.dying:main")
    assert done[rank].rc == -signal.SIGKILL, done[rank].said
    other = done[1 - rank]
    assert (other.hang, other.rc) == (False, 3), other.said
    assert re.search(rf"process {rank} \(.*\): has ended, so process {1 - rank} .* ends too", other.err), other.said
    assert not (run / "result.json").exists()
    for resumed in pair.run("resume", f"run={run}"):
        assert resumed.rc == 0, resumed.said


def of(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in FILES]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("where", "call"), POINTS)
def test_a_killed_process_ends_the_run_which_resumes_to_the_same_bytes(pair, left_alone, tmp_path, where, call, rank):
    told, runs = left_alone
    killed(pair, told, tmp_path / "run", where, call, rank)
    assert of(tmp_path / "run") == of(runs["whole"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("where", "call"), [("gather", 90), ("gather", 120), ("step", 6)])
def test_so_does_one_of_a_sharded_base(pair, left_alone, tmp_path, where, call, rank):
    told, runs = left_alone
    killed(pair, [*told, SHARDED], tmp_path / "run", where, call, rank)
    assert of(tmp_path / "run") == of(runs["sharded"])
