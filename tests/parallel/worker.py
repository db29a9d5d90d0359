"""What the processes of a test do: `python worker.py OUT FOLDER SCENE ...` in each of them. Process 0 writes what came of each scene."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.parallel import KINDS, Sources, grouped, train_kind
from lora_lab.base import load
from lora_lab.errors import LoraLabError, ProcessError
from lora_lab.runtime import ranks, signals
from lora_lab.training import loop
from lora_lab.training.loop import learn as as_it_is


def unlike(sources: Sources, folder: Path) -> str:
    """The processes have something else."""
    try:
        ranks.prove({"seed": 1, "optim.lr": (0.1, 0.2)[ranks.rank()]}, "Start all alike.")
    except ProcessError as error:
        return str(error)
    return ""


def fails(sources: Sources, folder: Path) -> str:
    """One process has an error that the other has not."""

    def learn(*given: object) -> None:
        if ranks.rank() == 1:
            raise ValueError("a pass that cannot be")
        as_it_is(*given)

    loop.learn = learn
    try:
        train_kind("packed", sources, folder)
    except (LoraLabError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        loop.learn = as_it_is
    return ""


def short_of_memory(sources: Sources, folder: Path) -> dict:
    """One process has too little memory for passes of two rows."""

    def learn(shares: list, place: int, accelerator: object) -> None:
        if ranks.rank() == 1 and any(len(one.parts[place]) > 1 for one in shares if place < len(one.parts)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        as_it_is(shares, place, accelerator)

    loop.learn = learn
    try:
        return train_kind("packed, micro-batches of 2", sources, folder, ["adapter.lora_dropout=0"])
    finally:
        loop.learn = as_it_is


def sharded(sources: Sources, folder: Path) -> dict:
    """The layers of a 4-bit base lie in parts."""
    return train_kind("NF4", sources, folder, ["hardware.shard=true"])


def unguarded(sources: Sources, folder: Path) -> str:
    """They do, and bitsandbytes repacks weights where it likes."""

    def load_model(*given: object) -> Any:
        model = loaded(*given)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = True
        return model

    loaded, load.load_model = load.load_model, load_model
    try:
        train_kind("NF4", sources, folder, ["hardware.shard=true"])
    except LoraLabError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        load.load_model = loaded
    return ""


def dies(sources: Sources, folder: Path) -> dict:
    """One process dies in the third step; the last scene."""
    steps = []

    def learn(shares: list, place: int, accelerator: object) -> None:
        steps.append(shares[0].member.state.step)
        if ranks.rank() == 1 and steps[-1] == 2:
            os._exit(9)
        as_it_is(shares, place, accelerator)

    loop.learn = learn
    try:
        train_kind("packed", sources, folder)
    except ProcessError as error:
        return {"said": str(error), "saved": sorted(path.name for path in folder.glob("0/checkpoints/step-*"))}
    return {}


SCENES = {one.__name__: one for one in (unlike, fails, short_of_memory, sharded, unguarded, dies)}
SHARD = ["hardware.shard=true"]
# many steps, with evaluations in between; nothing is left out for a sharded base
LONGER = ["train.max_steps=20", "train.epochs=5", "train.eval_steps=4", "speed=plain", "optim.lr=1e-3"]
WAYS = {"": [], "sharded": SHARD, "longer": LONGER, "longer, sharded": [*LONGER, *SHARD]}  # behind a kind and a colon


def main(out: str, sources: str, *scenes: str) -> None:
    found = {}
    signals.install()
    with signals.held(), grouped(timeout=60), tempfile.TemporaryDirectory() as folder:
        for place, scene in enumerate(scenes):
            own = Path(folder) / str(place)
            kind, _, way = scene.partition(": ")
            made = (
                train_kind(kind, Sources(Path(sources)), own, WAYS[way])
                if kind in KINDS
                else SCENES[scene](Sources(Path(sources)), own)
            )
            found[scene] = made
            if ranks.main():
                Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
