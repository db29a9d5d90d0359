"""A base in 4 bits is kept as it was quantized, so that later loads need not quantize it again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.base import cache
from lora_lab.base.resolve import cache_dir
from lora_lab.config.model import QuantConfig
from lora_lab.errors import RunError
from lora_lab.runtime import storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_lab.base.load import BaseFiles, ModelKind

SHARD = "2GB"  # a file of weights from a GPU is in main memory while it is written
_FORMAT = 1  # raised when what is kept changes, so that older cache entries are not used


def folder_of(files: BaseFiles, kind: ModelKind, dtype: str, quant: QuantConfig, device: str) -> Path | None:
    """Where this base is kept in 4 bits; None where it is not: nothing to quantize, or parts that every run makes anew."""
    if files.published is not None or quant.method not in ("nf4", "fp4") or not quant.cache or kind.whole:
        return None
    versions = [importlib.metadata.version(name) for name in ("bitsandbytes", "transformers", "torch")]
    made_of = [
        _FORMAT,
        files.fingerprint,
        kind.auto_class,
        kind.settings,
        dtype,
        dataclasses.asdict(quant),
        device,
        versions,
        *([kind.unread] if kind.unread else []),
    ]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "quantized" / digest[:32]


def keep(model: PreTrainedModel, folder: Path) -> None:
    """Write a quantized model that has just been loaded; a cache that cannot be written costs time, nothing else."""
    with contextlib.suppress(OSError, RunError), cache.entry(folder, RunError) as there:
        if not there:
            with storage.new_folder(folder) as temporary:
                cache.save(model, temporary, max_shard_size=SHARD)
