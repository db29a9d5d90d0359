"""A base's tensors read one by one from its files, and a checkpoint's written so, without a model."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lora_lab.base import inspect
from lora_lab.errors import BaseModelError
from lora_lab.runtime import storage
from lora_lab.runtime.reading import reading

_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
FORMAT_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Weights:
    """The tensors of a model folder by name. Each is read when it is asked for, and its file is not kept open."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.floating: dict[str, bool] = {}
        self.dtypes: dict[str, str] = {}  # by the names of the format
        for file in inspect.weight_files(folder):
            with reading(file, BaseModelError), safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = tensors.get_slice(name)
                    self._files[name], self.shapes[name] = file, torch.Size(part.get_shape())
                    self.dtypes[name] = part.get_dtype()
                    self.floating[name] = self.dtypes[name] in ("BF16", "F16", "F32", "F64")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    @property
    def dtype(self) -> str | None:
        """Name of torch's type of most of the numbers, if that is one that models compute in."""
        sizes = Counter[str]()
        for name, dtype in self.dtypes.items():
            sizes[dtype] += self.shapes[name].numel()
        [(dtype, _)] = sizes.most_common(1)
        return _NAMES.get(dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor; its pages of the file leave memory with it."""
        file = self._files[name]
        with reading(file, BaseModelError), safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)


def write(
    folder: Path, tensors: Mapping[str, tuple[torch.Size, str]], read: Callable[[str], torch.Tensor], shard_size: str
) -> None:
    """Write a checkpoint's tensors into a folder, so that memory holds one of them: shards, and the index last.

    Args:
        tensors: of each the shape, and the type by the name of the safetensors format, in order.
        read: gives each, with that shape and type.
        shard_size: as `export.max_shard_size`.
    """
    shards = list(_shards(tensors, shard_size))
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        _write_shard(folder / file, {name: tensors[name] for name in shard}, read)
        where |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(_size(*one) for one in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(storage.dump_json(index), encoding="utf-8")


def _size(shape: torch.Size, dtype: str) -> int:
    return shape.numel() * _BYTES[dtype]


def _shards(tensors: Mapping[str, tuple[torch.Size, str]], shard_size: str) -> Iterator[list[str]]:
    """The tensors' names, cut where a shard is full."""
    limit, size = int(shard_size[:-2]) * _UNITS[shard_size[-2:]], 0
    shard: list[str] = []
    for name, one in tensors.items():
        own = _size(*one)
        if shard and size + own > limit:
            yield shard
            size, shard = 0, []
        size, shard = size + own, [*shard, name]
    yield shard


def _write_shard(
    file: Path, tensors: Mapping[str, tuple[torch.Size, str]], read: Callable[[str], torch.Tensor]
) -> None:
    """One safetensors file: length of the header (8 bytes), header (JSON), tensors. safetensors' own writer takes all tensors
    at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + _size(shape, dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name in tensors:
            read(name).flatten().view(torch.uint8).numpy().tofile(out)
