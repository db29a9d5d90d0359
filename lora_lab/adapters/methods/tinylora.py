"""TinyLoRA (arXiv:2602.04118): a vector of a few numbers for each layer, through frozen random matrices and singular vectors."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import Dropout, LayerAdapter, Rank, Seed
from lora_lab.schema.sections import section


@section
class TinyloraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=tinylora`. Every name is peft's own."""

    method: Annotated[Literal["tinylora"], Field(description="adapter family")] = "tinylora"
    r: Rank = 2
    u: Annotated[int, Field(ge=1, description="numbers that train in each group of layers")] = 64
    weight_tying: Annotated[float, Field(ge=0, le=1, description="0: a vector for each layer; 1: one for all")] = 0.0
    projection_seed: Seed = 42
    tinylora_dropout: Dropout = 0.0

    peft_type: ClassVar[str] = "TINYLORA"
    label: ClassVar[str] = "TinyLoRA"
    dropout_key: ClassVar[str] = "tinylora_dropout"
    against_quantized: ClassVar[str] = "it decomposes whole weights"
    against_merging: ClassVar[str] = ""
