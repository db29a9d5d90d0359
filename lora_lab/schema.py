"""How a section of the configuration is declared, checked and described: strict, frozen pydantic dataclasses.

Strict: an unknown key, a wrong type (also "3" for 3, or true for 1) or a value out of range is an error.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import typing
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lora_lab.errors import nearest

section = dataclass(config=ConfigDict(extra="forbid", strict=True, validate_default=True), frozen=True, kw_only=True)

MISSING = "???"  # Hydra's mark for "the user must say"
_NUMBERS = (int, float, bool, int | None, float | None)


def keys(of: type, prefix: str = "") -> dict[str, FieldInfo]:
    """Every key below a section, with its pydantic description, in order."""
    found = {}
    for name, info in of.__pydantic_fields__.items():
        if dataclasses.is_dataclass(info.annotation):
            found.update(keys(info.annotation, f"{prefix}{name}."))
        else:
            found[prefix + name] = info
    return found


def validate(adapter: TypeAdapter, tree: dict[str, Any]) -> tuple[Any, list[ErrorDetails]]:
    """The section that a tree of plain values describes, or None and everything that is wrong with it."""
    try:
        return adapter.validate_json(json.dumps(tree)), []  # strict dataclasses are built from JSON, not from dicts
    except ValidationError as error:
        return None, error.errors(include_url=False)


def _key(error: ErrorDetails, known: dict[str, FieldInfo]) -> str:
    """The configuration key of an error: its location up to the schema's own key (unions add parts behind it)."""
    parts = [str(part) for part in error["loc"]]
    return next((".".join(parts[:n]) for n in range(1, len(parts)) if ".".join(parts[:n]) in known), ".".join(parts))


def describe(errors: list[ErrorDetails], known: dict[str, FieldInfo]) -> list[str]:
    """One sentence for each key that is wrong: key, value, rule, nearest valid choice."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        by_key.setdefault(_key(error, known), []).append(error)
    return [_sentence(key, found, known) for key, found in by_key.items()]


def _inside(key: str, errors: list[ErrorDetails], known: dict[str, FieldInfo]) -> str | None:
    """The sentence for a section in a list (`data.train=[{path: ...}]`): pydantic reports it for every member of the union,
    and the error that lies deepest is of the member that was meant."""
    sections = {kind.__name__: kind for kind in _sections(known[key].annotation)} if key in known else {}
    for error in errors:
        names = [part for part in error["loc"] if isinstance(part, str)]
        kind = next((sections[name] for name in names if name in sections), None)
        if kind is None or names[-1] in sections:
            continue
        index = next(part for part in error["loc"] if isinstance(part, int))
        field, fields = names[names.index(kind.__name__) + 1], keys(kind)
        if field not in fields:
            there = f" There are: {', '.join(fields)}."
            return f"{key}[{index}].{field}: unknown key.{nearest(field, fields, cutoff=0.4)}{there}"
        if error["type"] not in ("missing", "missing_argument"):
            return f"{key}[{index}].{field}={json.dumps(error['input'], default=str)}: must be {rule(fields[field])}."
    return None


def _sections(kind: Any) -> list[type]:
    found = [kind] if dataclasses.is_dataclass(kind) else []
    return found + [section for part in typing.get_args(kind) for section in _sections(part)]


def _sentence(key: str, errors: list[ErrorDetails], known: dict[str, FieldInfo]) -> str:
    inside = _inside(key, errors, known)
    if inside is not None:
        return inside
    first = errors[0]
    value = "null" if first["input"] is None else json.dumps(first["input"], ensure_ascii=False, default=str)
    if first["type"] == "unexpected_keyword_argument":
        if key.rpartition(".")[2] == "_target_":
            return f"{key}={value}: a configuration never names code to run. Remove the key."
        namesakes = [other for other in known if other.rpartition(".")[2] == key.rpartition(".")[2]]
        return f"{key}={value}: unknown key.{nearest(key, namesakes or known) or nearest(key, known, cutoff=0.4)}"
    if first["type"] in ("missing", "missing_argument") or first["input"] == MISSING:
        return f"{key}: must be set. It is: {known[key].description if key in known else 'a section'}."
    rules = "; or ".join(dict.fromkeys(error["msg"].removeprefix("Input ").removeprefix("should ") for error in errors))
    choices = re.findall(r"'([^']+)'", first["msg"]) if first["type"] == "literal_error" else []
    if key in known and known[key].annotation in _NUMBERS:
        rules = f"be {rule(known[key])}"
    return f"{key}={value}: must {rules}.{nearest(first['input'], choices) if choices else ''}"


def rule(info: FieldInfo) -> str:
    """What a key accepts, in words: 'an integer, at least 1 (or null)'."""
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    limits = [
        f"{word} {getattr(mark, name)}"
        for mark in info.metadata
        for name, word in words.items()
        if getattr(mark, name, None) is not None
    ]
    optional = " (or null)" if type(None) in typing.get_args(info.annotation) else ""
    return ", ".join([_words(info.annotation), *limits]) + optional


def _words(kind: Any) -> str:
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(str, parts))
    if typing.get_origin(kind) is list:
        return "a list"
    if typing.get_origin(kind) is dict:
        return "a mapping"
    if parts:
        return " or ".join(_words(part) for part in parts if part is not type(None))
    return {int: "an integer", float: "a number", str: "text", bool: "true or false"}.get(kind, "a section")


def repaired(tree: dict[str, Any], errors: list[ErrorDetails], known: dict[str, FieldInfo]) -> dict[str, Any]:
    """A copy without the offending values, so that their defaults stand in (required keys are texts: any text does)."""
    tree = copy.deepcopy(tree)
    for error in errors:
        key = _key(error, known)
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node.pop(last, None)
            if key in known and known[key].is_required():
                node[last] = MISSING
    return tree
