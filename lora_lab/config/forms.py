"""Command lines as they are typed after other tools' habits, and the form that works here. Imports nothing heavy."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_lab.config.quoting import full_width
from lora_lab.schema import synonyms
from lora_lab.schema.groups import GROUPS, choices

if TYPE_CHECKING:
    from lora_lab.verbs.base import Verb

_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".conll", ".gz")
_KEY = re.compile(r"[A-Za-z_][\w-]*([./][\w-]+)*", re.ASCII)


def verb(words: Sequence[str], verbs: Mapping[str, Verb]) -> str:
    """A sentence for a first word that is no verb; '' if it is one, or an option."""
    if not words or words[0].startswith("-") or words[0] in verbs:
        return ""
    word, rest = words[0], " ".join(words[1:])
    near = difflib.get_close_matches(word.lower(), verbs, n=1, cutoff=0.6)
    called = word.lower().replace("_", "-")
    known = near[0] if near else next((name for name, one in verbs.items() if called in one.others), "")
    if known:
        return f"{word}: no such verb. Did you mean '{known}'? Write lora-lab {known}{f' {rest}' if rest else ''}"
    if "=" in word or word in choices("recipe"):
        told = word if "=" in word else f"recipe={word}"
        return f"{word}: the verb is missing. Write lora-lab train {told}{f' {rest}' if rest else ''}"
    return f"{word}: no such verb. There are: {', '.join(verbs)}."


def option(name: str, argv: Sequence[str], verb: str, own: Sequence[str]) -> str:
    """A sentence for an option that there is not: settings are written without dashes.

    Args:
        own: the words that verbs have beside the configuration's keys.
    """
    place = next((n for n, word in enumerate(argv) if word == name), len(argv))
    key, equals, value = name.lstrip("-").partition("=")
    following = argv[place + 1] if place + 1 < len(argv) else ""
    if not equals:
        is_value = following and "=" not in following and not re.match(r"-+[A-Za-z]", following)
        value = following if is_value else "true"
    asked = f"lora-lab {verb} --help lists the options."
    if not _KEY.fullmatch(key) or len(key) < 2:
        return f"unknown option {name}; {asked}"
    if key in GROUPS or key in own or "." in key:
        line = f"{key}={_quoted(value)}"
        return f"unknown option {name}; settings are written without dashes: {line}"
    meant = synonyms.of_key(key, value)
    return (
        f"unknown option {name}; settings are written key=value, without dashes.{meant}"
        if meant
        else f"unknown option {name}; {asked}"
    )


def words(argv: Sequence[str], verb: str, composes: bool) -> str:
    """A sentence for the first word of a command line that is no `key=value`; '' if all are.

    Args:
        argv: what stands behind the verb, without options.
        composes: the verb composes a configuration; else it works on a run that is there.
    """
    for place, word in enumerate(argv):
        key, equals, value = word.partition("=")
        before, after = (argv[place - 1] if place else ""), (argv[place + 1] if place + 1 < len(argv) else "")
        if word == "=" and _is_key(before):
            return _apart(f"{before} = {after}", before, after)
        if equals and key == "" and _is_key(before):
            return _apart(f"{before} {word}", before, value)
        if equals and value == "" and after and "=" not in after and _is_key(key):
            return _apart(f"{word} {after}", key, after)
        if not equals and not (after.startswith("=") and _is_key(word)):
            return _alone(word, before, after, verb, composes)
    return ""


def commas(overrides: Sequence[str], told: str) -> str:
    """What else a comma can have meant, for each override of a sweep that an error names; '' if nothing."""
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if "," not in value or not any(f"{key}={part.strip()}" in told for part in value.split(",")):
            continue
        if re.fullmatch(r"[+-]?\d+,\d+", value):
            return f" The comma separates two values here; a decimal point is meant? {key}={value.replace(',', '.')}"
        if key in ("data.train", "data.eval", "model.path") and value[0] not in "[{'\"":
            return f" The comma separates two runs here; put a name that has one in quotes: \"{key}='{value}'\""
    return ""


def full_width_hint(overrides: Sequence[str], told: str) -> str:
    """The line with plain signs, for an override with full-width ones outside quotes that an error names; '' if there is none."""
    for text in overrides:
        key, plain = text.partition("=")[0], full_width(text)
        if plain != text and plain not in told and key.lstrip("+") in told:
            return f" It has full-width signs; with plain ones: {plain}"
    return ""


def _is_key(word: str) -> bool:
    return bool(_KEY.fullmatch(word))


def _apart(typed: str, key: str, value: str) -> str:
    return f"{typed}: no blanks around =. Write {key}={_quoted(value)}"


def _alone(word: str, before: str, after: str, verb: str, composes: bool) -> str:
    plain = full_width(word)
    if plain != word and "=" in plain.strip("="):
        return f"{word}: not an override: = is a full-width sign there. Write {plain}"
    line = _meant(word, after, composes)
    if line:
        return f"{word}: not an override. Write lora-lab {verb} {line}"
    if "=" in before:
        whole = f"{before} {word}"
        return f"{word}: not an override. Put a value with blanks in quotes: lora-lab {verb} '{whole}'"
    return f"{word}: not an override. Write key=value, such as {'adapter.r=8' if composes else 'run=runs/demo/...'}."


def _meant(word: str, after: str, composes: bool) -> str:
    """The `key=value` that a word stands for; '' if that cannot be told."""
    if not composes:
        return f"run={_quoted(word)}" if "/" in word or os.path.isdir(word) else ""
    if word in choices("recipe"):
        return f"recipe={word}"
    group = next((group for group in GROUPS if word in choices(group) and word not in ("default", "auto", "none")), "")
    if group:
        return f"{group}={word}"
    if "." in word and _is_key(word) and after and "=" not in after and not os.path.exists(word):
        return f"{word}={_quoted(after)}"
    if word.lower().endswith(_FILES):
        return f"data.train={_quoted(word)}"
    if word.lower().endswith((".yaml", ".yml")):
        return f"--config-dir DIR recipe={os.path.basename(word).rpartition('.')[0]} (for DIR/recipe/{os.path.basename(word)})"
    if word in GROUPS and after in choices(word):
        return f"{word}={after}"
    near = difflib.get_close_matches(word, choices("recipe"), n=1, cutoff=0.75)
    return f"recipe={near[0]}" if near else ""


def _quoted(value: str) -> str:
    """The value, in quotes for the shell if it needs them."""
    return value if re.fullmatch(r"[^\s'\"\[\]{}()$&;|<>*?!`\\]*", value) else f'"{value}"'
