"""Super-Tuning (arXiv:2607.09287): trains the entries of each weight that are largest."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import LayerAdapter
from lora_lab.schema.sections import section


@section
class SupertuningAdapter(LayerAdapter):
    """The `adapter` section for `adapter=supertuning`. Every name is peft's own."""

    method: Annotated[Literal["supertuning"], Field(description="adapter family")] = "supertuning"
    sparsity: Annotated[float, Field(ge=0, lt=1, description="share of entries that stay frozen")] = 0.99
    select_top: Annotated[bool, Field(description="train the largest entries instead of the smallest")] = True

    peft_type: ClassVar[str] = "SUPERTUNING"
    label: ClassVar[str] = "Super-Tuning"
    against_quantized: ClassVar[str] = "it looks for the largest entries of whole weights"
    against_merging: ClassVar[str] = ""
