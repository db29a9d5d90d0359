"""VeRA (Kopiczko et al. 2023, arXiv:2310.11454): two random matrices that all layers share stay frozen, two vectors of each layer
train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, Dropout, LayerAdapter, Seed
from lora_lab.errors import AdapterError
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    import peft
    import torch
    from transformers import PreTrainedModel

    from lora_lab.adapters.deltas import Deltas

_SHARED = ("base_model.vera_A", "base_model.vera_B")


@section
class VeraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=vera`. Every name is peft's own (`peft.VeraConfig`).

    The shared matrices are always saved with the adapter (peft's `save_projection`): drawn again, they could be others.
    """

    method: Annotated[Literal["vera"], Field(description="adapter family")] = "vera"
    r: Annotated[
        int, Field(ge=1, le=4096, description="rank of the update; more than LoRA's, because it costs little")
    ] = 256
    projection_prng_key: Seed = 0
    vera_dropout: Dropout = 0.0
    d_initial: Annotated[float, Field(gt=0, description="what the inner vector begins with")] = 0.1

    peft_type: ClassVar[str] = "VERA"
    label: ClassVar[str] = "VeRA"
    dropout_key: ClassVar[str] = "vera_dropout"
    against_delta: ClassVar[str] = ""
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""

    @property
    def widest(self) -> int:
        return self.r

    @classmethod
    def delta(cls, config: peft.VeraConfig, tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> Deltas:
        """Of each layer, (lambda_b * B) @ (lambda_d * A), where A and B are cut to its size."""
        from peft.tuners.tuners_utils import _get_in_out_features

        from lora_lab.adapters.deltas import Delta, Deltas, parts_of

        shared = [tensors[name].float() for name in _SHARED if name in tensors]
        parts, whole = parts_of(
            {name: one for name, one in tensors.items() if name not in _SHARED}, ("vera_lambda_b", "vera_lambda_d")
        )
        half = [name for name, part in parts.items() if len(part) < 2]
        if half or len(shared) < 2:
            raise AdapterError(f"{half[0] if half else 'the adapter'} has half of its tensors only. Copy it again.")
        found = {}
        for name, part in parts.items():
            read, given = _get_in_out_features(model.get_submodule(name))
            down = part["vera_lambda_d"][:, None] * shared[0][:, :read]
            found[name] = Delta(down, part["vera_lambda_b"][:, None] * shared[1][:given])
        return Deltas(found, whole)
