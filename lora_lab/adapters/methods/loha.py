"""LoHa (FedPara, Hyeon-Woo et al. 2021, arXiv:2108.06098): adds the entrywise product of two low-rank matrices."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import LayerAdapter, Rank
from lora_lab.schema.sections import section


@section
class LohaAdapter(LayerAdapter):
    """The `adapter` section for `adapter=loha`. Every name is peft's own."""

    method: Annotated[Literal["loha"], Field(description="adapter family")] = "loha"
    r: Rank = 8
    alpha: Annotated[int, Field(ge=1, description="scale: the update is multiplied by alpha / r")] = 8
    rank_dropout: Annotated[float, Field(ge=0, lt=1, description="rate at which ranks are left out")] = 0.0
    module_dropout: Annotated[float, Field(ge=0, lt=1, description="rate at which layers go without it")] = 0.0

    peft_type: ClassVar[str] = "LOHA"
    label: ClassVar[str] = "LoHa"
    dropout_key: ClassVar[str] = "rank_dropout"
    quantized: ClassVar[tuple[str, ...]] = ("int8", "torchao_int8")
    against_quantized: ClassVar[str] = (
        "peft makes its update as large as the stored weight, which has another shape there"
    )
    against_merging: ClassVar[str] = ""
