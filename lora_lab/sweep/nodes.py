"""Cohorts on other machines: each is a `lora-lab resume` of some of a sweep's runs, handed over by an engine (`engines.py`).

The runs' folders, on a disk that all nodes share, are all that is passed: what to train stands in `config.yaml`, what came of it
in `result.json` or `failed.json`. Processes of this machine get one card each.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_lab.base import load
from lora_lab.errors import ConfigError, RunError
from lora_lab.runtime import cards, console
from lora_lab.sweep import cohort, engines
from lora_lab.sweep.jobs import Job, Nodes, groups

_ON_CPU = 2  # workers, where nothing says how many
_OF_CARDS = {"gpus_per_node", "visible_gpus"}  # what submitit would choose cards by: the same ones for every worker


def train(jobs: list[Job], nodes: Nodes) -> None:
    """Train all jobs that are not finished, in at most so many parts at once.

    Raises:
        ConfigError: the engine cannot take them, or there is no card for each worker.
    """
    own = _cards(jobs, nodes)
    waiting = cohort.opened(jobs)
    if not waiting:
        return
    folder = jobs[0].run.path.parent.absolute()
    on_cards = any(job.config.hardware.device != "cpu" for job in waiting)
    submit = engines.engine(nodes.executor, nodes.parameters, folder / "nodes", on_cards)
    submitted = []
    for place, part in enumerate(parts(waiting, nodes.workers or len(own) or _ON_CPU)):
        names = [job.run.path.name for job in part]
        command = ["-m", "lora_lab", "resume", f"sweep={folder}", f"members={','.join(names)}"]
        card = own[place] if own else None
        submitted.append((part, submit(command, names[0], card)))
        where = f", on card {card}" if own else ""
        console.say("node", f"{submitted[-1][1].title}: runs {','.join(names)}{where}")
    for part, task in submitted:
        if reason := task.failure():
            _collect(part, task, reason)


def _cards(jobs: Sequence[Job], nodes: Nodes) -> list[str]:
    """The card of each process of this machine; none where the runs use none, or where a scheduler hands them out.

    Raises:
        ConfigError: there are fewer cards than workers, or a run names a card that its worker would not see.
    """
    if nodes.executor == "slurm":
        return []
    named = [job.config.hardware.device for job in jobs if ":" in job.config.hardware.device]
    if named:
        raise ConfigError(
            f"hardware.device={named[0]}: each worker of hydra/launcher=cohort_{nodes.executor} gets a card of its own. Set "
            "hardware.device=cuda."
        )
    if nodes.executor != "local":
        return []
    if told := sorted(_OF_CARDS & nodes.parameters.keys()):
        raise ConfigError(
            f"hydra.launcher.parameters.{told[0]}: each worker of hydra/launcher=cohort_local gets one card. Drop it; hydra.launcher.workers "
            "says how many there are."
        )
    used = {job.config.hardware.device: load.torch_device(job.config.hardware) for job in jobs}
    if all(device.type == "cpu" for device in used.values()):
        return []
    found = cards.visible()
    if nodes.workers is not None and nodes.workers > len(found):
        raise ConfigError(
            f"hydra.launcher.workers={nodes.workers}: each worker trains on a card of its own, and this machine has {len(found)}. Set "
            f"hydra.launcher.workers={len(found)}, or leave it out."
        )
    return found


def _collect(part: list[Job], task: engines.Task, reason: str) -> None:
    """The errors of a part that did not end well: each run's own, or the node's."""
    for job in part:
        if job.result is None:
            job.error = job.failure() or RunError(
                f"{job.run.path}: node {task.title} ended without it ({reason}); see {task.log}. Resume with: lora-lab resume "
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
