"""The `task` section of task=reranker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import default_of, section
from lora_lab.tasks.section import TaskSection

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig
    from lora_lab.tasks.base import Task

_OF_ANSWERS = ("yes_word", "no_word", "instruction")


@section
class RerankerConfig(TaskSection):
    """A query with a document that it should find, and some that it should not."""

    name: Annotated[Literal["reranker"], Field(description="objective")] = "reranker"
    loss: Annotated[
        Literal["listwise", "binary"],
        Field(description="listwise: the positive among all documents of its row; binary: each document by itself"),
    ] = "listwise"
    score: Annotated[
        Literal["head", "yes_no"],
        Field(
            description="head: a new head on the base gives it; yes_no: a decoder is asked whether the document answers the query, and it is "
            "the log-odds of yes against no"
        ),
    ] = "head"
    yes_word: Annotated[str, Field(description="yes_no: the answer for a document that should be found; one token")] = (
        "yes"
    )
    no_word: Annotated[str, Field(description="yes_no: the answer for any other document; one token")] = "no"
    instruction: Annotated[
        str, Field(description="yes_no: what documents are sought for, which is told with each query", min_length=1)
    ] = "Given a web search query, retrieve relevant passages that answer the query"

    predicts: ClassVar[bool] = True
    asked_at: ClassVar[str] = "rerank"
    formats: ClassVar[tuple[str, ...]] = ("retrieval",)
    augments: ClassVar[bool] = True
    numbers: ClassVar[bool] = True
    compares_distributions: ClassVar[bool] = False

    @property
    def templated(self) -> bool:
        return self.score == "yes_no"

    def rules(self, run: RunConfig) -> list[str]:
        if self.score == "yes_no":
            return []
        return [
            f"task.{name}: no effect with task.score=head; it is for yes_no. Drop it."
            for name in _OF_ANSWERS
            if getattr(self, name) != default_of(self, name)
        ]

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.reranker.task import Reranker, YesNoReranker

        return YesNoReranker if self.score == "yes_no" else Reranker
