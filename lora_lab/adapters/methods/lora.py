"""LoRA (Hu et al. 2021, arXiv:2106.09685) and its variants that peft keeps in one class: rsLoRA, DoRA."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters import layers
from lora_lab.adapters.base import ANY_FORMAT, AdapterSection, Dropout, LayerAdapter, Rank
from lora_lab.errors import AdapterError
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    import peft
    import torch
    from transformers import PreTrainedModel

    from lora_lab.adapters.deltas import Deltas


@section
class LoraAdapter(LayerAdapter):
    """The `adapter` section for `adapter=lora`. Every name is peft's own (`peft.LoraConfig`)."""

    method: Annotated[Literal["lora"], Field(description="adapter family")] = "lora"
    r: Rank = 16
    lora_alpha: Annotated[float, Field(gt=0, description="scale: the update is multiplied by lora_alpha / r")] = 32
    lora_dropout: Dropout = 0.0
    rank_pattern: Annotated[dict[str, int] | None, Field(description="another rank for some modules")] = None
    alpha_pattern: Annotated[dict[str, float] | None, Field(description="another lora_alpha for some modules")] = None
    use_rslora: Annotated[bool, Field(description="scale by lora_alpha / sqrt(r) (arXiv:2312.03732)")] = False
    use_dora: Annotated[bool, Field(description="train magnitudes apart from directions (arXiv:2402.09353)")] = False
    init_lora_weights: Annotated[
        bool | Literal["gaussian"], Field(description="true or gaussian: the fresh adapter changes nothing")
    ] = True

    peft_type: ClassVar[str] = "LORA"
    dropout_key: ClassVar[str] = "lora_dropout"
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    quantized: ClassVar[tuple[str, ...]] = ANY_FORMAT
    against_merging: ClassVar[str] = ""
    against_delta: ClassVar[str] = ""
    shares_passes: ClassVar[bool] = True

    def needs_names(self, model: PreTrainedModel, new_modules: Sequence[str]) -> bool:
        return bool(
            new_modules
            or self.layers_to_transform is not None
            or any(map(layers.is_router, model.modules()))
            or layers.towers(model)
            or layers.bypassed(model)
            or layers.tied(model)
        )

    @property
    def undefined_for_experts(self) -> list[str]:
        return [name for name in ("lora_dropout", "use_dora") if getattr(self, name)]

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        return ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")

    @property
    def label(self) -> str:
        return "DoRA" if self.use_dora else "rsLoRA" if self.use_rslora else "LoRA"

    def warnings(self, model: PreTrainedModel, targets: Sequence[str]) -> dict[str, str]:
        """A rank above a layer's smaller side costs memory and adds nothing that a lower one could not."""
        sides = {name: _smaller_side(model.get_submodule(name)) for name in targets}
        smaller = [name for name, side in sides.items() if side < self.r]
        if not smaller:
            return {}
        return {
            "rank": f"adapter.r={self.r} is above the smaller side of {len(smaller)} layers ({smaller[0]}: {sides[smaller[0]]}); "
            f"{min(sides.values())} is all that the smallest of them can use"
        }

    def against_target(self, target: str) -> str:
        loaders = {"vllm": "loads no DoRA", "gguf_lora": "llama.cpp has no DoRA"}
        return loaders.get(target, "") if self.use_dora else ""

    def on_one_base(self) -> dict[str, Any]:
        return {"method": self.method}

    @property
    def widest(self) -> int:
        return max([self.r, *(self.rank_pattern or {}).values()])

    @classmethod
    def delta(cls, config: peft.LoraConfig, tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> Deltas:
        from lora_lab.adapters.deltas import Delta, Deltas, parts_of

        parts, whole = parts_of(tensors, ("lora_A", "lora_B", "lora_magnitude_vector"))
        found = {}
        for layer, part in parts.items():
            if not {"lora_A", "lora_B"} <= part.keys():
                raise AdapterError(f"{layer} has {', '.join(sorted(part))} only. Copy it again.")
            rank, scale = _rank_and_scale(config, layer)
            if part["lora_A"].shape[0] != rank or part["lora_B"].shape[1] != rank:
                raise AdapterError(
                    f"{layer} has rank {part['lora_A'].shape[0]}, and adapter_config.json says {rank}. Restore the one that was changed."
                )
            found[layer] = Delta(part["lora_A"], scale * part["lora_B"], part.get("lora_magnitude_vector"))
        return Deltas(found, whole)


def of_scale_one(like: Sequence[AdapterSection], rank: int, names: Sequence[str]) -> LoraAdapter:
    """LoRA of one rank and scale 1 in the place of other adapters: whatever has a `delta` can be written so.

    Args:
        like: if all are LoRA's with the same targets, these are kept, and the first's other settings.
        names: of the adapted layers, where they are not.
    """
    first = like[0]
    if not isinstance(first, LoraAdapter):
        return LoraAdapter(r=rank, lora_alpha=float(rank), target_modules=list(names))
    plain = dataclasses.replace(
        first, r=rank, lora_alpha=float(rank), rank_pattern=None, alpha_pattern=None, use_rslora=False, lora_dropout=0.0
    )
    if all(isinstance(one, LoraAdapter) and one.place == first.place for one in like):
        return plain
    return dataclasses.replace(plain, target_modules=list(names), exclude_modules=None, layers_to_transform=None)


def _smaller_side(layer: Any) -> int:
    return int(min(layer.weight.shape))


def _rank_and_scale(config: peft.LoraConfig, layer: str) -> tuple[int, float]:
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), layer), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
