"""A run, or a sweep, that several processes train together: each walks through the same stages, and process 0 alone works in the run's
folder. The others have a copy of its small files in a folder of their own, which goes when they end; nothing of theirs is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_lab.base import load, shard
from lora_lab.config.compose import leaves
from lora_lab.config.run import RunConfig
from lora_lab.config.train import HardwareConfig
from lora_lab.errors import ConfigError, LoraLabError, RunError
from lora_lab.run import run_dir
from lora_lab.runtime import console, launch, ranks, reading, storage

_HANDED_OUT = ("config.yaml", "manifest.json", "metrics.jsonl")  # what decides how a run goes on, beside its checkpoint
_SAME = "Start all processes with the same command, on machines with the same packages, base and rows."
_MAX_BYTES = 2**30


@contextlib.contextmanager
def joined(hardware: HardwareConfig, command: Sequence[str]) -> Iterator[Path | None]:
    """Inside the block this process trains with the others that a launcher started, if one did.

    Args:
        command: what each of them was told.

    Yields:
        A folder for what this process has to itself; None: it is process 0, or alone, and works where it was told to.

    Raises:
        ProcessError: the others do not come, or are not the same.
        ConfigError: there is no card for each of them.
    """
    place = launch.place()
    if place is None or ranks.size() > 1:
        yield None
        return
    if hardware.processes not in (None, place.size):
        console.say("processes", f"{place.size}, as {place.by} says, and not {hardware.processes}")
    backend = _backend(hardware, place)
    launch.take()
    ranks.start(place, hardware.timeout, backend)
    console.out.quiet = not ranks.main()
    try:
        ranks.prove({"command": " ".join(command), **run_dir.versions()}, _SAME)
        _one_card_each(hardware)
        console.say("processes", f"{place.size} train together, this is {ranks.title(0)}")
        with contextlib.nullcontext() if ranks.main() else storage.scratch() as own:
            yield own
        ranks.stop()
    except LoraLabError as error:
        ranks.last_words(str(error))
        raise
    finally:
        ranks.leave()
        console.out.quiet = False


def _backend(hardware: HardwareConfig, place: launch.Place) -> str:
    """Torch's name of what carries gradients, and its device made ready for it."""
    import torch

    device = load.torch_device(hardware, place.local)
    if device.type == "cpu":
        return "gloo"
    if ":" in hardware.device:
        raise ConfigError(
            f"hardware.device={hardware.device}: each of {place.size} processes has a card of its own. Set hardware.device=cuda; "
            "CUDA_VISIBLE_DEVICES chooses among the cards."
        )
    torch.cuda.set_device(device)
    return "cpu:gloo,cuda:nccl"


def _one_card_each(hardware: HardwareConfig) -> None:
    """
    Raises:
        ConfigError: two processes would work on one card.
    """
    import torch

    device = load.torch_device(hardware, ranks.local())
    card = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    every = ranks.gather(card)
    twice = next((one for number, one in enumerate(every) if one and one in every[:number]), None)
    if twice is not None:
        both = " and ".join(ranks.title(number) for number, one in enumerate(every) if one == twice)
        raise ConfigError(f"hardware.processes: {both} have one card. Start as many processes as there are cards.")
    ranks.prove({"device": device.type}, _SAME)


def same_configuration(config: RunConfig) -> None:
    """
    Raises:
        ProcessError: naming the key that another process has another value of.
    """
    ranks.prove({k: v for k, v in leaves(dataclasses.asdict(config)) if k not in ("run_dir", "name")}, _SAME)


def same_rows(base: dict[str, Any], data: dict[str, dict[str, str]]) -> None:
    """
    Args:
        base: what identifies it.
        data: hashes of the files, by key.

    Raises:
        ProcessError: naming what another process has otherwise.
    """
    facts = {f"base {key}": value for key, value in base.items()}
    facts |= {f"{key} (SHA-256)": sorted(files.values()) for key, files in data.items()}
    ranks.prove(facts, _SAME)


def enough_passes(config: RunConfig) -> None:
    """Refuse a step that has fewer micro-batches than there are processes: some would never have anything to do.

    Raises:
        ConfigError: naming the way out.
    """
    train, count = config.train, ranks.size()
    if count == 1 or train.packing is False or config.adapter.against_packing or train.micro_batch_tokens is not None:
        return
    rows = train.micro_batch_size or train.batch_size
    passes = -(-train.batch_size // rows)
    if passes >= count:
        return
    if train.batch_size < count:
        raise ConfigError(
            f"train.batch_size={train.batch_size}: {count} processes share each step, so some would have no row. Set it to {count} or "
            "more, or start fewer processes."
        )
    raise ConfigError(
        f"train.micro_batch_size={train.micro_batch_size or 'null'}: a step of {train.batch_size} rows has {passes} "
        f"micro-batch{'es' if passes > 1 else ''}, and {count} processes share them. Set train.micro_batch_size="
        f"{train.batch_size // count}; one process with the same value gives the same run."
    )


def enough_to_shard(config: RunConfig) -> None:
    """Refuse a base that would be shared out to one process.

    Raises:
        ConfigError: naming the way out.
    """
    if config.hardware.shard and ranks.size() == 1:
        raise ConfigError(
            "hardware.shard=true: one process holds the whole base. Start several, by hardware.processes=2, torchrun or srun; or set "
            "hardware.shard=false."
        )


def own_configuration(config: RunConfig, own: Path | None) -> RunConfig:
    """The configuration by which this process trains.

    Args:
        own: the folder that it has to itself; None: it trains where the configuration says, and follows its tracker.
    """
    if own is None:
        return config
    tracker = dataclasses.replace(config.tracker, name="none")
    folder = config.run_dir if Path(config.run_dir).is_relative_to(own) else str(own / Path(config.run_dir).name)
    return dataclasses.replace(config, run_dir=folder, tracker=tracker)


def part() -> bool:
    """Part from the other processes, once a run is trained and measured; whether this one goes on, to merge and export."""
    goes_on = ranks.main()
    ranks.stop()
    return goes_on


# -- folders ------------------------------------------------------------------------------------------------------------


def copy_of(path: str, own: Path | None) -> str:
    """The folder in which this process works on a run that is there; one of its own has a copy of the files that decide how it goes on."""
    [copy] = copies_of([path], own)
    return copy


def copies_of(paths: Sequence[str], own: Path | None) -> list[str]:
    """As `copy_of`, of several runs. What the others give for `paths` is not looked at."""
    if ranks.size() == 1:
        return list(paths)
    content = ranks.on_main(lambda: [(path, _small_files(Path(path).expanduser())) for path in paths])
    if own is None:
        return list(paths)
    return [_written(own / f"{place}-{Path(path).name}", files) for place, (path, files) in enumerate(content)]


def _small_files(folder: Path) -> dict[str, bytes]:
    there = [name for name in _HANDED_OUT if os.path.lexists(folder / name)]
    return {name: reading.read_bytes(folder / name, RunError, _MAX_BYTES) for name in there}


def _written(folder: Path, files: dict[str, bytes]) -> str:
    storage.make_folders(folder)
    for name, content in files.items():
        with storage.new_file(folder / name) as file:
            file.write(content)
    return str(folder)


# -- processes of this machine ------------------------------------------------------------------------------------------


def elsewhere(hardware: HardwareConfig, command: Callable[[], Sequence[str]]) -> int | None:
    """Train in `hardware.processes` processes that are started for it; their exit code. None: this process trains itself.

    Args:
        command: gives what each of them is told, beginning with the verb.

    Raises:
        ConfigError: this torch cannot share a base among them.
    """
    if hardware.shard:
        shard.check_torch()
    if hardware.processes in (None, 1) or launch.place() is not None:
        return None
    assert hardware.processes is not None
    return launch.run_here([sys.executable, "-m", "lora_lab", *command()], hardware.processes, hardware.timeout)
