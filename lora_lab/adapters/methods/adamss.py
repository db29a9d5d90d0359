"""AdaMSS (Zheng et al., NeurIPS 2025): the singular vectors of each weight, in clusters, each with a small update of its own."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import LayerAdapter, Seed
from lora_lab.schema.sections import section


@section
class AdamssAdapter(LayerAdapter):
    """The `adapter` section for `adapter=adamss`. Every name is peft's own."""

    method: Annotated[Literal["adamss"], Field(description="adapter family")] = "adamss"
    r: Annotated[int, Field(ge=1, description="singular values of a weight that are used")] = 100
    num_subspaces: Annotated[int, Field(ge=1, description="clusters of them")] = 5
    subspace_rank: Annotated[int, Field(ge=1, description="rank of the update in each")] = 1
    random_seed: Seed = 0

    peft_type: ClassVar[str] = "ADAMSS"
    label: ClassVar[str] = "AdaMSS"
    against_quantized: ClassVar[str] = "it needs the singular vectors of whole weights"
    against_merging: ClassVar[str] = ""
