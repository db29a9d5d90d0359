"""Several adapters of one base as one adapter, in a run folder of its own.

What is combined are the updates of the weights, up @ down with their scales; peft's "linear" adds the factors instead, whose
product is something else.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import merge_utils

from lora_lab.adapters import deltas, files
from lora_lab.adapters.deltas import Delta, Deltas, factored
from lora_lab.adapters.methods.lora import LoraAdapter, of_scale_one
from lora_lab.base.weights import Weights
from lora_lab.config.merge import MergeConfig
from lora_lab.config.run import RunConfig
from lora_lab.errors import AdapterError, ConfigError
from lora_lab.merge import derived
from lora_lab.run import run_dir, takes
from lora_lab.run.prepared import Trained
from lora_lab.run.run_dir import RunDir
from lora_lab.run.setup import Live, Setup
from lora_lab.run.trained import open_trained
from lora_lab.runtime import console, storage
from lora_lab.tasks.base import EvalResult

COMBINED = "combined"  # name of the new adapter in the model


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained run whose adapter goes into the new one."""

    trained: Trained
    adapter: Deltas
    name: str  # of its adapter in the model

    @property
    def run(self) -> RunDir:
        return self.trained.run

    @property
    def setup(self) -> Setup:
        return self.trained.setup

    @property
    def title(self) -> str:
        return str(self.run.path)

    def taught(self) -> Source:
        """As `Setup.taught`: its rows are measured on a base that is loaded once for all."""
        trained = dataclasses.replace(self.trained, setup=self.setup.taught())
        return dataclasses.replace(self, trained=trained)


def combine(named: Sequence[str], overrides: Sequence[str]) -> RunDir:
    """`lora-lab merge merge.adapters=[A,B]`: the new run, whose settings are the first's. Each source's held-out rows are measured
    with its own adapter and with the combined one, into `combination.json`.

    Args:
        named: the folders of `merge.adapters`.
        overrides: all of the command line.

    Raises:
        AdapterError: adapters of other bases, of other kinds of models, or with heads of their own.
    """
    runs = [run_dir.open_existing(path) for path in named]
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    default = f"run_dir={runs[0].path.absolute().parent / f'combined_{now}'}"
    _, config = open_trained(named[0], takes.COMBINE, [default, *overrides])
    run_dir.check_free(config)
    sources = [open_source(path, place) for place, path in enumerate(named)]
    check_together(sources)
    sources = [as_lora(source).taught() for source in sources]
    _check_search(config.merge, sources)
    rank = rank_of(config.merge, sources)
    config = dataclasses.replace(config, adapter=adapter_config(config, sources, rank))
    with load_all(sources, config) as live:
        weights = _weights(live, config, sources, rank)
        found, kept = combined([source.adapter for source in sources], weights, config.merge, rank, config.seed)
        lost = "" if config.merge.method == "cat" else f"; {kept:.1%} of the updates' squared norm fit into that rank"
        console.say("combine", f"{len(sources)} adapters by {config.merge.method} into one of rank {rank}{lost}")
        measured = _compare(live, sources, found, rank)
    first = sources[0]
    made_of = {
        "method": config.merge.method,
        "adapters": [{"run": source.title, "weight": w} for source, w in zip(sources, weights, strict=True)],
    }
    own = measured.get(first.title, {})
    run = derived.make(config, found, first.setup, made_of, own.get("base"), own.get("combined"))
    report = made_of | {"rank": rank, "kept": kept, "held_out": measured}
    storage.write_text(run.path / "combination.json", storage.dump_json(report))
    return run


def combined(
    adapters: Sequence[Deltas], weights: Sequence[float], merge: MergeConfig, rank: int, seed: int = 0
) -> tuple[Deltas, float]:
    """One adapter of several, and the mean share of its layers' squared norms that its rank holds.

    Args:
        adapters: none of them DoRA's.
        rank: of the result.
        seed: of what DARE drops.
    """
    torch.manual_seed(seed)
    layers, kept = {}, []
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.layers):
        pairs = [(w, a.layers[name]) for w, a in zip(weights, adapters, strict=True) if name in a.layers]
        layers[name], share = _combined_layer(pairs, merge, rank)
        kept.append(share)
    return Deltas(layers, {}), sum(kept) / len(kept)


def _combined_layer(pairs: list[tuple[float, Delta]], merge: MergeConfig, rank: int) -> tuple[Delta, float]:
    if merge.method in ("cat", "svd"):
        first, *others = (weight * update for weight, update in pairs)
        whole = sum(others, first)
        return (whole, 1.0) if merge.method == "cat" else whole.truncated(rank)
    dense = [update.up @ update.down for _, update in pairs]
    pruned = getattr(merge_utils, merge.method)(dense, torch.tensor([w for w, _ in pairs]), merge.density)
    return factored(pruned, rank)


def open_source(path: str, place: int) -> Source:
    """A run made ready, but for its model."""
    trained = Trained.open(path, takes.COMBINE)
    adapter = deltas.read(trained.run.adapter, trained.setup.skeleton())
    return Source(trained, adapter, f"source{place}")


def check_together(sources: list[Source]) -> None:
    """Refuse adapters that have no sum."""
    first = sources[0]
    for source in sources:
        try:
            files.check_base(source.run.adapter, first.setup.base)
        except AdapterError as error:
            raise AdapterError(f"merge.adapters: {error}") from error
        if source.setup.kind.auto_class != first.setup.kind.auto_class:
            raise AdapterError(
                f"merge.adapters: {source.title} is {source.setup.kind.auto_class}'s and {first.title} is "
                f"{first.setup.kind.auto_class}'s. Combine adapters of one kind of model."
            )
        if source.adapter.whole:
            raise AdapterError(
                f"merge.adapters: {source.title} has a head of its own ({next(iter(source.adapter.whole))}), and heads of "
                "different tasks have no sum. Combine adapters without one."
            )


def as_lora(source: Source) -> Source:
    """DoRA scales rows of the base, so its update is no product of factors: it is brought to twice its rank."""
    if all(update.magnitude is None for update in source.adapter.layers.values()):
        return source
    weights, layers, shares = Weights(source.setup.base.folder), {}, []
    for name, update in source.adapter.layers.items():
        weight = weights[f"{name}.weight"].float()
        layers[name], share = factored(update.added_to(weight) - weight, 2 * update.rank)
        shares.append(share)
    console.say(
        "convert",
        f"{source.title}: DoRA to LoRA of twice its rank, {sum(shares) / len(shares):.1%} of the updates' squared norm",
    )
    return dataclasses.replace(source, adapter=Deltas(layers, {}))


def rank_of(merge: MergeConfig, sources: list[Source]) -> int:
    if merge.rank is not None:
        return merge.rank
    ranks = [source.adapter.rank for source in sources]
    return max(ranks) if merge.method == "svd" else sum(ranks)


def adapter_config(config: RunConfig, sources: list[Source], rank: int) -> LoraAdapter:
    """The first's targets, if all have the same; else the layers' names."""
    names = list(dict.fromkeys(name for source in sources for name in source.adapter.layers))
    plain = of_scale_one([config.adapter, *(source.setup.config.adapter for source in sources)], rank, names)
    return dataclasses.replace(plain, use_dora=False)


def load_all(sources: list[Source], config: RunConfig) -> Live:
    """The first's base with every adapter on it, for all sources and for a `with` block."""
    first = sources[0].setup
    members = {source.name: _own(source) for source in sources} | {COMBINED: config}
    for source in sources[1:]:
        own = source.setup.config
        if (own.quant, own.model.dtype) != (config.quant, config.model.dtype):
            console.say(
                "base",
                f"{source.title} was trained on quant.method={own.quant.method}, {own.model.dtype}; here it is the first's",
            )
    live = first.loaded(members)
    model = live.model.eval()
    for source in sources:
        if isinstance(members[source.name], RunConfig):
            files.put(model, source.name, source.adapter.tensors(source.adapter.rank))
        source.setup.task.forward.share_model(first.task.forward)
        live.seen_by(source.setup).decide_packing()
    return live


def _own(source: Source) -> Path | RunConfig:
    """A source's adapter as it is, or, of another method than LoRA's, the LoRA that does the same: one model holds one method."""
    own = source.setup.config.adapter
    if isinstance(own, LoraAdapter):
        return source.run.adapter
    plain = of_scale_one([own], source.adapter.rank, list(source.adapter.layers))
    return dataclasses.replace(source.setup.config, adapter=plain)


def put(live: Live, found: Deltas, rank: int) -> None:
    """Give the combined adapter its weights."""
    files.put(live.model, COMBINED, found.tensors(rank))


def measure(live: Live, source: Source, name: str) -> EvalResult:
    """A source's held-out rows by an adapter: its own (`source.name`) or the combined one (`COMBINED`)."""
    live.model.set_adapter(name)
    return live.seen_by(source.setup).measure(f"{source.run.path.name}, {name}")


def _compare(live: Live, sources: list[Source], found: Deltas, rank: int) -> dict[str, Any]:
    """Each source's held-out rows by its own adapter and by the combined one."""
    put(live, found, rank)
    result = {}
    for source in sources:
        if source.setup.held_out is None:
            console.say("held out", f"{source.title} has no held-out rows; its task is not measured")
            continue
        own = {"base": live.seen_by(source.setup).measure_base().metrics}
        own |= {
            name: measure(live, source, key).metrics for name, key in (("alone", source.name), ("combined", COMBINED))
        }
        console.metrics_table(f"{source.title}: {len(source.setup.held_out)} held-out rows", own)
        result[source.title] = own
    return result


def _check_search(merge: MergeConfig, sources: list[Source]) -> None:
    if not merge.search_trials:
        return
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("merge.search_trials: needs Optuna. pip install 'lora-lab[hpo]'")
    blind = [source.title for source in sources if source.setup.held_out is None]
    if blind:
        raise ConfigError(
            f"merge.search_trials: weights are compared on held-out rows (data.eval), and {blind[0]} has none."
        )


def _weights(live: Live, config: RunConfig, sources: list[Source], rank: int) -> list[float]:
    if config.merge.search_trials:
        return _searched(live, config, sources, rank)
    return config.merge.weights or [1 / len(sources)] * len(sources)


def _searched(live: Live, config: RunConfig, sources: list[Source], rank: int) -> list[float]:
    """The weights of the lowest mean held-out loss that so many trials find, equal ones among them."""
    import optuna

    merge = config.merge
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=config.seed))
    names = [source.name for source in sources]
    study.enqueue_trial(dict.fromkeys(names, 1 / len(sources)))

    def loss(trial: optuna.Trial) -> float:
        weights = [trial.suggest_float(name, 0.0, 1.5) for name in names]
        put(live, combined([source.adapter for source in sources], weights, merge, rank, config.seed)[0], rank)
        model = live.model
        model.set_adapter(COMBINED)
        losses = []
        for source in sources:
            with source.setup.accelerator.autocast():
                losses.append(source.setup.task.measure(model.eval(), source.setup.held_out).metrics["loss"])
        return sum(losses) / len(losses)

    with console.steps("weights", merge.search_trials) as progress:
        study.optimize(
            loss, merge.search_trials, callbacks=[lambda study, _: progress.advance(loss=f"{study.best_value:.4f}")]
        )
    return [study.best_params[name] for name in names]
