"""LN tuning (Zhao et al. 2023, arXiv:2312.11420): trains the base's normalizations whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters import layers
from lora_lab.adapters.base import ANY_FORMAT, AdapterSection
from lora_lab.errors import AdapterError
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@section
class LnTuningAdapter(AdapterSection):
    """The `adapter` section for `adapter=ln_tuning`. Every name is peft's own."""

    method: Annotated[Literal["ln_tuning"], Field(description="adapter family")] = "ln_tuning"
    target_modules: Annotated[
        list[str] | None, Field(description="name endings of normalizations; null: all of them")
    ] = None

    peft_type: ClassVar[str] = "LN_TUNING"
    label: ClassVar[str] = "LN tuning"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        return ()

    def describe(self) -> str:
        return f"target_modules={'all' if self.target_modules is None else f'{len(self.target_modules)} names'}"

    @property
    def names_layers(self) -> bool:
        return self.target_modules is not None

    def targets(self, model: PreTrainedModel, new_modules: Sequence[str] = ()) -> list[str]:
        whole = tuple(f"{name}." for name in (*new_modules, *layers.towers(model)))
        found = [name for name in layers.normalizations(model) if not f"{name}.".startswith(whole)]
        if self.target_modules is not None:
            found = layers.matching("adapter.target_modules", self.target_modules, found)
        if not found:
            raise AdapterError(
                "adapter.method=ln_tuning: this base has no normalization with weights. Choose another method."
            )
        return found

    def peft_fields(self, targets: Sequence[str] | None) -> dict[str, Any]:
        return super().peft_fields(targets) | {"target_modules": list(targets or self.target_modules or ())}
