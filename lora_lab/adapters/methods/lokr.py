"""LoKr (Yeh et al. 2023, arXiv:2309.14859): adds a Kronecker product of small matrices."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import LayerAdapter, Rank
from lora_lab.schema.sections import section


@section
class LokrAdapter(LayerAdapter):
    """The `adapter` section for `adapter=lokr`. Every name is peft's own."""

    method: Annotated[Literal["lokr"], Field(description="adapter family")] = "lokr"
    r: Rank = 8
    alpha: Annotated[int, Field(ge=1, description="scale: the update is multiplied by alpha / r")] = 8
    decompose_both: Annotated[bool, Field(description="both factors of low rank")] = False
    decompose_factor: Annotated[
        int, Field(ge=-1, description="how the sides are split; -1: as evenly as possible")
    ] = -1
    rank_dropout: Annotated[float, Field(ge=0, lt=1, description="rate at which ranks are left out")] = 0.0
    module_dropout: Annotated[float, Field(ge=0, lt=1, description="rate at which layers go without it")] = 0.0

    peft_type: ClassVar[str] = "LOKR"
    label: ClassVar[str] = "LoKr"
    dropout_key: ClassVar[str] = "rank_dropout"
    quantized: ClassVar[tuple[str, ...]] = ("int8", "torchao_int8")
    against_quantized: ClassVar[str] = (
        "peft makes its update as large as the stored weight, which has another shape there"
    )
    against_merging: ClassVar[str] = ""
