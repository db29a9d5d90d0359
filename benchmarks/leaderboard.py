"""Adapter methods side by side at like sizes: python -m benchmarks.leaderboard [--sets sentiment,instructions] [--only METHOD,...] [--write]

Two sets: sentences of films to two classes (SST-2, MiniLM) and instructions to answers (Alpaca, SmolLM2-135M). Each method is set to about
as many trained parameters as LoRA of rank 4, or to as near as it goes. Its learning rate is the best of three on development rows, with a
seed of its own; then it trains with three other seeds and is measured on test rows. All of it is sweeps over methods: the members train in
turns on one base, so steps are timed side by side. LORA_LAB_DATA names the folder of the data. Results are kept in
benchmarks/results/leaderboard.json as they come, and docs/leaderboard.md is written from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
import random
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from scipy import stats

from benchmarks.sources import ROOT
from lora_lab.config import compose
from lora_lab.runtime import storage
from lora_lab.sweep import cohort, jobs

_RESULTS = ROOT / "benchmarks" / "results" / "leaderboard.json"
_DOCUMENT = ROOT / "docs" / "leaderboard.md"
_RATES = (1e-3, 4e-3, 1.6e-2)
_TUNED_WITH, _SEEDS = 0, (1, 2, 3)
_AT_ONCE = 5  # methods in one process at a time
_COMMON = [
    "quant=none", "model.dtype=float32", "export.targets=[]", "tracker=none", "hardware=cpu", "train.keep_best=false", "data.check=off",
    "train.eval_steps=1000000", "train.save_steps=1000000", "data.eval_ratio=null", "train.max_steps=null", "train.epochs=1",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Set:
    """Rows, and the recipe that they are trained by."""

    recipe: str
    files: tuple[str, str, str]  # below LORA_LAB_DATA: train, development, test
    rows: tuple[int, int, int]
    metric: str  # that is reported; "loss" is always
    more: list[str]
    longest: int | None = None  # characters of a line; longer ones are left out


SETS = {
    "sentiment": Set(
        "sentiment", ("sst2/train.jsonl", "sst2/validation.jsonl", "sst2/test.jsonl"), (1280, 300, 600), "accuracy",
        ["train.batch_size=16", "data.max_train_rows=null"],
    ),
    "instructions": Set(
        "assistant", ("alpaca_en_1k/train.jsonl",) * 3, (96, 32, 60), "loss", ["train.batch_size=4", "data.max_tokens=128"], longest=200,
    ),
}  # fmt: skip
LIKE = {  # settings by which a method has about the parameters of LoRA with rank 4; others have what their defaults give
    "lora": ["adapter.r=4", "adapter.lora_alpha=8"],
    "dora": ["adapter.r=4", "adapter.lora_alpha=8"],
    "rslora": ["adapter.r=4", "adapter.lora_alpha=8"],
    "gralora": ["adapter.r=4", "adapter.alpha=8"],
    "hira": ["adapter.r=4"],
    "miss": ["adapter.r=8"],
    "oft": ["adapter.oft_block_size=16"],
    "boft": ["adapter.boft_block_size=8"],
    "c3a": ["adapter.block_size=64"],
    "vera": ["adapter.r=1024"],
    "loha": ["adapter.r=2", "adapter.alpha=4"],
    "delora": ["adapter.r=4"],
    "hra": ["adapter.r=8"],
    "shira": ["adapter.r=4"],
    "waveft": ["adapter.n_frequency=5800"],
    "fourierft": ["adapter.n_frequency=5800"],
    "road": ["adapter.variant=road_4"],
    "lokr": [],
    "randlora": [],
    "ia3": [],
    "ln_tuning": [],
    "vblora": [],
    "unilora": ["adapter.theta_d_length=20000"],
    "adalora": ["adapter.init_r=6", "adapter.target_r=4"],
    "pissa": ["adapter.r=4", "adapter.lora_alpha=8"],
    "eva": ["adapter.r=4", "adapter.lora_alpha=8"],
    "bottleneck": ["adapter.bottleneck_size=35"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=lambda text: text.split(","), default=list(SETS))
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(LIKE), help="METHOD,...")
    parser.add_argument("--write", action="store_true", help="only write the page from the results that there are")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    known = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {"sets": {}}
    known["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    for name in () if told.write else told.sets:
        found = known["sets"].setdefault(name, {})
        methods = [method for method in told.only if method not in found]
        for start in range(0, len(methods), _AT_ONCE):
            part = methods[start : start + _AT_ONCE]
            part = part if "lora" in part else ["lora", *part]  # for the time of its steps
            with tempfile.TemporaryDirectory() as folder:
                measured = measure(SETS[name], part, Path(folder))
            found |= {method: one for method, one in measured.items() if method not in found}
            storage.write_text(_RESULTS, storage.dump_json(known))
            print(name, json.dumps({method: found[method] for method in part if method in found}), flush=True)
    _DOCUMENT.write_text(page(known), encoding="utf-8")


def measure(data: Set, methods: list[str], folder: Path) -> dict[str, Any]:
    """The best rate of each method, and what it then comes to with other seeds."""
    files = _write_rows(data, folder)
    tuned = _train(
        data,
        files[0],
        files[1],
        [(method, rate, _TUNED_WITH) for method in methods for rate in _RATES],
        folder / "tune",
    )
    best = {}
    for method in methods:
        losses = {rate: one["tuned"]["loss"] for (name, rate, _), one in tuned.items() if name == method}
        if losses:
            best[method] = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
    final = _train(
        data, files[0], files[2], [(method, best[method], seed) for method in best for seed in _SEEDS], folder / "final"
    )
    lora = statistics.fmean(one["train_seconds"] for (name, _, _), one in final.items() if name == "lora")
    found = {}
    for method, rate in best.items():
        runs = [one for (name, _, _), one in final.items() if name == method]
        if not runs:
            continue
        found[method] = {
            "rate": rate,
            "development": {
                str(one_rate): one["tuned"]["loss"] for (name, one_rate, _), one in tuned.items() if name == method
            },
            "parameters": runs[0]["coverage"]["trainable_parameters"],
            "loss": [one["tuned"]["loss"] for one in runs],
            data.metric: [one["tuned"][data.metric] for one in runs],
            "base": {name: value for name, value in runs[0]["base"].items() if name in ("loss", data.metric)},
            "step": statistics.fmean(one["train_seconds"] for one in runs) / lora,
            "own_mib": runs[0]["own_memory_mib"],
        }
    return found


def _write_rows(data: Set, folder: Path) -> list[Path]:
    """Training, development and test rows, of which no two are the same."""
    root, taken, files = Path(os.environ.get("LORA_LAB_DATA", "data")), set[str](), []
    for name, source, count in zip(("train", "development", "test"), data.files, data.rows, strict=True):
        lines = (root / source).read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(lines)
        fitting = [line for line in dict.fromkeys(lines) if data.longest is None or len(line) <= data.longest]
        chosen = [line for line in fitting if line not in taken][:count]
        taken |= {*chosen}
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return files


def _train(
    data: Set, train: Path, held_out: Path, points: list[tuple[str, float, int]], folder: Path
) -> dict[tuple[str, float, int], dict[str, Any]]:
    """One sweep; what `result.json` says of each point that ended well."""
    told = [f"recipe={data.recipe}", *_COMMON, f"data.train={train}", f"data.eval={held_out}", *data.more]
    found = jobs.jobs_of(
        [
            compose.compose(
                [
                    *told,
                    f"adapter={method}",
                    *LIKE[method],
                    f"optim.lr={rate}",
                    f"seed={seed}",
                    f"run_dir={folder}/{number}",
                ]
            )
            for number, (method, rate, seed) in enumerate(points)
        ]
    )
    cohort.train(found)
    for point, job in zip(points, found, strict=True):
        if job.result is None:
            print(f"{point}: {job.error}", flush=True)
    return {point: job.result for point, job in zip(points, found, strict=True) if job.result is not None}


# -- the page ---------------------------------------------------------------------------------------------------------------

_HEAD = """# Adapter methods side by side

Two sets, each method at about the size of LoRA with rank 4 where its settings allow it, with the best of the learning rates {rates} on
development rows (one seed), then with three other seeds on test rows. Made with {versions} by
`python -m benchmarks.leaderboard`, on a CPU in float32; nothing else was tuned, and runs are short, so this says how far a method comes
with little, not how far it can come.

- **difference**: of the test loss to LoRA's, seed by seed, with a 95 % interval (t, three seeds); below zero is better than LoRA.
- **told apart**: whether that interval leaves out zero. With {count} comparisons a few would by chance alone.
- **step**, **memory**: time of a step as a multiple of LoRA's in the same process; MiB for adapter, gradients and optimizer.
- A rate in *italics* is the lowest or highest that was tried, so a better one may lie beyond.

**What it says**: of the methods that are as large as LoRA, none is better on both sets beyond chance, and several are worse at these rates
on one. DoRA cannot be told from LoRA and takes 1.3 times as long. LoKr and IA3 come as far with a sixth to an eighth of the parameters. The
order within a set is not the order of the other: three seeds and some hundred rows decide little.
"""


def page(known: dict[str, Any]) -> str:
    count = sum(len(found) - 1 for found in known["sets"].values())
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    lines = [_HEAD.format(rates=", ".join(f"{rate:g}" for rate in _RATES), versions=versions, count=count)]
    for name, found in known["sets"].items():
        metric = SETS[name].metric
        rows, base = SETS[name].rows, found["lora"]["base"]
        lines += [
            f"## {name}",
            "",
            f"{rows[0]} training, {rows[1]} development, {rows[2]} test rows. The base: loss {base['loss']:.4f}.",
            "",
        ]
        columns = [
            "method",
            "parameters",
            "rate",
            "loss",
            *([metric] if metric != "loss" else []),
            "difference",
            "told apart",
            "step",
            "memory",
        ]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        ranked = sorted(found, key=lambda method: statistics.fmean(found[method]["loss"]))
        lines += ["| " + " | ".join(_cells(method, found, metric)) + " |" for method in ranked]
        apart = [
            method
            for method in ranked
            if method != "lora" and not _told_apart(*_difference(found[method], found["lora"]))
        ]
        lines += ["", f"Not told apart from LoRA: {', '.join(apart) or 'none'}.", ""]
    return "\n".join(lines)


def _cells(method: str, found: dict[str, Any], metric: str) -> list[str]:
    one = found[method]
    rate = f"{one['rate']:g}"
    mean, margin = _difference(one, found["lora"])
    return [
        f"`{method}`",
        f"{one['parameters']:,}",
        f"*{rate}*" if one["rate"] in (_RATES[0], _RATES[-1]) else rate,
        _mean(one["loss"]),
        *([_mean(one[metric])] if metric != "loss" else []),
        "" if method == "lora" else f"{mean:+.4f} ± {margin:.4f}",
        "" if method == "lora" else "yes" if _told_apart(mean, margin) else "no",
        f"{one['step']:.2f}",
        f"{one['own_mib']:.1f}",
    ]


def _mean(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def _difference(one: dict[str, Any], lora: dict[str, Any]) -> tuple[float, float]:
    """Mean and half interval of the difference of the losses, seed by seed."""
    gaps = [own - other for own, other in zip(one["loss"], lora["loss"], strict=True)]
    spread = statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.fmean(gaps), float(stats.t.ppf(0.975, len(gaps) - 1)) * spread


def _told_apart(mean: float, margin: float) -> bool:
    return abs(mean) > margin


if __name__ == "__main__":
    main()
