"""HRA (Yuan et al. 2024, arXiv:2405.17484): turns each weight by a chain of reflections (Householder)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import LayerAdapter
from lora_lab.schema.sections import section


@section
class HraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=hra`. Every name is peft's own."""

    method: Annotated[Literal["hra"], Field(description="adapter family")] = "hra"
    r: Annotated[
        int,
        Field(
            ge=2, multiple_of=2, description="reflections of each layer; an even number lets them cancel at the start"
        ),
    ] = 8
    apply_GS: Annotated[bool, Field(description="make the reflections orthogonal to each other")] = False

    peft_type: ClassVar[str] = "HRA"
    label: ClassVar[str] = "HRA"
    against_quantized: ClassVar[str] = "it reflects whole weights"
    against_merging: ClassVar[str] = ""
