"""Trainable tokens: the embeddings of some tokens train, all others stay frozen (peft's own)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, AdapterSection
from lora_lab.errors import AdapterError
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@section
class TrainableTokensAdapter(AdapterSection):
    """The `adapter` section for `adapter=trainable_tokens`. Every name is peft's own."""

    method: Annotated[Literal["trainable_tokens"], Field(description="adapter family")] = "trainable_tokens"
    token_indices: Annotated[list[int], Field(description="ids of the tokens whose embeddings train")] = (
        dataclasses.field(default_factory=list)
    )

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    label: ClassVar[str] = "trainable tokens"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""

    def describe(self) -> str:
        return f"{len(self.token_indices)} tokens"

    @property
    def names_layers(self) -> bool:
        return True

    def targets(self, model: PreTrainedModel, new_modules: Sequence[str] = ()) -> list[str]:
        embedding = model.get_input_embeddings()
        count = int(embedding.get_parameter("weight").shape[0])
        if not self.token_indices:
            raise AdapterError(
                "adapter.token_indices=[]: no token would train. Name the ids of some, such as [49152,49153]."
            )
        outside = [token for token in self.token_indices if not 0 <= token < count]
        if outside:
            raise AdapterError(
                f"adapter.token_indices: {outside[0]} is no token of this base; there are {count}, from 0."
            )
        return [next(name for name, module in model.named_modules() if module is embedding)]

    def peft_fields(self, targets: Sequence[str] | None) -> dict[str, Any]:
        return super().peft_fields(targets) | {"target_modules": list(targets or ())}
