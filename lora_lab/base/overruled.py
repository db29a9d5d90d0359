"""What `tokenizer.json` says is what is used: transformers builds some of its classes anew from vocabulary and merges alone, and drops
what the file says of normalizing, splitting and joining."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.base.hard_texts import HARD_TEXTS
from lora_lab.errors import BaseModelError
from lora_lab.runtime import console, storage
from lora_lab.runtime.reading import check_file, read_json, reading

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE = "tokenizer.model"  # transformers does not need it, llama.cpp's conversion does
KNOWN_TO_ALL = {
    "TokenizersBackend": "PreTrainedTokenizerFast"
}  # the same class: its name since transformers 5, and before
_PARTS = {
    "normalizer": "normalizes",
    "pre_tokenizer": "splits",
    "model": "merges",
    "decoder": "joins",
    "added_tokens": "adds tokens",
}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("add_bos_token", "add_eos_token")
_SHOWN = 3
_MOST_BYTES = 2**28  # of a tokenizer.json; the largest of known models has some 35 MB
Encode = Callable[[str], Sequence[Any]]


def as_written(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer of a folder by its `tokenizer.json`, and a sentence where its class does otherwise; empty where it is the same.

    Args:
        tokenizer: as transformers loads it.

    Raises:
        BaseModelError: the file cannot be used as it is, or other files of the folder contradict it.
    """
    file = folder / FILE
    if not file.is_file() or not tokenizer.is_fast:
        return tokenizer, ""
    if (folder / SENTENCEPIECE).is_file():
        _check_sentencepiece(folder, tokenizer)
    said, name = "", type(tokenizer).__name__
    if not _is_plain(tokenizer) and _can_be_written(tokenizer):
        written = read_alone(file)
        found = _otherwise(tokenizer.backend_tokenizer, written, _flagged(folder))
        if found:
            plain = _plain(folder, tokenizer)
            left = _otherwise(plain.backend_tokenizer, written, _flagged(folder))
            if left:
                raise BaseModelError(
                    f"{file}: transformers {' and '.join(left)} differently from this file, however it is loaded. Save the tokenizer of the "
                    "folder anew with the version of transformers that it was made with."
                )
            said = (
                f"tokenizer.json is used as it is: transformers' {name} {' and '.join(found)} differently from the file"
            )
            try:
                check_saved_copy(folder, plain)
                tokenizer = plain
            except BaseModelError:  # for some model types transformers takes its own class whatever a folder says
                other = differing(
                    lambda text: tokenizer(text)["input_ids"], lambda text: plain(text)["input_ids"], HARD_TEXTS
                )
                said = (
                    f"transformers takes its own {name} for this model_type whatever a folder says, so it is used, and saved with merges: it "
                    f"{' and '.join(found)} differently from tokenizer.json ({len(other)} of {len(HARD_TEXTS)} hard texts)"
                )
    _check_added(folder, tokenizer)
    return tokenizer, said


def differing(one: Encode, other: Encode, texts: Iterable[str] = HARD_TEXTS) -> list[str]:
    """The texts that become other tokens."""
    return [text for text in texts if list(one(text)) != list(other(text))]


def shown(texts: Sequence[str]) -> str:
    """Some texts, for a message."""
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(repr(text[:40]) for text in texts[:_SHOWN]) + more


def check_reloads(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a saved tokenizer says the same to whoever loads it: by transformers' AutoTokenizer, and by the package `tokenizers` alone.

    Args:
        folder: with `config.json`, which decides the class that transformers takes.

    Raises:
        BaseModelError: it becomes another there.
    """
    from transformers import AutoTokenizer

    if not tokenizer.is_fast:
        return
    with reading(f"{folder}: its tokenizer", BaseModelError):
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    readers: dict[str, Encode] = {f"transformers ({type(again).__name__})": lambda text: again(text)["input_ids"]}
    if _can_be_written(tokenizer):
        alone = read_alone(folder / FILE)
        readers["the package tokenizers"] = lambda text: alone.encode(text).ids
    for name, encode in readers.items():
        other = differing(lambda text: tokenizer(text)["input_ids"], encode, _with_added(tokenizer))
        if other:
            raise BaseModelError(
                f"{folder}: the saved tokenizer changes when {name} loads it: {shown(other)} become other tokens "
                f"({len(other)} of {len(HARD_TEXTS)} texts), so prompts would reach the model in other tokens than in training. Nothing is "
                "kept. Choose a base whose type of model (model_type in config.json) loads its own tokenizer.json."
            )


def check_saved_copy(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The same of a copy made for this, before anything is trained.

    Args:
        folder: of the base.

    Raises:
        BaseModelError: as `check_reloads`.
    """
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        if (folder / "config.json").is_file():
            (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
        write(tokenizer, copy, KNOWN_TO_ALL)
        try:
            check_reloads(copy, tokenizer)
        except BaseModelError as error:
            raise BaseModelError(str(error).replace(f"{copy}: what was saved", f"{folder}: what is saved")) from error


def write(tokenizer: PreTrainedTokenizerBase, folder: Path, names: dict[str, str] | None = None) -> None:
    """Save a tokenizer without transformers' notes about where this copy was loaded from.

    Args:
        names: other names of classes, to be written instead.
    """
    tokenizer.save_pretrained(folder)
    file = folder / CONFIG
    tree = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in tree.items() if key not in ("is_local", "local_files_only")}
    other = (names or {}).get(kept.get("tokenizer_class", ""))
    if other:
        kept["tokenizer_class"] = other
    file.write_text(storage.dump_json(kept), encoding="utf-8")


def read_alone(file: Path) -> Tokenizer:
    """A `tokenizer.json` as the package `tokenizers` reads it, as servers that are not written in Python do.

    Raises:
        BaseModelError: it cannot be read.
    """
    from tokenizers import Tokenizer

    check_file(file, BaseModelError, _MOST_BYTES)
    with reading(file, BaseModelError):
        found = Tokenizer.from_file(str(file))
    found.no_padding()  # which is about batches; transformers decides it for each call
    found.no_truncation()
    return found


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its class takes `tokenizer.json` as it is, and nothing else."""
    from transformers import PreTrainedTokenizerFast

    return type(tokenizer) is PreTrainedTokenizerFast


def _can_be_written(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a file can hold it: RoFormer splits Chinese by a program, for which a stand-in lies in the file."""
    try:
        tokenizer.backend_tokenizer.to_str()
    except Exception:  # the package raises nothing more particular
        return False
    return True


def _plain(folder: Path, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer.json` as it is, with the special tokens and settings that the class had."""
    from transformers import PreTrainedTokenizerFast

    with reading(f"{folder}: its tokenizer", BaseModelError):
        plain = PreTrainedTokenizerFast.from_pretrained(
            folder,
            trust_remote_code=False,
            model_input_names=list(tokenizer.model_input_names),
            padding_side=tokenizer.padding_side,
        )
    vocabulary = plain.get_vocab()
    for name in _SPECIAL:
        token = getattr(tokenizer, name)
        if getattr(plain, name) is None and token is not None and token in vocabulary:
            setattr(plain, name, token)
    return plain


def _flagged(folder: Path) -> bool:
    """Whether `tokenizer_config.json` says itself what is put around a text; it counts more than what the file says of that."""
    config = folder / CONFIG
    return config.is_file() and any(read_json(config, BaseModelError).get(name) is not None for name in _FLAGS)


def _otherwise(used: Tokenizer, written: Tokenizer, flagged: bool) -> list[str]:
    """Where `used` departs from `written`."""
    used.no_padding()
    used.no_truncation()
    if used.to_str() == written.to_str():  # comparing their trees takes seconds for large vocabularies
        return []
    one, other = _parts(used), _parts(written)
    added = other.pop("added_tokens")
    found = [name for name, part in other.items() if one[name] != part]
    if any(one["added_tokens"].get(number) != token for number, token in added.items()):
        found.append("added_tokens")
    says = [_PARTS[name] for name in found]
    if not flagged and differing(lambda text: used.encode(text).ids, lambda text: written.encode(text).ids):
        says = says or ["begins or ends texts"]
    return says


def _parts(backend: Tokenizer) -> dict[str, Any]:
    tree = json.loads(backend.to_str())
    model = {key: value for key, value in tree["model"].items() if value not in (None, "", False)}
    if isinstance(model.get("merges"), list):
        model["merges"] = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return {
        "normalizer": tree["normalizer"],
        "pre_tokenizer": tree["pre_tokenizer"],
        "model": model,
        "decoder": tree["decoder"],
        "added_tokens": {token["id"]: (token["content"], token["special"]) for token in tree["added_tokens"]},
    }


def _check_added(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse added tokens that have another number than `tokenizer_config.json` says: one of the files lost some.

    Raises:
        BaseModelError: naming the first.
    """
    file = folder / CONFIG
    told = read_json(file, BaseModelError).get("added_tokens_decoder") if file.is_file() else None
    if not isinstance(told, dict):
        return
    vocabulary = tokenizer.get_vocab()
    for number, token in told.items():
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str) or not str(number).isdecimal():
            continue
        found = vocabulary.get(text)
        if found != int(number):
            raise BaseModelError(
                f"{folder / FILE}: the added token {text!r} is number {found} there, and {number} by {CONFIG}. One of the files lost or "
                "moved it, so prompts would reach the model in other tokens than in training. Copy or download the tokenizer's files again."
            )


def _with_added(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The hard texts, and some of the tokens that are found whole, in the middle of one."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return [*HARD_TEXTS, *(f"a {token}b" for token in (*added[:20], *added[-20:]))]


def _check_sentencepiece(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a folder whose `tokenizer.model` and `tokenizer.json` disagree: programs take one or the other.

    Raises:
        BaseModelError: naming texts on which they differ.
    """
    if importlib.util.find_spec("sentencepiece") is None:
        console.say(
            "tokenizer",
            f"{SENTENCEPIECE} is not compared with {FILE}, because sentencepiece is not installed: pip install sentencepiece",
        )
        return
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.Load(str(folder / SENTENCEPIECE))
    except (OSError, RuntimeError):  # a vocabulary of another make under this name
        return
    encode = tokenizer.backend_tokenizer.encode
    other = differing(
        lambda text: model.EncodeAsPieces(text),
        lambda text: encode(text, add_special_tokens=False).tokens,
        (text for text in HARD_TEXTS if text == text.strip() and "  " not in text and text.isprintable()),
    )
    if other:
        raise BaseModelError(
            f"{folder}: {SENTENCEPIECE} and {FILE} disagree, and programs take one or the other: {shown(other)} become other tokens. Remove the "
            "one that is wrong from a copy of the folder."
        )
