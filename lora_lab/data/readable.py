"""Whether a base can read the rows: what its tokenizer makes of their characters.

A tokenizer that was made for one language turns another into unknown tokens, or drops what it does not know; the model then learns from
texts that hold nothing. A tokenizer of bytes reads everything, but spells what it never met.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lab.base.tokenizer import decode
from lora_lab.data import formats, sources
from lora_lab.data.chunks import columns_of
from lora_lab.data.formats import Record, RowError
from lora_lab.data.store import format_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_lab.data.encode import Encoder
    from lora_lab.data.sources import DataFile, HubData

_ROWS = 256  # of each key that are looked at
LOOKED_AT = 5_000  # of the first rows of a file, evenly spread
_MAX_CHARS = 2_000  # of a text
_OTHER_SCRIPT = 0.2  # share of the letters by which a text is not one in Latin letters
# Ranges of characters by the script that a base must know: (first, last, name)
_SCRIPTS = (
    (0x0041, 0x024F, "Latin"), (0x0370, 0x03FF, "Greek"), (0x0400, 0x052F, "Cyrillic"), (0x0590, 0x05FF, "Hebrew"),
    (0x0600, 0x06FF, "Arabic"), (0x0900, 0x097F, "Devanagari"), (0x0E00, 0x0E7F, "Thai"), (0x1E00, 0x1EFF, "Latin"),
    (0x3040, 0x30FF, "Japanese"), (0x3400, 0x4DBF, "Chinese"), (0x4E00, 0x9FFF, "Chinese"), (0xAC00, 0xD7AF, "Korean"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a tokenizer makes of some texts; all are counts."""

    tokens: int
    unknown: int  # tokens that stand for whatever is not known
    characters: int  # without blanks, accents, control characters
    lost: int  # of them: not there any more when the tokens become text again
    spelled: int  # of them: parted into several tokens, as bytes
    script: str  # of most of the lost or spelled characters; empty if of none in particular

    def share(self, count: int) -> float:
        """Of all characters."""
        return count / max(1, self.characters)


def measure(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Reading:
    """Tokenize texts and compare what is left of their characters, whatever their case and accents."""
    unknown_id = unknown_token_id(tokenizer)
    tokens = unknown = 0
    whole: collections.Counter[str] = collections.Counter()
    missed, spelled = whole.copy(), whole.copy()
    for text in texts:
        text = text[:_MAX_CHARS]
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = found["input_ids"]
        known = [number for number in ids if number != unknown_id]
        tokens, unknown = tokens + len(ids), unknown + len(ids) - len(known)
        there = _characters(text)
        whole += there
        missed += there - _characters(decode(tokenizer, known, clean_up_tokenization_spaces=False))
        spelled += _spelled(text, found["offset_mapping"])
    script = _script((missed if missed.total() >= spelled.total() else spelled).elements())
    return Reading(tokens, unknown, whole.total(), missed.total(), spelled.total(), script)


def unknown_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token of what is not known; None where it has another meaning too, so that texts never become it."""
    number = tokenizer.unk_token_id
    return None if number in (tokenizer.eos_token_id, tokenizer.bos_token_id) else number


def sample(key: str, names: Any, encoder: Encoder) -> Iterator[str]:
    """Texts of some rows, spread over the files of a key."""
    files = sources.find(key, names, encoder.config.sample_by, encoder.config.field)
    for file in files:
        for record in records(file, encoder, max(1, _ROWS // len(files))):
            yield from texts_of(record)


def records(file: DataFile | HubData, encoder: Encoder, count: int = LOOKED_AT) -> Iterator[Record]:
    """So many of the first `LOOKED_AT` rows of a file, evenly spread."""
    name, mapping = format_of(file, encoder), columns_of(file, encoder.config)
    first = sum(1 for _ in itertools.islice(file.rows(), LOOKED_AT))
    for row in itertools.islice(file.rows(), 0, first, max(1, -(-first // count))):
        with contextlib.suppress(RowError):  # told of elsewhere
            values = sources.renamed(row, mapping)
            if values.problem is None:
                yield formats.read(values.values, name, encoder.config.label_names)


def texts_of(record: Record) -> list[str]:
    """What the model is to read, or to write, of a row."""
    messages = [*(record.messages or ()), *(record.rejected or ())]
    if messages:
        found = [message.get("content") for message in messages]
    else:
        found = [record.text, record.pair, record.target, " ".join(record.tokens or ())]
    return [text for text in found if isinstance(text, str) and text]


def _characters(text: str) -> collections.Counter[str]:
    return collections.Counter(letter for letter in unicodedata.normalize("NFKD", text.casefold()) if _counts(letter))


def _counts(letter: str) -> bool:
    """Not a blank, an accent, a variant mark or a control character: tokenizers may drop those, and little is lost."""
    if "\u0300" <= letter <= "\u036f" or "\ufe00" <= letter <= "\ufe0f":
        return False
    return not letter.isspace() and unicodedata.category(letter)[0] != "C"


def _spelled(text: str, offsets: list[tuple[int, int]]) -> collections.Counter[str]:
    """Characters that several tokens share."""
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    spans = spans[spans[:, 1] > spans[:, 0]]
    edges = np.zeros(len(text) + 1, dtype=np.int64)
    np.add.at(edges, spans[:, 0], 1)
    np.add.at(edges, spans[:, 1], -1)
    several = np.flatnonzero(np.cumsum(edges[:-1]) > 1)
    return collections.Counter(text[place] for place in several if _counts(text[place]))


def script_of(texts: Iterable[str]) -> str:
    """The script that a base must know for texts: Latin letters stand among those of any other, so a share of these decides."""
    counts = _scripts(letter for text in texts for letter in text[:_MAX_CHARS])
    del counts[""]
    others = collections.Counter({name: count for name, count in counts.items() if name != "Latin"})
    first = others.most_common(1)
    if first and others.total() >= _OTHER_SCRIPT * counts.total():
        return "Japanese" if counts["Japanese"] >= _OTHER_SCRIPT * others.total() else first[0][0]
    return "Latin" if counts else ""


def _script(letters: Iterable[str]) -> str:
    counts = _scripts(letters)
    return counts.most_common(1)[0][0] if counts else ""


def _scripts(letters: Iterable[str]) -> collections.Counter[str]:
    return collections.Counter(
        next((name for first, last, name in _SCRIPTS if first <= ord(letter) <= last), "") for letter in letters
    )
