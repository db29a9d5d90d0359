"""A GGUF base is dequantized once into a cached transformers folder, so that later loads take a second.

GGUF holds quantized blocks that transformers can read but not train on. What they stand for is trained on: to the bit in float32, rounded
to bfloat16 once where a run computes in that. The cache is keyed by the file's bytes.
"""

from __future__ import annotations

import math
import mmap
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.base import cache, gguf_tokens, overruled
from lora_lab.base.fingerprint import remembered_sha256
from lora_lab.base.resolve import cache_dir
from lora_lab.base.tokenizer import (
    NUMBERS_AS_WRITTEN,
    READER,
    TOKENS_AS_WRITTEN,
    chosen_template,
    save_tokenizer,
)
from lora_lab.errors import BaseModelError
from lora_lab.runtime import storage
from lora_lab.runtime.reading import check_file, reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# GGUF's types of values: struct's letter for each of a fixed size.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT = ("tokenizer.", "general.architecture", "general.name")
_MAX_PAIRS, _MAX_TENSORS, _MAX_DIMENSIONS, _MAX_ELEMENTS = 2**16, 2**20, 8, 2**44
# What a model is built from before its tensors are looked at.
_LIMITS = {
    "block_count": 2_000, "expert_count": 4_096, "embedding_length": 2**20, "feed_forward_length": 2**20, "vocab_size": 2**24,
    "head_count": 2**14, "head_count_kv": 2**14, "context_length": 2**31,
}  # fmt: skip


def to_safetensors(file: Path, reader: int = READER, dtype: str = "bfloat16") -> Path:
    """The folder with the dequantized model and its tokenizer, made on first use and verified on every other.

    Args:
        reader: see `tokenizer.READER`; 1: transformers' own tokenizer, which leaves most of `tokenizer.ggml.pre` aside.
        dtype: that the run computes in. bfloat16: the weights are rounded to it, in half the space; else stored as they are in the file, in
            float32. Each has an entry of its own in the cache.

    Raises:
        BaseModelError: the file is not GGUF, is cut, holds an architecture that transformers cannot read, or splits texts in a way that
            is not known.
    """
    check_file(file, BaseModelError, None)
    told = read_head(file)
    exact = dtype != "bfloat16" and reader >= NUMBERS_AS_WRITTEN
    kept = f"{min(reader, TOKENS_AS_WRITTEN)}{'-float32' if exact else ''}"
    folder = cache_dir() / "gguf" / f"{remembered_sha256(file)[:32]}-{kept}"
    with cache.entry(folder, BaseModelError) as there:  # another process may have been converting the same file
        if not there:
            _convert(file, folder, told, reader, "float32" if exact else "bfloat16")
    return folder


def tokenizer_of(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file describes.

    Raises:
        BaseModelError: as `to_safetensors`.
    """
    return gguf_tokens.build(file, read_head(file))[0]


def _convert(file: Path, folder: Path, told: dict[str, Any], reader: int, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with (
            reading(f"model.path={file}, read by transformers", BaseModelError, "Choose another file of this model."),
            tempfile.TemporaryDirectory() as alone,
        ):
            (Path(alone) / "model.gguf").symlink_to(
                file.resolve()
            )  # transformers would read what lies beside it as well
            source = {"pretrained_model_name_or_path": alone, "gguf_file": "model.gguf"}
            tokenizer: PreTrainedTokenizerBase
            ends: list[int] = []
            if reader < TOKENS_AS_WRITTEN:
                tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
            else:
                tokenizer, ends = gguf_tokens.build(file, told)
            tokenizer.chat_template = chosen_template(file, tokenizer.chat_template)
            model = AutoModelForCausalLM.from_pretrained(
                **source,
                dtype=getattr(torch, dtype),
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
            )
    except BaseModelError as error:
        if isinstance(error.__cause__, ImportError):
            raise BaseModelError(f"model.path={file}: reading GGUF needs the package gguf: pip install gguf") from error
        raise
    if len(ends) > 1:  # the token that ends a text, and the one that ends a turn
        model.generation_config.eos_token_id = ends
    with storage.new_folder(folder, {"source": file.name}) as temporary:
        cache.save(model, temporary)
        if reader < TOKENS_AS_WRITTEN:
            overruled.write(tokenizer, temporary)
        else:
            save_tokenizer(tokenizer, temporary)


def read_head(file: Path) -> dict[str, Any]:
    """What the head of a GGUF file says of its architecture and tokenizer, and a check that it is whole: the reader of the package
    gguf trusts its counts, and reads on behind the end.

    Raises:
        BaseModelError: not GGUF, of another version, cut, or with counts that no model has.
    """
    with reading(f"model.path={file}", BaseModelError), open(file, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise BaseModelError(f"model.path={file}: not a GGUF file (its first bytes are not 'GGUF').")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Head(file, content).check()


class _Head:
    """A walk over the head of a GGUF file, in its own order: version, counts, pairs of key and value, tensors."""

    def __init__(self, file: Path, content: mmap.mmap):
        self.file, self.content, self.at = file, content, 4
        self.alignment = 32

    def check(self) -> dict[str, Any]:
        [version] = self._numbers("I")
        if version not in (2, 3):
            raise self._damaged(f"version {version}; 2 and 3 can be read")
        tensors, pairs = self._numbers("QQ")
        if tensors > _MAX_TENSORS or pairs > _MAX_PAIRS:
            raise self._damaged(f"{tensors:,} tensors and {pairs:,} settings")
        kept = {}
        for _ in range(pairs):
            key = self._text().decode("utf-8", "replace")
            name = key.rpartition(".")[2]
            [kind] = self._numbers("I")
            value = self._value(kind)
            if key.startswith(_KEPT):
                kept[key] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            if name == "alignment" and isinstance(value, int):
                self.alignment = value
            if name in _LIMITS and isinstance(value, (int, float)) and not value <= _LIMITS[name]:
                raise self._damaged(f"{name} {value:g}, above {_LIMITS[name]:,}")
        ends = [self._tensor_end() for _ in range(tensors)]
        data = -(-self.at // max(1, self.alignment)) * self.alignment
        if ends and data + max(ends) > len(self.content):
            raise self._damaged(f"tensors up to byte {data + max(ends):,} of {len(self.content):,}")
        return kept

    def _tensor_end(self) -> int:
        """Where a tensor's bytes end, behind the start of all data."""
        from gguf.constants import GGML_QUANT_SIZES

        name = self._text().decode("utf-8", "replace")
        [dimensions] = self._numbers("I")
        if dimensions > _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name[:60]!r} has {dimensions:,} dimensions")
        shape = self._numbers("Q" * dimensions)
        if math.prod(shape) > _MAX_ELEMENTS:
            raise self._damaged(f"tensor {name[:60]!r} of shape {list(shape)}")
        kind, offset = self._numbers("IQ")
        if kind not in GGML_QUANT_SIZES:
            raise self._damaged(f"tensor {name[:60]!r} of the unknown type {kind}")
        elements, size = GGML_QUANT_SIZES[kind]
        return offset + math.prod(shape) // elements * size

    def _value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._damaged(f"a value of the unknown type {kind}")
        [inner] = self._numbers("I")
        [count] = self._numbers("Q")
        if inner in _SCALARS:
            start, letters = self.at, f"<{count}{_SCALARS[inner]}"
            self._skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            return struct.unpack_from(letters, self.content, start)
        if inner != _STRING:
            raise self._damaged("lists inside a list")
        self._skip(8 * count, only_look=True)  # each has at least its length
        return [self._text().decode("utf-8", "replace") for _ in range(count)]

    def _text(self) -> bytes:
        [length] = self._numbers("Q")
        start = self.at
        self._skip(length)
        return self.content[start : self.at]

    def _numbers(self, letters: str) -> tuple[Any, ...]:
        start, size = self.at, struct.calcsize(f"<{letters}")
        self._skip(size)
        return struct.unpack_from(f"<{letters}", self.content, start)

    def _skip(self, size: int, only_look: bool = False) -> None:
        if self.at + size > len(self.content):
            raise self._damaged(f"something of {size:,} bytes at byte {self.at:,} of {len(self.content):,}")
        self.at += 0 if only_look else size

    def _damaged(self, what: str) -> BaseModelError:
        return BaseModelError(
            f"model.path={self.file}: cannot read this GGUF file: its head has {what}, so it is cut or damaged. Copy or download "
            "it again."
        )
