"""What `lora-lab evaluate` asks beside held-out rows."""

import dataclasses
from typing import Annotated

from pydantic import Field

from lora_lab.schema.sections import section


@section
class EvaluateConfig:
    """Published benchmarks by lm-eval, the harness that others use (`lora-lab evaluate`)."""

    suite: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        Field(description="tasks of lm-eval that base and adapter are asked beside the held-out rows"),
    ] = dataclasses.field(default_factory=list)
    tasks_dir: Annotated[
        str | None,
        Field(
            min_length=1,
            description="folder of tasks as lm-eval writes them (YAML), with their rows; null: lm-eval's own tasks, whose rows come from the hub",
        ),
    ] = None
    limit: Annotated[int | None, Field(ge=1, description="rows of each task, the first ones; null: all")] = None
    few_shot: Annotated[
        int | None, Field(ge=0, le=64, description="rows before each question; null: as the task says")
    ] = None
    chat_template: Annotated[bool, Field(description="ask in messages, by the run's chat template")] = False
