"""Bottleneck adapters as a method of peft, which has none: importing this module registers it (`BOTTLENECK`), and nothing else is needed
for `PeftModel.from_pretrained` to load such a folder.

Houlsby et al. 2019 (arXiv:1902.00751) put one behind each attention and each MLP, Pfeiffer et al. 2020 (arXiv:2005.00247) behind each MLP
alone, He et al. 2021 (arXiv:2110.04366) beside each MLP. A module of width d and size m has 2md + d + m parameters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import PeftType, register_peft_method
from torch import nn

from lora_lab.adapters import layers
from lora_lab.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARIANTS = ("houlsby", "pfeiffer", "parallel")
NON_LINEARITIES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "leaky_relu": nn.LeakyReLU,
}  # fmt: skip
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
_NO_OUTPUT = re.compile(
    r"gate|(^|_)(q|k|v|kv|qkv|query|key|value)(_|$)"
)  # layers of an attention that give no hidden states
_NO_MERGE = (
    "a bottleneck adapter cannot be merged: it has a non-linearity between two matrices, which no weight can hold"
)


def _enter() -> PeftType:
    """peft's entry for this method: its registration asks for one, and its enumeration is closed."""
    entry: Any = str.__new__(PeftType, "BOTTLENECK")
    entry._name_ = entry._value_ = "BOTTLENECK"
    type.__setattr__(PeftType, "BOTTLENECK", entry)
    PeftType._member_map_["BOTTLENECK"] = PeftType._value2member_map_["BOTTLENECK"] = entry
    PeftType._member_names_.append("BOTTLENECK")
    return PeftType("BOTTLENECK")


BOTTLENECK = _enter()


@dataclass
class BottleneckConfig(PeftConfig):
    """peft's configuration of the method. The fields are described in `adapters/methods/bottleneck.py`.

    Args:
        target_modules: names of the modules behind which the adapters lie; None: as the variant and the model's structure say.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    variant: str = "pfeiffer"
    reduction_factor: float = 16
    bottleneck_size: int | None = None
    non_linearity: str = "relu"
    bottleneck_dropout: float = 0.0
    scaling: float = 1.0
    target_parameters: None = field(default=None, repr=False)  # peft asks every method for it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BOTTLENECK
        if self.variant not in VARIANTS or self.non_linearity not in NON_LINEARITIES:
            raise ValueError(f"variant={self.variant}, non_linearity={self.non_linearity}: not known")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)

    def size(self, width: int) -> int:
        """Size of the bottleneck between values of a width."""
        return self.bottleneck_size or max(1, round(width / self.reduction_factor))


# -- where they lie ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A module that gives what a sublayer adds to the hidden states."""

    name: str
    width: int  # of the hidden states
    of_mlp: bool
    linear: bool  # else a block, which itself reads what the MLP reads
    reads: str | None = None  # of an MLP that ends in a linear layer: one that reads what it reads


def places(model: PreTrainedModel, variant: str, new_modules: Sequence[str] = ()) -> list[Place]:
    """Where a variant puts its adapters in a base, found by the base's structure.

    A layer is an entry of a list of modules that holds an attention (by its name or its class's) and, outside of it, linear layers that
    give hidden states. The output of an attention is the last such linear layer in it; of an MLP, the one that reads the most values; of
    a mixture of experts, the block that holds them.

    Args:
        new_modules: what is trained whole, and so gets no adapter.

    Raises:
        AdapterError: there are no such layers, or an MLP has no layer that reads what it does.
    """
    found = _found(model, new_modules)
    if not any(place.of_mlp for place in found):
        raise AdapterError(
            "adapter=bottleneck: no layers of an attention and an MLP with linear outputs were found in this base. Use adapter=lora."
        )
    if variant == "houlsby":
        return found
    unread = [place.name for place in found if place.of_mlp and place.linear and place.reads is None]
    if variant == "parallel" and unread:
        raise AdapterError(
            f"adapter.variant=parallel: nothing was found that reads the hidden states for {unread[0]}. Use variant=pfeiffer."
        )
    return [place for place in found if place.of_mlp]


def _found(model: PreTrainedModel, new_modules: Sequence[str]) -> list[Place]:
    width = _hidden_size(model)
    outside = tuple(f"{name}." for name in (*new_modules, *layers.towers(model), *layers.bypassed(model)))
    sizes = {name: _sizes(model.get_submodule(name)) for name in layers.linear_layers(model)}
    sizes = {name: size for name, size in sizes.items() if not f"{name}.".startswith(outside)}
    giving = [name for name, (_, given) in sizes.items() if given == width]
    blocks = {layers.block_of(name) for name in layers.expert_weights(model)}
    attentions = _attentions(model, giving)
    found: list[Place] = []
    for layer in _layers(model, giving, attentions, blocks):
        own = [name for name in giving if name.startswith(layer)]
        seen = [name for name in attentions if name.startswith(layer)]
        for name in seen:
            outputs = [one for one in own if _inside(one, name) and not _NO_OUTPUT.search(one.rpartition(".")[2])]
            found += [Place(one, width, False, True) for one in outputs[-1:]]
        outside_of = [name for name in (*own, *blocks) if not any(_inside(name, one) for one in seen)]
        mixtures = sorted(name for name in outside_of if name in blocks and name.startswith(layer))
        readers = {name: _reader(name, layer, sizes, seen, width) for name in outside_of if name not in blocks}
        if mixtures:
            found += [Place(name, width, True, False) for name in mixtures]
        elif readers:
            output = max(reversed(readers), key=lambda name: (_beside(readers[name], name), sizes[name][0]))
            found.append(Place(output, width, True, True, readers[output]))
    return found


def _hidden_size(model: PreTrainedModel) -> int:
    table: Any = model.get_input_embeddings()
    return int(getattr(model.config.get_text_config(), "hidden_size", None) or table.weight.shape[-1])


def _sizes(module: nn.Module) -> tuple[int, int]:
    """How many values a linear layer reads and gives."""
    layer: nn.Module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    reads, gives = _get_in_out_features(layer)
    assert reads is not None
    assert gives is not None
    return reads, gives


def _inside(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")


def _attentions(model: nn.Module, giving: Sequence[str]) -> list[str]:
    """Names of the attentions inside of layers, the outermost of those that lie in each other."""
    found: list[str] = []
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        named = _ATTENTION.search(f"{own} {type(module).__name__}") and "norm" not in own
        within = re.search(r"\.\d+\.", name) and not own.isdigit()
        if not named or not within or any(_inside(name, one) for one in found):
            continue
        if any(_inside(one, name) for one in giving):
            found.append(name)
    return found


def _layers(model: nn.Module, giving: Sequence[str], attentions: Sequence[str], blocks: set[str]) -> list[str]:
    """Names of the layers, each with a dot behind: the innermost entries of lists that hold an attention and something of an MLP, and
    the others in their lists, which may have no attention."""
    numbered = [f"{name}." for name, _ in model.named_modules() if name.rpartition(".")[2].isdigit()]
    whole = [
        name
        for name in numbered
        if any(one.startswith(name) for one in attentions)
        and any(
            one.startswith(name) and not any(_inside(one, attention) for attention in attentions)
            for one in (*giving, *blocks)
        )
    ]
    inner = [name for name in whole if not any(other != name and other.startswith(name) for other in whole)]
    lists = {_list_of(name) for name in inner}
    return [name for name in numbered if _list_of(name) in lists]


def _list_of(layer: str) -> str:
    return layer[:-1].rpartition(".")[0]


def _reader(
    output: str, layer: str, sizes: dict[str, tuple[int, int]], attentions: Sequence[str], width: int
) -> str | None:
    """The linear layer before it in an MLP that ends in `output`: it reads hidden states, and gives as many values as that reads, or a
    multiple (gates)."""
    names = list(sizes)
    fits = [
        name
        for name in names[: names.index(output)]
        if name.startswith(layer)
        and sizes[name][0] == width
        and sizes[name][1] % sizes[output][0] == 0
        and not any(_inside(name, one) for one in attentions)
    ]
    beside = [name for name in fits if _beside(name, output)]
    return next(reversed(beside or fits), None)


def _beside(name: str | None, other: str) -> bool:
    return name is not None and name.rpartition(".")[0] == other.rpartition(".")[0]


# -- the modules ------------------------------------------------------------------------------------------------------


class _Seen:
    """What a module read last."""

    tensor: torch.Tensor | None = None

    def note(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.tensor = inputs[0]

    def take(self) -> torch.Tensor:
        found, self.tensor = self.tensor, None
        assert found is not None, "the MLP's first layer is called before its last"
        return found


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module with adapters on what it gives: h + scaling * up(f(down(x))), where x is h itself or, beside an MLP, what that reads."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_inner", "scalings")

    def __init__(self, base_layer: nn.Module, width: int):
        super().__init__()
        self.base_layer = base_layer
        self.width = width
        self.parallel: set[str] = set()  # names of the adapters that read what the MLP reads
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.bottleneck_inner = nn.ModuleDict()  # non-linearity and dropout
        self.scalings: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self._seen: _Seen | None = None
        self._hook: Any = None

    def update_layer(self, name: str, config: BottleneckConfig, reader: nn.Module | None) -> None:
        """Add a fresh adapter, which changes nothing: its up projection is zero, and all biases.

        Args:
            reader: the module whose input a parallel adapter reads; None: `base_layer`.
        """
        if config.variant == "parallel":
            self.parallel.add(name)
            if self._seen is None and reader is not None:
                self._seen = _Seen()
                self._hook = reader.register_forward_pre_hook(self._seen.note)
        size = config.size(self.width)
        down, up = nn.Linear(self.width, size), nn.Linear(size, self.width)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self.bottleneck_inner[name] = nn.Sequential(
            NON_LINEARITIES[config.non_linearity](), nn.Dropout(config.bottleneck_dropout)
        )
        self.scalings[name] = config.scaling
        device = next(self.base_layer.parameters()).device
        for part in (down, up):
            part.to(device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def change(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds, of values [..., d]; in the adapter's own dtype."""
        down: Any = self.bottleneck_down[name]
        inner: torch.Tensor = self.bottleneck_inner[name](down(x.to(down.weight.dtype)))
        found: torch.Tensor = self.bottleneck_up[name](inner)
        return self.scalings[name] * found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.base_layer(*args, **kwargs)
        read = args[0] if self._seen is None else self._seen.take()
        if self.disable_adapters:
            return found
        whole = isinstance(found, torch.Tensor)
        given = found if whole else found[0]  # some mixtures give their router's scores beside it
        hidden = given
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                hidden = hidden + self.change(name, read if name in self.parallel else given).to(given.dtype)
        return hidden if whole else (hidden, *found[1:])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(_NO_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module as it was."""
        if merge:
            raise ValueError(_NO_MERGE)
        if self._hook is not None:
            self._hook.remove()
        return self.get_base_layer()


class BottleneckModel(BaseTuner):
    """A base with bottleneck adapters."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        self._places = {place.name: place for place in _found(self.model, peft_config.modules_to_save or ())}
        if peft_config.target_modules is None:
            peft_config.target_modules = {
                place.name for place in places(self.model, peft_config.variant, peft_config.modules_to_save or ())
            }
        return peft_config

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """peft's own looks for a weight, which a mixture's block has none of."""
        setattr(parent, child_name, new_module)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        place = self._places.get(current_key)
        if place is None:
            raise ValueError(f"{current_key} is no output of an attention or an MLP")
        reader = self.model.get_submodule(place.reads) if place.reads else None
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config, reader)
            return
        layer = BottleneckLayer(target, place.width)
        layer.update_layer(adapter_name, peft_config, reader)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


register_peft_method(name="bottleneck", config_cls=BottleneckConfig, model_cls=BottleneckModel)
