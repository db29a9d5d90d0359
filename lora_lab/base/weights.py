"""A base's tensors read one by one from its files, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from lora_lab.base import inspect
from lora_lab.errors import BaseModelError
from lora_lab.runtime.reading import reading

_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class Weights:
    """The tensors of a model folder by name. Each is read when it is asked for, and its file is not kept open."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.floating: dict[str, bool] = {}
        self._dtypes: dict[str, str] = {}  # by the names of the format
        for file in inspect.weight_files(folder):
            with reading(file, BaseModelError), safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = tensors.get_slice(name)
                    self._files[name], self.shapes[name] = file, torch.Size(part.get_shape())
                    self._dtypes[name] = part.get_dtype()
                    self.floating[name] = self._dtypes[name] in ("BF16", "F16", "F32", "F64")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    @property
    def dtype(self) -> str | None:
        """Name of torch's type of most of the numbers, if that is one that models compute in."""
        sizes = Counter[str]()
        for name, dtype in self._dtypes.items():
            sizes[dtype] += self.shapes[name].numel()
        [(dtype, _)] = sizes.most_common(1)
        return _NAMES.get(dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor; its pages of the file leave memory with it."""
        file = self._files[name]
        with reading(file, BaseModelError), safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)
