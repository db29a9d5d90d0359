"""The `task` section of task=distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.schema.sections import default_of, section
from lora_lab.tasks.causal_lm.config import CausalLMConfig

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig
    from lora_lab.tasks.base import Task


@section
class DistillationConfig(CausalLMConfig):
    """Conversations; for each token of the assistant's turns a teacher's distribution is learned."""

    name: Annotated[Literal["distillation"], Field(description="objective")] = "distillation"  # type: ignore[assignment]
    teacher: Annotated[
        str | None,
        Field(
            description="folder, .gguf file, hub id or run folder of a model with the same tokens; base: the base itself, without adapter",
            min_length=1,
        ),
    ] = None
    divergence: Annotated[
        Literal["forward_kl", "reverse_kl", "jensen_shannon"],
        Field(
            description="of the teacher's distribution P and the student's Q: KL(P||Q), KL(Q||P), or both to their mixture"
        ),
    ] = "forward_kl"
    beta: Annotated[
        float,
        Field(gt=0, lt=1, description="jensen_shannon: share of the teacher in the mixture (generalized, as GKD)"),
    ] = 0.5
    temperature: Annotated[
        float, Field(gt=0, le=100, description="what the logits of both are divided by before they are compared")
    ] = 1.0
    kd_ratio: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="share of the divergence in the loss; the rest is the usual loss of the rows' own tokens",
        ),
    ] = 0.5
    top_k: Annotated[
        int | None,
        Field(
            ge=1,
            description="likeliest tokens of the teacher that are kept for each place, the rest as one class; null: the whole vocabulary",
        ),
    ] = 64

    meant_for: ClassVar[dict[str, dict[str, Any]]] = {}

    @property
    def taught_by(self) -> str | None:
        return self.teacher

    def rules(self, run: RunConfig) -> list[str]:
        found = super().rules(run)
        if self.teacher is None:
            found.append(
                "task.teacher: nobody is named to learn from. Set it to a folder, a hub id, the folder of a run, or base."
            )
        if self.beta != default_of(self, "beta") and self.divergence != "jensen_shannon":
            found.append(
                f"task.beta: no effect with task.divergence={self.divergence}; it is for jensen_shannon. Drop it."
            )
        if self.kd_ratio == 1 and self.label_smoothing:
            found.append(
                "task.label_smoothing: no effect with task.kd_ratio=1, where the rows' own tokens are not learned. Drop it."
            )
        if self.kd_ratio == 1 and self.teacher == "base":
            found.append(
                "task.kd_ratio=1: with task.teacher=base the student says what its teacher says before the first step, and nothing "
                "would be learned. Lower it, or name another teacher."
            )
        if run.data.streaming:
            found.append(
                "data.streaming=true: a teacher reads all rows before training, and streamed rows are read as they come. Drop it."
            )
        return found

    def load(self) -> type[Task[Any, Any]]:
        from lora_lab.tasks.distillation.task import Distillation

        return Distillation
