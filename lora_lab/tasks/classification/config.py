"""The `task` section of task=classification."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import section
from lora_lab.tasks.section import ClassWeights, LabelSmoothing, TaskSection

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig
    from lora_lab.tasks.base import Task


@section
class ClassificationConfig(TaskSection):
    """A text, or a pair, and its class, or its classes."""

    name: Annotated[Literal["classification"], Field(description="objective")] = "classification"
    multi_label: Annotated[bool, Field(description="a row has any number of classes")] = False
    class_weights: ClassWeights = None
    label_smoothing: LabelSmoothing = 0.0

    predicts: ClassVar[bool] = True
    asked_at: ClassVar[str] = "classify"
    meant_for: ClassVar[dict[str, dict[str, Any]]] = {"pair_label": {}, "text_label": {}}
    formats: ClassVar[tuple[str, ...]] = ("pair_label", "text_label")
    augments: ClassVar[bool] = True

    @property
    def one_class(self) -> bool:
        return not self.multi_label

    @property
    def smoothing(self) -> float:
        return self.label_smoothing

    def rules(self, run: RunConfig) -> list[str]:
        found = []
        if self.multi_label and self.class_weights == "balanced":
            found.append("task.class_weights=balanced: not defined for task.multi_label=true. Give a list, or drop it.")
        if self.multi_label and self.label_smoothing:
            found.append("task.label_smoothing: not defined for task.multi_label=true. Drop it.")
        return found

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.classification.task import Classification

        return Classification
