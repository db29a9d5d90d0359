"""Methods that change no weight but put virtual tokens before each row: their section, and where their tensors and logits lie.

peft's own saved form is what the model reads of them (`prompt_embeddings`). A method that computes that by a network, which is trained,
is saved with the network beside it: the rest of a run needs it, and peft takes no notice of it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lora_lab.adapters.base import ANY_FORMAT, AdapterSection
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_lab.tasks.section import TaskSection

VirtualTokens = Annotated[int, Field(ge=1, le=4096, description="virtual tokens before each row")]


@section
class PromptAdapter(AdapterSection):
    """A method of virtual tokens."""

    method: str
    num_virtual_tokens: VirtualTokens = 20

    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = "it changes no weight but puts virtual tokens before each row"
    against_delta: ClassVar[str] = against_merging
    fresh_differs: ClassVar[str] = "the model reads its virtual tokens from the beginning"
    against_packing: ClassVar[str] = "its virtual tokens stand before each row, so each has a pass of its own"

    @property
    def names_layers(self) -> bool:
        return False

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens

    def against_task(self, task: TaskSection) -> str:
        if task.packed and not task.compares_rows:
            return ""
        return "its virtual tokens are proved before the rows of a language model alone, each with a loss of its own"

    def targets(self, model: PreTrainedModel, new_modules: Sequence[str] = ()) -> list[str]:
        return []

    def on_same_modules(self) -> dict[str, Any]:
        return {"method": self.method}


def positions_before(model: Any) -> int:
    """How many positions stand before those of a row's own tokens in what the model gives, with its active adapter as it is."""
    config = model.peft_config[model.active_adapter] if hasattr(model, "active_peft_config") else None
    if config is None or not config.is_prompt_learning or model._adapters_disabled:
        return 0
    return 0 if config.peft_type == "PREFIX_TUNING" else int(config.num_virtual_tokens)


def is_prompt(model: PeftModel, name: str) -> bool:
    """Whether the adapter `name` is of virtual tokens."""
    return bool(model.peft_config[name].is_prompt_learning)


@contextlib.contextmanager
def generating() -> Iterator[None]:
    """Inside the block a model may generate after virtual tokens. transformers tells it their positions, of which peft says that it drops them:
    the model counts them itself from the first virtual token on, as in training."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
        yield


def tensors_of(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """What is saved of such an adapter. Tensors that are trained share their memory with the adapter's."""
    import torch

    encoder: Any = model.prompt_encoder[name]
    own = {f"prompt_encoder.{key}": one for key, one in encoder.state_dict().items()}
    if len(own) == 1:  # what is trained is what the model reads
        return {"prompt_embeddings": encoder.embedding.weight.detach()}
    places = torch.arange(encoder.embedding.num_embeddings, device=encoder.embedding.weight.device)
    with torch.no_grad():
        return {"prompt_embeddings": encoder(places[None])[0], **own}
