"""Prompt tuning (Lester et al. 2021, arXiv:2104.08691): embeddings of virtual tokens before each row are all that is trained."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.prompts import PromptAdapter
from lora_lab.schema.sections import section


@section
class PromptTuningAdapter(PromptAdapter):
    """The `adapter` section for `adapter=prompt_tuning`. Every name is peft's own (`peft.PromptTuningConfig`)."""

    method: Annotated[Literal["prompt_tuning"], Field(description="adapter family")] = "prompt_tuning"
    prompt_tuning_init: Annotated[
        Literal["SAMPLE_VOCAB", "RANDOM"],
        Field(description="SAMPLE_VOCAB: begin with embeddings of random tokens; RANDOM: with random numbers"),
    ] = "SAMPLE_VOCAB"

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    label: ClassVar[str] = "prompt tuning"
