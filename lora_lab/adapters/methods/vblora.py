"""VB-LoRA (Li et al. 2024, arXiv:2405.15179): LoRA matrices composed of vectors from one bank."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, Dropout, LayerAdapter, Rank
from lora_lab.schema.sections import section


@section
class VbloraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=vblora`. Every name is peft's own."""

    method: Annotated[Literal["vblora"], Field(description="adapter family")] = "vblora"
    r: Rank = 4
    num_vectors: Annotated[int, Field(ge=1, description="vectors of the bank")] = 256
    vector_length: Annotated[int, Field(ge=1, description="their length; divides inputs and outputs of each layer")] = (
        64
    )
    topk: Annotated[int, Field(ge=1, description="vectors that are mixed for each part")] = 2
    vblora_dropout: Dropout = 0.0

    peft_type: ClassVar[str] = "VBLORA"
    label: ClassVar[str] = "VB-LoRA"
    dropout_key: ClassVar[str] = "vblora_dropout"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""
    fresh_differs: ClassVar[str] = "its bank cannot begin with zeros"
    divides: ClassVar[dict[str, tuple[str, ...]]] = {"vector_length": ("inputs", "outputs")}
