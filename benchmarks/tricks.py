"""What each acceleration is worth by itself: python -m benchmarks.tricks [--steps 7] [--out RESULT.json]

For each, two models stand side by side in one process, with everything on and with this one left out, and take forward and
backward passes over the same batch in turns, so that a slower minute of the machine meets both. Reported are the medians, their
ratio, and how far losses and gradients are from each other. Needs the same data and model folders as benchmarks/speed.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import speed
from benchmarks.sources import commit
from benchmarks.tasks import _machine, _versions

_OUT = Path(__file__).parent / "results" / "tricks.json"
TRICKS = {
    "fused_projections": ("mixed_bf16", "speed.fused_projections=false"),
    "fused_mlp": ("mixed_bf16", "speed.fused_mlp=false"),
    "fused_norms": ("mixed_bf16", "speed.fused_norms=false"),
    "block_attention": ("mixed_bf16", "speed.block_attention=false"),
    "block_attention, rows of 1,100 tokens": ("long_bf16", "speed.block_attention=false"),
    "chunked_loss": ("mixed_bf16", "speed.chunked_loss=false"),
    "chunked_loss, vocabulary of 262,000": ("vocabulary_262k", "speed.chunked_loss=false"),
    "last_layer_rows": ("mixed_bf16", "speed.last_layer_rows=false"),
    "dequantize=once": ("mixed_nf4", "speed.dequantize=always"),
    "all of them": ("mixed_bf16", "speed=plain"),
}
UPPER_THIRD = ["adapter.layers_to_transform=[20,21,22,23,24,25,26,27,28,29]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="of each side")
    parser.add_argument("--out", type=Path, default=_OUT)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": _machine(), "versions": _versions(), "commit": commit(), "tricks": {}}
    for name, (workload, off) in TRICKS.items():
        result["tricks"][name] = _compare(workload, [], [off], args.steps)
        print(name, json.dumps(result["tricks"][name]), flush=True)
    name = "prefix_cache, the upper third adapted, second epoch"
    result["tricks"][name] = _compare("mixed_bf16", [*UPPER_THIRD, "speed.prefix_cache=true"], UPPER_THIRD, args.steps)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(result))
    print(table(result))


def _compare(workload: str, on: list[str], off: list[str], steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="lora_lab_tricks_") as temporary:
        sides = [_side(workload, more, Path(temporary)) for more in (on, off)]
        seconds: list[list[float]] = [[], []]
        for _ in range(steps):
            for step, times in zip(sides, seconds, strict=True):
                started = time.perf_counter()
                step()
                times.append(time.perf_counter() - started)
        (loss, gradient), (other_loss, other_gradient) = (step() for step in sides)
    with_it, without = (statistics.median(times[1:]) for times in seconds)
    del sides
    gc.collect()
    return {
        "seconds_with": with_it,
        "seconds_without": without,
        "ratio": without / with_it,
        "least_ratio": min(b / a for a, b in zip(seconds[0][1:], seconds[1][1:], strict=True)),
        "most_ratio": max(b / a for a, b in zip(seconds[0][1:], seconds[1][1:], strict=True)),
        "loss_gap": abs(loss - other_loss) / other_loss,
        "gradient_gap": ((gradient - other_gradient).norm() / other_gradient.norm()).item(),
    }


def _side(workload: str, more: list[str], folder: Path) -> Callable[[], tuple[float, torch.Tensor]]:
    """A forward and backward pass over the first step's rows."""
    from lora_lab.adapters.attach import trainable
    from lora_lab.config import compose
    from lora_lab.run import prepared

    work = speed.WORKLOADS[workload]
    rows = speed._rows(work.rows, work.batch_size)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ready = prepared.prepare(compose.compose([*work.overrides(folder), *more, f"run_dir={folder}/run"]))
    model = ready.loaded().model
    torch.manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data.normal_(std=0.02)  # an adapter that does something
    model.train()
    batch = ready.task.collate([ready.train[i][0] for i in range(len(ready.train))], np.random.default_rng(0))

    def step() -> tuple[float, torch.Tensor]:
        model.zero_grad()
        with ready.accelerator.autocast():
            loss = ready.task.loss(model, batch).loss / batch.weight
        loss.backward()
        return loss.item(), torch.cat([parameter.grad.flatten() for parameter in trainable(model).values()])

    return step


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = result["machine"]
    lines = [
        "# What each acceleration is worth", "",
        "Made by `python -m benchmarks.tricks`: forward and backward over 8 GSM8K rows (4 of 1,100 tokens; 4 with Gemma 3 270M), "
        "SmolLM2-135M, bfloat16, everything on beside this one left out, taking turns in one process.", "",
        f"- {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; commit {result['commit']}",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}", "",
        "| acceleration | without, s | with, s | ratio (range) | loss differs by | gradient by |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {name} | {one['seconds_without']:.2f} | {one['seconds_with']:.2f} | {one['ratio']:.2f} ({one['least_ratio']:.2f} to "
        f"{one['most_ratio']:.2f}) | {one['loss_gap']:.0e} | {one['gradient_gap']:.0e} |"
        for name, one in result["tricks"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
