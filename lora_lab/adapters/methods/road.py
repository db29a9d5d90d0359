"""RoAd (Liao et al. 2024, arXiv:2409.00119): turns and scales pairs of what each layer gives."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, LayerAdapter
from lora_lab.schema.sections import section


@section
class RoadAdapter(LayerAdapter):
    """The `adapter` section for `adapter=road`. Every name is peft's own."""

    method: Annotated[Literal["road"], Field(description="adapter family")] = "road"
    variant: Annotated[
        Literal["road_1", "road_2", "road_4"],
        Field(description="1: one angle and scale for a pair; 2: for each of its elements; 4: two for each"),
    ] = "road_1"
    group_size: Annotated[
        int, Field(ge=2, multiple_of=2, description="how pairs are formed; divides the outputs of each layer")
    ] = 64

    peft_type: ClassVar[str] = "ROAD"
    label: ClassVar[str] = "RoAd"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""
    divides: ClassVar[dict[str, tuple[str, ...]]] = {"group_size": ("outputs",)}
