"""A sweep from its first run to its ranking."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lora_lab.config.run import RunConfig
from lora_lab.errors import ConfigError, Interrupted, LoraLabError, RunError
from lora_lab.run import parallel, pipeline
from lora_lab.runtime import console, ranks
from lora_lab.sweep import cohort, nodes, ranking
from lora_lab.sweep.jobs import Job, Nodes, Outcome, in_folder, jobs_of, repeats, run_folders


class Sweep:
    """What was launched so far; a sweeper may launch several times."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.nodes: Nodes | None = None  # None: everything is trained here

    @property
    def folder(self) -> Path:
        return self.jobs[0].run.path.parent

    def launch(self, configs: list[RunConfig], nodes: Nodes | None = None) -> list[Outcome]:
        """Train these runs; what each was worth."""
        if nodes is not None and ranks.size() > 1:
            raise ConfigError(
                "hydra/launcher: hands whole runs to other processes, and these share each step. Drop the launcher, or start one process."
            )
        new = jobs_of(configs)
        self.jobs, self.nodes = self.jobs + new, nodes
        if new:
            _train(new, nodes)
        found = {job.config.run_dir: ranking.outcome(job) for job in new}
        return [found.get(config.run_dir, Outcome(None)) for config in configs]

    def end(self, refused: list[tuple[str, LoraLabError]], ranked: bool = True) -> int:
        """Repeat the best over seeds, rank, list what failed; the exit code.

        Args:
            refused: folder and error of points that could not be used at all.
            ranked: whether these are all runs of the sweep.
        """
        if self.jobs and ranked:
            self.jobs = jobs_of([job.config for job in self.jobs], self.jobs)
            again = repeats(ranking.best(self.jobs), self.jobs)
            if again:
                console.say("seeds", f"{len(again)} more runs, to separate the best from chance")
                _train(again, self.nodes)
            ranking.rank(self.folder, self.jobs, again, refused)
        failed = [(job.run.path, job.error) for job in self.jobs if job.error is not None] + refused
        for error in dict.fromkeys(str(error) for _, error in failed):
            folders = ", ".join(str(folder) for folder, other in failed if str(other) == error)
            console.complain(f"lora-lab: {folders}: {error}")
        console.say("sweep", f"{len(failed)} of its runs failed" if failed else "all runs finished")
        cohort.no_more()
        return max((error.exit_code if isinstance(error, LoraLabError) else 1 for _, error in failed), default=0)


def _train(jobs: list[Job], on: Nodes | None = None) -> None:
    try:
        cohort.train(jobs) if on is None else nodes.train(jobs, on)
    except Interrupted as interruption:
        interruption.sweep = jobs[0].run.path.parent
        raise


def elsewhere(configs: list[RunConfig], processes: contextlib.ExitStack, command: list[str]) -> int | None:
    """Have a sweep trained by processes that are started for it, or train along with process 0, which has it; the exit code. None: this
    process has the sweep.

    Args:
        processes: this process parts from the others when it ends.
        command: the command line.
    """
    hardware = configs[0].hardware
    code = parallel.elsewhere(hardware, lambda: command)
    if code is not None:
        return code
    own = processes.enter_context(parallel.joined(hardware, command))
    if own is None:
        return None
    cohort.follow(own)
    return 0


def resume(folder: str, members: list[str] | None, command: list[str]) -> int:
    """`lora-lab resume sweep=DIR`: finished runs stay as they are, the others go on.

    Args:
        members: names of the runs that go on, without a ranking; None: all of them.
        command: the command line.
    """
    jobs, left_out = in_folder(Path(folder).expanduser(), members)
    with contextlib.ExitStack() as processes:
        code = elsewhere([job.config for job in jobs], processes, command) if jobs else None
        if code is not None:
            return code
        whole = Sweep()
        whole.jobs = jobs
        for path, error in left_out:
            console.say("left out", f"{path}: {error}")
        if whole.jobs:
            _train(whole.jobs)
        return whole.end(left_out, ranked=members is None)


def merge(folder: str, overrides: list[str], member: str | None = None) -> dict[str, Any]:
    """`lora-lab merge sweep=DIR`: merge one of a sweep's runs.

    Args:
        member: its name; None: the run that the ranking recommends.
    """
    path = Path(folder).expanduser()
    chosen = ranking.read(path)["take"] if member is None else member
    there = [one.name for one in run_folders(path)]
    if chosen not in there:
        raise RunError(
            f"sweep={folder}: no run {chosen} to merge. Name one of {', '.join(there) or 'none'}: member=NAME"
        )
    console.say("merge", path / chosen)
    return pipeline.merge(str(path / chosen), overrides)
