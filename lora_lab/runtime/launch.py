"""Which processes a launcher started to train together: torchrun, `accelerate launch`, srun, or this one, for `hardware.processes`.

Importing this loads no torch.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.errors import ConfigError
from lora_lab.runtime import children
from lora_lab.runtime.environment import usable_cores

# What torchrun, accelerate launch and mpirun-like launchers say. It is taken out of the environment once it was read: libraries and
# child processes would act on it.
_SAID = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
         "SLURM_STEP_NUM_TASKS")  # fmt: skip
_NO_PART = {  # what accelerate launch may be told and would have no effect
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_PORTS = range(20000, 40000)  # of runs that srun starts, by their job's number


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among those that train together."""

    rank: int
    size: int
    local: int  # number on its machine
    address: str  # of process 0's machine
    port: int
    by: str  # who started it


def place(environ: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place; None: it was started alone.

    Raises:
        ConfigError: the launcher's variables are not all there, or not numbers.
    """
    if _number(environ, "WORLD_SIZE", 1) > 1:
        found = Place(
            _number(environ, "RANK"),
            _number(environ, "WORLD_SIZE"),
            _number(environ, "LOCAL_RANK"),
            environ.get("MASTER_ADDR", "127.0.0.1"),
            _number(environ, "MASTER_PORT", 29500),
            f"WORLD_SIZE={environ['WORLD_SIZE']}",
        )
    elif _number(environ, "SLURM_STEP_NUM_TASKS", 1) > 1:
        found = _of_slurm(environ)
    else:
        return None
    for name, what in _NO_PART.items():
        if environ.get(name, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"{name}={environ[name]}: {what} has no effect. Start it with accelerate launch --multi_gpu, or torchrun."
            )
    if not 0 <= found.rank < found.size:
        raise ConfigError(f"{found.by}: RANK={found.rank} must be below it. Start it with torchrun or srun.")
    return found


def _of_slurm(environ: Mapping[str, str]) -> Place:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST", "127.0.0.1")
    job = _number(environ, "SLURM_JOB_ID", 0) * 16 + _number(environ, "SLURM_STEP_ID", 0)
    return Place(
        _number(environ, "SLURM_PROCID"),
        _number(environ, "SLURM_STEP_NUM_TASKS"),
        _number(environ, "SLURM_LOCALID"),
        environ.get("MASTER_ADDR", first_node(nodes)),
        _number(environ, "MASTER_PORT", _PORTS[job % len(_PORTS)]),
        f"SLURM_STEP_NUM_TASKS={environ['SLURM_STEP_NUM_TASKS']}",
    )


def first_node(nodes: str) -> str:
    """The first machine of a list as Slurm writes it: 'a3' of 'a[3-5,9],b1'."""
    name = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in name.groups()) if name else nodes


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ConfigError(
            f"{name}={text}: must be a number. Start all processes with torchrun, accelerate launch or srun, which set it."
        )
    return int(text)


def refuse_several(what: str) -> None:
    """Each process of a launcher would do the whole work by itself, in one folder.

    Raises:
        ConfigError: a launcher started more than one.
    """
    found = place()
    if found is not None:
        raise ConfigError(
            f"{found.by}: lora-lab {what} works in one process. Start it without torchrun, accelerate launch or srun; lora-lab train and "
            "lora-lab resume train in several."
        )


def take() -> None:
    """Take what the launcher said out of the environment."""
    for name in _SAID:
        os.environ.pop(name, None)


# -- processes of this machine ------------------------------------------------------------------------------------------


def _ending_in(config: type, timeout: float) -> dict[str, Any]:
    """What tells torch's launcher how many seconds processes have to end; torch 2.11 takes none, and waits 30."""
    known = any(one.name == "shutdown_timeout" for one in dataclasses.fields(config))
    return {"shutdown_timeout": max(1, round(timeout))} if known else {}


def run_here(command: Sequence[str], processes: int, timeout: float) -> int:
    """Run a command in so many processes of this machine, by torch's own launcher; the exit code.

    They end with this one. A signal is handed to each of them, and they save before they end.

    Args:
        command: program and arguments.
        timeout: seconds that they have to end.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from lora_lab.runtime import console, storage

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    tied = children.tied(*command)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with storage.scratch() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(str(folder)),
            signals_to_handle="SIGTERM,SIGINT,SIGHUP",
            **_ending_in(LaunchConfig, timeout),
        )
        try:
            elastic_launch(config, tied[0])(*tied[1:])
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
        except ChildFailedError as error:
            number, first = error.get_first_failure()
            if first.exitcode < 0:
                console.complain(
                    f"lora-lab: process {number} was ended by {signal.Signals(-first.exitcode).name}, and with it the others"
                )
                return 3
            return int(first.exitcode)
        finally:
            for known, handler in handlers.items():
                signal.signal(known, handler)
    return 0
