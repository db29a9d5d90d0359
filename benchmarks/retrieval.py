"""Compare task=embedding with sentence-transformers' own trainer: python -m benchmarks.retrieval [--cases a,b] [--seeds 0,1,2]

Each case is a recipe, cut to a size that trains in a minute on a CPU core. Both systems get the same rows, batch size, number of steps,
learning rate and schedule, LoRA on the same layers, and the same loss (in-batch negatives in both directions); both are measured by the
same functions on the same held-out rows. sentence-transformers does not mask equal texts; its batches hold none by its own sampler
(NO_DUPLICATES). So the rows come in other orders, and adapters begin with other numbers; given ours, sentence-transformers' trainer must end
where we do. Last, the peak memory of steps of 256 rows in micro-batches of 16, beside that of steps of 16, and that of 256 in one pass.

Needs sentence-transformers and datasets. Recipes find data and models by LORA_LAB_DATA and LORA_LAB_MODELS.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lab.adapters import files
from lora_lab.config import compose
from lora_lab.config.run import RunConfig
from lora_lab.data.encode import Example
from lora_lab.run import pipeline, prepared
from lora_lab.run.setup import Setup
from lora_lab.training.batches import plan_of

_OUT = Path(__file__).parent / "results" / "retrieval.json"
_COMMON = [
    "export=adapter", "tracker=none", "train.keep_best=false", "train.eval_steps=1000000", "train.save_steps=1000000",
    "hardware=cpu", "optim.schedule=constant", "optim.warmup_steps=0", "optim.weight_decay=0", "optim.max_grad_norm=null",
    "adapter.lora_dropout=0", "data.max_tokens=128", "train.epochs=1",
]  # fmt: skip
CASES = {
    "retrieval": ["train.max_steps=10", "train.batch_size=32", "optim.lr=5e-4"],
    "retrieval_zh": ["train.max_steps=10", "train.batch_size=32", "optim.lr=2e-3", "data.max_train_rows=320", "data.max_eval_rows=100"],
}  # fmt: skip
METRICS = ("recall@1", "mrr@10", "ndcg@10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), help="names, comma between")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=_OUT)
    parser.add_argument("--memory", nargs=2, metavar=("ROWS", "MICRO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(_memory(*map(int, args.memory))))
        return
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    names = ("sentence-transformers", "torch", "transformers", "peft")
    result["versions"] = {name: importlib.metadata.version(name) for name in names}
    for case in args.cases:
        for seed in args.seeds:
            for system, run in (("lora_lab", _ours), ("sentence-transformers", _theirs)):
                if any((one["case"], one["seed"], one["system"]) == (case, seed, system) for one in result["runs"]):
                    continue
                started = time.process_time()
                found = run(_config(case, seed))
                seconds = round(time.process_time() - started, 1)
                result["runs"].append({"case": case, "seed": seed, "system": system, "cpu_seconds": seconds, **found})
                args.out.write_text(json.dumps(result, indent=1) + "\n")
                print(case, seed, system, found["tuned"], f"{seconds} CPU s", flush=True)
    for case in args.cases:
        if all(one["case"] != case for one in result.setdefault("alike", [])):
            result["alike"].append(_alike(case, args.seeds[0]))
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    if "memory" not in result:
        result["memory"] = [_in_a_process(*sizes) for sizes in ((16, 16), (256, 16), (256, 256))]
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(_table(result))


def _config(case: str, seed: int, *more: str) -> RunConfig:
    folder = tempfile.mkdtemp(prefix="retrieval_")
    return compose.compose([f"recipe={case}", *_COMMON, *CASES[case], f"seed={seed}", f"run_dir={folder}/run", *more])


def _ours(config: RunConfig) -> dict[str, Any]:
    result = json.loads(pipeline.train(config).result.read_text())
    return {
        "base": {name: result["base"][name] for name in METRICS},
        "tuned": {name: result["tuned"][name] for name in METRICS},
        "bm25": {name: result["baselines"]["bm25"][name] for name in METRICS},
        "parameters": result["coverage"]["trainable_parameters"],
    }


def _theirs(config: RunConfig) -> dict[str, Any]:
    setup = prepared.prepare(config)
    torch_seed(config.seed)
    model = _adapted(config, setup)
    train = setup.training_rows()
    _train(model, config, [example for place in range(len(train)) for example in train[place]], "no_duplicates")
    parameters = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return {"tuned": _measured(model, setup), "parameters": parameters}


def _alike(case: str, seed: int) -> dict[str, Any]:
    """How far both systems end from each other where rows come in the same order and adapters begin with the same numbers."""
    import torch
    from safetensors.torch import load_file
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    config = _config(case, seed)
    with prepared.prepare(config).loaded() as live:
        setup, rows = live.setup, live.setup.training_rows()
        first = {_layer(name): one.detach().clone() for name, one in _trainable(live.model)}
    plan = plan_of(config, rows)
    steps = plan.total_steps(config.train.epochs, config.train.max_steps)
    order = [int(place) for step in range(steps) for part in plan.step(step) for place in part]
    model = _adapted(config, setup)
    own = {_layer(name): one for name, one in _trainable(model)}
    with torch.no_grad():
        for name, one in first.items():
            own[name].copy_(one)
    _train(
        model,
        config,
        [rows[place][0] for place in order],
        lambda table, **given: DefaultBatchSampler(SequentialSampler(table), **given),
    )
    run = pipeline.train(config)
    trained = {_layer(name): one for name, one in load_file(run.adapter / files.WEIGHTS).items()}
    assert trained.keys() == own.keys()
    apart, way = (
        torch.cat([(one[name].detach() - trained[name]).flatten() for name in trained]).norm() for one in (own, first)
    )
    ours = json.loads(run.result.read_text())["tuned"]
    return {
        "case": case,
        "seed": seed,
        "lora_lab": {name: ours[name] for name in METRICS},
        "sentence-transformers": _measured(model, setup),
        "apart": float(apart / way),
    }


def _trainable(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, one) for name, one in model.named_parameters() if one.requires_grad)


def _layer(name: str) -> str:
    """The name of an adapter's tensor below the base, whatever it is called above."""
    return re.sub(r".*?(?=encoder\.layer)", "", name).replace(".default", "")


def _adapted(config: RunConfig, setup: Setup) -> Any:
    """A SentenceTransformer of the recipe's base with a fresh adapter."""
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    body = Transformer(str(setup.base.folder), max_seq_length=config.data.max_tokens)
    model = SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), "mean")], device="cpu")
    adapter: Any = config.adapter
    targets = adapter.targets(setup.skeleton(), setup.kind.unadapted)
    model.add_adapter(LoraConfig(r=adapter.r, lora_alpha=adapter.lora_alpha, target_modules=targets, lora_dropout=0.0))
    return model


def _train(model: Any, config: RunConfig, examples: list[Example], batch_sampler: Any) -> None:
    """By sentence-transformers' own trainer."""
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import losses, trainer, training_args

    rows = [example["texts"][:2] for example in examples]
    table = Dataset.from_dict({"anchor": [row[0] for row in rows], "positive": [row[1] for row in rows]})
    told = training_args.SentenceTransformerTrainingArguments(
        output_dir=f"{config.run_dir}_theirs", max_steps=config.train.max_steps or -1, save_strategy="no",
        per_device_train_batch_size=config.train.batch_size, learning_rate=config.optim.lr, lr_scheduler_type="constant",
        weight_decay=0.0, max_grad_norm=0.0, seed=config.seed, batch_sampler=batch_sampler, report_to="none", use_cpu=True,
        disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    loss = losses.MultipleNegativesSymmetricRankingLoss(model, scale=1 / config.task.temperature)  # type: ignore[attr-defined]
    trainer.SentenceTransformerTrainer(model=model, args=told, train_dataset=table, loss=loss).train()


def torch_seed(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _measured(model: Any, setup: Setup) -> dict[str, float]:
    """As lora_lab measures: each query once, among the documents of all held-out rows."""
    import torch

    from lora_lab.tasks import metrics

    right: dict[str, set[str]] = {}
    for example in setup.held_out_rows():
        right.setdefault(example["texts"][0], set()).add(example["texts"][1])
    documents = sorted({text for texts in right.values() for text in texts})
    queries, there = (
        torch.nn.functional.normalize(model.encode(texts, convert_to_tensor=True, show_progress_bar=False), dim=-1)
        for texts in (list(right), documents)
    )
    ranks = []
    for scores, texts in zip(queries @ there.T, right.values(), strict=True):
        order = [documents[place] for place in scores.argsort(descending=True).tolist()]
        ranks.append([order.index(text) + 1 for text in texts])
    found = metrics.retrieval(ranks)
    return {name: found[name] for name in METRICS}


def _in_a_process(rows: int, micro: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.retrieval", "--memory", str(rows), str(micro)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _memory(rows: int, micro: int) -> dict[str, Any]:
    """Peak memory of one step of the Chinese recipe, and of the process before it."""
    more = [f"train.batch_size={rows}", f"train.micro_batch_size={micro}", "train.max_steps=1", "data.max_eval_rows=2"]
    config = _config("retrieval_zh", 0, *more)
    result = json.loads(pipeline.train(config).result.read_text())
    return {"rows": rows, "micro_batch": micro, "peak_gib": result["peak_memory_gib"]}


def _table(result: dict[str, Any]) -> str:
    lines = [
        "# Retrieval beside sentence-transformers",
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in result['versions'].items())}. Mean ± standard deviation over seeds.",
        "",
        "| case | metric | BM25 | base | lora_lab | sentence-transformers | CPU s of each | parameters of each |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(one["case"] for one in result["runs"]):
        both = {
            system: [one for one in result["runs"] if (one["case"], one["system"]) == (case, system)]
            for system in ("lora_lab", "sentence-transformers")
        }
        ours = both["lora_lab"][0]
        seconds = ", ".join(f"{statistics.fmean(one['cpu_seconds'] for one in runs):.0f}" for runs in both.values())
        parameters = ", ".join(f"{runs[0]['parameters']:,}" for runs in both.values())
        for name in METRICS:
            means = [_mean([one["tuned"][name] for one in runs]) for runs in both.values()]
            cells = [case, name, f"{ours['bm25'][name]:.3f}", f"{ours['base'][name]:.3f}", *means, seconds, parameters]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Given our order of rows and our first adapter, sentence-transformers' trainer ends where we do:",
        "",
        "| case | seed | metric | lora_lab | sentence-transformers | adapters apart, as a share of how far they moved |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['case']} | {one['seed']} | {name} | {one['lora_lab'][name]:.6f} | {one['sentence-transformers'][name]:.6f} | {one['apart']:.0e} |"
        for one in result["alike"]
        for name in METRICS
    ]
    small, large, whole = result["memory"]
    lines += [
        "",
        f"Peak memory of a step: {small['rows']} rows {small['peak_gib']:.2f} GiB, {large['rows']} rows in micro-batches of "
        f"{large['micro_batch']} {large['peak_gib']:.2f} GiB ({large['peak_gib'] / small['peak_gib']:.2f} times), 256 rows in one pass {whole['peak_gib']:.2f} GiB.",
    ]
    return "\n".join(lines) + "\n"


def _mean(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


if __name__ == "__main__":
    main()
