"""Is a run of several processes the run of one? python -m benchmarks.parallel [--processes 1,2,3] [--shard] [--scaling] [--memory] [--write]

The same few steps are trained by one process and by several, for each kind of task: with dropout, on rows of unlike length, an epoch whose
last step is smaller than the others, and NF4. What is compared is each step's loss and each number of the adapters. Beside it stands the
way that most tools take, where each process divides by its own items and the results are averaged. Base and rows are made here.

`--shard` compares runs whose base is sharded with that of one process. `--memory` measures what a process holds of a base, sharded or not.
`--scaling` measures tokens per second of one and of two processes, each with one thread, and what the exchange costs.
Results are kept in benchmarks/results/parallel.json, and the tables of docs/parallel.md are written from them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from lora_lab.runtime import launch, ranks

ROOT = Path(__file__).parents[1]
_RESULTS = ROOT / "benchmarks" / "results" / "parallel.json"
_DOCUMENT = ROOT / "docs" / "parallel.md"
TIMEOUT = 120.0
_COMMON = [
    "model=hub", "model.dtype=float32", "tracker=none", "hardware=cpu", "optim.lr=2e-4", "adapter.r=4", "adapter.lora_dropout=0.1",
    "train.batch_size=5", "train.micro_batch_size=1", "train.max_steps=5", "train.eval_steps=5", "optim.weight_decay=0.01",
]  # fmt: skip
_COHORT = ["seed=3", "optim.lr=1e-4", "adapter.r=2"]  # what sets the members of a cohort apart from the first

KINDS: dict[str, tuple[str, list[str]]] = {  # file of rows, and settings
    "packed": ("completions", ["quant=none"]),
    "packed, micro-batches of 2": ("completions", ["quant=none", "train.micro_batch_size=2"]),
    "padded": ("classes", ["quant=none", "task=classification"]),
    "preference": ("pairs", ["quant=none", "task=preference"]),
    "preference, KTO": ("pairs", ["quant=none", "task=preference", "task.loss=kto"]),
    "cohort of 3": ("completions", ["quant=none"]),
    "NEFTune": ("completions", ["quant=none", "train.neftune_alpha=5"]),
    "distillation, cohort of 3": (
        "completions",
        ["quant=none", "task=distillation", "task.teacher=base", "task.top_k=8"],
    ),
    "float16": ("completions", ["quant=none", "model.dtype=float16"]),
    # accelerations round otherwise in bfloat16, and a sharded base has not all of them
    "bfloat16": ("completions", ["quant=none", "model.dtype=bfloat16", "speed=plain"]),
    "NF4": ("completions", ["quant=nf4"]),
    "NF4, cohort of 3": ("completions", ["quant=nf4"]),
}


@dataclasses.dataclass(frozen=True)
class Sources:
    """Base and rows that are trained on."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def rows(self, name: str, part: str = "train") -> Path:
        return self.folder / f"{name}-{part}.jsonl"

    @classmethod
    def made(cls, folder: Path, base: Path | None = None) -> Sources:
        """Rows of unlike length, with unlike numbers of items."""
        from tests.conftest import make_base, make_rows, write_jsonl

        found = cls(folder)
        if base is None:
            make_base(found.base)
        else:
            found.base.symlink_to(base)
        for part, count, seed in (("train", 22, 0), ("eval", 7, 1)):
            rows, other = make_rows(count, seed), make_rows(count, seed + 7)
            write_jsonl(found.rows("completions", part), rows)
            write_jsonl(
                found.rows("classes", part),
                [{"text": row["prompt"], "label": "ab"[len(row["completion"]) % 2]} for row in rows],
            )
            pairs = zip(rows, other, strict=True)
            write_jsonl(
                found.rows("pairs", part),
                [
                    {"prompt": a["prompt"], "chosen": a["completion"], "rejected": f"{b['completion']} no"}
                    for a, b in pairs
                ],
            )
        return found


# -- training -----------------------------------------------------------------------------------------------------------


def train_kind(kind: str, sources: Sources, folder: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """Train the members of a kind, with the other processes if there are any: their losses, and their adapters' numbers."""
    from lora_lab.config import compose
    from lora_lab.run import run_dir
    from lora_lab.run.prepared import prepare
    from lora_lab.training.cohort import Member
    from lora_lab.training.loop import fit

    rows, settings = KINDS[kind]
    told = [
        *_COMMON, f"model.path={sources.base}", f"data.train={sources.rows(rows)}", f"data.eval={sources.rows(rows, 'eval')}",
        *settings, *more,
    ]  # fmt: skip
    each = [[], _COHORT, ["seed=5"]] if "cohort" in kind else [[]]
    configs = [compose.compose([*told, *own, f"run_dir={folder}/{place}"]) for place, own in enumerate(each)]
    setup = prepare(configs[0]).taught()
    [base] = setup.bases()
    with setup.on(base, {f"member{place}": config for place, config in enumerate(configs)}) as live:
        members = []
        for place, config in enumerate(configs):
            live.model.set_adapter(f"member{place}")
            members.append(
                Member(
                    f"member{place}",
                    config,
                    run_dir.create(config),
                    setup.base,
                    live.model,
                    setup.training_rows(),
                    setup.task,
                )
            )
        setup.task.forward.members = 1 if setup.sharded else len(members)
        clock = fit(members, setup.training_rows(), setup.held_out, setup.accelerator)
        return {
            "losses": [
                [line[key] for line in member.log.read() for key in ("loss", "eval_loss") if key in line]
                for member in members
            ],
            "adapters": {
                f"{member.name}.{name}": one.detach().flatten().tolist()
                for member in members
                for name, one in member.parameters.items()
            },
            "tokens_per_second": clock.tokens_per_second,
        }


@contextlib.contextmanager
def averaged() -> Iterator[None]:
    """Inside the block each process divides by its own items, and gradients are averaged: the usual way, which is another loss."""
    from lora_lab.training.learned import Learned

    as_it_is = Learned.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Learned], shares: Any, finished: bool) -> Learned:
        for share in shares:
            own = share.weight / max(share.supervised, 1) / ranks.size()
            for parameter in share.member.parameters.values():
                if parameter.grad is not None:
                    parameter.grad *= own
        found: Learned = as_it_is(cls, shares, finished)
        return found

    Learned.of = classmethod(of)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Learned.of = classmethod(as_it_is)  # type: ignore[method-assign]


@contextlib.contextmanager
def grouped(timeout: float = TIMEOUT) -> Iterator[None]:
    """Inside the block the processes that a launcher started train together."""
    from lora_lab.runtime import console

    place = launch.place()
    if place is None:
        yield
        return
    launch.take()
    ranks.start(place, timeout, "gloo")
    console.out.quiet = not ranks.main()
    yield
    ranks.stop()


def work(out: Path, sources: Sources, kinds: Sequence[str], more: Sequence[str] = ()) -> None:
    """What each process does: train these kinds, and 'KIND (averaged)'; process 0 writes what came of it."""
    found = {}
    with grouped(), tempfile.TemporaryDirectory() as folder:
        for place, kind in enumerate(kinds):
            with averaged() if kind.endswith(" (averaged)") else contextlib.nullcontext():
                found[kind] = train_kind(kind.removesuffix(" (averaged)"), sources, Path(folder) / str(place), more)
        if ranks.main():
            out.write_text(json.dumps(found))


def gaps(one: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """The largest difference between two trainings of a kind: of losses, as a share of the loss, and of adapters' numbers."""
    losses = max(
        abs(a - b) / abs(b)
        for mine, theirs in zip(one["losses"], other["losses"], strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
    numbers = max(
        abs(a - b)
        for name in one["adapters"]
        for a, b in zip(one["adapters"][name], other["adapters"][name], strict=True)
    )
    return losses, numbers


def in_processes(
    count: int, out: Path, sources: Sources, kinds: Sequence[str], more: Sequence[str] = ()
) -> dict[str, Any]:
    """`work` in so many processes."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.parallel",
        "--work",
        str(out),
        str(sources.folder),
        json.dumps([list(kinds), list(more)]),
    ]
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    try:
        code = launch.run_here(command, count, TIMEOUT)
    finally:
        os.environ.clear()
        os.environ.update(before)
    if code:
        raise SystemExit(f"{count} processes ended with {code}")
    return json.loads(out.read_text())


# -- figures ------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,3")
    parser.add_argument("--kinds", default=";".join(KINDS), help="separated by ;")
    parser.add_argument("--shard", action="store_true", help="hardware.shard=true in several processes")
    parser.add_argument("--memory", action="store_true", help="what a process holds of a base, instead")
    parser.add_argument("--scaling", action="store_true", help="speed of two processes beside one, instead")
    parser.add_argument("--write", action="store_true", help="into the results and docs/parallel.md")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.work:
        out, folder, what = told.work
        kinds, more = json.loads(what)
        if kinds == ["scaling"]:
            race(Path(out), Path(folder))
        elif kinds == ["memory"]:
            hold(Path(out), Path(folder), more)
        else:
            work(Path(out), Sources(Path(folder)), kinds, more)
        return
    if told.scaling:
        scaling(told)
    elif told.memory:
        memory(told)
    elif told.shard:
        sharded(told)
    else:
        equal(told)


def equal(told: argparse.Namespace) -> None:
    """How far several processes are from one."""
    kinds, counts = told.kinds.split(";"), [int(count) for count in told.processes.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = Sources.made(folder)
        both = [*kinds, *(f"{kind} (averaged)" for kind in kinds)]
        alone = in_processes(1, folder / "1.json", sources, kinds)
        rows = []
        for count in counts:
            if count == 1:
                continue
            found = in_processes(count, folder / f"{count}.json", sources, both)
            for kind in kinds:
                exact, usual = gaps(found[kind], alone[kind]), gaps(found[f"{kind} (averaged)"], alone[kind])
                rows.append(
                    {
                        "kind": kind,
                        "processes": count,
                        "loss": exact[0],
                        "adapter": exact[1],
                        "averaged loss": usual[0],
                        "averaged adapter": usual[1],
                    }
                )
                print(rows[-1], flush=True)
    if told.write:
        _keep("equal", rows)


SHARDED = ("packed", "padded", "preference", "cohort of 3", "bfloat16", "NF4", "NF4, cohort of 3")
_SHARD = "hardware.shard=true"


def sharded(told: argparse.Namespace) -> None:
    """How far several processes with a sharded base are from one process."""
    counts = [int(count) for count in told.processes.split(",") if count != "1"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = Sources.made(folder)
        alone = in_processes(1, folder / "1.json", sources, SHARDED)
        found = {count: in_processes(count, folder / f"{count}.json", sources, SHARDED, [_SHARD]) for count in counts}
    rows = []
    for count in counts:
        for kind in SHARDED:
            loss, adapter = gaps(found[count][kind], alone[kind])
            rows.append({"kind": kind, "processes": count, "loss": loss, "adapter": adapter})
            print(rows[-1], flush=True)
    if told.write:
        _keep("sharded", rows)


_HELD = {  # a base of 8 layers, about 100 million parameters in them, and hardly any outside
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def memory(told: argparse.Namespace) -> None:
    """What each process holds after some steps, of a base that is whole in each, and of one that is sharded."""
    from tests.conftest import make_base

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(folder / "made", initializer_range=0.02, **_HELD)
        sources = Sources.made(folder, folder / "made")
        for quant in ("none", "nf4"):
            for shard in ("false", "true"):
                more = [f"quant={quant}", f"hardware.shard={shard}", "speed.dequantize=always"]
                found = in_processes(2, folder / "memory.json", sources, ["memory"], more)
                rows.append({"quant": quant, "base": "sharded" if shard == "true" else "whole"} | found)
                print(rows[-1], flush=True)
    if told.write:
        _keep("memory", rows)


def hold(out: Path, folder: Path, more: Sequence[str]) -> None:
    """Train two steps; process 0 writes by how much the process grew that grew most."""
    import gc

    import psutil

    from lora_lab.config import compose
    from lora_lab.run import run_dir
    from lora_lab.run.prepared import prepare
    from lora_lab.runtime import pages
    from lora_lab.training import loop
    from lora_lab.training.cohort import Member

    def mib() -> float:
        gc.collect()
        pages.trim()
        return psutil.Process().memory_info().rss / 2**20

    sources = Sources(folder)
    with grouped(), tempfile.TemporaryDirectory() as runs:
        told = [
            *_COMMON,
            f"model.path={sources.base}",
            f"data.train={sources.rows('completions')}",
            "train.max_steps=2",
            "train.eval_steps=null",
        ]
        config = compose.compose([*told, *more, f"run_dir={runs}/run"])
        setup = prepare(config)
        before = mib()
        live = setup.loaded()
        member = Member(
            "default", config, run_dir.create(config), setup.base, live.model, setup.training_rows(), setup.task
        )
        loop.fit([member], setup.training_rows(), None, setup.accelerator)
        grown = max(ranks.gather(mib() - before))
        if ranks.main():
            weights = sum(one.nbytes for one in live.model.parameters()) / 2**20
            out.write_text(json.dumps({"weights, MiB": round(weights), "process grew by, MiB": round(grown)}))


_ROW, _ROWS, _ROUNDS = 512, 8, 4  # tokens of a row, rows of a step, and steps of each way
_SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}


def scaling(told: argparse.Namespace) -> None:
    """Tokens per second of one process and of two, with a thread each, and what a step's exchange takes."""
    from tests.conftest import WORDS, make_base, make_tokenizer, write_jsonl

    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_base(folder / "base", initializer_range=0.02, **_SHAPE)
        tokenizer = make_tokenizer(folder)
        words = [WORDS[place % 8] for place in range(_ROW)]
        lengths = [len(tokenizer(" ".join(words[:count]))["input_ids"]) for count in range(_ROW)]
        words = words[: max(count for count, length in enumerate(lengths) if length <= _ROW - 24)]
        write_jsonl(folder / "rows.jsonl", [{"prompt": " ".join(words), "completion": "one two three"}] * _ROWS)
        found = in_processes(2, folder / "scaling.json", Sources(folder), ["scaling"])
    print(found)
    if told.write:
        _keep("scaling", [found])


def race(out: Path, folder: Path) -> None:
    """Steps that process 0 makes alone, while the other waits, in turn with steps that both share; process 0 writes how long they took."""
    from lora_lab.config import compose
    from lora_lab.run import run_dir
    from lora_lab.run.prepared import prepare
    from lora_lab.training import learned, loop
    from lora_lab.training.cohort import Member

    told = [
        "model=hub", f"model.path={folder}/base", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu", "data.duplicates=keep",
        f"data.train={folder}/rows.jsonl", f"train.batch_size={_ROWS}", "train.micro_batch_size=1", f"train.epochs={2 * _ROUNDS + 2}",
        "train.save_steps=1000", "adapter.r=16", "data.check=off",
    ]  # fmt: skip
    deal, seconds, tokens, buffers, alone_steps = ranks.dealt, [], [], [], set()

    def dealt(sizes: Sequence[float], hands: int) -> list[list[int]]:
        if len(seconds) % 2:
            return deal(sizes, hands)
        alone_steps.add(len(seconds))
        return [list(range(len(sizes))), []]

    def add(clock: Any, took: float, count: int) -> None:
        seconds.append(took)
        tokens.append(count)

    def of(cls: Any, shares: Any, finished: bool) -> Any:
        buffers.append(made(cls, shares, finished))
        return buffers[-1]

    made = learned.Learned.of.__func__  # type: ignore[attr-defined]
    with grouped(), tempfile.TemporaryDirectory() as runs:
        config = compose.compose([*told, f"run_dir={runs}/run"])
        setup = prepare(config)
        live = setup.loaded()
        member = Member(
            "default", config, run_dir.create(config), setup.base, live.model, setup.training_rows(), setup.task
        )
        ranks.dealt, loop.Clock.add, learned.Learned.of = dealt, add, classmethod(of)  # type: ignore[assignment, method-assign]
        loop.fit([member], setup.training_rows(), None, setup.accelerator)
        if len(alone_steps) <= _ROUNDS:
            raise RuntimeError("the loop deals work out by another function: nothing was made alone")
        last, times = buffers[-1], []
        for _ in range(20):
            ranks.gather(None)
            begun = time.perf_counter()
            ranks.gather(last.told)
            ranks.sum_flat(last.buffer)
            ranks.gather(([], False))
            ranks.from_main(None)
            times.append(time.perf_counter() - begun)
        alone, shared = (sorted(seconds[2 + way :: 2])[_ROUNDS // 2] for way in (0, 1))
        if ranks.main():
            exchange = sorted(times)[len(times) // 2]
            out.write_text(
                json.dumps(
                    {
                        "tokens a row": tokens[0] // _ROWS,
                        "tokens/s, one process": round(tokens[0] / alone),
                        "tokens/s, two": round(tokens[0] / shared),
                        "ratio": round(alone / shared, 2),
                        "numbers summed": last.buffer.numel(),
                        "exchange, ms": round(1000 * exchange, 2),
                        "of a shared step, %": round(100 * exchange / shared, 2),
                    }
                )
            )


def _keep(part: str, value: Any) -> None:
    """Put a part of the results into their file, and its table into the document."""
    kept = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    kept[part] = _merged(kept.get(part, []), value) if part in ("equal", "sharded") else value
    _RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    text = _DOCUMENT.read_text(encoding="utf-8")
    for name, rows in kept.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        text = f"{before}{begin}{_table(rows)}\n{end}{after}"
    _DOCUMENT.write_text(text, encoding="utf-8")


def _merged(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that were measured now, and those of before of other kinds, in order."""
    found = {(row["processes"], row["kind"]): row for row in [*before, *rows]}
    order = list(KINDS)
    return [found[place] for place in sorted(found, key=lambda place: (place[0], order.index(place[1])))]


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_shown(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    return (f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3g}") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
