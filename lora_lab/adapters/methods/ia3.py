"""IA3 (Liu et al. 2022, arXiv:2205.05638): scales what each layer gives, or reads, by a vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, LayerAdapter
from lora_lab.schema.sections import section


@section
class Ia3Adapter(LayerAdapter):
    """The `adapter` section for `adapter=ia3`. Every name is peft's own."""

    method: Annotated[Literal["ia3"], Field(description="adapter family")] = "ia3"
    feedforward_modules: Annotated[
        list[str] | None,
        Field(description="name endings among the targeted layers whose inputs are scaled instead of their outputs"),
    ] = None

    peft_type: ClassVar[str] = "IA3"
    label: ClassVar[str] = "IA3"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""

    def peft_fields(self, targets: Sequence[str] | None) -> dict[str, Any]:
        """As in the base class. peft wants its own list within the targets, and takes one of its own where there is none."""
        fields = super().peft_fields(targets)
        read = [
            name
            for name in targets or ()
            if f".{name}".endswith(tuple(f".{ending}" for ending in self.feedforward_modules or ()))
        ]
        return fields | {"feedforward_modules": read}
