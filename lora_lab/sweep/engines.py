"""What hands commands to other processes and machines: submitit, and a Ray cluster that is there already.

A command is what stands behind `python`, and nothing else is passed. The same Python environment is on every machine. submitit keeps the
command in a pickle of its own, in `DIR/nodes`; Ray sends it in one. What a command says is in a file there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_lab.errors import ConfigError, Interrupted
from lora_lab.runtime import children, signals, storage

_OF_RAY = ("address", "max_retries", "num_cpus", "num_gpus", "resources")  # what its tasks are told of parameters
_LOOK = 1.0  # seconds between looks for signals
_PATIENCE = 10.0  # seconds in which the head of a Ray cluster is reached


@dataclasses.dataclass(frozen=True)
class Task:
    """A command that was handed over."""

    title: str
    log: str  # the file that holds what it said
    failure: Callable[[], str]  # waits until it has ended; why not well, else empty


Submit = Callable[[Sequence[str], str, str | None], Task]
"""Takes Python's arguments, a name that no other command in the folder has, and the card of this machine that the command gets; None:
whatever it is given."""


def _submitit(executor: str, parameters: dict[str, Any], folder: Path, on_cards: bool) -> Submit:
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(f"hydra/launcher=cohort_{executor}: needs submitit. pip install 'lora-lab[slurm]'") from error
    engine = submitit.AutoExecutor(folder, cluster=executor)
    try:
        engine.update_parameters(**parameters)
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"hydra.launcher.parameters: submitit refuses them ({error}).") from error

    def submit(arguments: Sequence[str], name: str, card: str | None) -> Task:
        # submitit's local executor hides all cards, and its pickle is no place for the whole environment
        seen = [] if card is None else ["env", f"CUDA_VISIBLE_DEVICES={card}"]
        command = submitit.helpers.CommandFunction([*seen, sys.executable, *arguments], verbose=False)
        job = engine.submit(command)

        def failure() -> str:
            try:
                job.result()
            except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
                return type(error).__name__
            return ""

        return Task(job.job_id, str(job.paths.stderr), failure)

    return submit


def _ray(executor: str, parameters: dict[str, Any], folder: Path, on_cards: bool) -> Submit:
    """Ray makes a task again elsewhere where its machine or its worker is lost (`max_retries`)."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("hydra/launcher=cohort_ray: needs ray. pip install 'lora-lab[ray]'") from error
    if other := sorted(set(parameters).difference(_OF_RAY)):
        raise ConfigError(f"hydra.launcher.parameters.{other[0]}: Ray is told {', '.join(_OF_RAY)}. Drop it.")
    told = {"num_cpus": 1, "num_gpus": int(on_cards), **parameters}
    address = str(told.pop("address", "auto"))
    try:
        _reach(address)
        with signals.kept():
            ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
        remote = ray.remote(**told)(run_command)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        line = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"hydra/launcher=cohort_ray: {line} (hydra.launcher.parameters.address={address}). Start a cluster with ray start --head, and "
            "on other machines ray start --address=HOST:6379."
        ) from error
    _find_room(told, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    storage.make_folders(folder)

    def submit(arguments: Sequence[str], name: str, card: str | None) -> Task:
        log = str(folder / f"ray-{name}.log")
        task = remote.remote(list(arguments), str(Path.cwd()), log)

        def failure() -> str:
            with signals.held() as arrived:  # Ray drops what a handler raises inside its calls
                while not ray.wait([task], timeout=_LOOK, fetch_local=False)[0]:
                    if arrived:
                        raise Interrupted(arrived[0])
            try:
                code = ray.get(task)
            except ray.exceptions.RayError as error:
                return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            return f"exit code {code}" if code else ""

        return Task(f"ray-{name}", log, failure)

    return submit


ENGINES = {"local": _submitit, "slurm": _submitit, "ray": _ray}


def engine(executor: str, parameters: dict[str, Any], folder: Path, on_cards: bool) -> Submit:
    """What hands commands over.

    Args:
        executor: of `ENGINES`.
        parameters: the engine's own.
        folder: where commands' output goes.
        on_cards: whether a command needs a card, where parameters do not say how many.

    Raises:
        ConfigError: its library is not installed, it refuses its parameters, or there is no such cluster.
    """
    if executor not in ENGINES:
        raise ConfigError(
            f"hydra.launcher.executor={executor}: choose hydra/launcher={', '.join(f'cohort_{name}' for name in ENGINES)}."
        )
    return ENGINES[executor](executor, parameters, folder, on_cards)


def run_command(arguments: Sequence[str], cwd: str, log: str) -> int:
    """Run Python with these arguments where this is called, as long as the one that called lives; its exit code.

    Args:
        cwd: the folder that it runs in.
        log: a file that gets what it says.
    """
    with os.fdopen(storage.open_own(Path(log), os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as file:
        return subprocess.run(
            children.tied(sys.executable, *arguments),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            check=False,
        ).returncode


def _reach(address: str) -> None:
    """Ray asks an address that nobody answers at for minutes.

    Raises:
        OSError: nobody answers there.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdecimal():
        with contextlib.closing(socket.create_connection((host, int(port)), _PATIENCE)):
            pass


def _find_room(told: dict[str, Any], nodes: Sequence[dict[str, float]]) -> None:
    """A task that fits nowhere would wait for ever.

    Args:
        told: what a task needs.
        nodes: what each has.

    Raises:
        ConfigError: none has all of it.
    """
    needs = {"num_cpus": ("CPU", told["num_cpus"]), "num_gpus": ("GPU", told["num_gpus"])}
    needs |= {f"resources.{name}": (name, value) for name, value in told.get("resources", {}).items()}
    if any(all(node.get(name, 0) >= value for name, value in needs.values()) for node in nodes):
        return
    asked = " and ".join(f"{key}={value:g}" for key, (_, value) in needs.items() if value)
    raise ConfigError(
        f"hydra.launcher.parameters: no node of the Ray cluster has {asked}. Ask for less; hardware=cpu needs no card."
    )
