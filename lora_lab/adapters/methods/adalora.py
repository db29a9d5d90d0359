"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): an update in the form of singular values, whose ranks are given to the layers where
they matter most while the run trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import BITSANDBYTES, Dropout, LayerAdapter, Step
from lora_lab.errors import AdapterError
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    from collections.abc import Sequence

    import peft
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_lab.adapters.deltas import Deltas
    from lora_lab.config.run import RunConfig

_PARTS = ("lora_A", "lora_B", "lora_E")
_SHARES = ("tinit", "tfinal")  # fields that may be shares of the run's steps


@section
class AdaLoraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=adalora`. Every name is peft's own (`peft.AdaLoraConfig`).

    peft's two parts of training belong to the step here: its orthogonality term has a gradient and no place in the loss over tokens,
    and ranks are allocated after each update.
    """

    method: Annotated[Literal["adalora"], Field(description="adapter family")] = "adalora"
    init_r: Annotated[int, Field(ge=1, le=4096, description="rank of every layer at the beginning")] = 24
    target_r: Annotated[int, Field(ge=1, le=4096, description="mean rank of the layers at the end")] = 16
    lora_alpha: Annotated[float, Field(gt=0, description="scale: the update is multiplied by lora_alpha / init_r")] = 16
    lora_dropout: Dropout = 0.0
    tinit: Annotated[
        float, Field(ge=0, description="steps before the ranks begin to fall; below 1: share of all steps")
    ] = 0.1
    tfinal: Annotated[
        float, Field(ge=0, description="steps after the ranks have fallen; below 1: share of all steps")
    ] = 0.3
    deltaT: Annotated[int, Field(ge=1, description="steps between two allocations of ranks")] = 1
    beta1: Annotated[float, Field(gt=0, lt=1, description="smoothing of each weight's importance")] = 0.85
    beta2: Annotated[float, Field(gt=0, lt=1, description="smoothing of how uncertain that is")] = 0.85
    orth_reg_weight: Annotated[
        float, Field(ge=0, description="weight of the term that keeps singular vectors orthogonal")
    ] = 0.5

    peft_type: ClassVar[str] = "ADALORA"
    label: ClassVar[str] = "AdaLoRA"
    dropout_key: ClassVar[str] = "lora_dropout"
    quantized: ClassVar[tuple[str, ...]] = BITSANDBYTES
    against_quantized: ClassVar[str] = "peft adds to what a layer gives in place, which such layers do not always allow"
    against_merging: ClassVar[str] = ""
    against_delta: ClassVar[str] = ""

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        return ("init_r", "target_r", "lora_alpha", "lora_dropout")

    @property
    def widest(self) -> int:
        return self.init_r

    @property
    def undefined_for_experts(self) -> list[str]:
        return ["method"]

    def rules(self, config: RunConfig) -> list[str]:
        found = []
        if self.target_r >= self.init_r:
            found.append(
                f"adapter.target_r={self.target_r}: must be below adapter.init_r={self.init_r}, because ranks only fall."
            )
        if self.tinit < 1 and self.tfinal < 1 and self.tinit + self.tfinal >= 1:
            found.append(
                f"adapter.tinit={self.tinit:g}: with adapter.tfinal={self.tfinal:g} no step is left in which ranks fall. Lower one of the two."
            )
        return found

    def peft_fields(self, targets: Sequence[str] | None) -> dict[str, Any]:
        """As in the base class. How many steps there are, only the run knows; see `schedule`."""
        fields = super().peft_fields(targets)
        for name in _SHARES:
            del fields[name]
        return fields | {"total_step": 1}

    # -- its part in a step --

    def schedule(self, total: int) -> tuple[int, int]:
        """`tinit` and `tfinal` in steps.

        Raises:
            AdapterError: no step is left between them.
        """
        first, last = (int(value) if value >= 1 else round(value * total) for value in (self.tinit, self.tfinal))
        if first + last >= total - 1:  # the last allocation ranks by the steps before it
            raise AdapterError(
                f"adapter.tinit={self.tinit:g}, adapter.tfinal={self.tfinal:g}: of the run's {total} steps none is left in which ranks fall. Lower "
                "them, or train longer."
            )
        return first, last

    def check_length(self, steps: int) -> None:
        self.schedule(steps)

    def shape(self, model: PeftModel, name: str) -> None:
        from lora_lab.adapters.allocation import Allocation

        Allocation.begin(model, name)

    def kept(self, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        from lora_lab.adapters.allocation import Allocation

        return Allocation.of(model, name).tensors()

    def before_update(self, step: Step) -> None:
        from lora_lab.adapters import allocation

        if self.orth_reg_weight:
            allocation.keep_orthogonal(step.parameters, self.orth_reg_weight)

    def after_update(self, step: Step) -> None:
        from lora_lab.adapters.allocation import Allocation

        Allocation.of(step.model, step.name).allocate(step, *self.schedule(step.total))

    # -- its change of each weight --

    @classmethod
    def delta(cls, config: peft.AdaLoraConfig, tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> Deltas:
        """Of each layer B (E A) with the scale, without the ranks that were taken from it; a layer that has none left keeps one of
        zeros."""
        from lora_lab.adapters.deltas import Delta, Deltas, parts_of

        parts, whole = parts_of(tensors, _PARTS)
        found = {}
        for layer, part in parts.items():
            if set(_PARTS) - part.keys():
                raise AdapterError(f"{layer} has {', '.join(sorted(part))} only. Copy it again.")
            kept = part["lora_E"][:, 0] != 0
            kept[0] |= not kept.any()
            scale = config.lora_alpha / (config.init_r + 1e-5)  # peft's small number as well
            down = part["lora_A"][kept] * part["lora_E"][kept]
            found[layer] = Delta(down, scale * part["lora_B"][:, kept])
        return Deltas(found, whole)
