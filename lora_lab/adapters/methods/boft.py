"""BOFT (Liu et al. 2023, arXiv:2311.06243): turns each weight by a product of sparse orthogonal matrices (butterfly)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, LayerAdapter
from lora_lab.schema.sections import section


@section
class BoftAdapter(LayerAdapter):
    """The `adapter` section for `adapter=boft`. Every name is peft's own.

    peft has more than one butterfly factor only with a CUDA extension that it compiles, so there is one here.
    """

    method: Annotated[Literal["boft"], Field(description="adapter family")] = "boft"
    boft_block_size: Annotated[int, Field(ge=2, description="size of the blocks; divides the inputs of each layer")] = 4
    boft_dropout: Annotated[float, Field(ge=0, lt=1, description="rate at which blocks are left as they are")] = 0.0

    peft_type: ClassVar[str] = "BOFT"
    label: ClassVar[str] = "BOFT"
    dropout_key: ClassVar[str] = "boft_dropout"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""
    divides: ClassVar[dict[str, tuple[str, ...]]] = {"boft_block_size": ("inputs",)}
