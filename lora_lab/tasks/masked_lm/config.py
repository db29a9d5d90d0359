"""The `task` section of task=masked_lm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import section
from lora_lab.tasks.section import TaskSection

if TYPE_CHECKING:
    from lora_lab.tasks.base import Task


@section
class MaskedLMConfig(TaskSection):
    """Plain texts with some tokens masked, which are guessed."""

    name: Annotated[Literal["masked_lm"], Field(description="objective")] = "masked_lm"
    mask_probability: Annotated[float, Field(gt=0, lt=1, description="share of the tokens to mask")] = 0.15
    whole_words: Annotated[bool, Field(description="mask all tokens of a word together")] = False
    pseudo_perplexity_rows: Annotated[
        int, Field(ge=0, description="held-out rows whose tokens are masked one by one; 0: none")
    ] = 0

    formats: ClassVar[tuple[str, ...]] = ("text",)
    in_pieces: ClassVar[bool] = True
    augments: ClassVar[bool] = True
    measured_rows: ClassVar[tuple[str, ...]] = ("pseudo_perplexity_rows",)

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.masked_lm.task import MaskedLM

        return MaskedLM
