"""What "LoRA Without Regret" says, tried on the default base: python -m benchmarks.regret [--part rates,targets,batches,default] [--write]

The claims (Schulman and Thinking Machines Lab, 2025): LoRA's best learning rate is about ten times that of full fine-tuning and does not
depend on the rank; LoRA on all linear layers is better than on attention alone; LoRA loses more than full fine-tuning when batches are large.
All LoRA runs of a part are members of one cohort. Full fine-tuning is a loop of its own, over the same rows, batches, loss and schedule.
Results are kept in benchmarks/results/regret.json as they come, and docs/regret.md is written from them. Needs alpaca_en_1k in LORA_LAB_DATA.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
from accelerate import Accelerator
from scipy import stats

from benchmarks.sources import ROOT
from benchmarks.tasks import _machine, _versions
from lora_lab.adapters.attach import without_adapter
from lora_lab.config import compose
from lora_lab.config.run import RunConfig
from lora_lab.data import build
from lora_lab.data.dataset import Dataset
from lora_lab.data.encode import Example
from lora_lab.run import prepared, run_dir
from lora_lab.run.setup import Live
from lora_lab.runtime import storage
from lora_lab.sweep.cohort import _width
from lora_lab.tasks.base import AnyTask
from lora_lab.training.batches import plan_of
from lora_lab.training.cohort import Member
from lora_lab.training.loop import fit
from lora_lab.training.optim import build_optimizer, build_schedule

_RESULTS = ROOT / "benchmarks" / "results" / "regret.json"
_DOCUMENT = ROOT / "docs" / "regret.md"
_RECIPE = [
    "recipe=assistant", "quant=none", "data.max_tokens=96", "export.targets=[]", "tracker=none", "hardware=cpu",
]  # fmt: skip
_DEV, _TEST, _SEEN = 32, 40, 96  # rows: to choose rates by, to report, and to train on in each run
_FACTOR = 10 ** (1 / 3)  # between neighbouring learning rates
_HIGHEST = 0.1  # that optim.lr takes
_DEFAULT = -11  # the place of 2.15e-4, beside which the default of optim.lr, 2e-4, lies
_TARGETS = {
    "all": "all-linear",
    "attention": "[q_proj,k_proj,v_proj,o_proj]",
    "mlp": "[gate_proj,up_proj,down_proj]",
}
PARTS = ("rates", "targets", "batches", "default")
RANKS = (1, 8, 64)
BATCHES = (2, 8, 32)


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared, each at its own best learning rate."""

    kind: str = "lora"  # or full
    targets: str = "all"
    rank: int = 8  # full fine-tuning has none: 0
    batch: int = 8

    @property
    def title(self) -> str:
        what = "full fine-tuning" if self.kind == "full" else f"LoRA, {self.targets}, rank {self.rank}"
        return f"{what}, batch {self.batch}"


FULL = Arm("full", "all", 0)
# as many parameters as rank 8 on all layers has: 10,176 a rank and layer, of which 3,840 lie in attention and 6,336 in the MLP
PLACES = (Arm(), Arm(targets="attention", rank=21), Arm(targets="mlp", rank=13))


@dataclasses.dataclass(frozen=True)
class Run:
    """One training."""

    arm: Arm
    place: int  # of its learning rate on the grid: 10 ** (place / 3)
    seed: int

    @property
    def lr(self) -> float:
        return float(f"{_FACTOR**self.place:.3g}")


Losses = dict[Run, dict[str, float]]  # dev, test, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help="PART,... of rates, targets, batches, default")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--write", action="store_true", help="only write the page from the results that there are")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    known = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {"runs": []}
    if not told.write:
        known |= {"versions": _versions(), "machine": _machine()}
        with tempfile.TemporaryDirectory(prefix="lora_lab_regret_") as folder:
            bench = Bench(known, Path(folder))
            for part in told.part.split(","):
                bench.measure(part, told.seeds)
    _DOCUMENT.write_text(page(known), encoding="utf-8")


# -- which runs ---------------------------------------------------------------------------------------------------------------


def arms(part: str) -> list[Arm]:
    """What a part compares."""
    if part == "rates":
        return [*(Arm(rank=rank) for rank in RANKS), FULL]
    if part == "targets":
        return list(PLACES)
    if part == "default":
        return [Arm()]
    return [dataclasses.replace(arm, batch=batch) for arm in (Arm(), FULL) for batch in BATCHES]


def wanted(arm: Arm, seed: int, losses: Losses) -> list[Run]:
    """The next runs of an arm: three learning rates, and then further ones until the best of them has neighbours on both sides."""
    places = {run.place: losses[run]["dev"] for run in losses if (run.arm, run.seed) == (arm, seed)}
    if not places:
        middle = _guess(arm, losses)
        return [Run(arm, place, seed) for place in range(middle - 1, middle + 2)]
    best = min(places, key=places.__getitem__)
    missing = [Run(arm, place, seed) for place in (best - 1, best + 1) if place not in places]
    return [run for run in missing if run.lr <= _HIGHEST]


def _guess(arm: Arm, losses: Losses) -> int:
    """Where to look first: where the arm's other seeds, else the arms most like it, were best."""
    for like in (arm, dataclasses.replace(arm, batch=8), FULL if arm.kind == "full" else Arm()):
        known = {run: losses[run]["dev"] for run in losses if run.arm == like}
        if known:
            best = min({run.seed for run in known})
            return min((run for run in known if run.seed == best), key=known.__getitem__).place
    return -12 if arm.kind == "full" else -8


class Bench:
    """The rows, the base, and what has been measured."""

    def __init__(self, known: dict[str, Any], folder: Path):
        self.known, self.folder = known, folder
        self.losses, self.number = losses_of(known), itertools.count()
        with _silent():
            known["rows"] = _write_rows(folder)
            self.setup = prepared.prepare(self.config(Run(Arm(), -8, 0)))
            data = dataclasses.replace(self.setup.config.data, eval=str(folder / "test.jsonl"))
            test = build.build(data, self.setup.encoder, need_train=False).held_out
        assert test is not None
        self.held_out = {"dev": self.setup.held_out_rows(), "test": test}

    def config(self, run: Run) -> RunConfig:
        """A run's configuration; full fine-tuning makes no use of its adapter."""
        adapter = [
            f"adapter.r={run.arm.rank or 8}",
            "adapter.lora_alpha=32",
            f"adapter.target_modules={_TARGETS[run.arm.targets]}",
        ]
        told = [
            f"data.train={self.folder}/train.jsonl", f"data.eval={self.folder}/dev.jsonl", "data.eval_ratio=null", "data.check=warn",
            f"optim.lr={run.lr}", f"train.batch_size={run.arm.batch}", f"train.micro_batch_size={min(run.arm.batch, 8)}",
            f"train.max_steps={_SEEN // run.arm.batch}", f"seed={run.seed}", f"run_dir={self.folder}/runs/{next(self.number)}",
        ]  # fmt: skip
        return compose.compose([*_RECIPE, *adapter, *told])

    def measure(self, part: str, seeds: list[int]) -> None:
        """Make the runs of a part with these seeds that are not known yet."""
        if part == "default":
            runs = [Run(Arm(), _DEFAULT, seed) for seed in seeds]
            if missing := [run for run in runs if "test" not in self.losses.get(run, {})]:
                self.cohort(missing)
            return
        while runs := [run for arm in arms(part) for seed in seeds for run in wanted(arm, seed, self.losses)]:
            lora = [run for run in runs if run.arm.kind == "lora"]
            full = [run for run in runs if run.arm.kind == "full"]
            if lora:
                self.cohort(lora)
            if full:
                self.full(full)

    def keep(self, run: Run, found: dict[str, float]) -> None:
        self.losses[run] = found
        self.known["runs"] = [
            {**dataclasses.asdict(run.arm), "place": run.place, "seed": run.seed, "lr": run.lr, **found}
            for run, found in self.losses.items()
        ]
        storage.write_text(_RESULTS, storage.dump_json(self.known))
        shown = {name: round(value, 4) for name, value in found.items()}
        print(f"{run.arm.title}, lr {run.lr:g}, seed {run.seed}: {shown}", flush=True)

    def cohort(self, runs: list[Run]) -> None:
        """LoRA runs, in shared passes."""
        names = {f"member{place}": run for place, run in enumerate(runs)}
        configs = {name: self.config(run) for name, run in names.items()}
        with _silent(), self.setup.loaded(configs) as live:
            members = [self._member(name, config, live) for name, config in configs.items()]
            live.setup.task.forward.members = _width(members, live.setup, members[0].config.sweep)
            fit(members, self.setup.training_rows(), None, self.setup.accelerator)
            found = self._measured({names[one.name]: one for one in members}, live)
            if "base" not in self.known:
                with without_adapter(live.model):
                    self.known["base"] = {name: self._loss(live.model, live.setup.task, name) for name in self.held_out}
        for run, one in found.items():
            self.keep(run, one)

    def _member(self, name: str, config: RunConfig, live: Live) -> Member:
        live.model.set_adapter(name)
        setup = live.setup
        return Member(name, config, run_dir.create(config), setup.base, live.model, setup.training_rows(), setup.task)

    def _measured(self, members: dict[Run, Member], live: Live) -> Losses:
        """The loss of every member on the rows of dev, and on those of test of each arm's best."""
        found, task = Losses(), live.setup.task
        for run, member in members.items():
            with member.active():
                count = sum(one.numel() for one in member.parameters.values())
                dev = self._loss(live.model, task, "dev")
                found[run] = {"dev": dev, "parameters": count, "seconds": round(member.seconds, 1)}
        for run, member in members.items():
            if run.place == _DEFAULT or self._is_best(run, found):
                with member.active():
                    found[run]["test"] = self._loss(live.model, task, "test")
        return found

    def _is_best(self, run: Run, found: Losses) -> bool:
        """Whether no other learning rate was better so far."""
        every = {**self.losses, **found}
        same = [one for one in every if (one.arm, one.seed) == (run.arm, run.seed)]
        return min(same, key=lambda one: every[one]["dev"]) == run

    def _loss(self, model: Any, task: AnyTask, rows: str) -> float:
        with self.setup.accelerator.autocast():
            return float(task.measure(model.eval(), self.held_out[rows]).metrics["loss"])

    def full(self, runs: list[Run]) -> None:
        """Full fine-tuning, one run after the other from the same base."""
        [base] = self.setup.bases()
        model = Whole(base.float())  # float32 weights are trained on both sides, and computed with in `model.dtype`
        before = [one.detach().clone() for one in model.parameters()]
        for run in runs:
            with torch.no_grad():
                for parameter, was in zip(model.parameters(), before, strict=True):
                    parameter.copy_(was)
            started, config = time.perf_counter(), self.config(run)
            task = self.setup.for_other(config).task
            fine_tune(model, task, config, self.setup.training_rows(), self.setup.accelerator)
            seconds, count = time.perf_counter() - started, sum(one.numel() for one in before)
            found = {"dev": self._loss(model, task, "dev"), "parameters": count, "seconds": round(seconds, 1)}
            if self._is_best(run, {run: found}):
                found["test"] = self._loss(model, task, "test")
            self.keep(run, found)


def _write_rows(folder: Path) -> dict[str, int]:
    """Write train.jsonl, dev.jsonl and test.jsonl: the rows that are short enough, in an order of their own."""
    config = compose.compose([*_RECIPE, "data.eval_ratio=null", f"run_dir={folder}/unused"])
    data = build.build(config.data, prepared.find_base(config).encoder).train
    assert isinstance(data, Dataset)
    lines = Path(str(config.data.train)).read_text(encoding="utf-8").splitlines(keepends=True)
    fitting = [lines[int(data[place][0].origin.rpartition(" ")[2]) - 1] for place in range(len(data))]
    order = [fitting[place] for place in np.random.default_rng(0).permutation(len(fitting))]
    parts = {"dev": order[:_DEV], "test": order[_DEV : _DEV + _TEST], "train": order[_DEV + _TEST :]}
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    return {name: len(rows) for name, rows in parts.items()}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# -- full fine-tuning -----------------------------------------------------------------------------------------------------------


class Whole(torch.nn.Module):
    """A base all of whose weights train, which tasks can call as they call one with an adapter."""

    def __init__(self, base: torch.nn.Module):
        super().__init__()
        self.base = base.requires_grad_()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def get_base_model(self) -> torch.nn.Module:
        return self.base

    def forward(self, **inputs: Any) -> Any:
        return self.base(**inputs)


def fine_tune(model: Whole, task: AnyTask, config: RunConfig, train: Dataset, accelerator: Accelerator) -> None:
    """Train every weight of the model, on the batches and with the optimizer and schedule that a run of this configuration has."""
    plan, parameters = plan_of(config, train), dict(model.named_parameters())
    total = plan.total_steps(config.train.epochs, config.train.max_steps)
    optimizer = build_optimizer(config.optim, parameters)
    schedule = build_schedule(config.optim, optimizer, total)
    for step in range(total):
        parts = [[example for place in part for example in train[int(place)]] for part in plan.step(step)]
        backward(model, task, parts, plan.dropout_seed(step), accelerator)
        if config.optim.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters.values(), config.optim.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def backward(model: Whole, task: AnyTask, parts: Iterable[list[Example]], seed: int, accelerator: Accelerator) -> float:
    """The loss of a step, whose gradients are then at the weights."""
    torch.manual_seed(seed)
    step, loss = task.step(model.train(), parts, np.random.default_rng(seed)), 0.0
    for batch in step.batches:
        with accelerator.autocast():
            part = task.loss(model, batch).loss / step.weight
        part.backward()
        loss += part.item()
    return loss


# -- figures --------------------------------------------------------------------------------------------------------------------


def losses_of(known: dict[str, Any]) -> Losses:
    """What the file holds, by run."""
    fields = [field.name for field in dataclasses.fields(Arm)]
    return {
        Run(Arm(**{name: one[name] for name in fields}), one["place"], one["seed"]): {
            name: one[name] for name in ("dev", "test", "parameters", "seconds") if name in one
        }
        for one in known["runs"]
    }


def best(arm: Arm, seed: int, losses: Losses) -> Run | None:
    """The run with the learning rate that the rows of dev prefer; None: there is none yet."""
    same = [run for run in losses if (run.arm, run.seed) == (arm, seed)]
    return min(same, key=lambda run: losses[run]["dev"], default=None)


def optimum(arm: Arm, seed: int, losses: Losses) -> float | None:
    """log10 of the best learning rate: the vertex of the parabola through the best loss of dev and its neighbours.

    None: the best has no neighbours on both sides.
    """
    middle = best(arm, seed, losses)
    if middle is None:
        return None
    around = [dataclasses.replace(middle, place=middle.place + step) for step in (-1, 0, 1)]
    if not all(run in losses for run in around):
        return None
    low, mid, high = (losses[run]["dev"] for run in around)
    return (middle.place + (low - high) / (2 * (low - 2 * mid + high))) / 3


def on_test(arm: Arm, seed: int, losses: Losses) -> float | None:
    """The loss on the rows of test at the arm's own best learning rate; None: that was not found, because the best has no neighbours."""
    run = best(arm, seed, losses)
    return None if run is None or optimum(arm, seed, losses) is None else losses[run].get("test")


def by_default(arm: Arm, losses: Losses) -> Estimate | None:
    """How much more an arm loses at the default learning rate than at its best; None: nobody has looked."""
    seeds = sorted({run.seed for run in losses if (run.arm, run.place) == (arm, _DEFAULT)})
    pairs = [(losses[Run(arm, _DEFAULT, seed)].get("test"), on_test(arm, seed, losses)) for seed in seeds]
    found = [one - other for one, other in pairs if one is not None and other is not None]
    return Estimate(found) if found else None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval (t); without one if there are fewer than two."""

    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def ends(self) -> tuple[float, float] | None:
        count = len(self.values)
        if count < 2:
            return None
        half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(self.values) / math.sqrt(count)
        return self.mean - half, self.mean + half

    def verdict(self, low: float, high: float) -> str:
        """What it says of the claim that the true value lies between `low` and `high`."""
        if self.ends is None:
            return "not told apart"
        if low <= self.ends[0] and self.ends[1] <= high:
            return "confirmed"
        return "refuted" if self.ends[1] < low or high < self.ends[0] else "not told apart"

    def ratio(self) -> str:
        """The figure of log10 values, as a ratio."""
        ends = "" if self.ends is None else f" ({10 ** self.ends[0]:.3g} to {10 ** self.ends[1]:.3g})"
        return f"{10**self.mean:.3g}{ends}"

    def __str__(self) -> str:
        ends = "" if self.ends is None else f" ({self.ends[0]:+.4f} to {self.ends[1]:+.4f})"
        return f"{self.mean:+.4f}{ends}"


Seen = Callable[[Arm, int, Losses], float | None]


def between(seen: Seen, one: Arm, other: Arm, losses: Losses) -> Estimate | None:
    """`one` minus `other`, paired over the seeds that both have; None: there are none."""
    pairs = [(seen(one, seed, losses), seen(other, seed, losses)) for seed in sorted({run.seed for run in losses})]
    found = [first - second for first, second in pairs if first is not None and second is not None]
    return Estimate(found) if found else None


# -- the page -------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the post says, and what was measured."""

    says: str
    measured: str
    verdict: str
    seeds: int


_INFINITE = math.inf


def claims(losses: Losses) -> list[Claim]:
    """Each claim with its figures."""
    found = []

    def rate(says: str, one: Arm, other: Arm, low: float, high: float) -> None:
        if got := between(optimum, one, other, losses):
            verdict = got.verdict(math.log10(low), math.log10(high))
            found.append(Claim(says, f"{got.ratio()} times", verdict, len(got.values)))

    def loss(says: str, one: Arm, other: Arm) -> None:
        if got := between(on_test, one, other, losses):
            found.append(Claim(says, str(got), got.verdict(0.0, _INFINITE), len(got.values)))

    for rank in RANKS:
        rate(
            f"LoRA's best rate is about 10 times (5 to 20) full fine-tuning's: rank {rank}", Arm(rank=rank), FULL, 5, 20
        )
    if got := _together(losses):
        verdict = got.verdict(math.log10(5), math.log10(20))
        says = "the same, geometric mean of these ranks"
        found.append(Claim(says, f"{got.ratio()} times", verdict, len(got.values)))
    for rank in RANKS[1:]:
        rate(
            f"the best rate does not depend on the rank (0.5 to 2 times): rank {rank} beside rank 1",
            Arm(rank=rank),
            Arm(rank=1),
            0.5,
            2,
        )
    for rank in RANKS:
        if got := between(on_test, Arm(rank=rank), FULL, losses):
            says = f"LoRA is as good as full fine-tuning (at most 0.01 worse), rank {rank}: its loss more"
            found.append(Claim(says, str(got), got.verdict(-_INFINITE, 0.01), len(got.values)))
    for arm in PLACES[1:]:
        loss(f"all linear layers are better than {_PLACE[arm.targets]} alone: loss of the latter more", arm, Arm())
    loss("MLP alone is better than attention alone: loss of the latter more", PLACES[1], PLACES[2])
    for arm in (Arm(), FULL):
        small, large = (dataclasses.replace(arm, batch=batch) for batch in (BATCHES[0], BATCHES[-1]))
        what = "full fine-tuning" if arm == FULL else "LoRA"
        loss(
            f"{what}: batches of {small.batch} are better than of {large.batch}: loss of the latter more", large, small
        )
        rate(
            f"{what}: the best rate with batches of {large.batch} is higher than of {small.batch}",
            large,
            small,
            1,
            _INFINITE,
        )
    if got := by_default(Arm(), losses):
        says = "the default of optim.lr, 2e-4, is too low for runs as short as these (rank 8): loss at 2.15e-4 more than at the best rate"
        found.append(Claim(says, str(got), got.verdict(0.0, _INFINITE), len(got.values)))
    if got := _penalty(losses):
        says = f"LoRA loses more than full fine-tuning from batches of {BATCHES[0]} to {BATCHES[-1]}: how much more"
        found.append(Claim(says, str(got), got.verdict(0.0, _INFINITE), len(got.values)))
    return found


def _together(losses: Losses) -> Estimate | None:
    """How far the mean over ranks of log10 of LoRA's best rate lies above that of full fine-tuning."""
    every = [between(optimum, Arm(rank=rank), FULL, losses) for rank in RANKS]
    values = [one.values for one in every if one is not None]
    if len(values) < len(RANKS) or len(set(map(len, values))) > 1:
        return None
    return Estimate([statistics.fmean(of_seed) for of_seed in zip(*values, strict=True)])


def _penalty(losses: Losses) -> Estimate | None:
    """How much more LoRA loses than full fine-tuning where batches grow from the smallest to the largest."""
    found = []
    for seed in sorted({run.seed for run in losses}):
        ends = [
            on_test(dataclasses.replace(arm, batch=batch), seed, losses)
            for arm in (Arm(), FULL)
            for batch in (BATCHES[-1], BATCHES[0])
        ]
        if None not in ends:
            large, small, full_large, full_small = ends
            found.append((large - small) - (full_large - full_small))  # type: ignore[operator]
    return Estimate(found) if found else None


_PLACE = {"all": "all linear layers", "attention": "attention", "mlp": "the MLP"}
_HEAD = """# LoRA without regret, at 135M

The post "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025) makes claims about learning rates, places and batches, from larger
models and longer runs. They are tried here on the default base with short runs. Made by `python -m benchmarks.regret`
([figures](../benchmarks/results/regret.json)). Full fine-tuning is a reference in this benchmark alone: lora_lab does not offer it.

- Base: SmolLM2-135M-Instruct, not quantized, computed in bfloat16. {base}.
- What trains is kept in float32 on both sides. AdamW, linear schedule without warm-up, no weight decay, gradients clipped to 1.
- Rows: alpaca_en_1k up to 96 tokens, {train} to train on, {dev} to choose learning rates by (dev), {test} to report (test). Each run sees
  {seen} rows once, chosen and ordered by its seed: {steps} steps of 8 rows.
- LoRA has `lora_alpha=32` and the scale `lora_alpha / r`, as in the post. LoRA runs share passes over one base.
- Learning rates lie on a grid with a factor of 2.15, widened until the best has neighbours on both sides. The best rate is the vertex of
  the parabola through these three losses on dev. Losses are compared on test, each arm at its own best rate of the grid.
- Intervals are 95 % (t) over seeds, differences paired by seed. *confirmed*: the interval lies within what the claim says (the range in
  brackets); *refuted*: it lies outside; *not told apart*: neither, or one seed only.
- {versions}
"""
_LIMITS = """
## What such short runs can show, and what not
- They show the first steps of a run, as in our recipes (25 to 100 steps). A fresh adapter's B is zero, so that it must first grow before
  A learns: short runs want higher rates of LoRA than long ones. The post itself names a ratio of about 15 for short runs, 10 for long ones.
- They cannot show where a low rank runs out of capacity: {seen} rows do not fill rank 1.
- The schedule falls to zero over the run. With a constant rate, or a warm-up, other rates are best.
- One base, one data set, answers of about 24 tokens. Larger models and long answers may differ.
- The intervals hold for seeds (row choice, row order, fresh adapter), not for other rows of test.

## What our defaults take from it
- `adapter.target_modules=all-linear`, one rate for every rank, and small batches (8 rows) in the recipes.
- `optim.lr=2e-4` stays the default: it is made for large bases and long runs. A run of less than 100 steps on a small
  base learns more at 1e-3 to 2e-3 (above: 0.08 nats). `recipe=assistant`, 25 steps: loss 1.995 -> 1.857 at 3e-4, 1.795 at 1e-3, 1.778 at
  2e-3, which it has now. `recipe=shakespeare`, 20 steps: perplexity 61.2 at 5e-4, 52.9 at 1e-3, 46.6 at 2e-3.
- When in doubt, sweep it: `lora-lab train -m recipe=NAME optim.lr=3e-4,1e-3,2e-3` shares passes.
"""


def page(known: dict[str, Any]) -> str:
    """docs/regret.md."""
    losses = losses_of(known)
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items() if name in _NAMED)
    base = f"The base's loss is {known['base']['dev']:.4f} on dev and {known['base']['test']:.4f} on test"
    head = _HEAD.format(base=base, versions=versions, seen=_SEEN, steps=_SEEN // 8, **known["rows"])
    lines = [head, "## Claims", "", "| claim | measured | seeds | verdict |", "|---|---|---|---|"]
    lines += [f"| {one.says} | {one.measured} | {one.seeds} | {one.verdict} |" for one in claims(losses)]
    for part, title in _TITLES.items():
        lines += ["", f"## {title}", ""]
        lines += [
            "| | parameters | best rate (interval) | by seed | test loss ± sd | seeds |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_line(arm, losses) for arm in arms(part)]
    lines += [
        "",
        "## Losses on dev by learning rate",
        "",
        "Means over the seeds that were tried there.",
        "",
        *_grid(losses),
    ]
    return "\n".join(lines) + "\n" + _LIMITS.format(seen=_SEEN)


_NAMED = ("torch", "transformers", "peft")
_TITLES = {
    "rates": "Learning rates and ranks",
    "targets": "Places, at like parameter counts",
    "batches": "Batches, over the same rows",
}


def _line(arm: Arm, losses: Losses) -> str:
    seeds = sorted({run.seed for run in losses if run.arm == arm})
    if not seeds:
        return f"| {arm.title} | not measured | | | | 0 |"
    rates = [rate for seed in seeds if (rate := optimum(arm, seed, losses)) is not None]
    tests = [loss for seed in seeds if (loss := on_test(arm, seed, losses)) is not None]
    count = next(losses[run]["parameters"] for run in losses if run.arm == arm)
    spread = f" ± {statistics.stdev(tests):.4f}" if len(tests) > 1 else ""
    cells = [
        arm.title, f"{count:,.0f}", Estimate(rates).ratio() if rates else "", ", ".join(f"{10**rate:.2g}" for rate in rates),
        f"{statistics.fmean(tests):.4f}{spread}" if tests else "best rate not reached", str(len(seeds)),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _grid(losses: Losses) -> list[str]:
    """A table of the mean dev loss over seeds at each learning rate."""
    every = list(dict.fromkeys(arm for part in _TITLES for arm in arms(part)))
    places = sorted({run.place for run in losses})
    lines = [
        "| | " + " | ".join(f"{Run(FULL, place, 0).lr:.1e}" for place in places) + " |",
        "|" + "---|" * (len(places) + 1),
    ]
    for arm in every:
        cells = []
        for place in places:
            found = [losses[run]["dev"] for run in losses if (run.arm, run.place) == (arm, place)]
            cells.append(f"{statistics.fmean(found):.4f}" if found else "")
        if any(cells):
            lines.append(f"| {arm.title} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
