"""Text augmentation of training rows, off by default: changed copies of a text, made by one of four methods.

- delete, swap, synonyms: easy data augmentation (Wei & Zou 2019, arXiv:1901.11196), one operation a copy.
- back_translation: into another language and back (Sennrich et al. 2016, arXiv:1511.06709), with two models of the user's.

Every copy is a function of text, seed and number of the copy alone: what else is augmented beside it changes nothing.
Chinese words are found by rjieba, which comes with the extra `text`.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field

from lora_lab.base.resolve import local_path
from lora_lab.data.clean import Language
from lora_lab.errors import ConfigError, DataError
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lora_lab.data import translate

Method = Literal["delete", "swap", "synonyms", "back_translation"]
METHODS: tuple[Method, ...] = get_args(Method)

_KEY = "data.augment"
_WORD_METHODS = ("delete", "swap", "synonyms")
# The methods that each field has an effect on.
_USERS = {
    "copies": METHODS,
    "rate": _WORD_METHODS,
    "language": _WORD_METHODS,
    "synonyms": ("synonyms",),
    "back_translation": ("back_translation",),
    "prefixes": ("back_translation",),
}
# Letters and digits, and what is written against them, are one word, as they are for `data.clean`.
_WORD = re.compile(r"(\w+(?:['’.\-/:@&=?#%+]+\w+)*)")
_SPACES = " \t\u00a0\u3000"  # white space inside a line
_TABLE_LINE = "Write word<TAB>synonym<TAB>synonym..., each word once."


@section
class AugmentConfig:
    """The `data.augment` section."""

    methods: Annotated[
        list[Method],
        Field(description="changed copies of training rows; each copy takes the next method in turn; empty: none"),
    ] = dataclasses.field(default_factory=list)
    copies: Annotated[
        int, Field(ge=1, description="changed copies of each row, over all methods; fewer where two would be equal")
    ] = 1
    rate: Annotated[
        float, Field(gt=0, lt=1, description="share of the words that delete, swap and synonyms change, at least one")
    ] = 0.1
    language: Annotated[Language, Field(description="how words are found; zh has no spaces between them")] = "en"
    synonyms: Annotated[
        str | None, Field(description="table in UTF-8 for the method synonyms: word<TAB>synonym<TAB>synonym... a line")
    ] = None
    back_translation: Annotated[
        list[str] | None,
        Field(description="two sequence-to-sequence models, there and back: folders, hub ids or package:..."),
    ] = None
    prefixes: Annotated[
        list[str] | None,
        Field(description="text before each input of the two models, such as 'translate English to German: ' for T5"),
    ] = None


def require(config: AugmentConfig) -> None:
    """Refuse what `Augmenter` cannot do and options that it would not use, before long work starts.

    Raises:
        ConfigError: a method named twice, never reached or without its model or table, an option without effect, a list
            of the wrong length, or a package that is not installed; all of them at once.
    """
    problems = _method_problems(config) + _unused(config)
    if "synonyms" in config.methods and config.synonyms is None:
        problems.append(
            f"{_KEY}.synonyms: must be set with the method synonyms. Give a table in UTF-8, each line "
            "word<TAB>synonym<TAB>synonym..., or leave the method out."
        )
    if "back_translation" in config.methods and config.back_translation is None:
        problems.append(
            f"{_KEY}.back_translation: must be set with the method back_translation. Give two models, there and back, "
            "or leave the method out."
        )
    for field, what in (("back_translation", "two models, there and back"), ("prefixes", "two texts, one a model")):
        value = getattr(config, field)
        if value is not None and len(value) != 2:
            problems.append(f"{_KEY}.{field}={_shown(value)}: must be exactly {what}; this is {len(value)}.")
    uses_words = any(method in _WORD_METHODS for method in config.methods)
    if config.language == "zh" and uses_words and importlib.util.find_spec("rjieba") is None:
        problems.append(
            f"{_KEY}.language=zh: needs the package rjieba, which is not installed. "
            'pip install "lora-lab[text]", or use back_translation only.'
        )
    if problems:
        raise ConfigError(*problems)


def _method_problems(config: AugmentConfig) -> list[str]:
    methods = list(dict.fromkeys(config.methods))
    problems = [
        f"{_KEY}.methods: {method}: named twice, and copies take the methods in turn. Name it once."
        for method in methods
        if config.methods.count(method) > 1
    ]
    if methods[config.copies :]:
        problems.append(
            f"{_KEY}.methods: {', '.join(methods[config.copies :])}: no effect with {_KEY}.copies={config.copies}, as "
            f"each copy takes one method, in turn. Set {_KEY}.copies={len(methods)}, or leave out what no copy takes."
        )
    if methods == ["back_translation"] and config.copies > 1:
        problems.append(
            f"{_KEY}.copies={config.copies}: no effect with back_translation alone, which always gives the same copy. "
            f"Set {_KEY}.copies=1, or name another method beside it."
        )
    return problems


def _unused(config: AugmentConfig) -> list[str]:
    default = AugmentConfig()
    return [
        f"{_KEY}.{field}={_shown(getattr(config, field))}: no effect with {_KEY}.methods={_shown(config.methods)}. "
        f"Leave it out, or name {' or '.join(users)}."
        for field, users in _USERS.items()
        if getattr(config, field) != getattr(default, field) and not set(users) & set(config.methods)
    ]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


class Augmenter:
    """Makes changed copies of texts; `require` has accepted its `config`.

    Models are loaded when they are first needed, and held until `let_go`, or as long as the augmenter.
    """

    device: torch.device | None = None  # of the models; None: the CPU

    def __init__(self, config: AugmentConfig):
        """
        Raises:
            DataError: the table of synonyms is not there, cannot be read or has a line that is no entry.
        """
        self.config = config
        self._synonyms: dict[str, list[str]] = {}
        self._synonyms_sha256: str | None = None
        if "synonyms" in config.methods:
            key = f"{_KEY}.synonyms"
            file = local_path(config.synonyms or "", key, DataError)
            try:
                content = file.read_bytes()
            except OSError as error:
                raise DataError(f"{key}={file}: cannot be read ({error.strerror}). Name a text file.") from error
            self._synonyms = _read_synonyms(file, content)
            self._synonyms_sha256 = hashlib.sha256(content).hexdigest()

    def copies(self, texts: Sequence[str], seeds: Sequence[int]) -> list[list[str]]:
        """For each text its changed copies, at most `config.copies`, without repeats and without the text itself.

        Copy `i` is made by the method `i % len(config.methods)`. A text that a method cannot change (one word and
        nothing to delete, no word in the table, too long for a model) has a copy less.

        Args:
            texts: any texts; white space and punctuation around words that stay are kept.
            seeds: one for each text, at least 0. Copy `i` is a function of the text, its seed and `i`. Back-translation
                takes the likeliest token each time and uses no seed; that a padded batch rounds otherwise than a single
                line can only matter where two tokens are equally likely in float32.

        Raises:
            BaseModelError: a translation model cannot be found, trusted or loaded.
        """
        translated = self._back_translated(texts) if "back_translation" in self.config.methods else {}
        return [self._copies_of(text, seed, translated) for text, seed in zip(texts, seeds, strict=True)]

    def _copies_of(self, text: str, seed: int, translated: dict[str, str | None]) -> list[str]:
        config = self.config
        found: list[str] = []
        for number in range(config.copies if config.methods else 0):
            method = config.methods[number % len(config.methods)]
            copy = translated[text] if method == "back_translation" else self._changed(method, text, seed, number)
            if copy is not None and copy not in (text, *found):
                found.append(copy)
        return found

    def _changed(self, method: str, text: str, seed: int, number: int) -> str:
        """`text` after one of the methods that change words."""
        import numpy as np

        # `spawn_key` keeps copy 1 of seed 0 apart from copy 0 of any other seed.
        draw = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
        words, gaps = _split(text, self.config.language)
        count = max(1, round(self.config.rate * len(words)))
        if method == "delete":
            words, gaps = _delete(words, gaps, count, draw)
        elif method == "swap":
            words = _swap(words, count, draw)
        else:
            words = _replace(words, self._synonyms, count, draw)
        return _joined(words, gaps)

    def _back_translated(self, texts: Sequence[str]) -> dict[str, str | None]:
        """Text -> its back-translation; None where a line of it is too long for a model, or comes out without an end.

        Lines are translated one by one: line breaks mean nothing to most models. A line without letters stays.
        """
        there, back = self._translators
        lines = dict.fromkeys(line.strip() for text in texts for line in text.split("\n"))
        forth = there.translate([line for line in lines if any(map(str.isalpha, line))])
        returned = back.translate(list(dict.fromkeys(line for line in forth.values() if line)))
        new = {line: returned.get(forth[line] or "") if line in forth else line for line in lines}
        return {text: _relined(text, new) for text in texts}

    @functools.cached_property
    def _translators(self) -> list[translate.Translator]:
        import torch  # a configuration is read without what loads models

        from lora_lab.data import translate

        prefixes = self.config.prefixes or ["", ""]
        return [
            translate.Translator(_model_key(index, name), folder, prefix, self.device or torch.device("cpu"))
            for index, (name, folder, prefix) in enumerate(zip(self._models, self._folders, prefixes, strict=True))
        ]

    def let_go(self) -> None:
        """Give back what the models take, until they are needed again."""
        vars(self).pop("_translators", None)

    @property
    def _models(self) -> list[str]:
        return self.config.back_translation or []

    @functools.cached_property
    def _folders(self) -> list[Path]:
        from lora_lab.data import translate

        return [translate.find(_model_key(index, name), name) for index, name in enumerate(self._models)]

    def digest(self) -> str:
        """Hex SHA-256 of what decides the copies beside the values of the configuration, for the keys of caches.

        That is the bytes of the table, the weights and small files of the models, and the versions of the libraries that
        do the work. The device does not count: a cache may move from a GPU to a CPU.

        Raises:
            BaseModelError: a translation model cannot be found or trusted.
        """
        libraries, models = ["numpy"], []
        if self.config.language == "zh":
            libraries.append("rjieba")
        if "back_translation" in self.config.methods:
            from lora_lab.data import translate

            libraries += ["torch", "transformers", "tokenizers"]
            models = [translate.digest(folder) for folder in self._folders]
        parts = {
            "synonyms": self._synonyms_sha256,
            "models": models,
            "libraries": [f"{name} {importlib.metadata.version(name)}" for name in libraries],
        }
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _split(text: str, language: str) -> tuple[list[str], list[str]]:
    """The words of a text, and what stands before, between and after them: one gap more than words."""
    if language == "zh":
        import rjieba

        pieces = rjieba.cut(text)
    else:
        pieces = _WORD.split(text)
    words: list[str] = []
    gaps = [""]
    for piece in pieces:
        if not any(map(str.isalnum, piece)):
            gaps[-1] += piece
        elif words and not gaps[-1] and _would_merge(words[-1], piece):
            words[-1] += piece  # rjieba cut inside a Latin word
        else:
            words.append(piece)
            gaps.append("")
    return words, gaps


def _would_merge(left: str, right: str) -> bool:
    """Whether two texts, written without a space, read as one Latin word."""
    return all(side.isascii() and side.isalnum() for side in (left[-1:], right[:1]))


def _joined(words: list[str], gaps: list[str]) -> str:
    parts = [gaps[0]]
    for index, word in enumerate(words):
        # "GPT和BERT" must not become "GPTBERT"
        merged = index > 0 and not gaps[index] and _would_merge(words[index - 1], word)
        parts += [" " if merged else "", word, gaps[index + 1]]
    return "".join(parts)


def _delete(words: list[str], gaps: list[str], count: int, draw: np.random.Generator) -> tuple[list[str], list[str]]:
    """Random deletion of `count` words, but never of all; a fixed count, so that no copy is left unchanged by chance."""
    if len(words) < 2:
        return words, gaps
    gone = set(draw.choice(len(words), size=min(count, len(words) - 1), replace=False).tolist())
    kept, around = [], [gaps[0]]
    for index, (word, gap) in enumerate(zip(words, gaps[1:], strict=True)):
        if index in gone:
            around[-1] = _closed(around[-1], gap)
        else:
            kept.append(word)
            around.append(gap)
    return kept, around


def _closed(left: str, right: str) -> str:
    """What stands where a word was: the spaces on one side of it go with it."""
    if right[:1] and right[0] in _SPACES:
        return left + right.lstrip(_SPACES)
    return left.rstrip(_SPACES) + right


def _swap(words: list[str], count: int, draw: np.random.Generator) -> list[str]:
    """Two random words change places, `count` times."""
    words = list(words)
    for _ in range(count if len(words) > 1 else 0):
        first, second = draw.choice(len(words), size=2, replace=False).tolist()
        words[first], words[second] = words[second], words[first]
    return words


def _replace(words: list[str], synonyms: dict[str, list[str]], count: int, draw: np.random.Generator) -> list[str]:
    """Up to `count` of the words that the table has give way to a random synonym, with their first letter's case."""
    words = list(words)
    known = [index for index, word in enumerate(words) if word.lower() in synonyms]
    for index in draw.permutation(known)[:count].astype(int).tolist():
        choices = synonyms[words[index].lower()]
        synonym = choices[draw.integers(len(choices))]
        words[index] = synonym[0].upper() + synonym[1:] if words[index][0].isupper() else synonym
    return words


def _read_synonyms(file: Path, content: bytes) -> dict[str, list[str]]:
    """Lower-case word -> its synonyms. Empty lines are skipped; an entry that is not one word is never found in a text.

    Raises:
        DataError: a line that is no entry, a word that comes twice, or no entry at all.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        place = f"{_KEY}.synonyms: {file} line {number}"
        try:
            word, *synonyms = (cell.strip() for cell in line.decode("utf-8").split("\t"))
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: not UTF-8 ({error.reason}). Save the table as UTF-8.") from error
        if not word and not synonyms:
            continue
        if not synonyms:
            raise DataError(f"{place}: '{word}' has no synonym. {_TABLE_LINE}")
        if not all([word, *synonyms]):
            raise DataError(f"{place}: an empty cell. {_TABLE_LINE}")
        if word.lower() in map(str.lower, synonyms):
            raise DataError(f"{place}: '{word}' is given as a synonym of itself. {_TABLE_LINE}")
        if word.lower() in found:
            raise DataError(f"{place}: '{word}' has a line already. {_TABLE_LINE}")
        found[word.lower()] = synonyms
    if not found:
        raise DataError(f"{_KEY}.synonyms={file}: the table is empty. {_TABLE_LINE}")
    return found


def _model_key(index: int, name: str) -> str:
    return f"{_KEY}.back_translation[{index}]={name}"


def _relined(text: str, new: dict[str, str | None]) -> str | None:
    """`text` with every line replaced, white space around lines kept; None if a line has no replacement."""
    lines = []
    for line in text.split("\n"):
        core = line.strip()
        other = new[core] if core else ""
        if core and not other:
            return None
        lines.append(line.replace(core, other, 1) if core and other else line)
    return "\n".join(lines)
