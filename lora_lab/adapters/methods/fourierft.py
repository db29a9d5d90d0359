"""FourierFT (Gao et al. 2024, arXiv:2405.03003): trains some coefficients of the update's Fourier spectrum."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, LayerAdapter, Seed
from lora_lab.adapters.layers import Size
from lora_lab.schema.sections import section


@section
class FourierftAdapter(LayerAdapter):
    """The `adapter` section for `adapter=fourierft`. Every name is peft's own."""

    method: Annotated[Literal["fourierft"], Field(description="adapter family")] = "fourierft"
    n_frequency: Annotated[int, Field(ge=1, description="trained coefficients of each layer")] = 1000
    scaling: Annotated[float, Field(gt=0, description="factor of the update")] = 150.0
    random_loc_seed: Seed = 777

    peft_type: ClassVar[str] = "FOURIERFT"
    label: ClassVar[str] = "FourierFT"
    fixed: ClassVar[dict[str, Any]] = {"init_weights": True}
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""

    def most(self, size: Size) -> dict[str, int]:
        return {"n_frequency": size.inputs * size.outputs}
