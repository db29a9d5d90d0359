"""The `task` section of task=reranker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import section
from lora_lab.tasks.section import TaskSection

if TYPE_CHECKING:
    from lora_lab.tasks.base import Task


@section
class RerankerConfig(TaskSection):
    """A query with a document that it should find, and some that it should not."""

    name: Annotated[Literal["reranker"], Field(description="objective")] = "reranker"
    loss: Annotated[
        Literal["listwise", "binary"],
        Field(description="listwise: the positive among all documents of its row; binary: each document by itself"),
    ] = "listwise"

    predicts: ClassVar[bool] = True
    asked_at: ClassVar[str] = "rerank"
    formats: ClassVar[tuple[str, ...]] = ("retrieval",)
    augments: ClassVar[bool] = True
    numbers: ClassVar[bool] = True
    compares_distributions: ClassVar[bool] = False

    @classmethod
    def load(cls) -> type[Task[Any, Any]]:
        from lora_lab.tasks.reranker.task import Reranker

        return Reranker
