"""DeLoRA (Bini et al. 2025, arXiv:2503.18225): LoRA with a bound on how far each weight may move."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import LayerAdapter, Rank
from lora_lab.schema.sections import section


@section
class DeloraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=delora`. Every name is peft's own."""

    method: Annotated[Literal["delora"], Field(description="adapter family")] = "delora"
    r: Rank = 8
    delora_lambda: Annotated[int, Field(ge=1, description="where the bound begins")] = 15
    module_dropout: Annotated[float, Field(ge=0, lt=1, description="rate at which layers go without it")] = 0.0

    peft_type: ClassVar[str] = "DELORA"
    label: ClassVar[str] = "DeLoRA"
    dropout_key: ClassVar[str] = "module_dropout"
    against_quantized: ClassVar[str] = "it measures the norms of whole weights"
    against_merging: ClassVar[str] = ""
