"""A sweep of many tiny runs in which things go wrong at random, run by `test_sweep_faults.py` in this process or in another.

    python -m tests.faults.soak FOLDER RUNS GROUP SEED

trains until everything is finished or the process is killed, as planned; the same command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
from pathlib import Path

import psutil
import pytest

from lora_lab import cli
from lora_lab.config import compose
from lora_lab.config.run import RunConfig
from lora_lab.sweep import cohort, sweep
from lora_lab.training import loop
from tests.conftest import make_base, make_rows, write_jsonl

STEPS = 20
SHARE = 0.05  # of the runs that meet a fault
KILLS = 4  # at most: each costs a start of the process


def configs(folder: Path, runs: int, group: int) -> list[RunConfig]:
    """Runs that differ by their seed; so many share a base."""
    base, train, held_out = folder / "base", folder / "train.jsonl", folder / "eval.jsonl"
    if not held_out.exists():
        make_base(base, num_hidden_layers=1)
        write_jsonl(train, make_rows(20))
        write_jsonl(held_out, make_rows(2, seed=1))
    one = compose.compose(
        [
            "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
            f"data.train={train}", f"data.eval={held_out}", "optim.lr=0.01", "adapter.r=2", "adapter.target_modules=[q_proj]",
            "train.batch_size=2", f"train.max_steps={STEPS}", "train.epochs=2", "train.save_steps=10", f"train.eval_steps={STEPS}",
            f"run_dir={folder}/sweep/0",
        ]
    )  # fmt: skip
    return [
        dataclasses.replace(
            one,
            run_dir=f"{folder}/sweep/{place}",
            seed=place,
            sweep=dataclasses.replace(one.sweep, joint_tokens=4096 + place // group),  # what differs parts the groups
        )
        for place in range(runs)
    ]


def plan(runs: int, seed: int) -> dict[str, tuple[str, int]]:
    """Which runs meet which fault, and after how many steps."""
    draw = random.Random(seed)
    kinds = ["raise", "nan", "cut", "kill"]
    chosen = draw.sample(range(runs), max(len(kinds), round(SHARE * runs)))
    found = {str(run): (kinds[place % len(kinds)], draw.randrange(1, STEPS)) for place, run in enumerate(chosen)}
    killed = [run for run, (kind, _) in found.items() if kind == "kill"]
    return found | {run: ("raise", found[run][1]) for run in killed[KILLS:]}


class Faults:
    """Makes each planned fault happen once, also over several processes."""

    def __init__(self, folder: Path, planned: dict[str, tuple[str, int]], kill_with: signal.Signals):
        self.folder, self.planned, self.kill_with = folder, planned, kill_with
        self.marks = folder / "faults"
        self.marks.mkdir(exist_ok=True)
        self.plain = loop._check

    def check(self, share, *more):
        """In the place of `loop._check`."""
        member, name = share.member, share.member.run.path.name
        kind, at = self.planned.get(name, ("", 0))
        if member.state.step == at and kind in ("raise", "nan", "kill") and self._first(name, kind):
            if kind == "raise":
                raise ValueError("a fault")
            if kind == "kill":
                os.kill(os.getpid(), self.kill_with)
            else:
                share.loss = float("nan")
        self.plain(share, *more)

    def cut(self) -> int:
        """Cut the results that are to be cut; how many there were."""
        count = 0
        for name, (kind, _) in self.planned.items():
            file = self.folder / "sweep" / name / "result.json"
            if kind == "cut" and file.exists() and self._first(name, kind):
                file.write_bytes(file.read_bytes()[:40])
                count += 1
        return count

    def _first(self, name: str, kind: str) -> bool:
        mark = self.marks / f"{name}-{kind}"
        if mark.exists():
            return False
        mark.touch()
        return True


def launch(folder: Path, runs: int, group: int) -> int:
    """Begin the sweep, or go on with it."""
    if (folder / "sweep" / str(runs - 1) / "config.yaml").exists():
        return cli.main(["resume", f"sweep={folder}/sweep"])
    whole = sweep.Sweep()
    whole.launch(configs(folder, runs, group))
    return whole.end([])


def check(folder: Path, runs: int) -> None:
    """Every run is there, finished, once, with each of its steps once."""
    ranked = json.loads((folder / "sweep/ranking.json").read_text())["ranking"]
    assert sorted(int(place["name"]) for place in ranked) == list(range(runs))
    assert [place["note"] for place in ranked] == [""] * runs
    for run in range(runs):
        result = json.loads((folder / f"sweep/{run}/result.json").read_text())
        assert result["steps"] == STEPS, run
        lines = [json.loads(line) for line in (folder / f"sweep/{run}/metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1)), run
        assert not (folder / f"sweep/{run}/failed.json").exists()


def main(folder: Path, runs: int, group: int, seed: int) -> None:
    """One process of the soak; leaves the memory after each group in `rss.jsonl`."""
    faults = Faults(folder, plan(runs, seed), signal.SIGKILL)
    plain = cohort._train_group

    def train_group(*given):
        plain(*given)
        with open(folder / "rss.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([os.getpid(), psutil.Process().memory_info().rss >> 20]) + "\n")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_check", faults.check)
        patch.setattr(cohort, "_train_group", train_group)
        code = launch(folder, runs, group)
    faults.cut()
    sys.exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
