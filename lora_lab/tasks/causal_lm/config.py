"""The `task` section of task=causal_lm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import section
from lora_lab.tasks.section import Generating

if TYPE_CHECKING:
    from lora_lab.tasks.base import Task


@section
class CausalLMConfig(Generating):
    """Conversations; the assistant's turns are learned."""

    name: Annotated[Literal["causal_lm"], Field(description="objective")] = "causal_lm"
    answer_format: Annotated[
        Literal["text", "json"],
        Field(description="json: answers are compared as parsed JSON and valid_json is reported"),
    ] = "text"

    meant_for: ClassVar[dict[str, dict[str, Any]]] = {
        "messages": {}, "sharegpt": {}, "prompt_completion": {}, "alpaca": {}
    }  # fmt: skip
    formats: ClassVar[tuple[str, ...]] = (
        "messages", "sharegpt", "preference", "prompt_completion", "alpaca", "question_answering", "source_target", "pair_label",
        "text_label", "text",
    )  # fmt: skip
    packed: ClassVar[bool] = True
    language_model: ClassVar[bool] = True
    chat: ClassVar[bool] = True

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.causal_lm.task import CausalLM

        return CausalLM
