"""LoRA (Hu et al. 2021, arXiv:2106.09685) and its variants that peft keeps in one class: rsLoRA, DoRA, and what its factors begin
with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from lora_lab.adapters import layers
from lora_lab.adapters.base import ANY_FORMAT, AdapterSection, Dropout, LayerAdapter, Rank
from lora_lab.errors import AdapterError, nearest
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    import peft
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_lab.adapters.beginnings import Given
    from lora_lab.adapters.deltas import Deltas
    from lora_lab.config.run import RunConfig


Niter = Annotated[str, Field(pattern=r"^pissa_niter_\d{1,3}$")]
_RESIDUAL = ("pissa", "olora", "corda", "lora_ga")  # begin with a product that is not zero, see `adapters.beginnings`
_OF_ROWS = ("eva", "corda", "lora_ga")
_OF_THE_BASE = (
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
    "ensure_weight_tying",
)  # wrap its modules
_OWN = ("init_rows", "corda_method")  # fields that peft's class does not have


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
        Literal[True, "gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "corda", "lora_ga"] | Niter,
        Field(
            description="what the factors begin with: true, gaussian, orthogonal, of the base's weights (pissa, pissa_niter_N, olora, "
            "loftq), of training rows (eva, corda, lora_ga)"
        ),
    ] = True
    init_rows: Annotated[
        int, Field(ge=1, le=100_000, description="training rows that eva, corda and lora_ga look at, the run's first")
    ] = 64
    corda_method: Annotated[
        Literal["ipm", "kpm"], Field(description="corda: begin where the task reads most (ipm) or least (kpm)")
    ] = "ipm"

    target_parameters: Annotated[
        list[str] | None,
        Field(description="weights of experts and routers to adapt too, by the endings of their names"),
    ] = None
    trainable_token_indices: Annotated[
        list[Annotated[int, Field(ge=0)]] | None,
        Field(
            min_length=1,
            description="tokens whose rows of the input embeddings (and of a tied output head) are trained",
        ),
    ] = None
    modules_to_save: Annotated[
        list[str] | None,
        Field(description="embeddings, norms, output head to train whole, by the endings of their names"),
    ] = None
    ensure_weight_tying: Annotated[
        bool, Field(description="train modules_to_save and what is tied to them as one, so that they stay tied")
    ] = False

    peft_type: ClassVar[str] = "LORA"
    dropout_key: ClassVar[str] = "lora_dropout"
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    second_factor: ClassVar[str] = "lora_B"
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
    def names_layers(self) -> bool:
        told = [self.target_parameters, self.trainable_token_indices, self.modules_to_save]
        return super().names_layers or any(one is not None for one in told)

    def targets(self, model: PreTrainedModel, new_modules: Sequence[str] = ()) -> list[str]:
        """As in the base class; without any layer, where `target_parameters` names what is adapted.

        Raises:
            AdapterError: also a name in `target_parameters` that matches no weight, a token that the model does not have.
        """
        found = [] if self.target_parameters and not self.target_modules else super().targets(model, new_modules)
        _check_parameters(model, self.target_parameters or [])
        _check_tokens(model, self.trainable_token_indices or [])
        return found

    def retrained(self, model: PreTrainedModel) -> tuple[str, ...]:
        """As in the base class.

        Raises:
            AdapterError: also a module that shares its weight with another, which would be changed by a merge as well.
        """
        found = layers.leaves(model, "adapter.modules_to_save", self.modules_to_save or [])
        shared = [name for name in found if name in layers.sharing(model)]
        if shared and not self.ensure_weight_tying:
            raise AdapterError(
                f"adapter.modules_to_save: '{shared[0]}' shares its weight with another module, and a merge would change both. Set "
                "adapter.ensure_weight_tying=true, which trains them as one, or leave it out."
            )
        if self.ensure_weight_tying and not shared:
            raise AdapterError(
                "adapter.ensure_weight_tying=true: no effect, because no module in adapter.modules_to_save shares its weight with another"
                f"{' (rows of tied embeddings always stay tied)' if self.trainable_token_indices else ''}. Drop it."
            )
        return tuple(found)

    @property
    def undefined_for_experts(self) -> list[str]:
        own = [] if self.beginning in ("default", "gaussian") else ["init_lora_weights"]
        return own + [name for name in ("lora_dropout", "use_dora") if getattr(self, name)]

    # -- how a fresh one begins --

    @property
    def beginning(self) -> str:
        """`init_lora_weights` without numbers."""
        told = self.init_lora_weights
        return "default" if isinstance(told, bool) else told.partition("_niter_")[0]

    @property
    def niter(self) -> int | None:
        """Iterations of a fast decomposition; None: an exact one."""
        number = str(self.init_lora_weights).partition("_niter_")[2]
        return int(number) if number else None

    @property
    def residual(self) -> bool:
        """Whether the factors' change alone trains, in an adapter of twice the rank."""
        return self.beginning in _RESIDUAL

    @property
    def fresh_differs(self) -> str:
        return "it begins with what quantizing took from the base" if self.beginning == "loftq" else ""

    @property
    def against_sharding(self) -> str:
        if self.beginning in ("default", "gaussian"):
            return ""
        return f"init_lora_weights={self.init_lora_weights} is made of whole weights"

    def rules(self, config: RunConfig) -> list[str]:
        told, found = f"adapter.init_lora_weights={_word(self.init_lora_weights)}", []
        if self.residual and self.lora_dropout:
            found.append(
                f"adapter.lora_dropout={self.lora_dropout:g}: not with {told}, whose factors hold a part of the base, which would be dropped "
                "with them. Drop one of the two."
            )
        odd = [rank for rank in (self.r, *(self.rank_pattern or {}).values()) if rank % 2]
        if self.beginning == "orthogonal" and odd:
            found.append(f"adapter.r={odd[0]}: {told} shares an even number of vectors out. Use {odd[0] + 1}.")
        if self.beginning == "loftq" and config.quant.method == "none":
            found.append(
                f"{told}: begins with what quantizing takes away, and quant=none takes nothing. Use quant=nf4."
            )
        inputs = {"trainable_token_indices": self.trainable_token_indices, "modules_to_save": self.modules_to_save}
        for key in [name for name, told in inputs.items() if told]:
            if config.speed.prefix_cache:
                found.append(
                    f"speed.prefix_cache=true: not with adapter.{key}, which may change the first layer's input. Drop one of the two."
                )
            if self.trainable_token_indices and (config.train.neftune_alpha or config.train.fgm_epsilon):
                name = "neftune_alpha" if config.train.neftune_alpha else "fgm_epsilon"
                found.append(
                    f"train.{name}: not with adapter.{key}, where no module gives the embeddings of all tokens. Drop one of the two."
                )
        if self.init_rows != 64 and self.beginning not in _OF_ROWS:
            found.append(f"adapter.init_rows={self.init_rows}: no effect with {told}, which looks at no rows. Drop it.")
        if self.corda_method != "ipm" and self.beginning != "corda":
            found.append(f"adapter.corda_method={self.corda_method}: no effect with {told}. Drop it.")
        return found

    def peft_fields(self, targets: Sequence[str] | None) -> dict[str, Any]:
        """As in the base class. What `begin` does, peft is not told, nor whoever loads the adapter: it would change its base."""
        fields = super().peft_fields(targets)
        for name in _OWN:
            del fields[name]
        if self.beginning not in ("default", "gaussian"):
            fields["init_lora_weights"] = True
        if not self.residual:
            return fields
        factor = math.sqrt(2) if self.use_rslora else 2.0  # the scale stays
        return fields | {
            "r": 2 * self.r,
            "lora_alpha": factor * self.lora_alpha,
            "rank_pattern": {name: 2 * rank for name, rank in (self.rank_pattern or {}).items()},
            "alpha_pattern": {name: factor * alpha for name, alpha in (self.alpha_pattern or {}).items()},
        }

    def shape(self, model: PeftModel, name: str) -> None:
        if self.residual:
            from lora_lab.adapters import beginnings

            beginnings.divide(model, name)

    def begin(self, model: PeftModel, name: str, given: Given) -> None:
        if self.beginning not in ("default", "gaussian"):
            from lora_lab.adapters import beginnings

            beginnings.begin(self, model, name, given)

    def kept(self, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        if not self.residual:
            return {}
        from lora_lab.adapters import beginnings

        return beginnings.initial(model, name)

    def describe(self) -> str:
        if self.beginning == "default":
            return super().describe()
        return f"{super().describe()}, init_lora_weights={self.init_lora_weights}"

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
        if target in ("vllm", "gguf_lora") and (self.trainable_token_indices or self.modules_to_save):
            key = "trainable_token_indices" if self.trainable_token_indices else "modules_to_save"
            return f"loads LoRA's factors alone, and nothing that adapter.{key} trains"
        loaders = {"vllm": "loads no DoRA", "gguf_lora": "llama.cpp has no DoRA"}
        return loaders.get(target, "") if self.use_dora else ""

    def on_same_modules(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("method", *_OF_THE_BASE)}

    @property
    def widest(self) -> int:
        return max([self.r, *(self.rank_pattern or {}).values()]) * (2 if self.residual else 1)

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
    own = {name: getattr(LoraAdapter(), name) for name in ("init_lora_weights", *_OWN)}
    plain = dataclasses.replace(
        first,
        r=rank,
        lora_alpha=float(rank),
        rank_pattern=None,
        alpha_pattern=None,
        use_rslora=False,
        lora_dropout=0.0,
        **own,
    )
    if all(isinstance(one, LoraAdapter) and one.place == first.place for one in like):
        return plain
    return dataclasses.replace(plain, target_modules=list(names), exclude_modules=None, layers_to_transform=None)


def _word(value: bool | str) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _check_parameters(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Refuse a name in `target_parameters` that peft's rule finds no weight for."""
    there = list(layers.expert_weights(model)) if names else []
    for name in names:
        if not any(one == name or one.endswith(f".{name}") for one in there):
            endings = sorted({".".join(one.rsplit(".", 2)[-2:]) for one in there})
            has = f"The model has: {', '.join(endings)}" if there else "The model has no weights of experts"
            raise AdapterError(
                f"adapter.target_parameters: {name} matches no weight of an expert or router.{nearest(name, endings)} {has}."
            )


def _check_tokens(model: PreTrainedModel, tokens: Sequence[int]) -> None:
    """Refuse tokens in `trainable_token_indices` that have no row, or several."""
    if not tokens:
        return
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    for place, token in enumerate(tokens):
        if token >= rows:
            raise AdapterError(f"adapter.trainable_token_indices: {token}: the model's tokens are 0 to {rows - 1}.")
        if token in tokens[:place]:
            raise AdapterError(f"adapter.trainable_token_indices: {token} is there twice. Name it once.")


def _smaller_side(layer: Any) -> int:
    return int(min(layer.weight.shape))


def _rank_and_scale(config: peft.LoraConfig, layer: str) -> tuple[int, float]:
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), layer), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)
