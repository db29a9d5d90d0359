"""The `task` section of task=token_classification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import section
from lora_lab.tasks.section import ClassWeights, LabelSmoothing, TaskSection

if TYPE_CHECKING:
    from lora_lab.tasks.base import Task


@section
class TokenClassificationConfig(TaskSection):
    """Words, each with a label."""

    name: Annotated[Literal["token_classification"], Field(description="objective")] = "token_classification"
    class_weights: ClassWeights = None
    label_smoothing: LabelSmoothing = 0.0

    predicts: ClassVar[bool] = True
    asked_at: ClassVar[str] = "tokens"
    meant_for: ClassVar[dict[str, dict[str, Any]]] = {"token_labels": {}}
    formats: ClassVar[tuple[str, ...]] = ("token_labels",)
    cuts: ClassVar[bool] = False
    cleans: ClassVar[bool] = False

    @property
    def smoothing(self) -> float:
        return self.label_smoothing

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.token_classification.task import TokenClassification

        return TokenClassification
