"""PVeRA (arXiv:2512.07703): VeRA whose inner vector is drawn at random while it trains."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, Dropout, LayerAdapter, Rank, Seed
from lora_lab.schema.sections import section


@section
class PveraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=pvera`. Every name is peft's own."""

    method: Annotated[Literal["pvera"], Field(description="adapter family")] = "pvera"
    r: Rank = 256
    projection_prng_key: Seed = 0
    pvera_dropout: Dropout = 0.0
    d_initial: Annotated[float, Field(gt=0, description="what the inner vector begins with")] = 0.1

    peft_type: ClassVar[str] = "PVERA"
    label: ClassVar[str] = "PVeRA"
    dropout_key: ClassVar[str] = "pvera_dropout"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""
