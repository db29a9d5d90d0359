"""GGUF files for llama.cpp and what is built on it, of a merged checkpoint or of an adapter alone."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import log_softmax

from lora_lab.adapters import deltas
from lora_lab.base import cache, load, pretokenizers
from lora_lab.base.gguf import read_head
from lora_lab.base.load import ModelKind
from lora_lab.base.overruled import FILE, SENTENCEPIECE, read_alone
from lora_lab.base.resolve import cache_dir
from lora_lab.base.tokenizer import READER, save_tokenizer
from lora_lab.base.weights import Weights
from lora_lab.errors import BaseModelError, ConfigError, ExportError
from lora_lab.export import ollama, text, tiny
from lora_lab.export.convert import CHECK, K_QUANTS, RANDOM
from lora_lab.run.prepared import Trained
from lora_lab.run.setup import Setup
from lora_lab.runtime import children, console, storage
from lora_lab.runtime.reading import read_json
from lora_lab.verify.parity import as_likely, disagreements, loss_increase, outputs_of_rows, reloaded_outputs

if TYPE_CHECKING:
    from lora_lab.data.encode import Encoder, Example
    from lora_lab.verify.parity import Probe

_PACKAGES = ("auto_round", "sentencepiece", "xllamacpp")
_SMALL_KL = 1e-3  # nats; measured: below 1e-5 where an architecture is the same, above 1e-2 where it is not
_WAY_OUT = (
    "Take a base whose tokenizer and chat template llama.cpp reads as transformers does, or drop the target: hf, adapter and vllm use "
    "transformers' own."
)
_WAY_OUT_OF_OLD_TOKENS = "An earlier version read this base's tokenizer wrongly, and the run keeps those tokens: train it anew, or drop the target."


@dataclasses.dataclass(frozen=True)
class TopGap:
    """How far llama.cpp's next-token distributions are from the reference's, of which its most likely tokens are known.

    `top1_agreement` is the share of positions whose likeliest token of llama.cpp is the reference's, near ties included (`as_likely`).
    `kl` is taken over those tokens and all others together, so it is at most the whole one. The losses are over the positions
    whose true token llama.cpp tells the log-probability of, a share `truth_known` of all, which must be 1.
    """

    positions: int
    truth_known: float
    kl: float
    top1_agreement: float
    reference_loss: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Told:
    """What llama.cpp told of a row, as `llama.py` writes it."""

    tokens: torch.Tensor  # [S, K] int64, the likeliest
    logprobs: torch.Tensor  # [S, K], falling
    truth: torch.Tensor  # [S], of the true tokens


def check(setup: Setup, target: str) -> Iterator[str]:
    """What stands against this target, before anything is trained."""
    absent = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        yield f"export.targets: {target} needs {', '.join(absent)}. pip install 'lora-lab[gguf]'"
        return
    if setup.kind.auto_class != "AutoModelForCausalLM":
        yield f"export.targets: {target} needs a causal LM; task={setup.config.task.name} produces a different model type. Drop it."
        return
    if target == "gguf_lora" and setup.base.published is not None:
        yield (
            f"export.targets: gguf_lora: the base was published in {setup.base.published.method}, which llama.cpp's conversion cannot read to "
            "verify the adapter over it. Export gguf (merged)."
        )
        return
    if target == "gguf_lora" and setup.experts:
        yield "export.targets: gguf_lora: the adapter reaches into experts. Export gguf (merged), or name other adapter.target_modules."
        return
    if target == "ollama" and setup.encoder.chat:
        try:
            ollama.turns(setup.encoder)
        except ConfigError as error:
            yield str(error)
            return
    old_tokens = setup.base.reader < READER
    if target == "gguf_lora" and old_tokens and _tokenized_otherwise_now(setup):
        yield f"export.targets: {target}: GGUF files of the base make other tokens than this run's. {_WAY_OUT_OF_OLD_TOKENS}"
        return
    reason = _reason_against(setup.base.folder, setup.encoder)
    if reason:
        yield (
            f"export.targets: {target}: llama.cpp's conversion cannot take this base ({reason}). "
            f"{_WAY_OUT_OF_OLD_TOKENS if old_tokens else 'Drop the target; hf and adapter always load.'}"
        )
        return
    reason = _architecture_against(setup.base.folder)
    if reason:
        yield f"export.targets: {target}: {reason} Drop the target; hf and adapter always load."
        return
    said = _text_against(setup.base.folder, setup.encoder, target == "ollama")
    if said:
        yield f"export.targets: {target}: {said} {_WAY_OUT_OF_OLD_TOKENS if old_tokens else _WAY_OUT}"


def _tokenized_otherwise_now(setup: Setup) -> bool:
    """Whether a run that is begun now would have other tokens, as everybody's GGUF files of its base have, or would be refused."""
    try:
        return bool(load.tokenized_otherwise(setup.config.model, setup.base, setup.encoder.tokenizer))
    except BaseModelError:
        return True


@functools.lru_cache(maxsize=2)
def _reason_against(base: Path, encoder: Encoder) -> str:
    """What the conversion says against the base's architecture or the run's tokenizer; empty if it takes them."""
    try:
        _tiny(base, encoder)
    except ExportError as error:
        return str(error).partition(": ")[2].removesuffix(".")
    return ""


@functools.lru_cache(maxsize=2)
@torch.no_grad()
def _architecture_against(base: Path) -> str:
    """What stands against the base's architecture: it is made small (`tiny.py`), converted, loaded in llama.cpp and compared with
    transformers; empty if nothing does, or if it cannot be made small, which is said.

    Half of the positions must agree within `_SMALL_KL`: both compute with the same numbers of 32 bits, but in a mixture of random weights
    a single position may well choose other experts.
    """
    try:
        made, narrowed = tiny.model(base)
    except Exception as error:  # of transformers, on a size that a family does not take
        made, said = None, f" ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    else:
        said = ""
    if made is None:
        console.say("export", f"llama.cpp is not tried with a small model before training: this base has none{said}")
        return ""
    ids = tiny.ids()
    logits = made(input_ids=ids).logits[0].float()
    positions, targets = torch.arange(ids.shape[1] - 1), ids[0, 1:].clone()
    with storage.scratch() as scratch:
        made.save_pretrained(scratch / "folder")
        some = {f"<{number}>": number for number in range(tiny.VOCABULARY)}  # some conversions count them
        (scratch / "folder" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": some}, "added_tokens": []}))
        file = scratch / "random.gguf"
        rows = [({"input_ids": ids}, positions, targets)]
        try:
            convert(scratch / "folder", file, RANDOM, [], base)
            told = _told(file, rows, {"context": ids.shape[1] + 8, "letter": 3, "vocabulary": tiny.VOCABULARY})
        except ExportError as error:
            reason = str(error).partition(": ")[2].removesuffix(".")
            if "FileNotFoundError" in reason or (narrowed and "wrong shape" in reason):  # of its own making
                console.say("export", f"llama.cpp is not tried with a small model before training ({reason})")
                return ""
            return f"llama.cpp cannot take a small model of this base's architecture ({reason})."
    apart = float(_divergences(logits[:-1], told["rows"][0]).median())
    if apart <= _SMALL_KL:
        return ""
    return (
        f"of a small model of this base's architecture llama.cpp computes something else than transformers (KL {apart:.2g} at half of the "
        f"positions, above {_SMALL_KL:g})."
    )


@functools.lru_cache(maxsize=2)
def _text_against(base: Path, encoder: Encoder, with_modelfile: bool) -> str:
    """What llama.cpp, with the run's tokenizer as the conversion writes it, tokenizes differently from the run; empty if nothing."""
    with storage.scratch() as scratch:
        file = scratch / "tokenizer.gguf"
        file.write_bytes(_tiny(base, encoder))
        asked = _asked(encoder, with_modelfile)
        written = ollama.modelfile(file.name, encoder) if with_modelfile else None
        try:
            _check_text(file, encoder, asked, ask(file, encoder, asked, modelfile=written), written)
        except ExportError as error:
            return str(error)
    return ""


@functools.lru_cache(maxsize=1)
def _tiny(base: Path, encoder: Encoder) -> bytes:
    """A GGUF file of a tiny model with the tokenizer that an export of this base would have.

    Raises:
        ExportError: the conversion does not take it.
    """
    with storage.scratch() as scratch:
        folder = scratch / "folder"
        folder.mkdir()
        load.model_config(base, ModelKind()).save_pretrained(folder)  # as a merge will write it
        save_tokenizer(encoder.tokenizer, folder)
        for file in base.iterdir():
            own = file.name.startswith(
                ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
            )
            if (not own or file.name == SENTENCEPIECE) and file.is_file() and not (folder / file.name).exists():
                (folder / file.name).symlink_to(file.resolve())
        convert(folder, scratch / "tiny.gguf", CHECK, text.ends_of(encoder), base)
        return (scratch / "tiny.gguf").read_bytes()


def make(trained: Trained, rows: Probe, folder: Path, with_modelfile: bool = False) -> dict[str, Any]:
    """Write the merged checkpoint as GGUF, and perhaps Ollama's Modelfile; what was proved of it.

    Raises:
        ExportError: llama.cpp does not load it, or its outputs differ from those of the merged checkpoint in transformers.
    """
    setup = trained.setup
    kind, encoder = setup.config.export.gguf_type, setup.encoder
    file = folder / f"{setup.config.name}-{kind}.gguf".replace(" ", "_")
    convert(trained.run.merged, file, kind, text.ends_of(encoder), setup.base.folder)
    written = None
    if with_modelfile:
        written = ollama.modelfile(file.name, encoder)
        (folder / "Modelfile").write_text(written, encoding="utf-8")
    beginning = _beginning(encoder, file)
    proved = _proved(trained, rows, file, exact=kind in ("f32", "f16", "bf16"), modelfile=written)
    return {"type": kind, **beginning, **proved}


def _beginning(encoder: Encoder, file: Path) -> dict[str, bool]:
    """What llama.cpp will put before a text by itself, as the file says: it must be what the tokenizer puts there.

    Raises:
        ExportError: it is something else, so prompts would begin differently than in training.
    """
    import gguf

    said = read_head(file).get(gguf.Keys.Tokenizer.ADD_BOS)
    if said is None:
        return {}
    tokenizer, adds = encoder.tokenizer, bool(said)
    if adds != (tokenizer.bos_token_id in encoder.marks.before):
        raise ExportError(
            f"{file.name}: llama.cpp would {'put' if adds else 'not put'} {tokenizer.bos_token!r} before every text, and the tokenizer "
            f"does{' not' if adds else ''}. Nothing is kept. Set add_bos_token in the base's tokenizer_config.json to what is right."
        )
    if adds:
        again = "; where the chat template writes it too, it is not written twice" if encoder.chat else ""
        console.say("export", f"{file.name}: llama.cpp and Ollama begin every text with {tokenizer.bos_token!r}{again}")
    return {"adds_bos": adds}


def make_lora(trained: Trained, rows: Probe, folder: Path) -> dict[str, Any]:
    """Write the adapter as GGUF, for any GGUF of its base; proved over the base at f16.

    Raises:
        ExportError: as `make`.
    """
    setup = trained.setup
    adapter = deltas.read(trained.run.adapter, setup.skeleton())
    file = folder / f"{setup.config.name}-lora.gguf".replace(" ", "_")
    with storage.scratch() as scratch:
        factors = {}
        for name, update in adapter.layers.items():
            same = update.filled(adapter.rank)
            factors |= {f"{name}.a": same.down.contiguous(), f"{name}.b": same.up.contiguous()}
        save_file(factors, f"{scratch}/factors.safetensors")
        base = scratch / "base.gguf"
        own = setup.base.folder
        convert(own, base, "f16", text.ends_of(setup.encoder), own, f"{scratch}/factors.safetensors", str(file))
        serve = f"llama-server -m GGUF_OF_THE_BASE --lora {file.name}"
        if setup.encoder.chat:  # the base's own file may have another, or none
            template = setup.encoder.tokenizer.chat_template
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
            serve += " --jinja --chat-template-file chat_template.jinja"
        return {"serve": serve, **_proved(trained, rows, base, exact=True, adapter=file)}


def base_file(setup: Setup) -> Path:
    """A run's base as a GGUF file in 16 bits, over which its `gguf_lora` lies; made once and kept in the cache.

    Raises:
        BaseModelError: the cache cannot be written.
        ExportError: the conversion does not take it.
    """
    ends = text.ends_of(setup.encoder)
    made_of = {"fingerprint": setup.base.fingerprint, "companions": setup.base.companions, "ends": ends}
    folder = cache_dir() / "gguf_base" / storage.digest(made_of)[:32]
    with cache.entry(folder, BaseModelError) as there:
        if not there:
            console.say("engine", f"the base is written as GGUF, once: {folder}")
            with storage.new_folder(folder) as temporary:
                convert(setup.base.folder, temporary / "base.gguf", "f16", ends, setup.base.folder)
    return folder / "base.gguf"


def convert(folder: Path, file: Path, kind: str, ends: list[int], base: Path, *adapter: str) -> None:
    """Write a GGUF file of a transformers folder, see `convert.py`.

    Raises:
        ExportError: the conversion does not take it.
    """
    if kind in K_QUANTS and shutil.which("llama-quantize"):
        with storage.scratch(file.parent) as scratch:
            whole = scratch / "f16.gguf"
            convert(folder, whole, "f16", ends, base)
            _run(["llama-quantize", str(whole), str(file), kind.upper()], f"llama-quantize to {kind}")
        return
    script = str(Path(__file__).with_name("convert.py"))
    told = [kind, ",".join(map(str, ends)), str(base), "" if kind == RANDOM else _split_of(folder), *adapter]
    words = [sys.executable, "-P", script, str(folder), str(file), *told]
    _run(words, f"llama.cpp's conversion of {folder}")


def _split_of(folder: Path) -> str:
    """How a folder's tokenizer splits texts, by llama.cpp's name; empty: in no way that is known by one."""
    file = folder / FILE
    return pretokenizers.name_of(read_alone(file)) if file.is_file() else ""


def _run(words: list[str], what: str) -> None:
    done = children.run(words, env={**os.environ, "HF_HUB_OFFLINE": "1", "GGML_NO_BACKTRACE": "1"})
    if done.returncode != 0:
        raise ExportError(f"{what} fails: {_reason(done.stderr).strip().removesuffix('.')}.")


def _reason(said: str) -> str:
    """The line that tells most of why a process failed."""
    lines = [line for line in said.splitlines() if line.strip()] or ["no message"]
    for line in lines:
        if (why := re.search(r"error loading model: (.*)|(GGML_ASSERT.*)", line)) is not None:
            return why[1] or why[2]
    return next((line for line in reversed(lines) if "Error" in line or "error" in line), lines[-1])


def _proved(
    trained: Trained, rows: Probe, file: Path, exact: bool, adapter: Path | None = None, modelfile: str | None = None
) -> dict[str, Any]:
    """Compare llama.cpp with transformers: what it makes of texts, what it says of some rows, and what it answers.

    Args:
        exact: whether the file holds the same numbers, so that distributions must agree; else the loss alone may rise a little.
        adapter: that is put on the file's model; transformers then puts the run's on the base.
        modelfile: of Ollama, by which texts are written.

    Raises:
        ExportError: something differs.
    """
    setup, encoder, began = trained.setup, trained.setup.encoder, time.monotonic()
    asked = _asked(encoder, modelfile is not None, rows.examples)
    answered = text.answered(asked)
    template = encoder.tokenizer.chat_template if adapter is not None and encoder.chat else None
    told = ask(file, encoder, asked, answered, rows, adapter, template, modelfile)
    _check_text(file, encoder, asked, told, modelfile)
    seconds = time.monotonic() - began
    answers = text.Answers(encoder, asked, answered, told["answers"])
    extra = answers.passes
    weights, own = (trained.run.merged, None) if adapter is None else (setup.base.folder, trained.run.adapter)
    passes = [one for passes in rows.passes for one in passes] + extra
    outputs = reloaded_outputs(weights, setup.kind.auto_class, passes, setup.device, _exact(setup), own)
    reference = outputs_of_rows(rows, outputs[: len(outputs) - len(extra)])
    gap = compare(reference, told["rows"], [rows.task.compared_targets(one) for one in rows.examples])
    limits = setup.config.merge
    found = disagreements(gap, limits) if exact else []
    found += loss_increase(gap, limits, "against transformers")
    if gap.truth_known < 1:
        found.append(f"it gives no probability for {1 - gap.truth_known:.1%} of the true tokens")
    scores = [one["logits"] for one in outputs[len(outputs) - len(extra) :]]
    agreed = answers.agreement(scores, largest_difference(reference, told["rows"]))
    if exact and agreed.parting:
        found.append(f"greedy answers part: {agreed.parting}")
    if found:
        raise ExportError(
            f"{file.name}: outputs differ between llama.cpp and transformers: {'; '.join(found)}. Nothing is kept."
        )
    return {
        "loader": "llama.cpp (xllamacpp)",
        **dataclasses.asdict(gap),
        "texts": len(asked),
        **agreed.told(),
        "llama_cpp_seconds": round(seconds, 1),
    }


def _exact(setup: Setup) -> str:
    """The type that a reference is computed in: float32 where that fits into the machine's memory, not to mistake rounding for a
    fault."""
    if setup.device.type != "cpu":
        return "auto"
    size = 4 * sum(shape.numel() for shape in Weights(setup.base.folder).shapes.values())
    return "float32" if size < 0.7 * psutil.virtual_memory().available else "auto"


def ask(
    file: Path,
    encoder: Encoder,
    asked: list[text.Prompt],
    answered: Sequence[text.Prompt] = (),
    rows: Probe | None = None,
    adapter: Path | None = None,
    template: str | None = None,
    modelfile: str | None = None,
) -> dict[str, Any]:
    """What llama.cpp tells, see `llama.py`; `rows` of it are `Told`.

    Args:
        modelfile: conversations are written by its template instead of the file's.
    """
    prompts: list[dict[str, Any]] = []
    for number, one in enumerate(asked):
        if one.messages is None or modelfile is not None:
            prompts.append({"text": one.text if one.messages is None else ollama.rendered(modelfile, one.messages)})
        else:
            prompts.append({"messages": one.messages, "tools": one.tools, "count": number == 0})
    asked_rows = (
        []
        if rows is None
        else [
            (inputs, positions, rows.task.compared_targets(example))
            for example, [(inputs, positions)] in zip(rows.examples, rows.passes, strict=True)
        ]
    )
    longest = max([len(one.ids) for one in asked] + [inputs["input_ids"].shape[1] for inputs, *_ in asked_rows])
    words = {
        "context": longest + text.NEW_TOKENS + 8,
        "template": template,
        "variables": encoder.template.kwargs if encoder.chat else {},
        "prompts": prompts,
        "ends": text.ends_of(encoder),
        "answers": [one.ids for one in answered],
        "letter": encoder.tokenizer.encode("a", add_special_tokens=False)[0],
        "vocabulary": encoder.vocab_size or len(encoder.tokenizer),
    }
    return _told(file, asked_rows, words, adapter)


def _told(
    file: Path,
    rows: list[tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]],
    words: dict[str, Any],
    adapter: Path | None = None,
) -> dict[str, Any]:
    """As `ask`.

    Args:
        rows: of each its inputs, and the positions and true tokens that are asked about.
        words: what is asked beside that, see `llama.py`.
    """
    nothing = {"template": None, "variables": {}, "prompts": [], "ends": [], "answers": []}
    with storage.scratch() as scratch:
        tensors = {}
        for number, (inputs, positions, targets) in enumerate(rows):
            tensors |= {
                f"{number:06}.input_ids": inputs["input_ids"].contiguous(),
                f"{number:06}.positions": positions.contiguous(),
                f"{number:06}.targets": targets.contiguous(),
            }
        save_file(tensors, f"{scratch}/rows.safetensors")
        words = {
            **nothing,
            **words,
            "threads": torch.get_num_threads(),
            "new_tokens": text.NEW_TOKENS,
            "rows": f"{scratch}/rows.safetensors" if rows else None,
            "outputs": f"{scratch}/out.safetensors",
        }
        (scratch / "asked.json").write_text(json.dumps(words), encoding="utf-8")
        script = str(Path(__file__).with_name("llama.py"))
        command = [str(file), f"{scratch}/asked.json", f"{scratch}/told.json", *([str(adapter)] if adapter else [])]
        _run([sys.executable, "-P", script, *command], f"llama.cpp with {file.name}")
        told = read_json(scratch / "told.json", ExportError)
        found = load_file(f"{scratch}/out.safetensors") if rows else {}
    names = [f"{number:06}" for number in range(len(rows))]
    told["rows"] = [Told(*(found[f"{n}.{name}"] for name in ("tokens", "logprobs", "truth"))) for n in names]
    return told


def _asked(encoder: Encoder, with_modelfile: bool, examples: Iterable[Example] = ()) -> list[text.Prompt]:
    """What a file is asked; a Modelfile's template shows no tools, and Ollama refuses them then: only the rows may have some."""
    return [one for one in text.prompts(encoder, examples) if one.held_out or not (with_modelfile and one.with_tools)]


def _check_text(
    file: Path, encoder: Encoder, asked: list[text.Prompt], told: dict[str, Any], modelfile: str | None
) -> None:
    """Refuse a file that llama.cpp tokenizes differently from the run, or that would not stop where the run does.

    Conversations with tools that no row has are told of only: nothing of what was trained depends on them. So are tokens that llama.cpp
    takes for control tokens by their names, whatever the file says, as long as no row has them: Qwen's vocabulary has a plain `</s>`.

    Raises:
        ExportError: the first difference.
    """
    seen = [(one.get("text"), one["ids"] if "ids" in one else one["error"]) for one in told["prompts"]]
    by = "the Modelfile's template and llama.cpp's tokenizer make" if modelfile is not None else "llama.cpp makes"
    beside = [one.with_tools and not one.held_out for one in asked]  # tools that the rows do not have
    for number, (prompt, (_, ids)) in enumerate(zip(asked, seen, strict=True)):
        if not prompt.held_out and (taken := text.taken_whole(encoder, prompt, ids)):
            seen[number] = (prompt.text, prompt.ids)
            console.say(
                "export",
                f"{file.name}: llama.cpp takes {' and '.join(map(repr, taken))}, in this vocabulary plain text, for a control token: "
                "where a user writes it, it makes other tokens than the run's, and an answer ends there. No row that was asked has it",
            )

    def differing(kind: bool) -> list[str]:
        own, theirs = ([one for one, b in zip(part, beside, strict=True) if b is kind] for part in (asked, seen))
        return [f"{by} {one}" for one in text.differences(encoder, own, theirs)]

    found, said = differing(False), differing(True)
    for one in said:
        console.say("export", f"{file.name}: of conversations with tools, which no row has, {one}")
    for one in told["prompts"]:
        if one.get("counted") not in (None, len(one.get("ids", ()))) and not found:
            found.append(f"llama.cpp counts {one['counted']} tokens of a conversation of {len(one['ids'])}")
    ends = text.ends_of(encoder)
    going_on = [end for end, how in zip(ends, told["ends"], strict=True) if how != "eos"]
    if modelfile is not None:
        going_on = [end for end in going_on if encoder.tokenizer.decode([end]) not in ollama.stops(modelfile)]
    if going_on:
        found.append(text.not_stopping(encoder, going_on, "the file (its end-of-sequence and end-of-turn tokens)"))
    if found:
        raise ExportError(f"{file.name}: {'; '.join(found)}. Nothing is kept.")


def compare(reference: list[torch.Tensor], told: list[Told], targets: list[torch.Tensor]) -> TopGap:
    """Measure what llama.cpp told.

    Args:
        reference: logits [S, C] of each row.
        targets: [S] the true tokens.
    """
    kl, agreed, known, losses = 0.0, 0, 0, [0.0, 0.0]
    for logits, row, truth in zip(reference, told, targets, strict=True):
        p = log_softmax(logits.double(), -1)
        kl += float(_divergences(logits, row).sum())
        agreed += int(as_likely(logits, row.tokens[:, 0]).sum())
        there = row.truth.isfinite()
        known += int(there.sum())
        sides = (p.gather(1, truth[:, None])[:, 0], row.truth.double())
        losses = [total - float(side[there].sum()) for total, side in zip(losses, sides, strict=True)]
    count = sum(map(len, targets))
    return TopGap(
        count, known / count, kl / count, agreed / count, losses[0] / max(known, 1), losses[1] / max(known, 1)
    )


def _divergences(logits: torch.Tensor, row: Told) -> torch.Tensor:
    """KL(reference || llama.cpp) [S] in nats at each position, over the tokens that llama.cpp told of and all others together."""
    p, q = log_softmax(logits.double(), -1), row.logprobs.double()
    top = p.gather(1, row.tokens)
    rest_p, rest_q = ((1 - one.exp().sum(1)).clamp_min(1e-12) for one in (top, q))
    return (top.exp() * (top - q)).sum(1) + rest_p * (rest_p / rest_q).log()


def largest_difference(reference: list[torch.Tensor], told: list[Told], top: int = 10) -> float:
    """The largest difference of a log-probability among the likeliest tokens."""
    worst = 0.0
    for logits, row in zip(reference, told, strict=True):
        own = log_softmax(logits.double(), -1).gather(1, row.tokens[:, :top])
        worst = max(worst, float((own - row.logprobs[:, :top]).abs().max()))
    return worst
