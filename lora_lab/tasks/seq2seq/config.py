"""The `task` section of task=seq2seq."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import section
from lora_lab.tasks.section import Generating

if TYPE_CHECKING:
    from lora_lab.tasks.base import Task


@section
class Seq2SeqConfig(Generating):
    """A source text and its target text."""

    name: Annotated[Literal["seq2seq"], Field(description="objective")] = "seq2seq"
    prefix: Annotated[str, Field(description="put before every source, such as 'summarize: '")] = ""

    encoder_decoder: ClassVar[bool] = True
    meant_for: ClassVar[dict[str, dict[str, Any]]] = {"source_target": {}}
    formats: ClassVar[tuple[str, ...]] = ("source_target", "prompt_completion", "alpaca")

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.seq2seq.task import Seq2Seq

        return Seq2Seq
