"""HiRA (Huang et al., ICLR 2025, openreview.net/forum?id=TwJrTz9cRS): multiplies each weight, entry by entry, with a low-rank matrix."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import BITSANDBYTES, Dropout, LayerAdapter, Rank
from lora_lab.schema.sections import section


@section
class HiraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=hira`. Every name is peft's own."""

    method: Annotated[Literal["hira"], Field(description="adapter family")] = "hira"
    r: Rank = 32
    hira_dropout: Dropout = 0.0

    peft_type: ClassVar[str] = "HIRA"
    label: ClassVar[str] = "HiRA"
    dropout_key: ClassVar[str] = "hira_dropout"
    quantized: ClassVar[tuple[str, ...]] = BITSANDBYTES
    against_merging: ClassVar[str] = ""
