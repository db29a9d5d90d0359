"""Adapter folders for other servers: peft's own layout, and the part of it that vLLM and SGLang read."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lab.adapters import deltas, files
from lora_lab.adapters.methods.lora import of_scale_one
from lora_lab.base.resolve import is_hub_id
from lora_lab.base.tokenizer import save_tokenizer
from lora_lab.errors import ExportError
from lora_lab.export import text
from lora_lab.merge import merge
from lora_lab.merge.merge import adapted
from lora_lab.run.prepared import Trained
from lora_lab.run.setup import Setup
from lora_lab.verify.parity import Probe, compare, disagreements, logits

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank can be


def check(setup: Setup) -> Iterator[str]:
    """What peft alone cannot load onto the base as it is."""
    if setup.kind.new_modules:
        yield (
            f"export.targets: adapter: with a head of its own ({', '.join(setup.kind.new_modules)}) it loads only onto a model that "
            "was made for it. Export hf (merged); the run's adapter/ is there in any case."
        )


def check_vllm(setup: Setup) -> Iterator[str]:
    """What vLLM and SGLang cannot load."""
    if setup.kind.auto_class != "AutoModelForCausalLM":
        yield f"export.targets: vllm needs a causal LM; task={setup.config.task.name} produces a different model type. Drop it."
    if setup.experts:
        yield "export.targets: vllm: the adapter reaches into experts. Export hf (merged), or name other adapter.target_modules."
    if setup.kind.whole:
        yield f"export.targets: vllm: loads no whole modules beside LoRA ({', '.join(setup.kind.whole)}). Export hf (merged)."
    widest = 0 if setup.config.adapter.against_delta else setup.config.adapter.widest
    if widest > _VLLM_RANKS[-1]:
        yield f"export.targets: vllm: loads ranks up to {_VLLM_RANKS[-1]}, not {widest}. Lower adapter.r, or export hf (merged)."


def make(trained: Trained, rows: Probe, folder: Path) -> dict[str, Any]:
    """The adapter as it was saved, proved in plain peft."""
    for file in trained.run.adapter.iterdir():
        if file.name != "manifest.json":
            shutil.copy(file, folder)
    return _proved(trained, rows, folder, "adapter")


def make_vllm(trained: Trained, rows: Probe, folder: Path) -> dict[str, Any]:
    """The same update with one rank and scale 1 in every layer: vLLM reads neither patterns nor rsLoRA of all versions alike."""
    run, setup = trained.run, trained.setup
    adapter, config = deltas.read(run.adapter, setup.skeleton()), setup.config
    plain = of_scale_one([config.adapter], adapter.rank, sorted(adapter.layers))
    if isinstance(plain.target_modules, str) or plain.exclude_modules or plain.layers_to_transform:
        names = sorted(adapter.layers)
        plain = dataclasses.replace(plain, target_modules=names, exclude_modules=None, layers_to_transform=None)
    peft_config = plain.peft_config(setup.kind.peft_task_type)
    learned = files.learned(run.adapter)
    files.write_tensors(folder, adapter.tensors(adapter.rank), peft_config, config, setup.base, learned)
    limit = vllm_rank(adapter.rank)
    base = setup.base.name if is_hub_id(setup.base.name) else setup.base.folder
    final = run.path / "export/vllm"
    serve = f"vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules {config.name}={final}"
    if _with_tokenizer(setup, rows, folder):
        serve += f" --tokenizer {final} --generation-config {final}"
    return {"serve": serve, **_proved(trained, rows, folder, "vllm")}


def vllm_rank(rank: int) -> int:
    """What vLLM's `--max-lora-rank` must be for an adapter of this rank, which `check_vllm` has let through."""
    return next(one for one in _VLLM_RANKS if one >= rank)


def _with_tokenizer(setup: Setup, rows: Probe, folder: Path) -> bool:
    """Put the run's tokenizer, template and end tokens beside the adapter, where the base's own folder would be read as something
    else; whether that was needed.

    Raises:
        ExportError: they are not what the run was trained with.
    """
    from transformers import GenerationConfig

    encoder = setup.encoder
    asked = text.prompts(encoder, rows.examples)
    settings = setup.base.folder / "generation_config.json"
    if settings.is_file() and not text.folder_problems(setup.base.folder, encoder, asked):
        return False
    save_tokenizer(encoder.tokenizer, folder)
    known = GenerationConfig.from_pretrained(setup.base.folder) if settings.is_file() else GenerationConfig()
    merge.add_ends(known, encoder)
    known.save_pretrained(folder)
    problems = text.folder_problems(folder, encoder, asked)
    if problems:
        raise ExportError(f"vllm: {'; '.join(problems)}. Nothing is kept.")
    return True


def _proved(trained: Trained, rows: Probe, folder: Path, target: str) -> dict[str, Any]:
    """Compare the folder, loaded by plain peft, with the adapter as lora_lab puts it on the unquantized base."""
    setup, auto_class = trained.setup, trained.setup.kind.auto_class
    one = adapted("full_precision" if setup.base.published is None else "dequantized", trained)
    reference, answers = logits(one.model, rows, setup.device), one.answers(rows)
    del one
    found, agreed = answers.compared(
        setup.base.folder, auto_class, rows, reference, setup.device, setup.config.export.dtype, folder
    )
    gap = compare(reference, found, rows)
    wrong = disagreements(gap, setup.config.merge)
    if agreed.parting:
        wrong.append(f"greedy answers part: {agreed.parting}")
    if wrong:
        raise ExportError(
            f"{target}: outputs differ between peft and the trained adapter: {'; '.join(wrong)}. Nothing is kept."
        )
    return {"loader": "peft", "positions": rows.num_items, **dataclasses.asdict(gap), **agreed.told()}
