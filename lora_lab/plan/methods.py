"""Adapter methods as a table: what each answers for itself (see `adapters/base.py`)."""

from __future__ import annotations

import dataclasses
import sys
import typing

from lora_lab.adapters import ADAPTERS
from lora_lab.adapters.base import AdapterSection
from lora_lab.config.origins import as_override
from lora_lab.config.run import all_keys
from lora_lab.errors import ConfigError, nearest
from lora_lab.export.targets import TARGETS, reason_against
from lora_lab.runtime import console


def show() -> None:
    """All methods."""
    header = ["adapter=", "method", "trains on", "fresh", "merges", "exports", "in a sweep"]
    console.show_table(f"{len(ADAPTERS)} adapter methods", header, [_row(name) for name in ADAPTERS], slice(0, 0))
    console.say("formats", "trains on: quant.method; none: float32 and bfloat16 weights as they are")
    console.say("fresh", "=: a fresh adapter gives what the base gives; ≠: it does not")
    console.say("more", "lora-lab methods adapter=NAME: its paper, its settings, and what stands against it")


def show_one(name: str) -> None:
    """One method: where it is from, its settings, and what stands against it.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in ADAPTERS:
        raise ConfigError(f"adapter={name}: no such method.{nearest(name, ADAPTERS)} There are: {', '.join(ADAPTERS)}.")
    section = ADAPTERS[name]()
    console.say("method", source(section))
    for field in dataclasses.fields(section)[1:]:
        console.setting(
            f"adapter.{field.name}",
            as_override(getattr(section, field.name)),
            all_keys()[f"adapter.{field.name}"].description or "",
        )
    for against in reasons(section):
        console.say("not", against)


def source(section: AdapterSection) -> str:
    """What a method is and which paper it is from, in its file's words."""
    return " ".join((sys.modules[type(section).__module__].__doc__ or "").split())


def formats() -> tuple[str, ...]:
    """The values of `quant.method` but for none."""
    return tuple(name for name in typing.get_args(all_keys()["quant.method"].annotation) if name != "none")


def reasons(section: AdapterSection) -> list[str]:
    """All that stands against something, each once."""
    against: dict[str, list[str]] = {}
    for name in formats():
        against.setdefault(section.against_quant(name), []).append(f"quant={name}")
    against.setdefault(section.against_merging, []).append("merged")
    against.setdefault(section.fresh_differs, []).append("as the base when fresh")
    return [f"{', '.join(what)}: {why}" for why, what in against.items() if why]


def _row(name: str) -> list[str]:
    section = ADAPTERS[name]()
    made = [target for target in TARGETS if not reason_against(section, target)]
    missing = [target for target in TARGETS if target not in made]
    return [
        name,
        section.label,
        ", ".join(["none", *(form for form in formats() if not section.against_quant(form))]),
        "≠" if section.fresh_differs else "=",
        "no" if section.against_merging else "yes",
        ", ".join(made) if len(missing) > len(made) else f"all but {', '.join(missing)}" if missing else "all",
        "passes" if section.shares_passes else "turns",
    ]
