"""GLoRA (Chavan et al. 2023, arXiv:2306.07967): scales and shifts weights and biases, by low-rank matrices."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import LayerAdapter, Rank
from lora_lab.schema.sections import section


@section
class GloraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=glora`. Every name is peft's own."""

    method: Annotated[Literal["glora"], Field(description="adapter family")] = "glora"
    r: Rank = 8
    config_A_B: Annotated[
        Literal["lora", "vector", "constant", "none"], Field(description="how weights are scaled and shifted")
    ] = "lora"
    config_C: Annotated[Literal["lora", "vector", "none"], Field(description="how weights reach the bias")] = "lora"
    config_D_E: Annotated[
        Literal["vector", "constant", "none"], Field(description="how the bias is scaled and shifted")
    ] = "constant"

    peft_type: ClassVar[str] = "GLORA"
    label: ClassVar[str] = "GLoRA"
    against_quantized: ClassVar[str] = "it multiplies whole weights"
    against_merging: ClassVar[str] = ""
