"""OSF (Nayak et al. 2025, arXiv:2504.07097): trains the lower singular directions of each weight and keeps the higher."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import LayerAdapter
from lora_lab.schema.sections import section


@section
class OsfAdapter(LayerAdapter):
    """The `adapter` section for `adapter=osf`. Every name is peft's own."""

    method: Annotated[Literal["osf"], Field(description="adapter family")] = "osf"
    effective_rank: Annotated[
        int | float | None,
        Field(gt=0, description="singular directions that are kept, as a number or as a share of all; null: half"),
    ] = None

    peft_type: ClassVar[str] = "OSF"
    label: ClassVar[str] = "OSF"
    against_quantized: ClassVar[str] = "it decomposes whole weights"
    against_merging: ClassVar[str] = ""
