"""Merging, measured: python -m benchmarks.merge [--parts memory,write,bases,combine,gguf] [--runs demo=DIR,...] [--out RESULT.json]

memory: `lora-lab merge` of runs on a base of the shape of Llama 3.2 1B (random weights in bfloat16), unquantized and in 4 bits: the
peak memory of its process and of the one that reloads the checkpoint, as the kernel counts it: all that is resident, and of that what
is not mapped from files. What is mapped from files can be taken back at any time.

write: the merged checkpoint of a model of more than a gigabyte (random weights, the shape of Llama 3.2 1B), written file by file
and by peft's `merge_and_unload` with `save_pretrained`: seconds and peak memory, each in a process of its own, in turns.
bases: a 4-bit run of SmolLM2 and one of Gemma 3, merged into each base: held-out loss beside the model as trained.
combine: three adapters trained for three tasks on SmolLM2, combined by each method: each task's metrics, alone and combined.
gguf: the merged SmolLM2 and its adapter in llama.cpp.

`--runs` names trained runs of the recipes demo, dialogue_summary, shakespeare and of demo on Gemma (gemma); what is not named is
trained first, in a temporary folder. Needs the data and model folders that benchmarks/speed.py needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import speed
from benchmarks.sources import commit, now
from benchmarks.tasks import _machine, _versions

_OUT = Path(__file__).parent / "results" / "merge.json"
_SHAPE = "2048,16,32,8,8192"  # see speed.CURVES
_METHODS = ("cat", "svd", "magnitude_prune", "ties", "dare_linear", "dare_ties")
_RECIPES = {
    "demo": ["recipe=demo"],
    "dialogue_summary": ["recipe=dialogue_summary"],
    "shakespeare": ["recipe=shakespeare"],
    "gemma": ["recipe=demo", "model=gemma3_270m", "optim.lr=2e-4", "train.max_steps=12", "task.generate_rows=0"],
}
# the greedy answers that are compared are one token, and rows are short: more take minutes of a model of this size on a CPU, and no more memory
_MERGE = """
import sys
from lora_lab import cli
from lora_lab.export import text
from lora_lab.runtime import children
text.NEW_TOKENS = 1
run, watched = children.run, sys.argv.pop(1)
def told(command, **options):
    return run([*command[:2], "-c", watched, *command[2:]] if command[2].endswith("reload.py") else command, **options)
children.run = told
sys.exit(cli.main(["merge", *sys.argv[1:]]))
"""
# runs reload.py as it is run, and waits at its end until it has been looked at
_WATCHED = """
import runpy, sys, time
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
time.sleep(2)
"""
_METRICS = {"demo": ("loss", "exact_match"), "dialogue_summary": ("loss", "rougeL"), "shakespeare": ("loss",)}

_PEFT = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM  # libraries are imported before the time is taken
def merge(base, adapter, out):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True).save_pretrained(out, max_shard_size="2GB")
"""
_OWN = """
import torch
from pathlib import Path
from lora_lab.runtime import storage
from lora_lab.adapters import deltas
from lora_lab.base.load import ModelKind, skeleton
from lora_lab.base.weights import Weights
from lora_lab.merge import stream
from transformers import AutoModelForCausalLM, LlamaForCausalLM
def merge(base, adapter, out):
    found, weights, model = deltas.read(Path(adapter)), Weights(Path(base)), skeleton(Path(base), ModelKind())
    assert not stream.reason_against(model, weights, found)
    with storage.new_folder(Path(out)) as folder:
        stream.write(model, weights, found, torch.bfloat16, "2GB", folder)
"""
_TIMED = """
import json, resource, sys, time
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
merge(*sys.argv[1:4])
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "imports_gib": before / 2**20}))
"""

if TYPE_CHECKING:
    from lora_lab.merge import combine
    from lora_lab.run.setup import Live


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=["memory", "write", "bases", "combine", "gguf"]
    )
    parser.add_argument("--runs", type=lambda text: dict(part.split("=", 1) for part in text.split(",")), default={})
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=_OUT)
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    result |= {"machine": _machine(), "versions": _versions(), "commit": commit(), "when": now()}
    with tempfile.TemporaryDirectory(prefix="lora_lab_merge_") as temporary:
        folder = Path(temporary)
        parts = {
            "memory": lambda: {quant: _memory(folder, quant) for quant in ("none", "nf4")},
            "write": lambda: _write(folder, args.repeats),
            "bases": lambda: {name: _bases(_run(name, args.runs, folder)) for name in ("demo", "gemma")},
            "combine": lambda: _combine({name: _run(name, args.runs, folder) for name in _METRICS}),
            "gguf": lambda: _gguf(_run("demo", args.runs, folder), folder),
        }
        for name in args.parts:
            result[name] = parts[name]()
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(table(result))
    print(table(result))


def _run(name: str, runs: dict[str, str], folder: Path) -> Path:
    """The named run, trained if it is not there."""
    if name not in runs:
        runs[name] = str(folder / name)
        _lora_lab("train", *_RECIPES[name], "export=adapter", "tracker=none", f"run_dir={runs[name]}")
    return Path(runs[name])


def _lora_lab(*words: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_lab", *words],
        cwd=speed._ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 4):
        sys.exit(done.stdout[-2000:] + done.stderr[-3000:])
    return done.stdout


def _write(folder: Path, repeats: int) -> dict[str, Any]:
    # in a process of its own: the peak memory of a child begins with what its parent held when it was forked
    code = f"from benchmarks import merge; merge.make_random(merge.Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=speed._ROOT, check=True)
    found: dict[str, list[dict[str, float]]] = {"lora_lab": [], "peft": []}
    for repeat in range(repeats):
        for system, code in (("lora_lab", _OWN), ("peft", _PEFT)):
            out = folder / f"{system}_{repeat}"
            words = [sys.executable, "-c", code + _TIMED, str(folder / "base"), str(folder / "adapter"), str(out)]
            done = subprocess.run(words, cwd=speed._ROOT, capture_output=True, text=True, check=True)
            found[system].append(json.loads(done.stdout.splitlines()[-1]))
            print(system, found[system][-1], flush=True)
    gap = _largest_difference(folder / "lora_lab_0", folder / "peft_0")
    size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors")) / 2**30
    medians = {
        system: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for system, runs in found.items()
    }
    return {"model_gib": size, "runs": found, "medians": medians, "largest_difference": gap}


def _memory(folder: Path, quant: str) -> dict[str, Any]:
    """Peaks of a merge, the size of its base, and what was compared."""
    base, run = folder / "llama", folder / f"memory_{quant}"
    if not base.exists():
        make_llama(base)
    short = [{"prompt": row["prompt"][:30], "completion": row["completion"][:30]} for row in speed.gsm8k()[:8]]
    for name, rows in (("train", short[:4]), ("eval", short[4:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not run.exists():
        _lora_lab(
            "train", f"model.path={base}", f"quant={quant}", f"data.train={folder}/train.jsonl", f"data.eval={folder}/eval.jsonl",
            "hardware=cpu", "train.max_steps=1", "train.batch_size=1", "task.generate_rows=0", "export=adapter", "tracker=none",
            f"run_dir={run}",
        )  # fmt: skip
    loose = ("merge.parity_rows=1", "merge.max_kl=9", "merge.max_loss_increase=9", "merge.min_top1_agreement=0.01")
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _MERGE, _WATCHED, f"run={run}", f"data.eval={folder}/eval.jsonl", *loose],
        cwd=speed._ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
    )
    peaks = _peaks(process)
    report = json.loads((run / "merge_report.json").read_text())
    size = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2**30
    kept = ("base", "written", "merged_vs_base_and_adapter", "merged_vs_model_as_trained", "refused")
    return {
        "model_gib": size,
        "seconds": time.perf_counter() - began,
        "peaks": peaks,
        **{key: report[key] for key in kept},
    }


def _peaks(process: subprocess.Popen[bytes]) -> dict[str, dict[str, float]]:
    """GiB of a process and of those that it starts, until it ends; looked at every 100 ms."""
    found: dict[str, dict[str, float]] = {}
    while process.poll() is None:
        for pid, name in _family(process.pid).items():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:  # it has just ended
                continue
            lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            if "VmHWM" not in lines:
                continue
            own = found.setdefault(name, {"resident": 0.0, "anonymous": 0.0})
            for key, field in (("resident", "VmHWM"), ("anonymous", "RssAnon")):
                own[key] = max(own[key], int(lines[field].split()[0]) / 2**20)
        time.sleep(0.1)
    return found


def _family(parent: int) -> dict[int, str]:
    """A process, which merges, and its children, which reload."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        children = []
    return {parent: "merge", **dict.fromkeys(map(int, children), "reload")}


def make_llama(folder: Path) -> None:
    """A base of the shape of Llama 3.2 1B, written layer by layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, intermediate_size=8192, head_dim=64,
        vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=131072, rms_norm_eps=1e-5, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(speed._models() / "smollm2-135m-instruct-hf").save_pretrained(folder)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.manual_seed(0)
    where = {}
    for number, part in enumerate((model.model.embed_tokens, *model.model.layers, model.model.norm), 1):
        top = next(name for name, module in model.named_modules() if module is part)
        shapes = {f"{top}.{name}": one.shape for name, one in part.named_parameters()}
        tensors = {
            name: torch.ones(shape, dtype=torch.bfloat16)
            if "norm" in name
            else torch.randn(shape).mul_(0.02).bfloat16()
            for name, shape in shapes.items()
        }
        file = f"model-{number:05d}-of-{len(model.model.layers) + 2:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def make_random(folder: Path) -> None:
    """A base and an adapter on it, both of random numbers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    speed._random_model(_SHAPE, folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")


def _largest_difference(one: Path, other: Path) -> float:
    from lora_lab.base.weights import Weights

    first, second = Weights(one), Weights(other)
    assert set(first) == set(second)
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def _bases(run: Path) -> dict[str, Any]:
    """Figures of each policy, of the automatic choice, and which it was."""
    found = {}
    for policy in ("auto", "corrected"):
        _lora_lab("merge", f"run={run}", f"merge.base={policy}", "merge.parity_rows=64", "merge.max_loss_increase=9")
        report = json.loads((run / "merge_report.json").read_text())
        found |= report["bases"]
        found["chosen"] = report["base"] if policy == "auto" else found["chosen"]
        found["positions"] = report["positions"]
    return found


def _combine(runs: dict[str, Path]) -> list[dict[str, Any]]:
    """Each task's metrics by the base, by its own adapter, and by what each method makes of all three."""
    from lora_lab.config import compose
    from lora_lab.merge import combine

    sources = [combine.open_source(str(run), place) for place, run in enumerate(runs.values())]
    combine.check_together(sources)
    config = compose.load(sources[0].run.config)
    widest = sum(source.adapter.rank for source in sources)
    config = dataclasses.replace(config, adapter=combine.adapter_config(config, sources, widest))
    with combine.load_all(sources, config) as live:
        return _combined(live, dict(zip(runs, sources, strict=True)), widest)


def _combined(live: Live, sources: dict[str, combine.Source], widest: int) -> list[dict[str, Any]]:
    from lora_lab.config.merge import MergeConfig
    from lora_lab.merge import combine

    lines = [
        {"system": "base", **{name: live.seen_by(s.setup).measure_base().metrics for name, s in sources.items()}},
        {"system": "alone", **{name: combine.measure(live, s, s.name).metrics for name, s in sources.items()}},
    ]
    for method, weight in (("cat", 1 / 3), ("cat", 1.0), *((method, 1.0) for method in _METHODS[1:])):
        merge = MergeConfig(method=method)
        rank = combine.rank_of(merge, list(sources.values()))
        found, kept = combine.combined([s.adapter for s in sources.values()], [weight] * len(sources), merge, rank)
        combine.put(live, found, widest)
        line = {name: combine.measure(live, s, combine.COMBINED).metrics for name, s in sources.items()}
        lines.append({"system": method, "weight": weight, "rank": rank, "kept": kept, **line})
        print(lines[-1], flush=True)
    return lines


_LLAMA = """
import json, os, sys, xllamacpp
gguf, adapter, conversations = json.load(open(sys.argv[1]))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.verbosity = gguf, 1024, 1, -1
if adapter:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
server = xllamacpp.Server(params)
ask = lambda messages: server.handle_chat_completions({"messages": messages, "max_tokens": 80, "temperature": 0.0})
print(json.dumps([ask(messages)["choices"][0]["message"]["content"] for messages in conversations]), flush=True)
os._exit(0)  # taking the server down now and then waits for ever
"""
_TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, tokenizer, adapter, conversations = json.load(open(sys.argv[1]))
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
if adapter:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter)
found = []
for messages in conversations:
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=80, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    found.append(tokenizer.decode(made[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps(found))
"""


def _answers(code: str, given: list[Any], folder: Path) -> list[str]:
    (folder / "given.json").write_text(json.dumps(given))
    words = [sys.executable, "-c", code, str(folder / "given.json")]
    done = subprocess.run(words, cwd=speed._ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _gguf(run: Path, folder: Path) -> dict[str, Any]:
    """Proofs at f16 and q8_0, and answers to 16 held-out orders by llama.cpp beside transformers: merged, and adapter on its base."""
    from lora_lab.config import compose
    from lora_lab.data.dataset import first_examples
    from lora_lab.export import gguf, text
    from lora_lab.run.prepared import prepare

    _lora_lab("export", f"run={run}", "export.targets=[gguf,gguf_lora]", "export.gguf_type=f16")
    found = {"f16": json.loads((run / "export_report.json").read_text())}
    ready = prepare(compose.load(run / "config.yaml"), need_train=False)
    rows = [example.messages for example in first_examples(ready.held_out, 16)]
    asked, expected = [messages[:-1] for messages in rows], [messages[-1]["content"] for messages in rows]
    base = folder / "base.gguf"
    gguf.convert(ready.base.folder, base, "f16", text.ends_of(ready.encoder))
    [merged], [adapter] = (list((run / "export" / name).glob("*.gguf")) for name in ("gguf", "gguf_lora"))
    systems = {
        "merged in llama.cpp": (_LLAMA, [str(merged), None, asked]),
        "merged in transformers": (_TRANSFORMERS, [str(run / "merged"), str(run / "merged"), None, asked]),
        "adapter in llama.cpp": (_LLAMA, [str(base), str(adapter), asked]),
        "adapter in transformers": (
            _TRANSFORMERS,
            [str(ready.base.folder), str(run / "merged"), str(run / "adapter"), asked],
        ),
    }
    answers = {name: _answers(code, given, folder) for name, (code, given) in systems.items()}
    found["expected"], found["answers"] = expected, answers
    _lora_lab("export", f"run={run}", "export.targets=[gguf]", "export.gguf_type=q8_0")
    return found | {"q8_0": json.loads((run / "export_report.json").read_text())["gguf"]}


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = result["machine"]
    lines = [
        "# Merging", "",
        "Made by `python -m benchmarks.merge`.", "",
        f"- {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; commit {result['commit']}",
        f"- {', '.join(f'{name} {version}' for name, version in result['versions'].items())}",
    ]  # fmt: skip
    if "memory" in result:
        size = result["memory"]["none"]["model_gib"]
        lines += [
            "", f"## Peak memory of a merge ({size:.2f} GiB in bfloat16)", "",
            "| base | process | resident GiB | of that not mapped from files | seconds in all |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for quant, part in result["memory"].items():
            for name, peak in part["peaks"].items():
                lines.append(
                    f"| {quant} | {name} | {peak['resident']:.2f} | {peak['anonymous']:.2f} | {part['seconds']:.0f} |"
                )
    if "write" in result:
        part = result["write"]
        lines += [
            "", f"## Writing the merged checkpoint ({part['model_gib']:.2f} GiB in bfloat16, r=16 on all linear layers)", "",
            "| | seconds | peak GiB | of that, imports |", "|---|---|---|---|",
        ]  # fmt: skip
        for system, median in part["medians"].items():
            lines.append(
                f"| {system} | {median['seconds']:.1f} | {median['peak_gib']:.2f} | {median['imports_gib']:.2f} |"
            )
        own, peft = part["medians"]["lora_lab"], part["medians"]["peft"]
        lines += [
            "",
            f"Time {own['seconds'] / peft['seconds']:.2f} x, peak {own['peak_gib'] / peft['peak_gib']:.0%} of peft's; largest difference of a weight {part['largest_difference']:.1e}.",
        ]
    for name, part in result.get("bases", {}).items():
        lines += [
            "", f"## What to merge into: {name} ({part['positions']} held-out positions; taken: {part['chosen']})", "",
            "| base | loss | loss as trained | KL | top-1 agreement |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for policy, gap in part.items():
            if isinstance(gap, dict):
                lines.append(
                    f"| {policy} | {gap['loss']:.4f} | {gap['reference_loss']:.4f} | {gap['kl']:.4f} | {gap['top1_agreement']:.3f} |"
                )
    if "combine" in result:
        heads = [f"{name} {metric}" for name, metrics in _METRICS.items() for metric in metrics]
        lines += [
            "",
            "## Three adapters as one",
            "",
            f"| | weight | rank | norm kept | {' | '.join(heads)} |",
            "|---" * (4 + len(heads)) + "|",
        ]
        for line in result["combine"]:
            cells = [
                f"{line[name].get(metric, float('nan')):.3f}"
                for name, metrics in _METRICS.items()
                for metric in metrics
            ]
            told = (
                [f"{line['weight']:.2f}", str(line["rank"]), f"{line['kept']:.0%}"] if "rank" in line else ["", "", ""]
            )
            lines.append(f"| {line['system']} | {' | '.join(told + cells)} |")
    if "gguf" in result:
        lines += [
            "",
            "## llama.cpp beside transformers",
            "",
            "| | positions | top-1 agreement | KL | loss | loss of the reference |",
            "|---|---|---|---|---|---|",
        ]
        part = result["gguf"]
        for name, gap in (
            ("merged, f16", part["f16"]["gguf"]),
            ("merged, q8_0", part["q8_0"]),
            ("adapter over the base at f16", part["f16"]["gguf_lora"]),
        ):
            lines.append(
                f"| {name} | {gap['positions']} | {gap['top1_agreement']:.3f} | {gap['kl']:.5f} | {gap['loss']:.4f} | {gap['reference_loss']:.4f} |"
            )
        lines += ["", f"Answers to {len(part['expected'])} held-out orders:", ""]
        for name in ("merged", "adapter"):
            ours, theirs = (part["answers"][f"{name} in {where}"] for where in ("llama.cpp", "transformers"))
            same = sum(one.strip() == other.strip() for one, other in zip(ours, theirs, strict=True))
            right = sum(one.strip() == other.strip() for one, other in zip(ours, part["expected"], strict=True))
            lines.append(
                f"- {name}: {same} the same text in llama.cpp as in transformers, {right} as expected to the letter"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
