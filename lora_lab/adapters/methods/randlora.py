"""RandLoRA (Albert et al. 2025, arXiv:2502.00987): a sum of random matrices of full rank that stay frozen, weighted by vectors that train."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, Dropout, LayerAdapter, Seed
from lora_lab.schema.sections import section


@section
class RandloraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=randlora`. Every name is peft's own."""

    method: Annotated[Literal["randlora"], Field(description="adapter family")] = "randlora"
    r: Annotated[
        int, Field(ge=1, le=4096, description="rank of each random matrix; a lower one means more that trains")
    ] = 32
    randlora_alpha: Annotated[int, Field(ge=1, description="scale: the update is multiplied by randlora_alpha / r")] = (
        640
    )
    projection_prng_key: Seed = 0
    randlora_dropout: Dropout = 0.0

    peft_type: ClassVar[str] = "RANDLORA"
    label: ClassVar[str] = "RandLoRA"
    dropout_key: ClassVar[str] = "randlora_dropout"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""
    saved_once: ClassVar[tuple[str, ...]] = ("randlora_A", "randlora_B")
