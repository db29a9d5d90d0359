"""PSOFT (openreview.net/forum?id=FSHrinMArK): turns the principal subspace of each weight."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import Dropout, LayerAdapter, Rank, Seed
from lora_lab.schema.sections import section


@section
class PsoftAdapter(LayerAdapter):
    """The `adapter` section for `adapter=psoft`. Every name is peft's own."""

    method: Annotated[Literal["psoft"], Field(description="adapter family")] = "psoft"
    r: Rank = 32
    psoft_alpha: Annotated[int, Field(ge=1, description="scale: the update is multiplied by psoft_alpha / r")] = 32
    psoft_dropout: Dropout = 0.0
    random_seed: Seed = 0

    peft_type: ClassVar[str] = "PSOFT"
    label: ClassVar[str] = "PSOFT"
    dropout_key: ClassVar[str] = "psoft_dropout"
    against_quantized: ClassVar[str] = "it decomposes whole weights"
    against_merging: ClassVar[str] = ""
