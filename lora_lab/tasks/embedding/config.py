"""The `task` section of task=embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import default_of, section
from lora_lab.tasks.section import TaskSection

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig
    from lora_lab.tasks.base import Task

_OF_RETRIEVAL = ("symmetric", "corpus", "query_prompt")


@section
class EmbeddingConfig(TaskSection):
    """Texts that belong together, such as a query and what it should find, or pairs with a score."""

    name: Annotated[Literal["embedding"], Field(description="objective")] = "embedding"
    loss: Annotated[
        Literal["infonce", "cosent", "angle"],
        Field(
            description="infonce: rows of query, positive and perhaps negatives; cosent, angle: rows of text_a, text_b, score"
        ),
    ] = "infonce"
    temperature: Annotated[float, Field(gt=0, description="what cosines are divided by in the loss")] = 0.05
    symmetric: Annotated[
        bool, Field(description="infonce: each positive is told apart among the step's queries as well")
    ] = True
    dimensions: Annotated[
        list[Annotated[int, Field(ge=2)]] | None,
        Field(description="the first so many numbers of a vector are trained to do as well (Matryoshka)", min_length=1),
    ] = None
    pooling: Annotated[
        Literal["mean", "cls", "last", "max"] | None,
        Field(
            description="how hidden states become a vector; null: as the base was published, else last for decoders and mean"
        ),
    ] = None
    normalize: Annotated[
        bool | None,
        Field(
            description="whether vectors that are given out have length 1; null: as the base was published, else true"
        ),
    ] = None
    query_prompt: Annotated[
        str | None, Field(description="what stands before each query; null: as the base was published")
    ] = None
    document_prompt: Annotated[
        str | None, Field(description="what stands before each other text; null: as the base was published")
    ] = None
    corpus: Annotated[
        str | None,
        Field(
            description="file of further documents (column document, positive or text) among which held-out queries must find theirs",
            min_length=1,
        ),
    ] = None

    meant_for: ClassVar[dict[str, dict[str, Any]]] = {"retrieval": {}}
    predicts: ClassVar[bool] = True
    vectors: ClassVar[bool] = True
    augments: ClassVar[bool] = True
    numbers: ClassVar[bool] = True
    compares_distributions: ClassVar[bool] = False

    @property
    def apart(self) -> str | None:
        """Equal documents are no negatives of each other, so that a step of other ones says more."""
        return "document" if self.loss == "infonce" else None

    @property
    def formats(self) -> tuple[str, ...]:
        return ("retrieval",) if self.loss == "infonce" else ("scored_pair",)

    def rules(self, run: RunConfig) -> list[str]:
        found = []
        if self.loss != "infonce":
            found += [
                f"task.{name}: no effect with task.loss={self.loss}; it is for infonce. Drop it."
                for name in _OF_RETRIEVAL
                if getattr(self, name) != default_of(self, name)
            ]
        if run.train.batch_size == 1:
            found.append(
                "train.batch_size=1: task=embedding tells each row's texts from those of the other rows of a step, so it needs two."
            )
        found += [
            f"train.{name}: task=embedding reads the rows of a step twice, and both times must see the same. Drop it."
            for name, value in (
                ("neftune_alpha", run.train.neftune_alpha),
                ("fgm_epsilon", run.train.fgm_epsilon),
            )
            if value
        ]
        if self.corpus is not None and run.data.eval is None and run.data.eval_ratio is None:
            found.append("task.corpus: needs held-out rows. Set data.eval=FILE or data.eval_ratio=0.1.")
        return found

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.embedding.task import Embedding

        return Embedding
