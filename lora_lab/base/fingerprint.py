"""Know a base model again, so that an adapter never meets a base that it was not trained on."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.base.resolve import cache_dir
from lora_lab.errors import BaseModelError, RunError
from lora_lab.runtime import storage
from lora_lab.runtime.reading import read_bytes, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Notes that transformers keeps in config.json about where and with what a copy was made.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache")
# The same in tokenizer_config.json; the chat template, which may stand there too, counts as itself.
_TOKENIZER_NOTES = ("name_or_path", "is_local", "local_files_only", "transformers_version", "chat_template")


def fingerprint(folder: Path, weight_files: list[Path]) -> str:
    """Hex SHA-256 over the bytes of the weights and over what `config.json` says of the architecture.

    Names of files and folders do not count.
    """
    architecture = _without(read_json(folder / "config.json", BaseModelError), _VOLATILE)
    digests = sorted(remembered_sha256(file) for file in weight_files)
    return _digest("\n".join([*digests, architecture]))


def companions(folder: Path, tokenizer: PreTrainedTokenizerBase, chat: bool) -> dict[str, str]:
    """Hex SHA-256 of what decides results beside the weights: the tokenizer's files, the chat template, generation settings.

    Notes about where and with what a copy was made do not count.

    Args:
        tokenizer: as it was loaded from `folder`; it names its files.
        chat: whether conversations are rendered.
    """
    from transformers import tokenization_utils_base as names

    config, generation = names.TOKENIZER_CONFIG_FILE, folder / "generation_config.json"
    own = {*tokenizer.vocab_files_names.values(), names.SPECIAL_TOKENS_MAP_FILE, names.ADDED_TOKENS_FILE}
    parts = [
        f"{name} {hashlib.sha256(read_bytes(folder / name, BaseModelError)).hexdigest()}"
        for name in sorted(own - {config})
        if (folder / name).is_file()
    ]
    if (folder / config).is_file():
        parts.append(_without(read_json(folder / config, BaseModelError), _TOKENIZER_NOTES))
    found = {"tokenizer": _digest("\n".join(parts))}
    if chat:
        found["chat template"] = _digest(json.dumps(tokenizer.chat_template))
    if generation.is_file():
        found["generation config"] = _digest(_without(read_json(generation, BaseModelError), _VOLATILE))
    return found


def _without(tree: dict[str, Any], notes: tuple[str, ...]) -> str:
    return json.dumps({key: value for key, value in tree.items() if key not in notes}, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def remembered_sha256(file: Path) -> str:
    """SHA-256 of a large file, remembered by path, size and times of change: hashing runs at about a gigabyte a second."""
    stat = file.stat()
    mark = json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    note = cache_dir() / "sha256" / _digest(mark)
    with contextlib.suppress(RunError):
        digest, _, check = read_bytes(note, RunError, 1000).decode("ascii", "replace").partition(" ")
        if check == _digest(mark + digest):  # else the note is damaged, and made again
            return digest
    digest = storage.sha256(file)
    with contextlib.suppress(OSError, RunError):  # a read-only cache costs time, nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(note, f"{digest} {_digest(mark + digest)}")
    return digest
