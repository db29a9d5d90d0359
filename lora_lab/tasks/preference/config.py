"""The `task` section of task=preference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import default_of, section
from lora_lab.tasks.section import LabelSmoothing, TaskSection

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig
    from lora_lab.tasks.base import Task

_OPTION_OF = {
    "gamma": ("simpo",),
    "label_smoothing": ("dpo", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}


@section
class PreferenceConfig(TaskSection):
    """A better and a worse answer; for KTO one answer and a judgement."""

    name: Annotated[Literal["preference"], Field(description="objective")] = "preference"
    loss: Annotated[Literal["dpo", "ipo", "simpo", "orpo", "kto"], Field(description="the loss")] = "dpo"
    beta: Annotated[float, Field(gt=0, description="strength of the reference; orpo: weight of the odds ratio")] = 0.1
    gamma: Annotated[float, Field(ge=0, description="simpo: target reward margin")] = 0.5
    desirable_weight: Annotated[float, Field(gt=0, description="kto: weight of good answers")] = 1.0
    undesirable_weight: Annotated[float, Field(gt=0, description="kto: weight of bad answers")] = 1.0
    label_smoothing: LabelSmoothing = 0.0

    packed: ClassVar[bool] = True
    language_model: ClassVar[bool] = True
    compares_rows: ClassVar[bool] = True
    chat: ClassVar[bool] = True
    compares_distributions: ClassVar[bool] = False

    meant_for: ClassVar[dict[str, dict[str, Any]]] = {
        "preference": {}, "feedback_messages": {"loss": "kto"}, "feedback": {"loss": "kto"}
    }  # fmt: skip

    @property
    def formats(self) -> tuple[str, ...]:
        return ("preference", "feedback_messages", "feedback") if self.loss == "kto" else ("preference",)

    @property
    def smoothing(self) -> float:
        return self.label_smoothing

    def rules(self, run: RunConfig) -> list[str]:
        found = []
        for name, losses in _OPTION_OF.items():
            if getattr(self, name) != default_of(self, name) and self.loss not in losses:
                found.append(
                    f"task.{name}: no effect with task.loss={self.loss}; it is for {', '.join(losses)}. Drop it."
                )
        if self.loss == "kto" and run.train.batch_size == 1:
            found.append(
                "train.batch_size=1: task.loss=kto compares each answer with another row's, so a step needs two."
            )
        return found

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.preference.task import Preference

        return Preference
