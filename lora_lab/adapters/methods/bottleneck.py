"""Bottleneck adapters: two small matrices with a non-linearity between them (Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020,
arXiv:2005.00247; He et al. 2021, arXiv:2110.04366)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters import layers
from lora_lab.adapters.base import ANY_FORMAT, AdapterSection
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_lab.config.run import RunConfig


@section
class BottleneckAdapter(AdapterSection):
    """The `adapter` section for `adapter=bottleneck`. peft has no such method; `adapters/bottleneck.py` registers it."""

    method: Annotated[Literal["bottleneck"], Field(description="adapter family")] = "bottleneck"
    variant: Annotated[
        Literal["houlsby", "pfeiffer", "parallel"],
        Field(
            description="houlsby: behind each attention and each MLP; pfeiffer: behind each MLP; parallel: beside each MLP"
        ),
    ] = "pfeiffer"
    reduction_factor: Annotated[
        float, Field(ge=1, le=4096, description="how many times narrower than the hidden states the bottleneck is")
    ] = 16
    bottleneck_size: Annotated[
        int | None, Field(ge=1, le=65536, description="its size itself, instead of reduction_factor")
    ] = None
    non_linearity: Annotated[
        Literal["relu", "gelu", "silu", "tanh", "leaky_relu"], Field(description="what is between the two matrices")
    ] = "relu"
    bottleneck_dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the values in the bottleneck")] = 0.0
    scaling: Annotated[float, Field(gt=0, description="what the adapter adds is multiplied by it")] = 1.0
    layers_to_transform: Annotated[list[int] | None, Field(description="only these layers (counted from 0)")] = None

    peft_type: ClassVar[str] = "BOTTLENECK"
    registered_by: ClassVar[str] = "lora_lab.adapters.bottleneck"
    dropout_key: ClassVar[str] = "bottleneck_dropout"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = "it has a non-linearity between its two matrices, which no weight can hold"
    against_delta: ClassVar[str] = "what it adds depends on the values that pass, so it is no change of a weight"

    @property
    def label(self) -> str:
        return f"bottleneck ({self.variant})"

    @property
    def names_layers(self) -> bool:
        return self.layers_to_transform is not None

    def targets(self, model: PreTrainedModel, new_modules: Sequence[str] = ()) -> list[str]:
        """As in the base class: the modules behind which the adapters lie.

        Raises:
            AdapterError: no such modules; a layer number that does not exist.
        """
        from lora_lab.adapters.bottleneck import places

        found = [place.name for place in places(model, self.variant, new_modules)]
        return layers.in_layers(model, found, self.layers_to_transform)

    def peft_fields(self, targets: Sequence[str] | None) -> dict[str, Any]:
        fields = super().peft_fields(targets)
        del fields["layers_to_transform"]
        return fields | {"target_modules": None if targets is None else list(targets)}

    def describe(self) -> str:
        size = (
            f"bottleneck_size={self.bottleneck_size}"
            if self.bottleneck_size
            else f"reduction_factor={self.reduction_factor:g}"
        )
        return f"{size}, {self.non_linearity}"

    def rules(self, config: RunConfig) -> list[str]:
        if self.bottleneck_size is None or self.reduction_factor == 16:
            return []
        return [
            f"adapter.reduction_factor={self.reduction_factor:g}: no effect with adapter.bottleneck_size={self.bottleneck_size}. Drop it."
        ]

    def on_same_modules(self) -> dict[str, Any]:
        return {"method": self.method}
