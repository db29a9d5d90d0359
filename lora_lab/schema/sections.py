"""How a section of the configuration is declared, checked and described: strict, frozen pydantic dataclasses.

Strict: an unknown key, a wrong type (also "3" for 3, or true for 1) or a value out of range is an error.

A section may have variants, told apart by a name in it: `task.name=classification` has other keys than `task.name=causal_lm`. A key
that only another variant knows has no effect, which is an error as well.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import itertools
import json
import math
import operator
import os
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lora_lab.errors import nearest
from lora_lab.schema import synonyms
from lora_lab.schema.groups import GROUPS

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)
_PLUGINS = "PYDANTIC_DISABLE_PLUGINS"


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without pydantic's plugins: to find some, it reads the metadata of all installed packages, and what it finds runs."""
    before = os.environ.get(_PLUGINS)
    os.environ[_PLUGINS] = "__all__"
    try:
        yield
    finally:
        os.environ.pop(_PLUGINS)
        os.environ.update({} if before is None else {_PLUGINS: before})


@typing.dataclass_transform(kw_only_default=True, frozen_default=True)
def section(kind: type) -> type:
    """Class decorator of a section: a strict, frozen pydantic dataclass."""
    with _alone():
        return dataclass(kind, config=_STRICT, frozen=True, kw_only=True)


def adapter_of(kind: type) -> TypeAdapter[Any]:
    """What checks trees against a section."""
    with _alone():
        return TypeAdapter(kind)


def one_of(variants: Mapping[str, type], by: str) -> Any:
    """The type of a field that is one of several sections, told apart by their field `by`, a `Literal` of one name."""
    return Annotated[functools.reduce(operator.or_, variants.values()), Field(discriminator=by)]


@dataclasses.dataclass(frozen=True)
class Variants:
    """The sections that a field can be."""

    by: str  # the field that tells them apart
    sections: dict[str, type[Any]]
    default: str

    @property
    def tag(self) -> FieldInfo:
        """The field that tells them apart, with all its values."""
        own = self.sections[self.default].__pydantic_fields__[self.by]
        names: Any = Literal[tuple(self.sections)]
        return FieldInfo(annotation=names, default=self.default, description=own.description)

    def knowing(self, name: str) -> list[str]:
        """The variants that have a key."""
        return [variant for variant, kind in self.sections.items() if name in keys(kind)]


def variants_of(info: FieldInfo) -> Variants | None:
    """The variants of a field; None if it is no such field."""
    by = info.discriminator
    if not isinstance(by, str):
        return None
    kinds = {
        typing.get_args(kind.__pydantic_fields__[by].annotation)[0]: kind
        for kind in (typing.get_args(info.annotation) or (info.annotation,))
    }
    default = info.get_default(call_default_factory=True)
    return Variants(by, kinds, getattr(default, by))


MISSING = "???"  # Hydra's mark for "the user must say"
_MAX_INTEGER, _MAX_NUMBER = 2**32, 1e9  # no key has a use for more; what computes with it would overflow somewhere
_MAX_DEPTH = 30
_MAX_SHOWN = 20  # problems of one kind
_NUMBERS = (int, float, bool, int | None, float | None)


def keys(of: type[Any], prefix: str = "") -> dict[str, FieldInfo]:
    """Every key below a section, with its pydantic description, in order; of variants those of the first that has it."""
    found = {}
    for name, info in of.__pydantic_fields__.items():
        variants = variants_of(info)
        if variants is not None:
            found[f"{prefix}{name}.{variants.by}"] = variants.tag
            for key, own in itertools.chain.from_iterable(keys(kind).items() for kind in variants.sections.values()):
                found.setdefault(f"{prefix}{name}.{key}", own)
        elif isinstance(info.annotation, type) and dataclasses.is_dataclass(info.annotation):
            found.update(keys(info.annotation, f"{prefix}{name}."))
        else:
            found[prefix + name] = info
    return found


def only_for(of: type[Any]) -> dict[str, list[str]]:
    """The keys that not all variants of a section have, each with the variants that do."""
    found = {}
    for name, info in of.__pydantic_fields__.items():
        variants = variants_of(info)
        if variants is None:
            continue
        for key in dict.fromkeys(k for kind in variants.sections.values() for k in keys(kind)):
            knowing = variants.knowing(key)
            if len(knowing) < len(variants.sections):
                found[f"{name}.{key}"] = knowing
    return found


def default_of(section: Any, key: str) -> Any:
    """What a section, or one within it, has where nothing is said of a key."""
    *parents, last = key.split(".")
    for parent in parents:
        section = getattr(section, parent)
    return type(section).__pydantic_fields__[last].get_default(call_default_factory=True)


def values_of(section: Any, tag: tuple[str, str] = ("", "")) -> Iterator[tuple[str, Any, Any]]:
    """Every key of a section, and of those within it, with its value and with what it has where nothing is said.

    Args:
        tag: the section's field that says which variant it is, and the variant that is the default.
    """
    for name, info in type(section).__pydantic_fields__.items():
        value, variants = getattr(section, name), variants_of(info)
        if dataclasses.is_dataclass(value):
            inside = values_of(value, (variants.by, variants.default) if variants else ("", ""))
            yield from ((f"{name}.{key}", one, default) for key, one, default in inside)
        else:
            yield name, value, tag[1] if name == tag[0] else default_of(section, name)


def sorted_out(of: type[Any], tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A tree in which each section says which variant it is and has no key of another, and a sentence for each key that was taken out
    for that."""
    tree, refused = dict(tree), {}
    for name, info in of.__pydantic_fields__.items():
        variants, own = variants_of(info), tree.get(name)
        if variants is None or not isinstance(own, dict):
            continue
        own = {variants.by: variants.default} | own
        tag = own[variants.by]
        if not isinstance(tag, str) or tag not in variants.sections:
            refused[f"{name}.{variants.by}"] = _no_variant(name, variants, tag)
            known = {key for kind in variants.sections.values() for key in kind.__pydantic_fields__}
            own = {variants.by: variants.default} | {key: value for key, value in own.items() if key not in known}
            tag = variants.default
        for key in [key for key in own if key not in variants.sections[tag].__pydantic_fields__]:
            knowing = variants.knowing(key)
            if knowing:
                refused[f"{name}.{key}"] = (
                    f"{name}.{key}={shown(own.pop(key))}: no effect with {name}={tag}; it is for {', '.join(knowing)}. Drop it."
                )
        tree[name] = own
    return tree, refused


def renamed(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A tree with the values of today for those of an earlier version, and a sentence for each."""
    tree, told = dict(tree), []
    for key, values in synonyms.RENAMED.items():
        room, _, name = key.partition(".")
        own = tree.get(room)
        if isinstance(own, dict) and isinstance(own.get(name), str) and own[name] in values:
            told.append(
                f"{key}={own[name]} is called {values[own[name]]} now; the old name works until the next version"
            )
            tree[room] = own | {name: values[own[name]]}
    return tree, told


def _no_variant(name: str, variants: Variants, tag: Any) -> str:
    key = f"{name}.{variants.by}"
    known_as = synonyms.of_choice(key, tag) or nearest(tag, variants.sections)
    return f"{key}={shown(tag)}: must be {' or '.join(variants.sections)}.{known_as}"


def validate(adapter: TypeAdapter[Any], tree: dict[str, Any]) -> tuple[Any, list[ErrorDetails]]:
    """The section that a tree of plain values describes, or None and everything that is wrong with it."""
    try:
        return adapter.validate_json(json.dumps(tree)), []  # strict dataclasses are built from JSON, not from dicts
    except ValidationError as error:
        return None, [{**one, "loc": _without_variant(one["loc"], tree)} for one in error.errors(include_url=False)]


def _without_variant(loc: tuple[int | str, ...], tree: dict[str, Any]) -> tuple[int | str, ...]:
    """Where an error is, without the variant's name, which pydantic puts behind the section's."""
    section = tree.get(str(loc[0])) if len(loc) > 1 else None
    tagged = (
        isinstance(section, dict) and loc[1] not in section and loc[1] in (section.get("name"), section.get("method"))
    )
    return (loc[0], *loc[2:]) if tagged else loc


def unreadable(tree: Any) -> list[str]:
    """A sentence for each value that no key can have: what is no plain value, or text that no file can hold."""
    problems: list[str] = []
    left: list[tuple[str, Any, int]] = [("", tree, 0)]
    while left and len(problems) < _MAX_SHOWN:
        key, node, depth = left.pop()
        if depth > _MAX_DEPTH:
            return [f"{key.partition('.')[0]}: nested deeper than {_MAX_DEPTH} levels."]
        if isinstance(node, dict):
            names = [name for name in node if not isinstance(name, str)]
            problems += [
                f"{f'{key}.{name}'.lstrip('.')}: not text, as a key must be. Write it in quotes." for name in names
            ]
            left += [(f"{key}.{name}".lstrip("."), value, depth + 1) for name, value in node.items()]
            left += [(key, name, depth) for name in node if isinstance(name, str)]
        elif isinstance(node, list):
            left += [(f"{key}[{place}]", value, depth + 1) for place, value in enumerate(node)]
        else:
            problems += _unreadable(key, node)
    return problems


def _unreadable(key: str, value: Any) -> list[str]:
    if not isinstance(value, (str, int, float, type(None))):
        return [f"{key}: must be text, a number, true, false or null, not {type(value).__name__}."]
    if isinstance(value, str) and any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in value):
        return [f"{key}={shown(value)}: holds a NUL or half a character (bytes that are not UTF-8). Write plain text."]
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        return [f"{key}={shown(value)}: must be at most {_MAX_INTEGER:,}."]
    if isinstance(value, float) and _MAX_NUMBER < abs(value) < math.inf:
        return [f"{key}={shown(value)}: must be at most {_MAX_NUMBER:g}."]
    return []


def shown(value: Any) -> str:
    """A value in a message: as JSON, and not all of it if it is long."""
    if isinstance(value, int) and abs(value) > 10**20:
        return "a number of more than 20 digits"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= 200 else f"{text[:200]}…"


def _key(error: ErrorDetails, known: dict[str, FieldInfo]) -> str:
    """The configuration key of an error: its location up to the schema's own key (unions add parts behind it)."""
    parts = [str(part) for part in error["loc"]]
    return next((".".join(parts[:n]) for n in range(1, len(parts)) if ".".join(parts[:n]) in known), ".".join(parts))


def describe(errors: list[ErrorDetails], known: dict[str, FieldInfo]) -> list[str]:
    """One sentence for each key that is wrong: key, value, rule, nearest valid choice."""
    by_key: dict[str, list[ErrorDetails]] = {}
    for error in itertools.chain.from_iterable(map(_apart, errors)):
        by_key.setdefault(_key(error, known), []).append(error)
    problems = [_sentence(key, found, known) for key, found in itertools.islice(by_key.items(), _MAX_SHOWN)]
    return problems + ([f"... and {len(by_key) - _MAX_SHOWN} more keys."] if len(by_key) > _MAX_SHOWN else [])


def _apart(error: ErrorDetails) -> Iterator[ErrorDetails]:
    """An unknown section's keys, one by one; any other error as it is."""
    if error["type"] == "unexpected_keyword_argument" and isinstance(error["input"], dict) and error["input"]:
        for name, value in error["input"].items():
            yield from _apart({**error, "loc": (*error["loc"], name), "input": value})
    else:
        yield error


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
            return f"{key}[{index}].{field}={shown(error['input'])}: must be {rule(fields[field])}."
    return None


def _sections(kind: Any) -> list[Any]:
    found = [kind] if dataclasses.is_dataclass(kind) else []
    return found + [section for part in typing.get_args(kind) for section in _sections(part)]


_KINDS = {"list_type": "a list, such as [a,b]", "dict_type": "a mapping, such as {a: b}", "string_type": "text"}


def _sentence(key: str, errors: list[ErrorDetails], known: dict[str, FieldInfo]) -> str:
    inside = _inside(key, errors, known)
    if inside is not None:
        return inside
    first = errors[0]
    value, name = shown(first["input"]), key if len(key) <= 100 else f"{key[:100]}…"
    if first["type"] == "unexpected_keyword_argument":
        if key.rpartition(".")[2] == "_target_":
            return f"{name}={value}: a configuration never names code to run. Remove the key."
        return f"{name}={value}: unknown key.{synonyms.of_key(key[:100], value) or _meant(key[:100], known, first['input'])}"
    if first["type"] in ("missing", "missing_argument") or first["input"] == MISSING:
        return f"{key}: must be set. It is: {known[key].description if key in known else 'a section'}."
    rules = "; or ".join(
        dict.fromkeys(
            error["msg"].removeprefix("Input ").removeprefix("String ").removeprefix("should ") for error in errors
        )
    )
    choices = re.findall(r"'([^']+)'", first["msg"]) if first["type"] == "literal_error" else []
    if key in known and known[key].annotation in _NUMBERS:
        rules = f"be {rule(known[key])}"
    if first["type"] == "finite_number":
        rules = rules.replace("a number", "a finite number")
    if first["type"] in _KINDS:
        rules = f"be {_KINDS[first['type']]}"
    if first["type"] == "string_type" and isinstance(first["input"], (bool, int, float)):
        rules = f"be text; in quotes it is: '{value}'"
    if first["type"] in ("dataclass_type", "model_attributes_type"):
        rules = "be a section: keys and values"
    known_as = synonyms.of_choice(key, first["input"])
    return f"{name}={value}: must {rules}.{known_as or (nearest(first['input'], choices) if choices else '')}"


def _meant(key: str, known: dict[str, FieldInfo], value: Any) -> str:
    """' Did you mean ...?' for a key that there is not: one of the same section first, then a group, then the same name in
    another section. What is only a little like it is no help.

    A section may be called by what it holds as well: `lora.r` is `adapter.r`, because `adapter.method` can be lora.
    """
    first, _, last = key.rpartition(".")
    section = _section_called(first.partition(".")[0], known) if first else ""
    inside = [other for other in known if section and other.startswith(f"{section}.")]
    found = _like(last, inside, 0.6) if section else _like(last, [*GROUPS, *(k for k in known if "." not in k)], 0.7)
    found = found or synonyms.near(last, known, 0.75) or _like(last, list(known), 0.75)
    if found in GROUPS and isinstance(value, str):
        found = f"{found}={value}"
    return f" Did you mean '{found}'?" if found else ""


def _like(last: str, keys: list[str], cutoff: float) -> str:
    """The key the last part of which is most like this word, or which other tools call nearly so."""
    parts: dict[str, str] = {}
    for key in keys:
        parts.setdefault(key.rpartition(".")[2], key)
    match = difflib.get_close_matches(last, parts, n=1, cutoff=cutoff)
    return parts[match[0]] if match else synonyms.near(last, keys, max(cutoff, 0.75))


def _section_called(word: str, known: dict[str, FieldInfo]) -> str:
    sections = {key.partition(".")[0] for key in known if "." in key}
    if word in sections:
        return word
    for key, info in known.items():
        if key.endswith((".name", ".method")) and word in typing.get_args(info.annotation):
            return key.partition(".")[0]
    return next(iter(difflib.get_close_matches(word, sections, n=1, cutoff=0.6)), "")


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
