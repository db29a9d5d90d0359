"""The `task` section of task=regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import section
from lora_lab.tasks.section import TaskSection

if TYPE_CHECKING:
    from lora_lab.tasks.base import Task


@section
class RegressionConfig(TaskSection):
    """A text, or a pair, and a number."""

    name: Annotated[Literal["regression"], Field(description="objective")] = "regression"

    predicts: ClassVar[bool] = True
    asked_at: ClassVar[str] = "classify"
    meant_for: ClassVar[dict[str, dict[str, Any]]] = {"pair_label": {}, "text_label": {}}
    formats: ClassVar[tuple[str, ...]] = ("pair_label", "text_label")
    numbers: ClassVar[bool] = True
    augments: ClassVar[bool] = True
    compares_distributions: ClassVar[bool] = False

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.regression.task import Regression

        return Regression
