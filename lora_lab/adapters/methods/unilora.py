"""Uni-LoRA (arXiv:2506.00799): all entries of all LoRA matrices are taken from one vector."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import Dropout, LayerAdapter, Rank, Seed
from lora_lab.schema.sections import section


@section
class UniloraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=unilora`. Every name is peft's own."""

    method: Annotated[Literal["unilora"], Field(description="adapter family")] = "unilora"
    r: Rank = 4
    theta_d_length: Annotated[int, Field(ge=1, description="length of the vector")] = 256
    proj_seed: Seed = 42
    unilora_dropout: Dropout = 0.0

    peft_type: ClassVar[str] = "UNILORA"
    label: ClassVar[str] = "Uni-LoRA"
    dropout_key: ClassVar[str] = "unilora_dropout"
    fixed: ClassVar[dict[str, Any]] = {"save_indices": True}
    quantized: ClassVar[tuple[str, ...]] = ("torchao_int8",)
    against_quantized: ClassVar[str] = "no gradient reaches its vector there"
    against_merging: ClassVar[str] = ""
    fresh_differs: ClassVar[str] = "its vector cannot begin with zeros"
