"""SHiRA (Bhardwaj et al. 2024, arXiv:2406.13175): trains a sparse choice of each weight's entries."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import LayerAdapter, Seed
from lora_lab.adapters.layers import Size
from lora_lab.schema.sections import section


@section
class ShiraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=shira`. Every name is peft's own."""

    method: Annotated[Literal["shira"], Field(description="adapter family")] = "shira"
    r: Annotated[int, Field(ge=1, le=4096, description="as many entries train as a LoRA of this rank has")] = 32
    random_seed: Seed = 0

    peft_type: ClassVar[str] = "SHIRA"
    label: ClassVar[str] = "SHiRA"
    quantized: ClassVar[tuple[str, ...]] = ("nf4", "fp4", "torchao_int8")
    against_quantized: ClassVar[str] = "a fresh one would not be the base there"
    against_merging: ClassVar[str] = ""

    def most(self, size: Size) -> dict[str, int]:
        return {"r": size.inputs * size.outputs // (size.inputs + size.outputs)}
