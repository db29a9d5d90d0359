"""Lily (Zhong et al. 2024, arXiv:2407.09946): LoRA whose second matrices all layers share, mixed by a router for each input."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, LayerAdapter, Rank
from lora_lab.schema.sections import section


@section
class LilyAdapter(LayerAdapter):
    """The `adapter` section for `adapter=lily`. Every name is peft's own."""

    method: Annotated[Literal["lily"], Field(description="adapter family")] = "lily"
    r: Rank = 32
    stride_A: Annotated[int, Field(ge=1, description="neighbouring layers that share a first matrix")] = 1
    num_B: Annotated[int, Field(ge=2, description="second matrices that are shared")] = 2
    scaling: Annotated[float, Field(gt=0, description="factor of the update")] = 1.0

    peft_type: ClassVar[str] = "LILY"
    label: ClassVar[str] = "Lily"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = "what it adds depends on the input"
    saved_once: ClassVar[tuple[str, ...]] = ("lily_A", "lily_B")
