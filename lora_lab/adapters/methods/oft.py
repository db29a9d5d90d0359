"""OFT (Qiu et al. 2023, arXiv:2306.07280): turns each weight by a block-diagonal orthogonal matrix."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, LayerAdapter
from lora_lab.schema.sections import section


@section
class OftAdapter(LayerAdapter):
    """The `adapter` section for `adapter=oft`. Every name is peft's own."""

    method: Annotated[Literal["oft"], Field(description="adapter family")] = "oft"
    oft_block_size: Annotated[int, Field(ge=2, description="size of the blocks; divides the inputs of each layer")] = 32
    module_dropout: Annotated[float, Field(ge=0, lt=1, description="rate at which blocks are left as they are")] = 0.0
    block_share: Annotated[bool, Field(description="one block for the whole layer")] = False
    use_cayley_neumann: Annotated[
        bool, Field(description="approximate the turn by a short series, which is quicker")
    ] = True
    num_cayley_neumann_terms: Annotated[int, Field(ge=1, description="terms of the series")] = 5

    peft_type: ClassVar[str] = "OFT"
    label: ClassVar[str] = "OFT"
    dropout_key: ClassVar[str] = "module_dropout"
    fixed: ClassVar[dict[str, Any]] = {"r": 0}
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""
    divides: ClassVar[dict[str, tuple[str, ...]]] = {"oft_block_size": ("inputs",)}
