"""WaveFT (Bilican et al. 2025, arXiv:2505.12532): trains some wavelet coefficients of the update."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, LayerAdapter, Seed
from lora_lab.adapters.layers import Size
from lora_lab.schema.sections import section


@section
class WaveftAdapter(LayerAdapter):
    """The `adapter` section for `adapter=waveft`. Every name is peft's own."""

    method: Annotated[Literal["waveft"], Field(description="adapter family")] = "waveft"
    n_frequency: Annotated[int, Field(ge=1, description="trained coefficients of each layer")] = 2592
    scaling: Annotated[float, Field(gt=0, description="factor of the update")] = 25.0
    random_loc_seed: Seed = 777

    peft_type: ClassVar[str] = "WAVEFT"
    label: ClassVar[str] = "WaveFT"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""

    def most(self, size: Size) -> dict[str, int]:
        return {"n_frequency": size.inputs * size.outputs}
