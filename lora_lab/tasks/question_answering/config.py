"""The `task` section of task=question_answering."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import section
from lora_lab.tasks.section import AnswerLanguage, TaskSection

if TYPE_CHECKING:
    from lora_lab.tasks.base import Task


@section
class QuestionAnsweringConfig(TaskSection):
    """A question, and a context in which its answer is found."""

    name: Annotated[Literal["question_answering"], Field(description="objective")] = "question_answering"
    language: AnswerLanguage = "en"
    stride: Annotated[int, Field(ge=0, description="tokens that two windows of a long context share")] = 64
    max_answer_tokens: Annotated[int, Field(ge=1, description="longest answer, in tokens")] = 30

    predicts: ClassVar[bool] = True
    asked_at: ClassVar[str] = "answer"
    meant_for: ClassVar[dict[str, dict[str, Any]]] = {"question_answering": {}}
    formats: ClassVar[tuple[str, ...]] = ("question_answering",)
    cuts: ClassVar[bool] = False
    cleans: ClassVar[bool] = False

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.question_answering.task import QuestionAnswering

        return QuestionAnswering
