"""What a verb is, what it was told on a command line, and what all verbs on a trained run begin with. Imports nothing heavy."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from lora_lab.errors import ConfigError
from lora_lab.run.takes import Takes
from lora_lab.runtime import busy

_VERBS_OWN = ("evaluate", "serve", "trim")  # sections of one verb, which has their name


class Option:
    """An option of one verb, as argparse's `add_argument` takes it."""

    def __init__(self, *flags: str, **settings: Any):
        self.flags, self.settings = flags, settings


@dataclasses.dataclass(frozen=True)
class Word:
    """A word `NAME=VALUE` of one verb that is no key of the configuration, or means more than the key does."""

    name: str
    beside: str | None = None  # it counts only where this other word is said as well
    each: bool = False  # said several times, each counts; else the last one holds


@dataclasses.dataclass(frozen=True)
class Verb:
    """Something that `lora-lab` does. `run` imports what it needs, so that help and mistakes cost no time."""

    summary: str  # one line, without a full stop
    examples: str  # of --help: command lines, indented by two, then sentences
    run: Callable[[Told], int]  # its exit code
    takes: Takes | None = None  # what it may be told about a trained run; None: it composes a whole configuration
    arguments: tuple[Option | Word, ...] = ()  # its own, beside key=value
    filters: bool = False  # what is said of the configuration is looked for, and composes none
    foreign: tuple[str, ...] = _VERBS_OWN  # sections that mean nothing to it where it composes a whole configuration
    bare: str = ""  # the word of its own that a value without a name is for
    output_is_all: bool = False  # its output is all that it is for, so that losing it is a failure
    together: bool = False  # whether several processes may do it together, see `runtime/launch.py`
    exit_1: str = ""  # what exit code 1 says of it; '': a bug, as everywhere
    others: tuple[str, ...] = ()  # what other tools call it

    @property
    def options(self) -> list[Option]:
        own = [one for one in self.arguments if isinstance(one, Option)]
        composing = Option("--config-dir", metavar="DIR", help="a folder with your own groups and recipes")
        return [composing, *own] if self.composes else own

    @property
    def composes(self) -> bool:
        """Whether it composes a whole configuration."""
        return self.takes is None and not self.filters

    @property
    def words(self) -> list[Word]:
        return [one for one in self.arguments if isinstance(one, Word)]


@dataclasses.dataclass(frozen=True)
class Told:
    """A command line, in parts."""

    name: str  # of the verb
    verb: Verb
    overrides: list[str]  # keys and groups of the configuration, as they were typed
    words: dict[str, list[str]]  # the verb's own words, each with all its values
    options: argparse.Namespace  # the verb's own options

    @classmethod
    def of(cls, name: str, verb: Verb, typed: Sequence[str], options: argparse.Namespace) -> Told:
        """Take the verb's own words out of what was typed."""
        said = {text.partition("=")[0] for text in typed}
        own = {word.name for word in verb.words if word.beside is None or word.beside in said}
        words: dict[str, list[str]] = {word.name: [] for word in verb.words}
        overrides: list[str] = []
        for text in typed:
            key, _, value = text.partition("=")
            (words[key] if key in own else overrides).append(value if key in own else text)
        return cls(name, verb, overrides, words, options)

    def refuse_foreign(self) -> None:
        """
        Raises:
            ConfigError: something is said that would have no effect here.
        """
        for text in self.overrides if self.verb.composes else ():
            section = text.partition("=")[0].lstrip("+~").partition(".")[0]
            if section in self.verb.foreign:
                whose = f" It is for lora-lab {section}; drop it." if section in _VERBS_OWN else " Drop it."
                raise ConfigError(f"{text}: no effect on {self.name}.{whose}")

    def word(self, name: str) -> str | None:
        """The value of one of the verb's words that holds; None if it was not said."""
        return self.words[name][-1] if self.words[name] else None

    def refuse(self, name: str, instead: str) -> None:
        """Refuse a word, saying why.

        Raises:
            ConfigError: it was said.
        """
        if self.words[name]:
            raise ConfigError(f"{name}={self.words[name][0]}: {instead}")

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """The value of a word that is a number.

        Raises:
            ConfigError: it is none in this range.
        """
        text = self.word(name)
        try:
            found = default if text is None else float(text)
        except ValueError:
            found = float("nan")
        if not least <= found <= most:
            raise ConfigError(f"{name}={text}: must be a number from {least:g} to {most:g}.")
        return found

    def count(self, name: str, default: int, least: int, most: int) -> int:
        """The value of a word that is a whole number.

        Raises:
            ConfigError: it is none in this range.
        """
        found = self.number(name, default, least, most)
        if found != int(found):
            raise ConfigError(f"{name}={found:g}: must be a whole number.")
        return int(found)


RUN = Word("run")  # the trained run that a verb works on


def run_folder(told: Told) -> str:
    """The folder that `run=` names, once everything wrong with what is said about the run has been told, without torch.

    Raises:
        ConfigError: no folder or several, or an override that has no effect on a trained run.
        RunError: there is no run, or its configuration was edited.
    """
    named = told.words[RUN.name]
    if len(named) != 1 or not named[0]:
        raise ConfigError(f"run: must be set once. Name a run folder: lora-lab {told.name} run=runs/demo/...")
    from lora_lab.run.trained import open_trained

    takes = told.verb.takes
    assert takes is not None, f"{told.name} works on no run"
    open_trained(named[0], takes, told.overrides)
    before_libraries()
    return named[0]


def before_libraries(threads: int | None = None) -> None:
    """What other libraries are told before they are loaded: how threads wait, and to keep advice to their developers off the user's
    terminal. Errors still come through.

    Args:
        threads: of the configuration.
    """
    import logging
    import warnings

    busy.choose_waiting(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # rows are tokenized on all cores
    for name in (
        "bitsandbytes",
        "transformers",
        "datasets",
        "accelerate",
        "huggingface_hub",
        "torchao",
        "lm_eval",
        "presidio-analyzer",
        "torch.utils._pytree",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
