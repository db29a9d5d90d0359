"""The `task` section of task=completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import section
from lora_lab.tasks.section import TaskSection

if TYPE_CHECKING:
    from lora_lab.tasks.base import Task


@section
class CompletionConfig(TaskSection):
    """Plain texts, every token of which is learned."""

    name: Annotated[Literal["completion"], Field(description="objective")] = "completion"

    meant_for: ClassVar[dict[str, dict[str, Any]]] = {"text": {}}
    formats: ClassVar[tuple[str, ...]] = ("text",)
    packed: ClassVar[bool] = True
    language_model: ClassVar[bool] = True
    in_pieces: ClassVar[bool] = True
    augments: ClassVar[bool] = True

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.completion.task import Completion

        return Completion
