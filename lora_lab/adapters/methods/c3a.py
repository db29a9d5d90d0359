"""C3A (Chen et al. 2024, arXiv:2407.19342): adds a block-circulant matrix, which is a circular convolution."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import LayerAdapter
from lora_lab.schema.sections import section


@section
class C3aAdapter(LayerAdapter):
    """The `adapter` section for `adapter=c3a`. Every name is peft's own."""

    method: Annotated[Literal["c3a"], Field(description="adapter family")] = "c3a"
    block_size: Annotated[
        int, Field(ge=1, description="size of the blocks; divides inputs and outputs of each layer")
    ] = 64

    peft_type: ClassVar[str] = "C3A"
    label: ClassVar[str] = "C3A"
    fixed: ClassVar[dict[str, Any]] = {"init_weights": True}
    against_quantized: ClassVar[str] = (
        "peft adds to what a layer gives in place, which quantized layers do not always allow"
    )
    against_merging: ClassVar[str] = ""
    divides: ClassVar[dict[str, tuple[str, ...]]] = {"block_size": ("inputs", "outputs")}
