"""FRoD (doi:10.1609/aaai.v40i31.39813): a basis that layers of a kind share, a sparse rotation of it in each layer."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import Dropout, LayerAdapter, Seed
from lora_lab.schema.sections import section


@section
class FrodAdapter(LayerAdapter):
    """The `adapter` section for `adapter=frod`. Every name is peft's own."""

    method: Annotated[Literal["frod"], Field(description="adapter family")] = "frod"
    sparse_rate: Annotated[float, Field(gt=0, le=1, description="share of the rotation's entries that train")] = 0.01
    projection_prng_key: Seed = 0
    frod_dropout: Dropout = 0.0

    peft_type: ClassVar[str] = "FROD"
    label: ClassVar[str] = "FRoD"
    dropout_key: ClassVar[str] = "frod_dropout"
    fixed: ClassVar[dict[str, Any]] = {"progressbar": False}
    against_quantized: ClassVar[str] = "it decomposes whole weights"
    against_merging: ClassVar[str] = ""
