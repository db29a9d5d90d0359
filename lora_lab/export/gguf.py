"""GGUF files for llama.cpp and what is built on it, of a merged checkpoint or of an adapter alone."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax

from lora_lab import children, console, storage
from lora_lab.adapters import updates
from lora_lab.errors import ConfigError, ExportError
from lora_lab.export import ollama
from lora_lab.export.convert import CHECK, K_QUANTS
from lora_lab.export.job import Job
from lora_lab.merge.parity import disagreements, loss_increase, reloaded_logits

_PACKAGES = ("auto_round", "sentencepiece", "xllamacpp")


@dataclasses.dataclass(frozen=True)
class TopGap:
    """How far llama.cpp's next-token distributions are from the reference's, of which its most likely tokens are known.

    `kl` is taken over those tokens and all others together, so it is at most the whole one. The losses are over the positions
    whose true token is among them, a share `truth_known` of all.
    """

    positions: int
    truth_known: float
    kl: float
    top1_agreement: float
    reference_loss: float
    loss: float


def check(job: Job, target: str) -> Iterator[str]:
    """What stands against this target, before anything is trained."""
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        yield f"export.targets: {target} needs {', '.join(absent)}. pip install 'lora-lab[gguf]'"
        return
    if job.kind.auto_class != "AutoModelForCausalLM":
        yield f"export.targets: {target} is for models that write; task={job.config.task.name} makes another. Drop it."
        return
    if target == "gguf_lora" and job.config.adapter.use_dora:
        yield "export.targets: gguf_lora: llama.cpp has no DoRA. Export gguf (merged), or train with adapter=lora."
        return
    if target == "gguf_lora" and job.base.published is not None:
        yield (
            f"export.targets: gguf_lora: the base was published in {job.base.published.method}, which llama.cpp's conversion cannot read to "
            "prove the adapter over it. Export gguf (merged)."
        )
        return
    if target == "gguf_lora" and job.experts:
        yield "export.targets: gguf_lora: the adapter reaches into experts. Export gguf (merged), or name other adapter.target_modules."
        return
    if target == "ollama" and job.encoder.chat:
        try:
            ollama.turns(job.encoder)
        except ConfigError as error:
            yield str(error)
            return
    reason = _reason_against(job.base.folder)
    if reason:
        yield (
            f"export.targets: {target}: llama.cpp's conversion cannot take this base ({reason}). Drop the target; hf and adapter always "
            "load."
        )


@functools.lru_cache
def _reason_against(base: Path) -> str:
    """What the conversion says against the base's architecture or tokenizer; empty if it takes them."""
    try:
        convert(base, Path("/dev/null"), CHECK)
    except ExportError as error:
        return str(error).partition(": ")[2].removesuffix(".")
    return ""


def make(job: Job, folder: Path, with_modelfile: bool = False) -> dict[str, Any]:
    """Write the merged checkpoint as GGUF, and perhaps Ollama's Modelfile; what was proved of it.

    Raises:
        ExportError: llama.cpp does not load it, or says something else than transformers does of the merged checkpoint.
    """
    kind = job.config.export.gguf_type
    file = folder / f"{job.config.name}-{kind}.gguf".replace(" ", "_")
    convert(job.merged, file, kind)
    if with_modelfile:
        (folder / "Modelfile").write_text(ollama.modelfile(file.name, job.encoder), encoding="utf-8")
    reference = reloaded_logits(job.merged, job.kind.auto_class, job.rows, job.device, job.exact)
    proved = _proved(job, file, reference, exact=kind in ("f32", "f16", "bf16"))
    return {"type": kind, **_beginning(job, file), **proved}


def _beginning(job: Job, file: Path) -> dict[str, bool]:
    """What llama.cpp will put before a text by itself, as the file says: it must be what the tokenizer puts there.

    Raises:
        ExportError: it is something else, so prompts would begin otherwise than in training.
    """
    import gguf

    field = gguf.GGUFReader(file).get_field(gguf.Keys.Tokenizer.ADD_BOS)
    if field is None:
        return {}
    tokenizer, adds = job.encoder.tokenizer, bool(field.contents())
    if adds != (tokenizer.bos_token_id in job.encoder.marks.before):
        raise ExportError(
            f"{file.name}: llama.cpp would {'put' if adds else 'not put'} {tokenizer.bos_token!r} before every text, and the tokenizer "
            f"does{' not' if adds else ''}. Nothing is kept. Set add_bos_token in the base's tokenizer_config.json to what is right."
        )
    if adds:
        again = ", and drops the one that the chat template writes" if job.encoder.chat else ""
        console.say("export", f"{file.name}: llama.cpp and Ollama put {tokenizer.bos_token!r} before every text{again}")
    return {"adds_bos": adds}


def make_lora(job: Job, folder: Path) -> dict[str, Any]:
    """Write the adapter as GGUF, for any GGUF of its base; proved over the base at f16.

    Raises:
        ExportError: as `make`.
    """
    adapter = updates.read(job.run.adapter)
    file = folder / f"{job.config.name}-lora.gguf".replace(" ", "_")
    with storage.scratch() as scratch:
        factors = {}
        for name, update in adapter.layers.items():
            same = update.filled(adapter.rank)
            factors |= {f"{name}.a": same.down.contiguous(), f"{name}.b": same.up.contiguous()}
        save_file(factors, f"{scratch}/factors.safetensors")
        base = scratch / "base.gguf"
        convert(job.base.folder, base, "f16", f"{scratch}/factors.safetensors", str(file))
        reference = reloaded_logits(
            job.base.folder, job.kind.auto_class, job.rows, job.device, job.exact, job.run.adapter
        )
        return _proved(job, base, reference, exact=True, adapter=file)


def convert(folder: Path, file: Path, kind: str, *adapter: str) -> None:
    if kind in K_QUANTS and shutil.which("llama-quantize"):
        with storage.scratch(file.parent) as scratch:
            whole = scratch / "f16.gguf"
            convert(folder, whole, "f16")
            _run(["llama-quantize", str(whole), str(file), kind.upper()], f"llama-quantize to {kind}")
        return
    script = str(Path(__file__).with_name("convert.py"))
    words = [sys.executable, "-P", script, str(folder), str(file), kind, *adapter]
    _run(words, f"llama.cpp's conversion of {folder}")


def _run(words: list[str], what: str) -> None:
    done = children.run(words, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in reversed(lines) if "Error" in line or "error" in line), lines[-1])
        raise ExportError(f"{what} fails: {reason.strip().removesuffix('.')}.")


def _proved(
    job: Job, file: Path, reference: list[torch.Tensor], exact: bool, adapter: Path | None = None
) -> dict[str, Any]:
    """Compare llama.cpp with the reference on the job's rows.

    Args:
        reference: logits [S, C] of each row.
        exact: whether the file holds the same numbers, so that distributions must agree; else the loss alone may rise a little.
    """
    told = _ask(job, file, adapter)
    gap = compare(reference, told, [job.rows.task.compared_targets(example) for example in job.rows.examples])
    limits = job.config.merge
    found = disagreements(gap, limits) if exact else []
    found += loss_increase(gap, limits, "against transformers")
    if found:
        raise ExportError(
            f"{file.name}: llama.cpp says something else than transformers: {'; '.join(found)}. Nothing is kept."
        )
    return {"loader": "llama.cpp (xllamacpp)", **dataclasses.asdict(gap)}


def _ask(job: Job, file: Path, adapter: Path | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with storage.scratch() as scratch:
        tensors = {"letter": torch.tensor(job.encoder.tokenizer.encode("a", add_special_tokens=False)[:1])}
        for number, [(inputs, positions)] in enumerate(job.rows.passes):
            tensors |= {
                f"{number:06}.input_ids": inputs["input_ids"].contiguous(),
                f"{number:06}.positions": positions.contiguous(),
            }
        save_file(tensors, f"{scratch}/rows.safetensors")
        script = str(Path(__file__).with_name("llama.py"))
        words = [
            str(file),
            f"{scratch}/rows.safetensors",
            f"{scratch}/out.safetensors",
            *([str(adapter)] if adapter else []),
        ]
        _run([sys.executable, "-P", script, *words], f"llama.cpp with {file.name}")
        found = load_file(f"{scratch}/out.safetensors")
    return [(found[f"{n:06}.tokens"], found[f"{n:06}.logprobs"]) for n in range(len(job.rows.passes))]


def compare(
    reference: list[torch.Tensor], told: list[tuple[torch.Tensor, torch.Tensor]], targets: list[torch.Tensor]
) -> TopGap:
    """Measure what llama.cpp told.

    Args:
        reference: logits [S, C] of each row.
        told: of each row the most likely tokens [S, K] and their log-probabilities [S, K], falling.
        targets: [S] the true tokens.
    """
    kl, agreed, known, losses = 0.0, 0, 0, [0.0, 0.0]
    for logits, (tokens, logprobs), truth in zip(reference, told, targets, strict=True):
        p, q = log_softmax(logits.double(), -1), logprobs.double()
        top = p.gather(1, tokens)
        rest_p, rest_q = ((1 - one.exp().sum(1)).clamp_min(1e-12) for one in (top, q))
        kl += float((top.exp() * (top - q)).sum() + (rest_p * (rest_p / rest_q).log()).sum())
        agreed += int((p.argmax(1) == tokens[:, 0]).sum())
        there = tokens == truth[:, None]
        known += int(there.sum())
        losses = [total - float(side[there].sum()) for total, side in zip(losses, (top, q), strict=True)]
    count = sum(map(len, targets))
    return TopGap(
        count, known / count, kl / count, agreed / count, losses[0] / max(known, 1), losses[1] / max(known, 1)
    )
