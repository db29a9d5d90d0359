"""A trained adapter at lower ranks: each is measured, and the lowest one that is as good becomes a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lora_lab import console, run_dir, storage
from lora_lab.adapters import files, updates
from lora_lab.adapters.updates import Updates
from lora_lab.config import RunConfig
from lora_lab.errors import ConfigError
from lora_lab.merge import derived
from lora_lab.prepared import Prepared, load_adapted, prepare
from lora_lab.run_dir import RunDir
from lora_lab.trained import open_trained

_SHRUNK = "shrunk"  # name of the lower adapter in the model


def shrink(path: str, overrides: Sequence[str]) -> RunDir | None:
    """`lora-lab shrink`: the new run, in `run_dir` (by default `shrunk/` in the run's folder); None if no rank is as good.

    Each layer's update is cut by its singular values. The figures of all ranks are in `shrink.json`.

    Raises:
        ConfigError: no held-out rows to measure on, or no lower rank to try.
    """
    run, config = open_trained(path, "shrink", [f"run_dir={Path(path) / _SHRUNK}", *overrides])
    run_dir.check_free(config)
    prepared = prepare(config, need_train=False, trained=run)
    if prepared.held_out is None:
        raise ConfigError(
            "data.eval: ranks are compared on held-out rows. Name some: lora-lab shrink run=DIR data.eval=FILE"
        )
    adapter = updates.read(run.adapter)
    ranks = _ranks(config, adapter)
    figures = _figures(config, adapter, [adapter.rank, *ranks], prepared)
    console.show_table(
        f"{run.path}: ranks on {len(prepared.held_out)} held-out rows",
        list(figures[0]),
        [list(row.values()) for row in figures],
        slice(0, None),
    )
    tolerance, whole = config.shrink.tolerance, figures[0]["loss"]
    good = [row for row in figures[1:] if row["loss"] <= whole + tolerance]
    chosen = good[-1] if good else None  # ranks fall
    new = None
    if chosen is None:
        console.say(
            "shrink", f"no lower rank stays within shrink.tolerance={tolerance:g} of the loss; nothing is saved"
        )
    else:
        new = _save(run, config, adapter, chosen, prepared)
    report = {"run": str(run.path), "tolerance": tolerance, "chosen": chosen and chosen["rank"], "ranks": figures}
    storage.write_text(run.path / "shrink.json", storage.dump_json(report))
    return new


def _figures(config: RunConfig, adapter: Updates, ranks: Sequence[int], prepared: Prepared) -> list[dict[str, float]]:
    """For each rank the share of the updates that is kept, the adapter's size, and what is measured."""
    targets = config.adapter.target_modules
    widest = dataclasses.replace(config, adapter=derived.adapter_config(config.adapter, adapter.rank, targets))
    model, figures = load_adapted(prepared, {_SHRUNK: widest}).eval(), []
    for rank in ranks:
        cut, kept = _cut(adapter, rank)
        files.put(model, _SHRUNK, cut.tensors(adapter.rank))
        size = sum(tensor.numel() for tensor in cut.tensors(rank).values())
        figures.append({"rank": rank, "kept": kept, "parameters": size, **prepared.measure(f"rank {rank}").metrics})
    return figures


def _save(run: RunDir, config: RunConfig, adapter: Updates, chosen: dict[str, float], prepared: Prepared) -> RunDir:
    """The run folder of the chosen rank."""
    rank = chosen["rank"]
    lower = derived.adapter_config(config.adapter, rank, config.adapter.target_modules)
    metrics = {name: value for name, value in chosen.items() if name not in ("rank", "kept", "parameters")}
    made_of = {"method": f"svd to rank {rank}", "adapters": [{"run": str(run.path), "weight": 1.0}]}
    cut, _ = _cut(adapter, rank)
    new = derived.make(dataclasses.replace(config, adapter=lower), cut, prepared, made_of, None, metrics)
    console.say("shrink", f"rank {rank} instead of {adapter.rank}: {new.path}; merge it: lora-lab merge run={new.path}")
    return new


def _ranks(config: RunConfig, adapter: Updates) -> list[int]:
    given = config.shrink.ranks or [2**power for power in range(adapter.rank.bit_length()) if 2**power < adapter.rank]
    ranks = sorted(set(given), reverse=True)
    if not ranks or ranks[0] >= adapter.rank:
        raise ConfigError(f"shrink.ranks={given}: must all be below the adapter's rank, {adapter.rank}.")
    return ranks


def _cut(adapter: Updates, rank: int) -> tuple[Updates, float]:
    """The adapter at a rank, and the mean share of its layers' squared norms that is kept."""
    found = {name: update.truncated(min(rank, update.rank)) for name, update in adapter.layers.items()}
    shares = [share for _, share in found.values()]
    return Updates({name: update for name, (update, _) in found.items()}, adapter.whole), sum(shares) / len(shares)
