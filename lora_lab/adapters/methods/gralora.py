"""GraLoRA (Jung et al. 2025, arXiv:2505.20355): a LoRA for each block of a weight, with as many parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import Dropout, LayerAdapter, Rank
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig


@section
class GraloraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=gralora`. Every name is peft's own."""

    method: Annotated[Literal["gralora"], Field(description="adapter family")] = "gralora"
    r: Rank = 32
    alpha: Annotated[int, Field(gt=0, description="scale: the update is multiplied by alpha / r")] = 64
    gralora_k: Annotated[int, Field(ge=1, description="blocks along each side; divides r and the layer's sides")] = 2
    hybrid_r: Annotated[int, Field(ge=0, description="rank of a plain LoRA beside it")] = 0
    gralora_dropout: Dropout = 0.0

    peft_type: ClassVar[str] = "GRALORA"
    label: ClassVar[str] = "GraLoRA"
    dropout_key: ClassVar[str] = "gralora_dropout"
    against_quantized: ClassVar[str] = (
        "peft adds to what a layer gives in place, which quantized layers do not always allow"
    )
    against_merging: ClassVar[str] = ""
    divides: ClassVar[dict[str, tuple[str, ...]]] = {"gralora_k": ("inputs", "outputs")}

    def rules(self, config: RunConfig) -> list[str]:
        if self.r % self.gralora_k == 0:
            return []
        return [f"adapter.r={self.r}: adapter.gralora_k={self.gralora_k} does not divide it. Choose a multiple."]
