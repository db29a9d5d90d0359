"""What every adapter method can do, measured: python -m benchmarks.methods [--only METHOD,...] [--speed] [--write]

Each method trains on three tiny models (decoder, encoder, encoder-decoder) that are stored as float32, NF4 and int8, also where its
section says that it cannot: a section that has become wrong shows. In float32 it trains for other tasks too. Then it is merged, onto the
published weights and, of a quantized base, onto the dequantized ones. With --speed all methods train in turns with LoRA on the default base. Results are kept in
benchmarks/results/methods.json as they come, and docs/methods.md is written from them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.sources import ROOT
from lora_lab import cli
from lora_lab.adapters import ADAPTERS, files
from lora_lab.adapters.attach import trainable, without_adapter
from lora_lab.adapters.base import AdapterSection
from lora_lab.config import compose
from lora_lab.config.run import RunConfig
from lora_lab.errors import Interrupted
from lora_lab.export.targets import reason_against
from lora_lab.run import pipeline, run_dir
from lora_lab.run.prepared import prepare
from lora_lab.run.setup import Live
from lora_lab.runtime import storage
from lora_lab.sweep import cohort, jobs
from lora_lab.training.cohort import Member
from lora_lab.training.loop import fit
from tests import families
from tests.adapters.test_adapters import FITTING
from tests.conftest import write_jsonl
from tests.tasks.test_tasks import CASES
from tests.training.test_resume import stop_at

_RESULTS = ROOT / "benchmarks" / "results" / "methods.json"
_DOCUMENT = ROOT / "docs" / "methods.md"
MODELS = {
    "decoder": ("completion", "llama"),
    "encoder": ("classification", "bert"),
    "encoder-decoder": ("seq2seq", "t5"),
}
# Other tasks, on such models in float32, with the options and rows of their cases in the tests of tasks
OTHER_TASKS = {"embedding": "encoder", "reranker": "encoder", "distillation": "decoder"}
FORMATS = {
    "decoder": ("none", "nf4", "fp4", "int8", "torchao_int8"),
    "encoder": ("none", "nf4", "int8", "torchao_int8"),
    "encoder-decoder": ("none", "nf4", "int8", "torchao_int8"),
    **dict.fromkeys(OTHER_TASKS, ("none",)),
}
_STEPS = 4
_ROUNDING = 1e-4  # of a logit
_IN_TURNS = 6  # methods that train beside LoRA on one base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="METHOD,...; these are repeated")
    parser.add_argument(
        "--speed", action="store_true", help="measure parameters, time and memory on the default base instead"
    )
    parser.add_argument("--tasks", action="store_true", help="measure anew what other tasks make of the methods alone")
    parser.add_argument("--write", action="store_true", help="only write the page from the results that there are")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    known = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {"methods": {}, "speed": {}}
    known["versions"] = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")
    }
    only = list(filter(None, told.only.split(",")))
    if not told.write:
        for method in only or ADAPTERS:
            if not told.speed and (only or told.tasks or method not in known["methods"]):
                known["methods"][method] = (
                    known["methods"][method] | _other_tasks(method) if told.tasks else row(method)
                )
                storage.write_text(_RESULTS, storage.dump_json(known))
                print(method, json.dumps(known["methods"][method]), flush=True)
        if told.speed:
            known["speed"] |= speed(only or list(ADAPTERS))
            storage.write_text(_RESULTS, storage.dump_json(known))
    _DOCUMENT.write_text(page(known), encoding="utf-8")


# -- one method -------------------------------------------------------------------------------------------------------------


def row(method: str) -> dict[str, Any]:
    """What a method does on each model in each format, and as it is run."""
    found: dict[str, Any] = {}
    for model, formats in FORMATS.items():
        for quant in formats:
            found |= _cell(method, model, quant)
    with tempfile.TemporaryDirectory() as folder, _silent():
        found["run"] = as_run(method, Path(folder))
    return found


def _cell(method: str, model: str, quant: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, _promised(method), _silent():
        return {f"{model} {quant}": cell(method, model, quant, Path(folder))}


def _other_tasks(method: str) -> dict[str, Any]:
    """`row`, of the other tasks alone."""
    found: dict[str, Any] = {}
    for task in OTHER_TASKS:
        found |= _cell(method, task, "none")
    return found


@contextlib.contextmanager
def _promised(method: str) -> Iterator[None]:
    """Inside the block the section says nothing against any format, or against merging."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ADAPTERS[method], "quantized", FORMATS["decoder"])
        patch.setattr(ADAPTERS[method], "against_merging", "")
        yield


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with (
        families._reloaded_here(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


def cell(method: str, model: str, quant: str, folder: Path) -> dict[str, Any]:
    """Fresh, trained, merged; where something fails, what it says."""
    found: dict[str, Any] = {}
    try:
        config = _config(method, model, quant, folder)
        with prepare(config).loaded() as live:
            found |= _trained(live, config)
        shutil.rmtree(config.run_dir)
        path = pipeline.train(config).path
        found |= {"loss": [json.loads((path / "result.json").read_text())[name]["loss"] for name in ("base", "tuned")]}
    except Exception as error:
        return found | {"trains": False, "why": _short(error)}
    return found | {
        "merged": {
            base: _merged(path, base) for base in ("full_precision", *(["dequantized"] if quant != "none" else []))
        }
    }


def _config(method: str, model: str, quant: str, folder: Path, *more: str) -> RunConfig:
    made_for = OTHER_TASKS.get(model, model)
    task, family = MODELS[made_for]
    family = "starcoder2" if method == "beft" and made_for == "decoder" else family  # whose layers have a bias
    base, rows = folder / "base", [folder / "train.jsonl", folder / "eval.jsonl"]
    if not base.exists():
        base.mkdir()
        families.make(task, family, base)
        for number, file in enumerate(rows):
            write_jsonl(file, _rows(model, task, 12 - 8 * number, number))
    own, options = FITTING.get(method, []), families.TASKS[task][2]
    if model in OTHER_TASKS:
        task, options = model, CASES[model][0]
    if method == "trainable_tokens" and made_for == "encoder":  # which has 64
        own = [f"adapter.token_indices={list(range(5, 60))}".replace(" ", "")]
    told = [
        "model=hub", f"model.path={base}", "model.dtype=float32", f"quant={quant}", "tracker=none", "hardware=cpu", f"task={task}",
        f"data.train={rows[0]}", f"data.eval={rows[1]}", "data.max_tokens=64", "data.check=warn", "optim.lr=0.003", f"adapter={method}",
        *own, "train.batch_size=2", f"train.max_steps={_STEPS}", "export.dtype=float32", f"run_dir={folder}/run", *options,
    ]  # fmt: skip
    return compose.compose([*told, *more])


def _rows(model: str, task: str, count: int, seed: int) -> list[dict[str, Any]]:
    if model not in OTHER_TASKS:
        return families._rows(task, count, seed)
    draw = random.Random(seed)
    return [CASES[model][2](draw) for _ in range(count)]


def _trained(live: Live, config: RunConfig) -> dict[str, Any]:
    setup, model = live.setup, live.model
    with without_adapter(model):
        base = _logits(live)
    fresh = float((_logits(live) - base).abs().max())
    own = {one.data_ptr() for one in trainable(model).values()}
    frozen = {name: _content(one) for name, one in model.state_dict().items() if _place(one) not in own}
    before = {name: one.clone() for name, one in files.tensors_of(model, "default").items() if one.data_ptr() in own}
    member = Member("default", config, run_dir.create(config), setup.base, model, setup.training_rows(), setup.task)
    fit([member], setup.training_rows(), None, setup.accelerator)
    after = files.tensors_of(model, "default")
    return {
        "fresh": fresh,
        "trains": all(not torch.equal(one, after[name]) for name, one in before.items()),
        "frozen": all(torch.equal(_content(model.state_dict()[name]), one) for name, one in frozen.items()),
        "scale": float(base.abs().max()),
    }


def _content(tensor: torch.Tensor) -> torch.Tensor:
    """What is stored, also of torchao's tensors."""
    return tensor.qdata.clone() if hasattr(tensor, "qdata") else tensor.clone()


def _place(tensor: torch.Tensor) -> int:
    return tensor.qdata.data_ptr() if hasattr(tensor, "qdata") else tensor.data_ptr()


@torch.no_grad()
def _logits(live: Live) -> torch.Tensor:
    setup = live.setup
    rows = setup.training_rows()
    batch = setup.task.collate([rows[0][0]], np.random.default_rng(0))
    return setup.task.logits(live.model.eval(), batch)


def _merged(path: Path, base: str) -> float | str:
    """The largest difference of a logit to base + adapter, or why there is no merge."""
    shutil.rmtree(path / "merged", ignore_errors=True)
    try:
        pipeline.merge(str(path), [f"merge.base={base}", "export.dtype=float32"])
    except Exception as error:
        return _short(error)
    return float(json.loads((path / "merge_report.json").read_text())["merged_vs_base_and_adapter"]["max_logit_diff"])


def as_run(method: str, folder: Path) -> dict[str, Any]:
    """Of the decoder in float32: whether a resumed run, and a member of a sweep, are the run alone; what it exports."""
    alone = pipeline.train(
        _config(method, "decoder", "none", folder, f"run_dir={folder}/alone", "train.save_steps=2")
    ).path
    cli.signals.install()
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Interrupted):
        stop_at(patch, _STEPS - 1)
        pipeline.train(_config(method, "decoder", "none", folder, f"run_dir={folder}/stopped", "train.save_steps=2"))
    pipeline.resume(str(folder / "stopped"), [])
    told = [("train.save_steps=2",), ("train.save_steps=2", "optim.lr=0.002")]
    found = jobs.jobs_of(
        [
            _config(method, "decoder", "none", folder, *more, f"run_dir={folder}/sweep/{i}")
            for i, more in enumerate(told)
        ]
    )
    with contextlib.redirect_stdout(said := io.StringIO()):
        cohort.train(found)
    passes = "in each pass" in said.getvalue()
    return {
        "resumed": _distance(alone, folder / "stopped"),
        "in a sweep": "passes" if passes else "turns",
        "beside another": _distance(alone, folder / "sweep/0"),
        "exports": {
            name: reason_against(ADAPTERS[method](), name) for name in ("adapter", "hf", "vllm", "gguf", "gguf_lora")
        },
    }


def _distance(one: Path, other: Path) -> float:
    """How far two adapters are apart, as a share of the first's norm; 0: the same bits."""
    found, expected = (_flat(folder) for folder in (other, one))
    return float((found - expected).norm() / expected.norm())


def _flat(folder: Path) -> torch.Tensor:
    state = load_file(folder / "adapter" / files.WEIGHTS)
    return torch.cat([state[name].flatten().double() for name in sorted(state)])


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# -- all methods on the default base ----------------------------------------------------------------------------------------


def speed(methods: list[str]) -> dict[str, dict[str, float]]:
    """Trained parameters, time of a step beside LoRA's, memory of its own: groups of methods train in turns with LoRA on one base."""
    found: dict[str, dict[str, float]] = {}
    others = [method for method in methods if method != "lora"]
    for start in range(0, len(others), _IN_TURNS):
        with tempfile.TemporaryDirectory() as folder:
            found |= _speed(["lora", *others[start : start + _IN_TURNS]], Path(folder))
    return found


def _speed(methods: list[str], folder: Path) -> dict[str, dict[str, float]]:
    tokens = {"trainable_tokens": [f"adapter.token_indices={list(range(64))}".replace(" ", "")]}
    told = [
        "recipe=demo",
        "quant=none",
        "data.eval=null",
        "task.generate_rows=0",
        "train.max_steps=8",
        "train.batch_size=2",
        "tracker=none",
        "hardware=cpu",
        "export.targets=[]",
    ]
    found = jobs.jobs_of(
        [
            compose.compose([*told, f"adapter={method}", *tokens.get(method, []), f"run_dir={folder}/{method}"])
            for method in methods
        ]
    )
    cohort.train(found)
    rows = {}
    for method, job in zip(methods, found, strict=True):
        if job.result is None:
            print(f"{method}: {job.error}", flush=True)
            continue
        rows[method] = {
            "parameters": job.result["coverage"]["trainable_parameters"],
            "seconds": job.result["train_seconds"],
            "own_mib": job.result["own_memory_mib"],
        }
    lora = rows["lora"]["seconds"]
    return {method: one | {"step": one["seconds"] / lora} for method, one in rows.items()}


# -- the page ---------------------------------------------------------------------------------------------------------------

_HEAD = """# Adapter methods

Every method of peft {peft} that lora_lab trains, tried on tiny models (decoder: Llama; encoder: BERT; encoder-decoder: T5) with {torch}, {transformers},
{bitsandbytes}. `make methods-table` makes this page anew; `lora-lab methods` shows the first table in a terminal. A method is chosen with
`adapter=NAME`; its settings have peft's names, and `lora-lab config --keys` lists them.

- **nf4, fp4, int8, torchao_int8**: whether it trains on such a base; a combination that does not is refused before anything is loaded.
- **fresh**: *=* the fresh adapter gives what the base gives (to 1e-4 of a logit); *≠* it does not.
- **merge**: the largest difference of a logit between the merged checkpoint and base + adapter, in float32.
- **exports** beside the adapter itself, which every method has. **sweep**: whether members of a sweep share passes or take turns.
- **parameters**, **step** and **memory** on SmolLM2-135M with the method's own defaults: what trains, the time of a step (2 rows, about 250 tokens) as a multiple of
  LoRA's in the same process, and MiB for adapter, gradients and optimizer; –: not measured.

Of every method it was shown besides: only the adapter trains, every frozen tensor keeps its bytes, the saved adapter is loaded as it was,
a resumed run is the run to the bit, and a member that takes turns with others is the run alone to the bit.
"""


def page(known: dict[str, Any]) -> str:
    versions = {name: f"{name} {version}" for name, version in known["versions"].items()}
    lines = [_HEAD.format(**versions | {"peft": known["versions"]["peft"]})]
    lines += [
        "| method | adapter= | nf4 | fp4 | int8 | torchao_int8 | fresh | merge | exports | sweep | parameters | step | memory |",
        "|" + "---|" * 13,
    ]
    for method, found in known["methods"].items():
        lines.append("| " + " | ".join(_cells(method, found, known["speed"].get(method))) + " |")
    lines += [
        "",
        "## By model",
        "",
        "Trained on a model of each make, in each format. *part*: some of its tensors get no gradient there. *no*: it cannot be trained or "
        "merged so, or a fresh one is not the base; what is promised by a method is what works on all three.",
        "",
    ]
    lines += _marks(known, {f"{model} {quant}": f"{model} {quant}" for model in MODELS for quant in FORMATS[model]})
    tasks = {f"{model} none": task for model, (task, _) in MODELS.items()} | {
        f"{name} none": name for name in OTHER_TASKS
    }
    lines += [
        "",
        "## By task",
        "",
        "Trained for a task in float32 and merged: embedding and reranker on the encoder, distillation on the decoder, the others as above. "
        "Classification and reranker have a head of their own, embedding has none.",
        "",
        *_marks(known, tasks),
        "",
        "## What stands against it",
        "",
    ]
    for method in known["methods"]:
        told = _against(ADAPTERS[method]())
        lines += [f"- **{method}**: {'; '.join(told)}."] if told else []
    return "\n".join(lines) + "\n"


def _marks(known: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """A table of what works.

    Args:
        columns: cell -> heading.
    """
    rows = [
        f"| {method} | " + " | ".join(_mark(found[name], ADAPTERS[method]()) for name in columns) + " |"
        for method, found in known["methods"].items()
    ]
    return ["| adapter= | " + " | ".join(columns.values()) + " |", "|" + "---|" * (len(columns) + 1), *rows]


def _cells(method: str, found: dict[str, Any], speed: dict[str, float] | None) -> list[str]:
    section, plain = ADAPTERS[method](), found["decoder none"]
    merged = plain.get("merged", {}).get("full_precision")
    exports = [
        name for name, against in found["run"]["exports"].items() if not against and name not in ("adapter", "hf")
    ]
    return [
        section.label,
        f"`{method}`",
        *("no" if section.against_quant(quant) else "yes" for quant in FORMATS["decoder"][1:]),
        "=" if plain.get("fresh", 1) < 1e-4 else "≠",
        f"{merged:.0e}" if isinstance(merged, float) else "no",
        ", ".join(exports) or "–",
        found["run"]["in a sweep"],
        *((f"{speed['parameters']:,}", f"{speed['step']:.2f}", f"{speed['own_mib']:.1f}") if speed else ("–",) * 3),
    ]


def works(cell: dict[str, Any], section: AdapterSection) -> bool:
    """Whether a method does in a cell what it must: it alone trains, a fresh one is the base where it is said to be, and what can be
    merged is."""
    merged = all(isinstance(one, float) and one <= _ROUNDING for one in cell.get("merged", {}).values())
    return bool(
        cell.get("trains")
        and cell.get("frozen")
        and (section.fresh_differs or cell["fresh"] < _ROUNDING)
        and (section.against_merging or merged)
    )


def _mark(cell: dict[str, Any], section: AdapterSection) -> str:
    if works(cell, section):
        return "yes"
    return "part" if cell.get("frozen") and not cell["trains"] else "no"


def _against(section: AdapterSection) -> list[str]:
    formats = {quant: section.against_quant(quant) for quant in FORMATS["decoder"][1:]}
    told = [
        f"{', '.join(quant for quant in formats if formats[quant] == why)}: {why}"
        for why in dict.fromkeys(filter(None, formats.values()))
    ]
    told += [f"fresh: {section.fresh_differs}"] * bool(section.fresh_differs)
    return told + [f"merge: {section.against_merging}"] * bool(section.against_merging)


if __name__ == "__main__":
    main()
