"""Speed and memory beside other tools: python -m benchmarks.speed [--workloads a,b] [--systems a,b] [--repeats 3] [--out RESULT.json]

Every system trains the same steps on the same rows in the same order, from the same adapter, in a process of its own; systems
take turns, again and again, so that a slower hour of the machine meets them all. Figures are medians over the repeats; the first
step is left out of tokens/s and shown by itself. The rate of plain matrix products is measured between them.

GSM8K rows are found by LORA_LAB_DATA, the model by LORA_LAB_MODELS. Runs that the result file holds are not repeated; delete it
to begin again. Beside the JSON file a table (.md) and a plot (.svg) are written. TRL and LitGPT are left out where they are not
installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import speed_report
from benchmarks.sources import commit, now
from benchmarks.tasks import _machine, _versions

_ROOT = Path(__file__).parents[1]
_OUT = Path(__file__).parent / "results" / "speed.json"
PEERS = ("trl", "trl_bf16", "trl_packed", "transformers_peft", "litgpt")
OWN = ("lora_lab", "lora_lab_plain")
_LIMIT = 900  # seconds of one run


@dataclasses.dataclass(frozen=True)
class Workload:
    """Rows, model, how it is held, and whom it is compared with."""

    rows: str  # short, mixed, long, or length:N (all of about so many tokens)
    peers: tuple[str, ...]
    quant: str = "none"
    checkpointing: bool = False
    model: str = "smollm2-135m-instruct-hf"  # or shape:..., a model of random weights
    steps: int = 3
    batch_size: int = 8

    def overrides(self, folder: Path) -> list[str]:
        """Of lora_lab; what peers are told is read from here too."""
        path = folder / "model" if self.model.startswith("shape:") else _models() / self.model
        return [
            "model=hub", f"model.path={path}", f"quant={self.quant}", "hardware=cpu", "tracker=none",
            f"data.train={folder}/rows.jsonl", "data.check=off", "data.duplicates=keep", "data.max_tokens=2048", "adapter.r=16",
            "adapter.lora_alpha=32", "optim.lr=2e-4", "optim.schedule=constant", "optim.warmup_steps=0",
            f"train.max_steps={self.steps}", "train.epochs=100", f"train.batch_size={self.batch_size}",
            f"train.gradient_checkpointing={str(self.checkpointing).lower()}", "train.save_steps=1000000",
        ]  # fmt: skip


WORKLOADS = {
    "mixed_bf16": Workload("mixed", ("lora_lab_plain", *PEERS)),
    "mixed_nf4": Workload("mixed", ("lora_lab_plain", "trl", "trl_bf16"), quant="nf4"),
    "long_bf16": Workload("long", ("lora_lab_plain", "transformers_peft"), batch_size=4),
    "short_bf16": Workload("short", ("lora_lab_plain", "trl_bf16", "transformers_peft"), batch_size=32),
    "mixed_int8": Workload("mixed", ("lora_lab_plain", "trl_bf16"), quant="int8"),
    "mixed_bf16_checkpointed": Workload("mixed", ("lora_lab_plain", "trl"), checkpointing=True),
    "mixed_nf4_checkpointed": Workload("mixed", ("lora_lab_plain", "trl"), quant="nf4", checkpointing=True),
    "vocabulary_262k": Workload("mixed", ("lora_lab_plain", "trl", "trl_bf16"), model="gemma-3-270m-hf", batch_size=4),
}
CURVES = {
    "length": {
        f"length_{length}": Workload(f"length:{length}", ("lora_lab_plain", "trl"), batch_size=4096 // length, steps=2)
        for length in (128, 256, 512, 1024, 2048)
    },
    # hidden size, layers, heads, key heads, width of the MLP: SmolLM2-135M and -360M, Llama 3.2 1B
    "size": {
        f"size_{name}": Workload("mixed", ("lora_lab_plain", "trl"), model=f"shape:{shape}", batch_size=4, steps=2)
        for name, shape in (("135M", "576,30,9,3,1536"), ("360M", "960,32,15,5,2560"), ("1.2B", "2048,16,32,8,8192"))
    },
}
EVERY = WORKLOADS | CURVES["length"] | CURVES["size"]


def gsm8k() -> list[dict[str, str]]:
    """GSM8K's questions and answers as prompts and completions."""
    file = Path(os.environ.get("LORA_LAB_DATA", "data")) / "gsm8k_train" / "train.jsonl.gz"
    if not file.exists():
        sys.exit(f"{file}: not found. Name the folder that holds it: LORA_LAB_DATA=FOLDER make bench")
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).split(b"\n") if line]
    return [{"prompt": row["question"], "completion": row["answer"]} for row in rows]


def _rows(kind: str, count: int) -> list[dict[str, str]]:
    """GSM8K questions and answers: as they are, five of them in a row, or the first sentence of the question and the result."""
    every = gsm8k()[: count * 5]
    if kind == "mixed":
        return every[:count]
    if kind.startswith("length:"):
        letters = int(2.6 * int(kind.removeprefix("length:")))  # a token of these texts has 2.75; the chat needs some
        text = "\n\n".join(row[side] for row in every for side in ("prompt", "completion")) * 3
        return [
            {
                "prompt": text[i * letters : (i + 1) * letters - letters // 2],
                "completion": text[(i + 1) * letters - letters // 2 : (i + 1) * letters],
            }
            for i in range(count)
        ]
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
        "--workloads",
        type=lambda text: text.split(","),
        default=["mixed_bf16", "mixed_nf4", "long_bf16"],
        help=f"of {', '.join(EVERY)}; or length, size: whole curves",
    )
    parser.add_argument("--systems", type=lambda text: text.split(","), help="instead of each workload's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=_OUT)
    args = parser.parse_args()
    args.workloads = [name for given in args.workloads for name in CURVES.get(given, [given])]
    missing = {name for name in ("trl", "litgpt") if importlib.util.find_spec(name) is None}
    for name in sorted(missing):
        print(f"{name} is not installed: left out", file=sys.stderr)
    result = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    result |= {
        "machine": _machine(),
        "versions": _versions(),
    }
    with tempfile.TemporaryDirectory(prefix="lora_lab_speed_") as temporary:
        folders = {name: Path(temporary) / name for name in args.workloads}
        specs = {name: _prepare(name, folder) for name, folder in folders.items()}
        for repeat in range(args.repeats):
            for name, spec in specs.items():
                for system in [*(args.systems or ("lora_lab", *EVERY[name].peers)), "matrix_products"]:
                    if system.partition("_")[0] in missing:
                        continue
                    if (name, system, repeat) in {
                        (run["workload"], run["system"], run["repeat"]) for run in result["runs"]
                    }:
                        continue
                    found = _run(system, spec, folders[name])
                    if found is not None:
                        head = {
                            "workload": name,
                            "system": system,
                            "repeat": repeat,
                            "commit": commit(),
                            "when": now(),
                        }
                        result["runs"].append({**head, **found})
                        _write(args.out, result)
                        print(_shown(result["runs"][-1]), flush=True)
    print(speed_report.table(result))
    speed_report.plot(result, args.out.with_suffix(".svg"))


def _prepare(name: str, folder: Path) -> dict[str, Any]:
    """Write the rows, and let lora_lab say which tokens they are, in which order, and how the adapter starts."""
    work = EVERY[name]
    folder.mkdir()
    if work.model.startswith("shape:"):
        # in a process of its own: the peak memory of a child begins with what its parent held when it was forked
        code = f"from benchmarks import speed; speed._random_model({work.model.removeprefix('shape:')!r}, speed.Path({str(folder / 'model')!r}))"
        subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True)
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
    (folder / "spec.json").write_text(json.dumps(own))
    worker = "lora_lab" if system in OWN else system
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


def _models() -> Path:
    return Path(os.environ.get("LORA_LAB_MODELS", "models"))


def _random_model(shape: str, folder: Path) -> None:
    """A Llama of a shape with random bfloat16 weights, and SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    sizes = dict(zip(names, map(int, shape.split(",")), strict=True))
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(_models() / "smollm2-135m-instruct-hf")
    config = LlamaConfig(**sizes, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _shown(run: dict[str, Any]) -> str:
    head = f"{run['workload']} {run['system']} {run['repeat']}:"
    if "gflops_per_second" in run:
        return f"{head} {run['gflops_per_second']:.0f} GFLOP/s"
    return (
        f"{head} {run['tokens_per_second']:.0f} tokens/s, {run['peak_gib'] or 0:.2f} GiB, first step after "
        f"{run['first_step_seconds']:.1f} s, loss {run['losses'][0]:.4f} -> {run['losses'][-1]:.4f}"
    )


def _write(out: Path, result: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, out)
    out.with_suffix(".md").write_text(speed_report.table(result))


if __name__ == "__main__":
    main()
