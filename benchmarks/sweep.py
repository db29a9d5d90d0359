"""A sweep of eight adapters in every way there is: python -m benchmarks.sweep [--jobs bfloat16,nf4,...] [--steps 24] [--out RESULT.json]

Ranks 4, 8, 16, 32 times learning rates 1e-4, 1e-3: as one cohort with shared passes, as one cohort in turns, with successive halving, as
eight `lora-lab train` one after another, and, of chats, as eight runs of TRL's SFTTrainer (bfloat16 weights, no checkpointing; without the
evaluations that the others make). Measured: the time until everything is trained and ranked (makespan), the processor's seconds of that,
the time until every run has a held-out loss (first ranking), training tokens a second, peak memory, and regret: the held-out loss of
the chosen run minus the grid's lowest.

Jobs are chats of SmolLM2 in three precisions (short rows, 8 in a step), and three recipes: short texts of one class each (MiniLM in bfloat16, 16
rows), Chinese entities (a small BERT) and translation (FLAN-T5).

Needs the same data and model folders as benchmarks/speed.py. Runs that the result file holds are not repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import speed
from benchmarks.sources import commit, now
from benchmarks.tasks import _machine, _versions

_OUT = Path(__file__).parent / "results" / "sweep.json"
RANKS, RATES = (4, 8, 16, 32), (1e-4, 1e-3)
_CHATS = {"bfloat16": ["quant=none"], "nf4": ["quant=nf4"], "float32": ["quant=none", "model.dtype=float32"]}
_RECIPES = {
    "short texts": ["recipe=sentiment", "model.dtype=bfloat16", "data.columns=null", "train.batch_size=16", "train.max_steps=100"],
    "Chinese entities": ["recipe=resume_zh", "data.max_eval_rows=100", "train.max_steps=25"],
    "translation": ["recipe=translation", "data.max_eval_rows=40", "task.generate_rows=0", "train.max_steps=8"],
}  # fmt: skip
SYSTEMS = ("joint", "turns", "halving", "halving_3_rungs", "halving_eta_4", "processes", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=lambda text: text.split(","), default=["bfloat16", "nf4", *_RECIPES])
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--busy", action="store_true", help="the machine does other work: seconds on the clock are no result"
    )
    parser.add_argument("--out", type=Path, default=_OUT)
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    result |= {"machine": _machine(), "versions": _versions(), "steps": args.steps}
    done = {(run["job"], run["system"], run["repeat"]) for run in result["runs"]}
    with tempfile.TemporaryDirectory(prefix="lora_lab_sweep_") as temporary:
        rows = _write_rows(Path(temporary), args.steps)
        for repeat, job, system in itertools.product(range(args.repeats), args.jobs, args.systems):
            lacking = system == "trl" and (job not in _CHATS or importlib.util.find_spec("trl") is None)
            if (job, system, repeat) in done or lacking:
                continue
            folder = Path(temporary) / f"{job}_{system}_{repeat}".replace(" ", "_")
            folder.mkdir()
            started = time.perf_counter()
            system_runs = {"processes": _processes, "trl": _trl}.get(system, _cohort)
            with _first_ranking(folder) as first:
                found = system_runs(system, _overrides(rows, job, args.steps), folder)
            run = {
                "job": job,
                "system": system,
                "repeat": repeat,
                "busy": args.busy,
                "seconds": time.perf_counter() - started,
                "first_ranking": min(first, default=None),
                **found,
            }
            result["runs"].append({**run, "commit": commit(), "when": now()})
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print(json.dumps(run), flush=True)
    args.out.with_suffix(".md").write_text(table(result))
    print(table(result))


@contextlib.contextmanager
def _first_ranking(folder: Path) -> Iterator[list[float]]:
    """A list that gets the seconds after which every run in the folder has a held-out loss, looked at four times a second."""
    found, started, end = [], time.perf_counter(), threading.Event()

    def watch() -> None:
        while not found and not end.wait(0.25):
            if sum("eval_loss" in file.read_text() for file in folder.glob("*/metrics.jsonl")) == len(RANKS) * len(
                RATES
            ):
                found.append(time.perf_counter() - started)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield found
    end.set()
    watcher.join()


def _write_rows(folder: Path, steps: int) -> Path:
    """GSM8K's questions without their last sentences, and the result alone: about 40 tokens with the chat's own."""
    rows = [
        {"prompt": row["prompt"].split(". ")[0], "completion": row["completion"].rpartition("#### ")[2]}
        for row in speed.gsm8k()
    ]
    rows = [row for row in rows if len(row["prompt"]) < 40]
    random.Random(0).shuffle(rows)
    held_out = 64
    for name, part in (("eval", rows[:held_out]), ("train", rows[held_out : held_out + 8 * steps])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def _write_texts(folder: Path) -> list[str]:
    """SST-2's sentences of 8 to 14 words; the overrides that name them."""
    source = Path(os.environ.get("LORA_LAB_DATA", "data")) / "sst2"
    for name, file in (("train", "train.jsonl"), ("eval", "validation.jsonl")):
        rows = [json.loads(line) for line in (source / file).read_text(encoding="utf-8").splitlines()]
        short = [
            {"text": row["text"], "label": row["label_name"]} for row in rows if 8 <= len(row["text"].split()) <= 14
        ]
        (folder / f"texts-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    return [f"data.train={folder}/texts-train.jsonl", f"data.eval={folder}/texts-eval.jsonl"]


def _overrides(rows: Path, job: str, steps: int) -> list[str]:
    shared = ["hardware=cpu", "tracker=none", "data.check=off", "train.eval_steps=1000000"]
    if job in _RECIPES:
        named = _write_texts(rows) if job == "short texts" else []
        return [*_RECIPES[job], *named, *shared, "export=adapter"]
    return [
        "model=hub", f"model.path={speed._models()}/smollm2-135m-instruct-hf", *_CHATS[job], *shared, "data.duplicates=keep",
        f"data.train={rows}/train.jsonl", f"data.eval={rows}/eval.jsonl", "train.batch_size=8", f"train.max_steps={steps}",
    ]  # fmt: skip


def _command(words: list[str]) -> tuple[str, float, float]:
    """What a `lora-lab` command printed, its peak memory in GiB, and the processor's seconds that it took."""
    code = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True, text=True); "
        "print(done.stdout); print(done.stderr, file=sys.stderr); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss); sys.exit(done.returncode)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, sys.executable, "-m", *words],
        cwd=speed._ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    seconds, peak = done.stdout.split()[-2:]
    return done.stdout, int(peak) / 2**20, float(seconds)


def _cohort(system: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    more = {
        "joint": ["sweep.execution=batched"],
        "turns": ["sweep.execution=interleaved"],
        "halving": ["sweep=halving", "sweep.eta=3"],
        "halving_3_rungs": ["sweep=halving", "sweep.eta=3", "sweep.rungs=3"],
        "halving_eta_4": ["sweep=halving", "sweep.eta=4", "sweep.rungs=3"],
    }
    points = [f"adapter.r={','.join(map(str, RANKS))}", f"optim.lr={','.join(map(str, RATES))}"]
    said, peak, processor = _command(
        ["lora_lab", "train", "-m", *overrides, *more[system], *points, f"hydra.sweep.dir={folder}"]
    )
    results = [json.loads(file.read_text()) for file in folder.glob("*/result.json")]
    speeds = [result["tokens_per_second"] for result in results]
    return {
        "tokens_per_second": max(speeds),
        "peak_gib": peak,
        "processor_seconds": processor,
        "losses": {
            file.parent.name: json.loads(file.read_text())["tuned"]["loss"] for file in folder.glob("*/result.json")
        },
        "step_losses": _curves(folder),
        "steps_made": sum(max(line["step"] for line in _metrics(file)) for file in folder.glob("*/metrics.jsonl")),
        "width": int((re.search(r"(\d+) in each pass", said) or [0, 1])[1]),
    }


def _metrics(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _curves(folder: Path) -> dict[str, list[float]]:
    return {
        file.parent.name: [line["loss"] for line in _metrics(file) if "loss" in line]
        for file in folder.glob("*/metrics.jsonl")
    }


def _processes(system: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    peaks, speeds, processor = [], [], 0.0
    for number, (rank, rate) in enumerate(itertools.product(RANKS, RATES)):
        point = [f"adapter.r={rank}", f"optim.lr={rate}", f"run_dir={folder}/{number}"]
        _, peak, seconds = _command(["lora_lab", "train", *overrides, *point])
        processor += seconds
        result = json.loads((folder / str(number) / "result.json").read_text())
        peaks.append(peak)
        speeds.append(result["tokens_per_second"])
    losses = {file.parent.name: json.loads(file.read_text())["tuned"]["loss"] for file in folder.glob("*/result.json")}
    return {
        "tokens_per_second": sum(speeds) / len(speeds),
        "peak_gib": max(peaks),
        "processor_seconds": processor,
        "losses": losses,
        "step_losses": _curves(folder),
    }


def _trl(system: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """The same rows in the order that lora_lab gives them; adapters start from TRL's own random numbers."""
    settings = dict(text.partition("=")[::2] for text in overrides)
    spec = {
        "rows": None, "adapter": str(folder / "none"), "overrides": overrides, "steps": int(settings["train.max_steps"]),
        "batch_size": 8, "quant": settings["quant"], "weight_decay": 0.0, "lora_alpha": 32, "supervised_share": 1.0,
    }  # fmt: skip
    spec |= speed._run("rows", spec, folder)
    (folder / "none").unlink()
    spec["real_tokens"] = [
        sum(len(r["input_ids"]) for r in spec["rows"][8 * s : 8 * s + 8]) for s in range(spec["steps"])
    ]
    runs = [
        speed._run("trl_bf16", {**spec, "r": rank, "lr": rate}, folder)
        for rank, rate in itertools.product(RANKS, RATES)
    ]
    speeds = [run["tokens_per_second"] for run in runs]
    return {"tokens_per_second": sum(speeds) / len(speeds), "peak_gib": max(run["peak_gib"] for run in runs)}


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = result["machine"]
    lines = [
        "# A sweep of eight adapters", "",
        f"Made by `python -m benchmarks.sweep`: ranks {RANKS} times learning rates {RATES}, and evaluations before and after. The formats of "
        f"numbers are chats of SmolLM2-135M, 8 rows of about 50 tokens in each of {result['steps']} steps; the others are recipes, of 100, 25 and 8 "
        "steps, on one core. *processor* counts the processor's seconds, which other work on the machine hardly changes.", "",
        f"- {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; commits "
        f"{', '.join(dict.fromkeys(run['commit'] for run in result['runs']))}",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
    ]  # fmt: skip
    for job in dict.fromkeys(run["job"] for run in result["runs"]):
        lines += [
            "", f"## {job}", "",
            "| system | runs | makespan, s | faster than eight processes | first ranking, s | tokens/s in training | processor, s "
            "| of eight processes' | peak GiB | regret |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        runs = [run for run in result["runs"] if run["job"] == job]
        grid = [run for run in runs if run["system"] in ("joint", "turns", "processes")]
        lowest = min((min(run["losses"].values()) for run in grid), default=None)
        alone = [run["seconds"] for run in runs if run["system"] == "processes"]
        for system in dict.fromkeys(run["system"] for run in runs):
            own = [run for run in runs if run["system"] == system]
            seconds, speed_, peak = (
                statistics.median(run[key] for run in own) for key in ("seconds", "tokens_per_second", "peak_gib")
            )
            regret = (
                f"{min(own[0]['losses'].values()) - lowest:+.4f}" if own[0].get("losses") and lowest is not None else ""
            )
            faster = f"{statistics.median(alone) / seconds:.2f} x" if alone else ""
            used, theirs = (
                statistics.median([run["processor_seconds"] for run in some if "processor_seconds" in run] or [0])
                for some in (own, [run for run in runs if run["system"] == "processes"])
            )
            processor = f"{used:.0f} | 1 / {theirs / used:.2f}" if used and theirs else " | "
            firsts = [run["first_ranking"] for run in own if run.get("first_ranking")]
            first = f"{statistics.median(firsts):.0f}" if firsts else ""
            clock = [f"{seconds:.0f}", faster, first, f"{speed_:.0f}"]
            if any(run.get("busy") for run in runs):  # the machine did other work
                clock = [""] * len(clock)
            lines.append(f"| {system} | {len(own)} | {' | '.join(clock)} | {processor} | {peak:.2f} | {regret} |")
        curves = [run["step_losses"] for run in runs if run["system"] in ("joint", "processes") and run["repeat"] == 0]
        if len(curves) == 2:
            gap = max(
                abs(one - other) / other
                for name in curves[0]
                for one, other in zip(curves[0][name], curves[1][name], strict=True)
            )
            lines += [
                "",
                f"Largest relative difference of a step's loss, shared passes to runs of their own: {gap:.1e}.",
            ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
