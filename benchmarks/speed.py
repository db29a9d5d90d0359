"""Speed and memory beside other tools: python -m benchmarks.speed [--workloads a,b] [--systems a,b | --tricks] [--repeats 3] [--out RESULT.json]

Every system trains the same steps on the same rows in the same order, from the same adapter, in a process of its own; systems
take turns, again and again, so that a slower hour of the machine meets them all. Figures are medians over the repeats; the first
step is left out of tokens/s and shown by itself. The rate of plain matrix products is measured between them.

GSM8K rows are found by LORA_LAB_DATA, the model by LORA_LAB_MODELS. Runs that the result file holds are not repeated; delete it
to begin again. Beside the JSON file a table (.md) is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gzip
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.tasks import _machine, _versions

_ROOT = Path(__file__).parents[1]
_OUT = Path(__file__).parent / "results" / "speed.json"
PEERS = ("trl", "trl_bf16", "trl_packed", "transformers_peft")
OWN = ("lora_lab", "lora_lab_plain")
# each acceleration left out, of which --tricks tells what it is worth
TRICKS = {
    "without_fused_projections": "speed.fused_projections=false",
    "without_fused_mlp": "speed.fused_mlp=false",
    "without_fused_norms": "speed.fused_norms=false",
    "without_block_attention": "speed.block_attention=false",
    "without_chunked_loss": "speed.chunked_loss=false",
    "without_last_layer_rows": "speed.last_layer_rows=false",
    "without_dequantizing_once": "speed.dequantize=always",
}
_LIMIT = 900  # seconds of one run


@dataclasses.dataclass(frozen=True)
class Workload:
    """Rows, model, how it is held, and whom it is compared with."""

    rows: str  # short, mixed or long
    peers: tuple[str, ...]
    quant: str = "none"
    checkpointing: bool = False
    model: str = "smollm2-135m-instruct-hf"
    steps: int = 3
    batch_size: int = 8

    def overrides(self, folder: Path) -> list[str]:
        """Of lora_lab; what peers are told is read from here too."""
        models = os.environ.get("LORA_LAB_MODELS", "models")
        return [
            "model=hub", f"model.path={models}/{self.model}", f"quant={self.quant}", "hardware=cpu", "tracker=none",
            f"data.train={folder}/rows.jsonl", "data.check=off", "data.duplicates=keep", "data.max_tokens=2048", "adapter.r=16",
            "adapter.lora_alpha=32", "optim.lr=2e-4", "optim.schedule=constant", "optim.warmup_steps=0",
            f"train.max_steps={self.steps}", "train.epochs=100", f"train.batch_size={self.batch_size}",
            f"train.gradient_checkpointing={str(self.checkpointing).lower()}", "train.save_steps=1000000",
        ]  # fmt: skip


WORKLOADS = {
    "mixed_bf16": Workload("mixed", ("lora_lab_plain", *PEERS)),
    "mixed_nf4": Workload("mixed", ("trl", "trl_bf16"), quant="nf4"),
    "long_bf16": Workload("long", ("lora_lab_plain",), batch_size=4),
    "short_bf16": Workload("short", ("lora_lab_plain", "trl_bf16"), batch_size=32),
    "mixed_nf4_checkpointed": Workload("mixed", ("lora_lab_plain", "trl"), quant="nf4", checkpointing=True),
}


def _rows(kind: str, count: int) -> list[dict[str, str]]:
    """GSM8K questions and answers: as they are, five of them in a row, or the first sentence of the question and the result."""
    file = Path(os.environ.get("LORA_LAB_DATA", "data")) / "gsm8k_train" / "train.jsonl.gz"
    if not file.exists():
        sys.exit(f"{file}: not found. Name the folder that holds it: LORA_LAB_DATA=FOLDER make bench")
    found = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()[: count * 5]]
    every = [{"prompt": row["question"], "completion": row["answer"]} for row in found]
    if kind == "mixed":
        return every[:count]
    if kind == "short":
        return [
            {"prompt": row["prompt"].split(". ")[0], "completion": row["completion"].rpartition("#### ")[2]}
            for row in every[:count]
        ]
    return [
        {
            "prompt": every[5 * i]["prompt"],
            "completion": "\n\n".join(
                row[side] for row in every[5 * i : 5 * i + 5] for side in ("prompt", "completion")
            ),
        }
        for i in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workloads", type=lambda text: text.split(","), default=["mixed_bf16", "mixed_nf4", "long_bf16"]
    )
    parser.add_argument("--systems", type=lambda text: text.split(","), help="instead of each workload's own")
    parser.add_argument(
        "--tricks", action="store_true", help="lora_lab with and without each of its accelerations instead"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=_OUT)
    args = parser.parse_args()
    if args.tricks:
        args.systems = ["lora_lab", *TRICKS, "lora_lab_plain"]
    trl = importlib.util.find_spec("trl") is not None
    if not trl:
        print("trl is not installed: left out", file=sys.stderr)
    result = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    result |= {
        "machine": _machine(),
        "versions": _versions(),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }
    with tempfile.TemporaryDirectory(prefix="lora_lab_speed_") as temporary:
        folders = {name: Path(temporary) / name for name in args.workloads}
        specs = {name: _prepare(name, folder) for name, folder in folders.items()}
        for repeat in range(args.repeats):
            for name, spec in specs.items():
                for system in [*(args.systems or ("lora_lab", *WORKLOADS[name].peers)), "matrix_products"]:
                    if system.startswith("trl") and not trl:
                        continue
                    if (name, system, repeat) in {
                        (run["workload"], run["system"], run["repeat"]) for run in result["runs"]
                    }:
                        continue
                    found = _run(system, spec, folders[name])
                    if found is not None:
                        result["runs"].append({"workload": name, "system": system, "repeat": repeat, **found})
                        _write(args.out, result)
                        print(_shown(result["runs"][-1]), flush=True)
    print(table(result))


def _prepare(name: str, folder: Path) -> dict[str, Any]:
    """Write the rows, and let lora_lab say which tokens they are, in which order, and how the adapter starts."""
    work = WORKLOADS[name]
    folder.mkdir()
    count = work.steps * work.batch_size
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(work.rows, count)))
    spec = {
        "rows": None, "adapter": str(folder / "adapter.safetensors"), "overrides": work.overrides(folder), "steps": work.steps,
        "batch_size": work.batch_size, "quant": work.quant, "lr": 2e-4, "weight_decay": 0.0, "r": 16, "lora_alpha": 32, "tokens": 2048,
    }  # fmt: skip
    found = _run("rows", spec, folder)
    if found is None:
        sys.exit(f"{name}: the rows cannot be prepared")
    spec |= found
    spec["real_tokens"] = [
        sum(len(row["input_ids"]) for row in spec["rows"][step * work.batch_size : (step + 1) * work.batch_size])
        for step in range(work.steps)
    ]
    supervised = sum(label != -100 for row in spec["rows"] for label in row["labels"])
    print(f"{name}: {len(spec['rows'])} rows, {sum(spec['real_tokens'])} tokens, {supervised} supervised", flush=True)
    spec["supervised_share"] = supervised / sum(spec["real_tokens"])
    return spec


def _run(system: str, spec: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    own = dict(spec)
    shutil.rmtree(folder / "run", ignore_errors=True)
    own["overrides"] = [*spec["overrides"], f"run_dir={folder}/run"]
    if system == "lora_lab_plain":
        own["overrides"].append("speed=plain")
    if system in TRICKS:
        own["overrides"].append(TRICKS[system])
    (folder / "spec.json").write_text(json.dumps(own))
    worker = "lora_lab" if system in (*OWN, *TRICKS) else system
    command = [sys.executable, "-m", "benchmarks.speed_worker", worker, f"{folder}/spec.json", f"{folder}/out.json"]
    environment = {**os.environ, "BENCHMARK_BEGAN": str(time.time()), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False, timeout=_LIMIT
        )
    except subprocess.TimeoutExpired:
        print(f"{system}: more than {_LIMIT} s", file=sys.stderr, flush=True)
        return None
    if done.returncode:
        print(f"{system}: {done.stdout[-500:]}\n{done.stderr[-2000:]}", file=sys.stderr, flush=True)
        return None
    found = json.loads((folder / "out.json").read_text())
    if "step_seconds" in found:
        found["tokens_per_second"] = sum(spec["real_tokens"][1:]) / sum(found["step_seconds"][1:])
        found["supervised_tokens_per_second"] = found["tokens_per_second"] * spec["supervised_share"]
    return found


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=_ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _shown(run: dict[str, Any]) -> str:
    head = f"{run['workload']} {run['system']} {run['repeat']}:"
    if "gflops_per_second" in run:
        return f"{head} {run['gflops_per_second']:.0f} GFLOP/s"
    return (
        f"{head} {run['tokens_per_second']:.0f} tokens/s, {run['peak_gib']:.2f} GiB, first step after "
        f"{run['first_step_seconds']:.1f} s, loss {run['losses'][0]:.4f} -> {run['losses'][-1]:.4f}"
    )


def _write(out: Path, result: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, out)
    out.with_suffix(".md").write_text(table(result))


def table(result: dict[str, Any]) -> str:
    """The results as Markdown: medians, ranges, and ratios to lora_lab."""
    machine = result["machine"]
    lines = [
        "# Speed and memory beside other tools",
        "",
        "Made by `python -m benchmarks.speed`. Same rows, same order, same adapter to start from; medians (least to most) over the "
        "repeats of one alternating run. `lora_lab_plain` is the same loop and packing with `speed=plain`: transformers' and peft's "
        "own modules.",
        "",
        f"- {result['date']}, {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, commit {result['commit']}",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}, {platform.system()}",
    ]
    for name in dict.fromkeys(run["workload"] for run in result["runs"]):
        lines += ["", f"## {name}", ""]
        runs = [run for run in result["runs"] if run["workload"] == name]
        products = [run for run in runs if run["system"] == "matrix_products"]
        speeds = [run["tokens_per_second"] for run in runs if run["system"] == "lora_lab"]
        if products and speeds:
            rate, needed = (
                statistics.median(run["gflops_per_second"] for run in products),
                products[0]["gflop_per_token"],
            )
            lines += [
                f"Plain bfloat16 products at this model's shapes: {rate:.0f} GFLOP/s. A token needs {needed:.3f} GFLOP, so lora_lab "
                f"works at {statistics.median(speeds) * needed / rate:.0%} of that rate.",
                "",
            ]
        lines += [
            "| system | tokens/s | lora_lab is faster by | peak GiB | lora_lab needs | load s | first step s | first loss | last loss |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        medians = {}
        for system in dict.fromkeys(run["system"] for run in runs if "step_seconds" in run):
            own = [run for run in runs if run["system"] == system]
            medians[system] = {
                key: statistics.median(run[key] for run in own)
                for key in ("tokens_per_second", "peak_gib", "load_seconds", "first_step_seconds")
            }
            speeds = [run["tokens_per_second"] for run in own]
            ours, this = medians.get("lora_lab", medians[system]), medians[system]
            losses = [statistics.median(run["losses"][place] for run in own) for place in (0, -1)]
            lines.append(
                f"| {system} | {this['tokens_per_second']:.0f} ({min(speeds):.0f} to {max(speeds):.0f}) | "
                f"{ours['tokens_per_second'] / this['tokens_per_second']:.2f} x | {this['peak_gib']:.2f} | "
                f"{ours['peak_gib'] / this['peak_gib']:.0%} | {this['load_seconds']:.1f} | {this['first_step_seconds']:.1f} | "
                f"{losses[0]:.4f} | {losses[1]:.4f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
