"""PEANuT (arXiv:2410.01870): makes the update of each weight from the weight itself, by a small network."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import LayerAdapter, Rank
from lora_lab.schema.sections import section


@section
class PeanutAdapter(LayerAdapter):
    """The `adapter` section for `adapter=peanut`. Every name is peft's own."""

    method: Annotated[Literal["peanut"], Field(description="adapter family")] = "peanut"
    r: Rank = 32
    depth: Annotated[int, Field(ge=0, description="hidden layers of the network on each side")] = 0
    act_fn: Annotated[str, Field(min_length=1, description="its activation, by transformers' name")] = "relu"
    scaling: Annotated[float, Field(gt=0, description="factor of the update")] = 1.0

    peft_type: ClassVar[str] = "PEANUT"
    label: ClassVar[str] = "PEANuT"
    against_quantized: ClassVar[str] = "it reads whole weights"
    against_merging: ClassVar[str] = ""
