"""Which tokens of a base stay, and its tokenizer with these alone.

A token that is used stays, with all that it is made of. Then every text whose tokens all stay is tokenized as before, because nothing
that took part in it is gone:

- BPE: a token is made by merges, and which ones depends on its own characters alone, since no merge crosses the borders of what is a
  token in the end. All tokens on the way stay, with the merges between tokens that stay, in their order. A merge that is gone never
  took part, so each step's first merge is the same.
- WordPiece takes the longest token at each place: it stays, and none that is gone was longer.
- Unigram takes the likeliest split: it stays, and none that is gone was likelier. What an unknown character costs hangs on the
  least likely token, which stays too.

Every byte, or every single character where there are no bytes, stays as well, so that no text is lost. This is proved on the
texts, see `Vocabulary.prove`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lab.base import overruled
from lora_lab.base.hard_texts import HARD_TEXTS
from lora_lab.base.tokenizer import PLAIN_TEMPLATE, read_tokenizer
from lora_lab.config.data import Source
from lora_lab.data import sources
from lora_lab.data.chunks import watched
from lora_lab.data.formats import RowError
from lora_lab.data.template import ChatTemplate
from lora_lab.errors import BaseModelError, ConfigError, DataError, TrimError
from lora_lab.runtime import console, storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS = 1000  # that are tokenized at once
_USER, _SYSTEM, _ANSWER = ({"role": role, "content": "a"} for role in ("user", "system", "assistant"))
_LISTS_OF_IDS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids")


@dataclasses.dataclass(frozen=True)
class Read:
    """How texts were read by two tokenizers."""

    texts: int
    identical: int  # become the same tokens
    tokens: int  # by the base's tokenizer
    tokens_after: int  # by the trimmed one

    def told(self) -> dict[str, Any]:
        """For the report."""
        share = self.identical / self.texts if self.texts else None
        return {**dataclasses.asdict(self), "share_identical": share}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens that stay."""

    ids: np.ndarray  # [n] int64, ascending: their ids in the base; an id's place is its new id
    new: np.ndarray  # [all] int64: the new id of each of the base's; -1: gone
    used: int  # how many of them texts use

    @classmethod
    def of(cls, ids: Iterable[int], size: int, used: int) -> Vocabulary:
        """
        Args:
            size: ids of the base.
        """
        kept = np.unique(np.fromiter(ids, np.int64))
        new = np.full(size, -1, np.int64)
        new[kept] = np.arange(len(kept))
        return cls(kept, new, used)

    def rows(self, count: int) -> np.ndarray:
        """[m] int64: which of so many rows of an embedding stay. Some tokenizers have tokens behind its end."""
        return self.ids[self.ids < count]

    def renumbered(self, tree: Any, file: Path) -> Any:
        """A configuration with the new ids of the tokens that it names (see `named_ids`).

        Raises:
            BaseModelError: an id that is no token.
        """

        def other(key: str, number: int) -> int:
            if number >= len(self.new) or self.new[number] < 0:
                raise BaseModelError(
                    f"{file}: {key} is {number}, and the tokenizer has no such token. Correct it in a copy of the folder."
                )
            return int(self.new[number])

        return _with_ids(tree, other)

    def write(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
        """Write the tokenizer with the tokens that stay into a folder that holds `config.json`; as it is read from there.

        Raises:
            BaseModelError: it becomes another to some of those who load it.
        """
        overruled.write(tokenizer, folder, overruled.KNOWN_TO_ALL)
        for name in {*tokenizer.vocab_files_names.values()} - {overruled.FILE}:
            (folder / name).unlink(missing_ok=True)  # the same vocabulary for older programs, whole
        file = folder / overruled.FILE
        tree = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(self._trimmed(tree), ensure_ascii=False), encoding="utf-8")
        told = json.loads((folder / overruled.CONFIG).read_text(encoding="utf-8"))
        if "added_tokens_decoder" in told:
            added = told["added_tokens_decoder"].items()
            told["added_tokens_decoder"] = {str(self.new[int(number)]): token for number, token in added}
        (folder / overruled.CONFIG).write_text(storage.dump_json(told), encoding="utf-8")
        found = read_tokenizer(folder)
        overruled.check_reloads(folder, found)
        return found

    def _trimmed(self, tree: dict[str, Any]) -> dict[str, Any]:
        """A `tokenizer.json` with the tokens that stay."""
        model = dict(tree["model"])
        ids = _ids_of(model)
        stays = {token for token, number in ids.items() if self.new[number] >= 0}
        if isinstance(model["vocab"], list):  # a Unigram model's ids are places
            model["vocab"] = [one for place, one in enumerate(model["vocab"]) if self.new[place] >= 0]
            if model.get("unk_id") is not None:
                model["unk_id"] = int(self.new[model["unk_id"]])
        else:
            model["vocab"] = {token: int(self.new[number]) for token, number in ids.items() if token in stays}
        if "merges" in model:
            pairs = zip(model["merges"], _pairs(model), strict=True)
            model["merges"] = [merge for merge, (a, b) in pairs if {a, b, a + b} <= stays]
        added = [{**one, "id": int(self.new[one["id"]])} for one in tree["added_tokens"]]
        around = _around(tree.get("post_processor"), lambda number: int(self.new[number]))
        return {
            **tree,
            "model": model,
            "added_tokens": added,
            "post_processor": around,
            "padding": None,
            "truncation": None,
        }

    def prove(
        self, before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, texts: Iterable[str], title: str
    ) -> Read:
        """Compare how texts are read by the base's tokenizer and by the trimmed one.

        Raises:
            TrimError: one whose tokens all stay becomes other tokens.
        """
        total = np.zeros(4, dtype=np.int64)
        for batch in _batches(texts):
            for text, old, now in zip(batch, _encoded(before, batch), _encoded(after, batch), strict=True):
                expected = self.new[old]
                same = bool(np.array_equal(expected, now))
                if not same and (expected >= 0).all():
                    raise TrimError(
                        f"{title}: the trimmed tokenizer makes other tokens of {text[:60]!r}, although all of the base's stay. Nothing is kept. "
                        "Leave trim.vocabulary out: this tokenizer works in a way that is not known here."
                    )
                total += (1, same, len(old), len(now))
        return Read(*total.tolist())

    def prove_lossless(self, before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase) -> None:
        """Check that any text can still be read: hard ones come back as they do by the base's tokenizer.

        Raises:
            TrimError: one does not.
        """
        for text in HARD_TEXTS:
            back = [one.decode(one(text)["input_ids"], skip_special_tokens=True) for one in (before, after)]
            if back[0] != back[1]:
                raise TrimError(
                    f"{text[:60]!r}: the trimmed tokenizer loses some of it ({back[1]!r}). Nothing is kept."
                )


def choose(
    tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int, texts: Iterable[str], min_count: int, kwargs: Any
) -> Vocabulary:
    """The tokens that stay: those that texts use, the chat template's, the special and added ones, and what they are made of.

    Args:
        folder: of the base, whose configurations name tokens.
        rows: of the base's embedding.
        min_count: how often texts must use a token.
        kwargs: variables of the chat template.

    Raises:
        ConfigError: a kind of tokenizer whose tokens cannot be told to be needless.
    """
    tree = _tree(tokenizer, folder)
    model = tree["model"]
    ids = _ids_of(model)
    size = max(rows, *(number + 1 for number in tokenizer.get_vocab().values()))
    counts = np.zeros(size, np.int64)
    for batch in _batches(texts):
        counts += np.bincount(np.concatenate(_encoded(tokenizer, batch)), minlength=size)
    if not counts.any():
        raise DataError("trim.vocabulary: these files have no texts, so nothing says which tokens are used.")
    used = np.flatnonzero(counts >= min_count)
    always = itertools.chain.from_iterable(_encoded(tokenizer, _template_texts(tokenizer, kwargs)))
    tokens = {number: token for token, number in ids.items()}
    wanted = {tokens[number] for number in {*used.tolist(), *always} if number in tokens}
    made = {ids[token] for token in _KINDS[model["type"]](model, wanted | _atoms(tree))}
    named = {one["id"] for one in tree["added_tokens"]} | set(tokenizer.all_special_ids)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            named |= named_ids(json.loads((folder / name).read_text(encoding="utf-8")))
    return Vocabulary.of({*made, *(one for one in named if one < size)}, size, len(used))


def texts_of(key: str, names: str | list[str | Source], sample_by: str, field: str | None) -> Iterator[str]:
    """Every text in the rows of files, whatever the columns are called.

    Args:
        key: of the configuration, for messages.
        sample_by: what a row of a text file is, as `data.sample_by`.
        field: as `data.field`.

    Raises:
        DataError: a file or row that cannot be read.
    """
    for file in sources.find(key, names, sample_by, field):
        with watched(file, "read") as mark:
            for row in file.rows(mark):
                if row.problem is not None:
                    raise DataError(f"{file.name} row {row.number}: {row.problem}")
                mark.rows += 1
                yield from _texts(row.values)
            mark.done()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Mapping):
        yield from itertools.chain.from_iterable(map(_texts, value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        yield from itertools.chain.from_iterable(map(_texts, value))


def _template_texts(tokenizer: PreTrainedTokenizerBase, kwargs: Any) -> list[str]:
    """Conversations as far as the chat template can render them: what it writes itself must not be lost to others' words."""
    if tokenizer.chat_template is None or tokenizer.chat_template == PLAIN_TEMPLATE:
        return ["### user:\n\n", "### assistant:\n", "### system:\n"]
    template, found = ChatTemplate(tokenizer, kwargs), []
    for messages in ([_USER], [_SYSTEM, _USER], [_USER, _ANSWER, _USER]):
        for prompts in (False, True):
            try:
                found.append(template.text(list(messages), add_generation_prompt=prompts))
            except RowError:  # some refuse system messages
                continue
    return found


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    left = iter(texts)
    while batch := list(itertools.islice(left, _TEXTS)):
        yield batch


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, nothing around it."""
    if not texts:
        return []
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray(ids, dtype=np.int64) for ids in found]


# -- kinds of tokenizers --------------------------------------------------------------------------------------------------


def _tree(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, Any]:
    """The tokenizer as `tokenizer.json` describes it.

    Raises:
        ConfigError: it is of a kind that cannot be trimmed.
    """
    out = "Leave trim.vocabulary out, and trim layers alone."
    try:
        tree: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the package raises nothing more particular
        raise ConfigError(
            f"trim.vocabulary: no file can hold {folder}'s tokenizer, which splits texts by a program. {out}"
        ) from error
    model = tree["model"]
    joined = next((name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)), None)
    reasons = {
        f"is of the kind {model['type']}, where no token is made of others": model["type"] not in _KINDS,
        "drops merges at random (dropout)": model.get("dropout"),
        f"marks parts of words ({joined})": model["type"] == "BPE" and joined,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"trim.vocabulary: {folder}'s tokenizer {reason}, so no rule says what may go. {out}")
    return tree


def _ids_of(model: dict[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        return {token: number for number, (token, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """A BPE model's merges in order; older files write them with a blank between."""
    found = []
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        found.append((first, second))
    return found


def _atoms(tree: dict[str, Any]) -> set[str]:
    """The tokens by which any text can be written."""
    model = tree["model"]
    ids = _ids_of(model)
    if model.get("byte_fallback"):
        return {f"<0x{byte:02X}>" for byte in range(256)} & ids.keys() | _unknown(model)
    if _byte_level(tree):
        from tokenizers.pre_tokenizers import ByteLevel

        return set(ByteLevel.alphabet()) & ids.keys()
    prefix = model.get("continuing_subword_prefix") or ""
    return {token for token in ids if len(token.removeprefix(prefix)) == 1} | _unknown(model)


def _unknown(model: dict[str, Any]) -> set[str]:
    """The token of what is not known, and that by which its cost is counted."""
    if model["type"] != "Unigram":
        return {model["unk_token"]} if model.get("unk_token") in model["vocab"] else set()
    least = min(model["vocab"], key=lambda one: one[1])[0]
    unknown = model.get("unk_id")
    return {least} if unknown is None else {least, model["vocab"][unknown][0]}


def _byte_level(tree: dict[str, Any]) -> bool:
    """Whether texts are split into the 256 letters that stand for bytes."""
    parts = [tree.get("pre_tokenizer") or {}, tree.get("decoder") or {}]
    for part in parts:
        parts += [*part.get("pretokenizers", ()), *part.get("decoders", ())]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _closed(model: dict[str, Any], wanted: set[str]) -> set[str]:
    """Tokens of a BPE model with all that they are made of."""
    ranks = {pair: rank for rank, pair in enumerate(_pairs(model))}
    return wanted.union(*(_made_of(token, ranks) for token in wanted))


def _made_of(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """All that merges make of a token's characters until it is there; nothing if merges do not make it."""
    parts = list(token)
    seen = set(parts)
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda place: ranks.get((parts[place], parts[place + 1]), len(ranks)))
        if (parts[best], parts[best + 1]) not in ranks:
            return set()  # an added token, or one that is only taken whole (ignore_merges)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
        seen.add(parts[best])
    return seen


def _alone(model: dict[str, Any], wanted: set[str]) -> set[str]:
    """Where a token is in the vocabulary or not, whatever else is."""
    return wanted


_KINDS: dict[str, Callable[[dict[str, Any], set[str]], set[str]]] = {
    "BPE": _closed,
    "WordPiece": _alone,
    "Unigram": _alone,
}


# -- ids in configurations -------------------------------------------------------------------------------------------------


def named_ids(tree: Any) -> set[int]:
    """Ids of tokens that a `config.json` or `generation_config.json` names."""
    found: set[int] = set()

    def note(_: str, number: int) -> int:
        found.add(number)
        return number

    _with_ids(tree, note)
    return found


def _with_ids(tree: Any, other: Callable[[str, int], int]) -> Any:
    """A copy of a configuration, in which `other` gives each id of a token (key, id) anew. Below 0 there is none."""
    if isinstance(tree, list):
        return [_with_ids(item, other) for item in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: _ids_in(key, value, other) if _names_ids(key) else _with_ids(value, other) for key, value in tree.items()
    }


def _names_ids(key: str) -> bool:
    return key.endswith(("token_id", "token_ids", "token_index")) or key in _LISTS_OF_IDS


def _ids_in(key: str, value: Any, other: Callable[[str, int], int]) -> Any:
    if isinstance(value, list):
        return [_ids_in(key, item, other) for item in value]
    plain = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return other(key, value) if plain else value


def _around(processor: Any, other: Callable[[int], int]) -> Any:
    """A post-processor, which puts tokens around texts, with other ids."""
    if not isinstance(processor, dict):
        return processor
    found = dict(processor)
    if "processors" in found:
        found["processors"] = [_around(one, other) for one in found["processors"]]
    for name in ("sep", "cls"):  # of BERT's and RoBERTa's
        if name in found:
            token, number = found[name]
            found[name] = [token, other(number)]
    if "special_tokens" in found:
        found["special_tokens"] = {
            name: {**one, "ids": [other(number) for number in one["ids"]]}
            for name, one in found["special_tokens"].items()
        }
    return found


def say(vocabulary: Vocabulary, read: Read) -> None:
    """What was kept, and how the texts are read."""
    console.say(
        "tokens",
        f"{len(vocabulary.ids):,} of {len(vocabulary.new):,} stay ({vocabulary.used:,} used); {read.identical:,} of {read.texts:,} texts "
        "of trim.vocabulary become the same tokens",
    )
