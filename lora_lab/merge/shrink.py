"""A trained adapter at lower ranks: each is measured, and the lowest one that is as good becomes a run folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from lora_lab.adapters import deltas, files
from lora_lab.adapters.deltas import Deltas
from lora_lab.adapters.methods.lora import of_scale_one
from lora_lab.config.run import RunConfig
from lora_lab.data.dataset import Dataset, spread_examples
from lora_lab.errors import ConfigError
from lora_lab.merge import derived
from lora_lab.run import run_dir, takes
from lora_lab.run.prepared import Trained
from lora_lab.run.run_dir import RunDir
from lora_lab.run.setup import Live
from lora_lab.run.trained import open_trained
from lora_lab.runtime import console, storage
from lora_lab.tasks import metrics

_SHRUNK = "shrunk"  # name of the lower adapter in the model
_LOOK = 512  # examples whose own losses are compared
_CONFIDENCE = 0.95  # of the most that a rank's loss may have risen
_OWN = ("rank", "kept", "parameters", "rise", "rise_at_most")  # figures of a rank that are no metrics


def shrink(path: str, overrides: Sequence[str]) -> RunDir | None:
    """`lora-lab shrink`: the new run, in `run_dir` (by default `shrunk/` in the run's folder); None if no rank is as good.

    Each layer's update is cut by its singular values. A rank is as good if its loss, by how much the held-out rows differ in it,
    has risen by no more than the tolerance. The figures of all ranks are in `shrink.json`.

    Raises:
        ConfigError: no held-out rows to measure on, or no lower rank to try.
    """
    run, config = open_trained(path, takes.SHRINK, [f"run_dir={Path(path) / _SHRUNK}", *overrides])
    run_dir.check_free(config)
    trained = Trained.of(run, config)
    setup, held_out = trained.setup, trained.setup.held_out
    if held_out is None:
        raise ConfigError(
            "data.eval: ranks are compared on held-out rows. Name some: lora-lab shrink run=DIR data.eval=FILE"
        )
    adapter = deltas.read(run.adapter, setup.skeleton())
    ranks = _ranks(config, adapter)
    widest = dataclasses.replace(config, adapter=of_scale_one([config.adapter], adapter.rank, list(adapter.layers)))
    with setup.loaded({_SHRUNK: widest}) as live:
        figures = _figures(live, live.setup.held_out_rows(), adapter, [adapter.rank, *ranks])
    console.show_table(
        f"{run.path}: ranks on {len(held_out)} held-out rows",
        list(figures[0]),
        [list(row.values()) for row in figures],
        slice(0, None),
    )
    good = [row for row in figures[1:] if row["rise_at_most"] <= config.shrink.tolerance]
    chosen = good[-1] if good else None  # ranks fall
    new = None
    if chosen is None:
        console.say("shrink", _none_saved(figures, config.shrink.tolerance))
    else:
        new = _save(trained, adapter, chosen)
    report = {
        "run": str(run.path),
        "tolerance": config.shrink.tolerance,
        "chosen": chosen and chosen["rank"],
        "ranks": figures,
    }
    storage.write_text(run.path / "shrink.json", storage.dump_json(report))
    return new


def _none_saved(figures: list[dict[str, float]], tolerance: float) -> str:
    """Why no rank is as good: it is worse, or so few rows cannot tell."""
    unsure = [row for row in figures[1:] if row["rise"] <= tolerance]
    if not unsure:
        return f"no lower rank stays within shrink.tolerance={tolerance:g} of the loss; nothing is saved"
    row = min(unsure, key=lambda one: one["rise_at_most"])
    return (
        f"the loss changes by {row['rise']:+.4f} at rank {row['rank']}, but so few rows allow up to {row['rise_at_most']:+.4f} "
        f"({_CONFIDENCE:.0%} confidence), above shrink.tolerance={tolerance:g}; nothing is saved. Measure on more rows "
        "(data.eval=FILE), or raise the tolerance"
    )


def _figures(live: Live, held_out: Dataset, adapter: Deltas, ranks: Sequence[int]) -> list[dict[str, float]]:
    """For each rank the share of the updates that is kept, the adapter's size, what is measured, and how far the loss is above
    that of the first rank, as measured and at most."""
    model, figures, whole = live.model.eval(), [], None
    examples = spread_examples(held_out, _LOOK)
    origins = [example.origin for example in examples]
    for rank in ranks:
        cut, kept = _cut(adapter, rank)
        files.put(model, _SHRUNK, cut.tensors(adapter.rank))
        size = sum(tensor.numel() for tensor in cut.tensors(rank).values())
        measured = live.measure(f"rank {rank}").metrics
        with live.autocast():
            losses = live.setup.task.losses_of(model, examples)
        whole = losses if whole is None else whole
        rise = measured["loss"] - (figures[0]["loss"] if figures else measured["loss"])
        most = rise + metrics.paired_margin(losses, whole, origins, _CONFIDENCE) * math.sqrt(
            min(1, _LOOK / len(held_out))
        )
        figures.append({"rank": rank, "kept": kept, "parameters": size, **measured, "rise": rise, "rise_at_most": most})
    return figures


def _save(trained: Trained, adapter: Deltas, chosen: dict[str, float]) -> RunDir:
    """The run folder of the chosen rank."""
    config, rank = trained.setup.config, chosen["rank"]
    lower = of_scale_one([config.adapter], rank, list(adapter.layers))
    measured = {name: value for name, value in chosen.items() if name not in _OWN}
    made_of = {"method": f"svd to rank {rank}", "adapters": [{"run": str(trained.run.path), "weight": 1.0}]}
    cut, _ = _cut(adapter, rank)
    new = derived.make(dataclasses.replace(config, adapter=lower), cut, trained.setup, made_of, None, measured)
    console.say("shrink", f"rank {rank} instead of {adapter.rank}: {new.path}; merge it: lora-lab merge run={new.path}")
    return new


def _ranks(config: RunConfig, adapter: Deltas) -> list[int]:
    given = config.shrink.ranks or [2**power for power in range(adapter.rank.bit_length()) if 2**power < adapter.rank]
    ranks = sorted(set(given), reverse=True)
    if not ranks or ranks[0] >= adapter.rank:
        raise ConfigError(f"shrink.ranks={given}: must all be below the adapter's rank, {adapter.rank}.")
    return ranks


def _cut(adapter: Deltas, rank: int) -> tuple[Deltas, float]:
    """The adapter at a rank, and the mean share of its layers' squared norms that is kept."""
    found = {name: update.truncated(min(rank, update.rank)) for name, update in adapter.layers.items()}
    shares = [share for _, share in found.values()]
    return Deltas({name: update for name, (update, _) in found.items()}, adapter.whole), sum(shares) / len(shares)
