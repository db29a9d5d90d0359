"""Prefix tuning (Li and Liang 2021, arXiv:2101.00190): keys and values of virtual tokens before each row are trained, in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.prompts import PromptAdapter
from lora_lab.schema.sections import section


@section
class PrefixTuningAdapter(PromptAdapter):
    """The `adapter` section for `adapter=prefix_tuning`. Every name is peft's own (`peft.PrefixTuningConfig`)."""

    method: Annotated[Literal["prefix_tuning"], Field(description="adapter family")] = "prefix_tuning"
    encoder_hidden_size: Annotated[
        int | None,
        Field(
            ge=1, le=65536, description="width of a network that computes the prefix (prefix_projection); null: none"
        ),
    ] = None
    init_weights: Annotated[
        Literal["zero"] | None, Field(description="zero: begin with zeros; null: with random numbers")
    ] = None

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    label: ClassVar[str] = "prefix tuning"
    against_checkpointing: ClassVar[str] = (
        "its keys and values lie in the cache, which a layer that is computed again would add to"
    )

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """The network is there, or not, as the tensors are."""
        return ("num_virtual_tokens",)

    def peft_fields(self, targets: Sequence[str] | None) -> dict[str, Any]:
        return super().peft_fields(targets) | {"prefix_projection": self.encoder_hidden_size is not None}
