"""How much of a step is products: python -m benchmarks.product_rate [--recipes a,b] [--steps 15] [--out RESULT.json]

Steps of a recipe, forward and backward, on its own rows; the floating-point operations of all their products as torch counts them; and,
in turns with the steps, the rate of plain products of the shapes of the base's own layers at as many tokens. The share is the rate
of the step divided by the rate of the products alone. Processor seconds of one thread, medians. Recipes find data and models by
LORA_LAB_DATA and LORA_LAB_MODELS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sources import commit, now
from benchmarks.tasks import _machine, _versions
from lora_lab.adapters.attach import base_of
from lora_lab.config.compose import compose
from lora_lab.run import prepared
from lora_lab.run.setup import Live

_OUT = Path(__file__).parent / "results" / "product_rate.json"
RECIPES = ("spam", "sentiment", "similarity", "entities", "news_zh", "resume_zh", "reading_zh", "translation")
_LESS = ["data.max_train_rows=800", "data.max_eval_rows=20", "hardware=cpu", "tracker=none"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=list(RECIPES))
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, default=_OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = {"machine": _machine(), "versions": _versions(), "commit": commit(), "when": now(), "recipes": {}}
    for name in args.recipes:
        result["recipes"][name] = {dtype: measured(name, dtype, args.steps) for dtype in args.dtypes}
        print(name, result["recipes"][name], flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(result))
    print(table(result))


def measured(recipe: str, dtype: str, steps: int) -> dict[str, float]:
    """Milliseconds of a step, its GFLOP, and the rate of products alone in GFLOP/s."""
    with tempfile.TemporaryDirectory(prefix="lora_lab_rate_") as folder:
        config = compose([f"recipe={recipe}", *_LESS, f"model.dtype={dtype}", f"run_dir={folder}/run"])
        with prepared.prepare(config).loaded() as live:
            live.accelerate()
            step, tokens = _step(live, config.train.batch_size), []
            products = _products(live, dtype)
            step(0)
            seconds, rates = [], []
            for number in range(steps):
                spent, count = _timed(lambda number=number: step(number))
                seconds.append(spent)
                tokens.append(count)
                rates.append(products(int(statistics.median(tokens))))
            with FlopCounterMode(display=False) as counter:
                step(int(np.argsort(seconds)[len(seconds) // 2]))  # the one of the median
    spent, flop = statistics.median(seconds), counter.get_total_flops()
    rate = statistics.median(rates)
    return {
        "step_ms": round(1000 * spent, 1),
        "gflop": round(flop / 1e9, 2),
        "products_gflops": round(rate / 1e9),
        "share": round(flop / spent / rate, 3),
    }


def _timed(work: Callable[[], int]) -> tuple[float, int]:
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def _step(live: Live, rows: int) -> Callable[[int], int]:
    """Forward and backward over the rows of a step; gives its tokens."""
    task, model, data = live.setup.task, live.model.train(), live.setup.training_rows()

    def step(number: int) -> int:
        examples = [
            example for place in range(number * rows, (number + 1) * rows) for example in data[place % len(data)]
        ]
        with live.autocast():
            for batch in task.step(model, [examples], np.random.default_rng(0)).batches:
                task.loss(model, batch.to(model.device)).loss.backward()
        model.zero_grad()
        return sum(example.num_tokens for example in examples)

    return step


def _products(live: Live, dtype: str) -> Callable[[int], float]:
    """The rate of products of the base's layers with so many tokens, each as often as the base has it."""
    shapes = Counter(
        (module.out_features, module.in_features)
        for module in base_of(live.model).modules()
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad
    )
    weights: dict[tuple[int, int], Any] = {shape: torch.randn(shape).to(getattr(torch, dtype)) for shape in shapes}

    def rate(tokens: int) -> float:
        spent = 0.0
        for shape, count in shapes.items():
            x = torch.randn(tokens, shape[1]).to(weights[shape].dtype)
            torch.nn.functional.linear(x, weights[shape])
            started = time.process_time()
            for _ in range(3):
                torch.nn.functional.linear(x, weights[shape])
            spent += count * (time.process_time() - started) / 3
        return sum(2 * tokens * rows * columns * count for (rows, columns), count in shapes.items()) / spent

    return rate


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| recipe | type | step, ms | its products, GFLOP | products alone, GFLOP/s | share |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, types in result["recipes"].items():
        for dtype, of in types.items():
            lines.append(
                f"| {name} | {dtype} | {of['step_ms']} | {of['gflop']} | {of['products_gflops']} | {of['share']:.0%} |"
            )
    return f"One thread, {result['machine']['processor']}, commit {result['commit']}.\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
