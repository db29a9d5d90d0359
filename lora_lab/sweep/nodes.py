"""Cohorts on other machines: each is a `lora-lab resume` of some of a sweep's runs, submitted through submitit.

The runs' folders, on a disk that all nodes share, are all that is passed: what to train stands in `config.yaml`, what came of it
in `result.json` or `failed.json`. (submitit itself keeps the command line in a pickle of its own, in `DIR/nodes`.)
"""

from __future__ import annotations

import sys
from typing import Any

from lora_lab.errors import ConfigError, RunError
from lora_lab.runtime import console
from lora_lab.sweep import cohort
from lora_lab.sweep.jobs import Job, Nodes, groups


def train(jobs: list[Job], nodes: Nodes) -> None:
    """Train all jobs that are not finished, in at most so many parts at once.

    Raises:
        ConfigError: submitit is not installed, or refuses its parameters.
    """
    try:
        import submitit
    except ImportError as error:
        raise ConfigError("hydra/launcher=cohort_slurm: needs submitit. pip install 'lora-lab[slurm]'") from error
    waiting = cohort.opened(jobs)
    if not waiting:
        return
    folder = jobs[0].run.path.parent.absolute()
    engine = submitit.AutoExecutor(folder / "nodes", cluster=nodes.executor)
    try:
        engine.update_parameters(**nodes.parameters)
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"hydra.launcher.parameters: submitit refuses them ({error}).") from error
    submitted = []
    for part in parts(waiting, nodes.workers):
        names = ",".join(job.run.path.name for job in part)
        command = [sys.executable, "-m", "lora_lab", "resume", f"sweep={folder}", f"members={names}"]
        submitted.append((part, engine.submit(submitit.helpers.CommandFunction(command, verbose=False))))
        console.say("node", f"{submitted[-1][1].job_id}: runs {names}")
    for part, task in submitted:
        try:
            task.result()
        except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError):
            _collect(part, task)


def _collect(part: list[Job], task: Any) -> None:
    """The errors of a part that did not end well: each run's own, or the node's."""
    for job in part:
        if job.result is None:
            job.error = job.failure() or RunError(
                f"{job.run.path}: node {task.job_id} ended without it; see {task.paths.stderr}. Resume with: lora-lab resume "
                f"sweep={job.run.path.parent}"
            )


def parts(jobs: list[Job], workers: int) -> list[list[Job]]:
    """The jobs in at most so many parts. Groups stay whole, unless there are fewer of them than workers."""
    found = groups(jobs)
    while len(found) < min(workers, len(jobs)):
        largest = max(found, key=len)
        half = (len(largest) + 1) // 2
        place = found.index(largest)
        found[place : place + 1] = [largest[:half], largest[half:]]
    if len(found) <= workers:
        return found
    shares: list[list[Job]] = [[] for _ in range(workers)]
    for group in sorted(found, key=len, reverse=True):
        min(shares, key=len).extend(group)
    return shares
