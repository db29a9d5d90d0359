"""Compare the memory estimate with real runs: python -m benchmarks.plan_memory --rows ROWS.jsonl.gz --out RESULT.json

ROWS: JSONL, gzipped or not, with `question` and `answer`. Each recipe is estimated, then trained for a few steps in a
fresh process with an evaluation before and after; what it used at most beyond its imports is compared.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_ROWS, _EVAL_ROWS = 400, 32
_LONG = 2000  # characters of a long row's prompt: about 900 tokens in all
_BASE = "model=smollm2_135m"

RECIPES = {
    "nf4": ["quant=nf4", "data.max_train_rows=24", "train.batch_size=8"],
    "nf4-checkpointing": ["quant=nf4", "data.max_train_rows=24", "train.batch_size=8", "train.gradient_checkpointing=true"],
    "bf16": ["quant=none", "data.max_train_rows=12", "train.batch_size=4"],
    "float32-long": ["quant=none", "model.dtype=float32", "data.train={folder}/long.jsonl", "data.max_train_rows=6", "train.batch_size=2", "train.micro_batch_size=1"],
    "float32": ["quant=none", "model.dtype=float32", "data.max_train_rows=12", "train.batch_size=4"],
    "int8": ["quant=int8", "data.max_train_rows=12", "train.batch_size=4"],
    "nf4-attention-r64": ["quant=nf4", "data.max_train_rows=12", "train.batch_size=4", "train.micro_batch_size=2", "train.packing=false", "adapter.r=64", "adapter.target_modules=[q_proj,v_proj]", "optim=adamw_8bit"],
}  # fmt: skip
_OTHER = ["quant=nf4", "data.max_train_rows=12", "train.batch_size=4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--other", type=Path, help="folder of a model of another architecture, trained in NF4")
    parser.add_argument("--only", nargs="*", help="names of recipes")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        verb, result, *overrides = args.child
        return {"estimate": _estimate, "measure": _measure}[verb](Path(result), overrides)
    recipes = {name: [_BASE, *own] for name, own in RECIPES.items()}
    if args.other:
        recipes["other-nf4"] = ["model=hub", f"model.path={args.other}", *_OTHER]
    results = []
    with tempfile.TemporaryDirectory(prefix="lora_lab_") as folder:
        _write_rows(args.rows, Path(folder))
        for name, own in recipes.items():
            if not args.only or name in args.only:
                results.append(_compare(name, own, folder, args))
                args.out.write_text(json.dumps(results, indent=1))
    _show(results)
    return None


def _compare(name: str, own: list[str], folder: str, args: argparse.Namespace) -> dict[str, Any]:
    shared = [
        "data.too_long=drop",
        f"data.train={folder}/train.jsonl",
        f"data.eval={folder}/eval.jsonl",
        "tracker=none",
        "hardware=cpu",
    ]
    overrides = [text.format(folder=folder) for text in [*shared, *own]] + [f"run_dir={folder}/{name}"]
    result = {"recipe": name}
    for verb in ("estimate", "measure"):
        file = Path(folder) / f"{name}.{verb}.json"
        command = [sys.executable, "-m", "benchmarks.plan_memory", "--rows", "-", "--out", "-", "--child", verb]
        done = subprocess.run([*command, str(file), *overrides], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}: {verb} failed:\n{done.stderr[-2000:]}")
        result |= json.loads(file.read_text())
    result["ratio"] = max(result["phases"].values()) / result["measured"]
    print(json.dumps(result), flush=True)
    return result


def _write_rows(source: Path, folder: Path) -> None:
    text = gzip.open(source, "rt") if source.suffix == ".gz" else open(source)
    with text:
        rows = [json.loads(line) for line in text]
    rows = [{"prompt": row["question"], "completion": row["answer"]} for row in rows[: _ROWS + _EVAL_ROWS]]
    shots = [f"{row['prompt']}\n{row['completion']}\n\n" for row in rows]
    long = []
    for start in range(0, _ROWS, 20):
        prompt = "".join(shots[start : start + 20])[:_LONG]
        long.append({"prompt": prompt + rows[start + 20]["prompt"], "completion": rows[start + 20]["completion"]})
    for name, chosen in {"train": rows[:_ROWS], "eval": rows[_ROWS:], "long": long}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))


def _estimate(result: Path, overrides: list[str]) -> None:
    import dataclasses
    import time

    from lora_lab.config import compose
    from lora_lab.plan import memory
    from lora_lab.plan.plan import foresee
    from lora_lab.run import prepared

    config = compose.compose(overrides)
    data, base, task = prepared.build_data(config, prepared.find_base(config))
    work = foresee(config, task, data.train, data.held_out)
    started = time.perf_counter()
    found = memory.estimate(config, base.base, base.kind, task, work.largest, work.evaluation)
    seconds = time.perf_counter() - started
    largest = {"tokens": work.largest.num_tokens, "supervised": len(work.largest.targets)}
    result.write_text(json.dumps({**dataclasses.asdict(found), **largest, "seconds_to_estimate": seconds}))


def _measure(result: Path, overrides: list[str]) -> None:
    """Most resident memory (bytes) of this process beyond what its imports took."""
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from lora_lab.config import compose
    from lora_lab.run import pipeline

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    imports = pages * resource.getpagesize()
    pipeline.train(compose.compose(overrides))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result.write_text(json.dumps({"imports": imports, "measured": peak - imports}))


def _show(results: list[dict[str, Any]]) -> None:
    from lora_lab.runtime import console

    gib = 2**30
    rows = []
    for one in results:
        phase = max(one["phases"], key=one["phases"].get)
        sizes = one["phases"][phase] / gib, one["measured"] / gib
        tokens = f"{one['tokens']} / {one['supervised']}"
        rows.append([one["recipe"], tokens, phase, *sizes, one["ratio"], round(one["seconds_to_estimate"], 1)])
    header = [
        "recipe",
        "tokens / supervised",
        "peak in",
        "estimate GiB",
        "measured GiB",
        "ratio",
        "seconds to estimate",
    ]
    console.show_table("peak memory beyond imports, CPU", header, rows)


if __name__ == "__main__":
    main()
