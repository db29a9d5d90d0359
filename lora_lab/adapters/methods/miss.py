"""MiSS (Kang et al. 2024, arXiv:2409.15371): one small matrix for each layer, which all shards of the weight share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, Dropout, LayerAdapter
from lora_lab.schema.sections import section


@section
class MissAdapter(LayerAdapter):
    """The `adapter` section for `adapter=miss`. Every name is peft's own."""

    method: Annotated[Literal["miss"], Field(description="adapter family")] = "miss"
    r: Annotated[int, Field(ge=2, le=4096, multiple_of=2, description="rank of the update; an even number")] = 64
    miss_dropout: Dropout = 0.0

    peft_type: ClassVar[str] = "MISS"
    label: ClassVar[str] = "MiSS"
    dropout_key: ClassVar[str] = "miss_dropout"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""
