"""The `task` section of task=reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import section
from lora_lab.tasks.section import TaskSection

if TYPE_CHECKING:
    from lora_lab.tasks.base import Task


@section
class RewardConfig(TaskSection):
    """A better and a worse answer, each of which gets a score."""

    name: Annotated[Literal["reward"], Field(description="objective")] = "reward"

    predicts: ClassVar[bool] = True
    asked_at: ClassVar[str] = "rewards"
    compares_rows: ClassVar[bool] = True
    formats: ClassVar[tuple[str, ...]] = ("preference",)
    chat: ClassVar[bool] = True
    compares_distributions: ClassVar[bool] = False

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.reward.task import Reward

        return Reward
