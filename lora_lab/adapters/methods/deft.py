"""DEFT: takes a low-rank projection out of each weight and puts another in its place."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import Dropout, LayerAdapter, Rank
from lora_lab.schema.sections import section


@section
class DeftAdapter(LayerAdapter):
    """The `adapter` section for `adapter=deft`. Every name is peft's own."""

    method: Annotated[Literal["deft"], Field(description="adapter family")] = "deft"
    r: Rank = 8
    decomposition_method: Annotated[Literal["relu", "qr"], Field(description="how the projection is made")] = "relu"
    deft_dropout: Dropout = 0.0

    peft_type: ClassVar[str] = "DEFT"
    label: ClassVar[str] = "DEFT"
    dropout_key: ClassVar[str] = "deft_dropout"
    against_quantized: ClassVar[str] = "it projects whole weights"
    against_merging: ClassVar[str] = ""
