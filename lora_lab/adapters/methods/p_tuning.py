"""P-tuning (Liu et al. 2021, arXiv:2103.10385): a small network computes the embeddings of virtual tokens before each row."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.prompts import PromptAdapter
from lora_lab.schema.sections import section


@section
class PTuningAdapter(PromptAdapter):
    """The `adapter` section for `adapter=p_tuning`. Every name is peft's own (`peft.PromptEncoderConfig`)."""

    method: Annotated[Literal["p_tuning"], Field(description="adapter family")] = "p_tuning"
    encoder_reparameterization_type: Annotated[
        Literal["MLP", "LSTM"], Field(description="the network that computes the virtual tokens")
    ] = "MLP"
    encoder_hidden_size: Annotated[int, Field(ge=1, le=65536, description="width of that network")] = 128

    peft_type: ClassVar[str] = "P_TUNING"
    label: ClassVar[str] = "P-tuning"
