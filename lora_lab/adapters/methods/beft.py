"""BEFT (arXiv:2509.15974): trains a bias beside the frozen one of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, LayerAdapter
from lora_lab.errors import AdapterError
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@section
class BeftAdapter(LayerAdapter):
    """The `adapter` section for `adapter=beft`. Every name is peft's own."""

    method: Annotated[Literal["beft"], Field(description="adapter family")] = "beft"

    peft_type: ClassVar[str] = "BEFT"
    label: ClassVar[str] = "BEFT"
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""

    def targets(self, model: PreTrainedModel, new_modules: Sequence[str] = ()) -> list[str]:
        """As in the base class; of all linear layers, those that have a bias.

        Raises:
            AdapterError: also a layer without one, which the merged checkpoint has no place for.
        """
        found = super().targets(model, new_modules)
        bare = [name for name in found if getattr(model.get_submodule(name), "bias", None) is None]
        if self.target_modules == "all-linear" and len(bare) < len(found):
            return [name for name in found if name not in bare]
        if bare:
            raise AdapterError(
                f"adapter.method=beft: {bare[0]} has no bias, as {len(bare)} of {len(found)} layers. Name others as adapter.target_modules, or "
                "use adapter=ia3."
            )
        return found
