"""What every export is made from."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from lora_lab.adapters.attach import fresh_settings
from lora_lab.base import load
from lora_lab.base.load import BaseFiles, ModelKind
from lora_lab.base.weights import Weights
from lora_lab.config.run import RunConfig
from lora_lab.data.encode import Encoder
from lora_lab.run.run_dir import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_lab.verify.parity import Probe


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

    @property
    def merged(self) -> Path:
        return self.run.merged

    @functools.cached_property
    def skeleton(self) -> PreTrainedModel:
        """The base without weights."""
        return load.skeleton(self.base.folder, self.kind)

    @functools.cached_property
    def experts(self) -> bool:
        """Whether the adapter reaches into the experts of a mixture, whose updates are no single matrices."""
        return bool(getattr(fresh_settings(self.skeleton, self.config.adapter, self.kind), "target_parameters", None))

    @functools.cached_property
    def exact(self) -> str:
        """The type that a reference is computed in: float32 where that fits into the machine's memory, not to mistake rounding for
        a fault."""
        if self.device.type != "cpu":
            return "auto"
        size = 4 * sum(shape.numel() for shape in Weights(self.base.folder).shapes.values())
        return "float32" if size < 0.7 * psutil.virtual_memory().available else "auto"
