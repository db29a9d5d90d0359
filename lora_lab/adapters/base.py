"""What an adapter method answers for itself; the rest of lora_lab asks, and knows no method.

A method is a section of the configuration (`@section`) that extends `AdapterSection`, or `LayerAdapter` where it sits on linear
layers. Every answer has a default that promises nothing. A reason against something is a clause that a message can be made of,
such as "it has no merged form"; empty means that nothing stands against it.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lora_lab.adapters import layers
from lora_lab.errors import AdapterError
from lora_lab.schema.sections import section

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from lora_lab.adapters.beginnings import Given
    from lora_lab.adapters.deltas import Deltas
    from lora_lab.config.run import RunConfig
    from lora_lab.tasks.section import TaskSection

Rank = Annotated[int, Field(ge=1, le=4096, description="rank of the update")]
Dropout = Annotated[float, Field(ge=0, lt=1, description="dropout on the adapter's input")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="seed of what is drawn and stays frozen")]
BITSANDBYTES = ("nf4", "fp4", "int8")  # formats of `quant.method`, for methods that only add to what a layer gives
ANY_FORMAT = (*BITSANDBYTES, "torchao_int8")
_WHERE = ("target_modules", "exclude_modules", "layers_to_transform")  # fields that name layers


@dataclasses.dataclass(frozen=True)
class Step:
    """An optimizer step of one adapter, for methods that have a part in it."""

    model: PeftModel
    name: str  # of the adapter in the model
    parameters: dict[str, torch.nn.Parameter]  # all that is trained, by name, with its gradients
    number: int  # of the step, from 1
    total: int  # steps of the whole run


class AdapterSection:
    """The `adapter` section of one method. Fields have the names of peft's configuration class."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]  # the methods' sections are dataclasses
    method: str
    peft_type: ClassVar[str]  # peft's `PeftType` name
    dropout_key: ClassVar[str | None] = None  # the field that is the rate of the adapter's dropout
    fixed: ClassVar[dict[str, Any]] = {}  # what peft's class is always given beside the fields
    second_factor: ClassVar[str] = (
        ""  # part of the names of its parameters that are LoRA's B, see `optim.loraplus_lr_ratio`
    )
    quantized: ClassVar[tuple[str, ...]] = ()  # formats of a base (`quant.method`) that it trains on
    against_quantized: ClassVar[str] = "it has not been shown to train on quantized weights"  # on other formats
    against_merging: ClassVar[str] = "it has not been shown to merge"  # empty where it merges
    against_delta: ClassVar[str] = "what it does to a weight is no product of two small matrices"  # see `delta`
    shares_passes: ClassVar[bool] = False  # whether members of a sweep can share passes; else they take turns
    saved_once: ClassVar[tuple[str, ...]] = ()  # parts of the names of tensors that layers share
    modules_to_save: list[str] | None = None  # names of modules that train whole beside it, where it has such a field
    against_packing: ClassVar[str] = ""  # why each row needs a pass of its own
    against_checkpointing: ClassVar[str] = ""  # why activations cannot be computed again in the backward pass
    registered_by: ClassVar[str] = ""  # the module that makes peft know it when it is imported; empty: peft has it

    # -- its place and its settings --

    def targets(self, model: PreTrainedModel, new_modules: Sequence[str] = ()) -> list[str]:
        """Names of the layers that will be adapted, of a model that may be without weights.

        Args:
            new_modules: what is trained whole, and so gets no adapter.

        Raises:
            AdapterError: a name in the section that matches nothing.
        """
        raise NotImplementedError

    @property
    def names_layers(self) -> bool:
        """Whether the section names layers, which a base may not have."""
        return True

    def retrained(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Names of modules of the base that are trained whole beside the adapter, as a copy.

        Raises:
            AdapterError: a name in the section that matches nothing.
        """
        return ()

    def peft_config(self, task_type: str | None, targets: Sequence[str] | None = None) -> PeftConfig:
        """peft's configuration of this adapter.

        Args:
            task_type: peft's `TaskType` name, or None.
            targets: names of the layers to adapt; None: as the section says them.
        """
        return self.config_class()(task_type=task_type, **self.peft_fields(targets))

    @classmethod
    def config_class(cls) -> type[PeftConfig]:
        """peft's class for configurations of this method."""
        import peft

        if cls.registered_by:
            importlib.import_module(cls.registered_by)
        return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(cls.peft_type)]

    def peft_fields(self, targets: Sequence[str] | None) -> dict[str, Any]:
        """What peft's configuration class is given, beside the task type; `targets` as in `peft_config`."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "method"}
        return own | self.fixed

    def needs_names(self, model: PreTrainedModel, new_modules: Sequence[str]) -> bool:
        """Whether peft has to be told the layers' names, because its own rules would find others on this base."""
        return True

    @property
    def undefined_for_experts(self) -> list[str]:
        """Fields that are set and have no meaning for the weights of a mixture's experts."""
        return []

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """peft's names of what, beside the tensors, decides what a trained adapter does."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.name not in ("method", *_WHERE))

    def rules(self, config: RunConfig) -> list[str]:
        """A sentence for each setting that the rest of the run contradicts, or leaves without effect."""
        return []

    # -- how a fresh one begins --

    @property
    def fresh_differs(self) -> str:
        """Why a fresh adapter changes the base's outputs."""
        return ""

    def shape(self, model: PeftModel, name: str) -> None:
        """Bring a fresh adapter that peft has just put on a model into the form that it trains in. Its tensors may have no content."""

    def begin(self, model: PeftModel, name: str, given: Given) -> None:
        """Give a fresh adapter the weights that it begins with, where they are made of the base's or of training rows. torch's generators
        are seeded."""

    def kept(self, model: PeftModel, name: str) -> dict[str, torch.Tensor]:
        """Tensors that a checkpoint must hold beside the adapter as it is saved, by name. A resumed run writes into them."""
        return {}

    # -- its part in a step --

    def check_length(self, steps: int) -> None:
        """Refuse a run of so many steps.

        Raises:
            AdapterError: the section says what is to happen in more of them.
        """

    def before_update(self, step: Step) -> None:
        """Add to the gradients what belongs to the step and not to the loss over its rows; they are neither checked nor clipped yet."""

    def after_update(self, step: Step) -> None:
        """What is due when the optimizer has made its step, while the gradients are still there."""

    # -- what it is called, and what is to be said of it --

    @property
    def label(self) -> str:
        """Its name in cards and tables."""
        return self.method

    def describe(self) -> str:
        """Its most important settings in a few words."""
        return ", ".join(f"{name}={_shown(getattr(self, name))}" for name in self.settings()[:2])

    def warnings(self, model: PreTrainedModel, targets: Sequence[str]) -> dict[str, str]:
        """What the user should know of these settings on this base: a sentence by its catchword."""
        return {}

    @property
    def dropout(self) -> float:
        """Rate of the adapter's dropout."""
        return getattr(self, self.dropout_key) if self.dropout_key else 0.0

    @property
    def virtual_tokens(self) -> int:
        """Positions that it takes before each row."""
        return 0

    # -- what can be done with it --

    def against_quant(self, method: str) -> str:
        """Why it cannot be trained on a base that is stored in this format (`quant.method`, but for none)."""
        return "" if method in self.quantized else self.against_quantized

    def against_task(self, task: TaskSection) -> str:
        """Why it is not trained for a task."""
        return ""

    def against_target(self, target: str) -> str:
        """What stands against one of `export.targets`, beside what follows from merging and `delta`."""
        return ""

    def on_same_modules(self) -> dict[str, Any]:
        """Values that adapters must have in common to lie on the same modules of a base, by field."""
        return dataclasses.asdict(self)

    @property
    def against_sharding(self) -> str:
        """Why it cannot be trained on a base whose layers are spread over several processes."""
        return ""

    # -- its change of each weight, where `against_delta` is empty --

    @classmethod
    def delta(cls, config: Any, tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> Deltas:
        """What a saved adapter adds to each weight, as products of two matrices.

        Args:
            config: what was saved beside the tensors, peft's class for the method.
            tensors: as they were saved, by peft's names (see `deltas.parts_of`).
            model: the base without weights, which says how large its layers are.

        Raises:
            AdapterError: tensors are missing, or do not fit the settings.
        """
        raise AdapterError(f"{cls.peft_type}: {cls.against_delta}.")

    @property
    def widest(self) -> int:
        """The largest rank of `delta`."""
        raise NotImplementedError


@section
class LayerAdapter(AdapterSection):
    """A method that sits on linear layers, which its section names as LoRA's does."""

    method: str
    target_modules: Annotated[
        str | list[str],
        Field(description="'all-linear' (all but the output head), a list of name endings, or one regular expression"),
    ] = "all-linear"
    exclude_modules: Annotated[list[str] | None, Field(description="name endings to leave out")] = None
    layers_to_transform: Annotated[list[int] | None, Field(description="only these layers (counted from 0)")] = None

    patterns: ClassVar[tuple[str, ...]] = ()  # fields whose keys are names among the targeted layers
    divides: ClassVar[dict[str, tuple[str, ...]]] = {}  # what a field has to divide: inputs, outputs of each layer

    def most(self, size: layers.Size) -> dict[str, int]:
        """The largest values that fields can have on a layer of this size."""
        return {}

    @property
    def names(self) -> str | list[str]:
        """`target_modules` as peft means it: one plain name (`self_attn.q_proj`) is a name ending, as in a list, not a regular
        expression."""
        names = self.target_modules
        return [names] if isinstance(names, str) and re.fullmatch(r"\w+(\.\w+)*", names) else names

    @property
    def names_layers(self) -> bool:
        told = [getattr(self, name) for name in ("exclude_modules", "layers_to_transform", *self.patterns)]
        return self.target_modules != "all-linear" or any(told)

    def targets(self, model: PreTrainedModel, new_modules: Sequence[str] = ()) -> list[str]:
        """As in the base class.

        Raises:
            AdapterError: a name in `target_modules` that matches no layer (even if others match); a name in
                `exclude_modules` or a pattern that matches no targeted layer; a layer number that does not exist; a tied output
                head, a layer that is read past its module; a value that does not fit the size of a layer.
        """
        targeted = layers.targeted(model, self.target_modules, self.names, new_modules)
        excluded = layers.matching("adapter.exclude_modules", self.exclude_modules or [], targeted)
        targeted = [name for name in targeted if name not in excluded]
        for key in self.patterns:
            for name in getattr(self, key) or {}:
                layers.matching(f"adapter.{key}", rf"(.*\.)?({name})", targeted, shown=name)
        targeted = layers.in_layers(model, targeted, self.layers_to_transform)
        self._check_sizes({name: layers.size_of(model.get_submodule(name)) for name in targeted})
        return targeted

    def _check_sizes(self, sizes: dict[str, layers.Size]) -> None:
        for key, sides in self.divides.items():
            value = getattr(self, key)
            told = [(name, side, getattr(size, side)) for name, size in sizes.items() for side in sides]
            common = math.gcd(*(count for *_, count in told))
            if common % value:
                name, side, count = next(one for one in told if one[2] % value)
                fits = max(divisor for divisor in range(1, value) if common % divisor == 0)
                raise AdapterError(
                    f"adapter.{key}={value}: does not divide the {count} {side} of {name}. {fits} divides those of every targeted layer."
                )
        for name, size in sizes.items():
            for key, most in self.most(size).items():
                if getattr(self, key) > most:
                    raise AdapterError(
                        f"adapter.{key}={getattr(self, key)}: {name} ({size.inputs} inputs, {size.outputs} outputs) can have {most} at most. Set that, "
                        "or leave it out (adapter.exclude_modules)."
                    )

    def peft_fields(self, targets: Sequence[str] | None) -> dict[str, Any]:
        """As in the base class. Layers are told by name: peft refuses their numbers beside 'all-linear'."""
        fields = super().peft_fields(targets) | {name: getattr(self, name) or {} for name in self.patterns}
        del fields["layers_to_transform"]
        if targets is None:
            return fields | {"target_modules": self.names}
        del fields["exclude_modules"]
        return fields | {"target_modules": list(targets)}

    def describe(self) -> str:
        return f"{super().describe()}, {self.where}"

    @property
    def place(self) -> tuple[str, ...]:
        """All that names layers, to be compared."""
        return tuple(str(getattr(self, name)) for name in _WHERE)

    @property
    def where(self) -> str:
        """`target_modules` in a few words."""
        told = self.target_modules
        return f"target_modules={told if isinstance(told, str) else f'{len(told)} names'}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
