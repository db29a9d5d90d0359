"""What every export is made from."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_lab.base import load
from lora_lab.base.load import BaseFiles, ModelKind
from lora_lab.config import RunConfig
from lora_lab.data.encode import Encoder
from lora_lab.run_dir import RunDir

if TYPE_CHECKING:
    from lora_lab.merge.parity import Probe


@dataclasses.dataclass(frozen=True)
class Job:
    """A trained run, or one that is to be trained."""

    run: RunDir
    config: RunConfig
    base: BaseFiles
    kind: ModelKind
    encoder: Encoder
    device: torch.device
    rows: Probe | None = None  # what is compared on; not before training

    @functools.cached_property
    def architecture(self) -> str:
        """transformers' class of the model."""
        return type(load.skeleton(self.base.folder, self.kind)).__name__

    @property
    def merged(self) -> Path:
        return self.run.merged

    @property
    def exact(self) -> str:
        """The type that a reference is computed in: float32 where memory is the machine's, not to mistake rounding for a fault."""
        return "float32" if self.device.type == "cpu" else "auto"
