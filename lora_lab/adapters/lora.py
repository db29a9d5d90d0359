"""LoRA (Hu et al. 2021, arXiv:2106.09685) and its variants that peft keeps in one class: rsLoRA, DoRA."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lora_lab.schema.sections import section

if TYPE_CHECKING:
    import peft


@section
class LoraAdapter:
    """The `adapter` section for `adapter=lora`. Every name is peft's own (`peft.LoraConfig`)."""

    method: Annotated[Literal["lora"], Field(description="adapter family")] = "lora"
    r: Annotated[int, Field(ge=1, le=4096, description="rank of the update")] = 16
    lora_alpha: Annotated[float, Field(gt=0, description="scale: the update is multiplied by lora_alpha / r")] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1, description="dropout on the adapter's input")] = 0.0
    target_modules: Annotated[
        str | list[str],
        Field(description="'all-linear' (all but the output head), a list of name endings, or one regular expression"),
    ] = "all-linear"
    exclude_modules: Annotated[list[str] | None, Field(description="name endings to leave out")] = None
    layers_to_transform: Annotated[list[int] | None, Field(description="only these layers (counted from 0)")] = None
    rank_pattern: Annotated[dict[str, int] | None, Field(description="another rank for some modules")] = None
    alpha_pattern: Annotated[dict[str, float] | None, Field(description="another lora_alpha for some modules")] = None
    use_rslora: Annotated[bool, Field(description="scale by lora_alpha / sqrt(r) (arXiv:2312.03732)")] = False
    use_dora: Annotated[bool, Field(description="train magnitudes apart from directions (arXiv:2402.09353)")] = False
    init_lora_weights: Annotated[
        bool | Literal["gaussian"], Field(description="true or gaussian: the fresh adapter changes nothing")
    ] = True

    @property
    def targets(self) -> str | list[str]:
        """`target_modules` as peft means it: one plain name (`self_attn.q_proj`) is a name ending, as in a list, not a regular
        expression."""
        names = self.target_modules
        return [names] if isinstance(names, str) and re.fullmatch(r"\w+(\.\w+)*", names) else names

    def peft_config(self, task_type: str | None) -> peft.LoraConfig:
        """The peft configuration of this adapter; `task_type` is peft's `TaskType` name, or None."""
        import peft

        not_pefts = (
            "method",
            "layers_to_transform",
        )  # the latter is resolved to names: peft refuses it beside 'all-linear'
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in not_pefts}
        fields["target_modules"] = self.targets
        fields["rank_pattern"] = fields["rank_pattern"] or {}
        fields["alpha_pattern"] = fields["alpha_pattern"] or {}
        return peft.LoraConfig(task_type=task_type, **fields)
