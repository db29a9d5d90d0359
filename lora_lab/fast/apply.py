"""Which accelerations a model gets, each proved on its modules first, with the reason where one is not used."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import Linear as LoraLayer
from peft.tuners.lora import LoraLayer as AnyLoraLayer
from peft.tuners.lora.bnb import Linear4bit as LoraLayer4bit
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.nn.functional import silu

from lora_lab.adapters.attach import base_of, trainable
from lora_lab.base import shard
from lora_lab.config.train import SpeedConfig
from lora_lab.errors import BaseModelError, LoraLabError
from lora_lab.fast import dense, dropout, heads, liger, mlp, norm, prefix, rows, short_rows, unpadded, varlen
from lora_lab.fast.forward import Forward
from lora_lab.fast.frozen import QUANTIZED, FrozenWeight, Scratch
from lora_lab.fast.modules import FusedMLP, Group, Projection, computed_in
from lora_lab.runtime.memory import is_out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_PLAIN = (nn.Linear, *QUANTIZED)
_ADAPTED = (LoraLayer, LoraLayer4bit, TorchaoLoraLinear)
_ROUNDING = {
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 1e-2,
}  # how far the outputs may move, as a share of their norm
# in this order
_STEPS = (
    "fused_mlp",
    "fused_dense",
    "fused_projections",
    "fused_norms",
    "liger_kernels",
    "varlen_attention",
    "short_rows",
    "unpadded",
    "last_layer_rows",
    "fused_4bit",
    "prefix_cache",
)
# of these, what has a layer's weights to itself. A sharded base has them for no longer than that layer computes
OF_LAYERS_WEIGHTS = (
    "fused_mlp", "fused_dense", "fused_projections", "fused_norms", "liger_kernels", "fused_4bit", "prefix_cache",
)  # fmt: skip
_KEEP_SHARE = 0.25  # of the free memory that kept dequantized weights may take


@dataclasses.dataclass
class Applied:
    """What was replaced, and why the rest was not."""

    forward: Forward  # what callers must know of it
    lines: list[str] = dataclasses.field(default_factory=list)
    modules: list[nn.Module] = dataclasses.field(default_factory=list)
    weights: list[FrozenWeight] = dataclasses.field(default_factory=list)
    kept_bytes: int = 0  # of dequantized weights
    attending: PreTrainedModel | None = None  # whose attention was replaced

    def replace(self, module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
        module.forward = forward
        self.modules.append(module)

    def undo(self) -> None:
        """Give every module its own forward back."""
        for module in self.modules:
            module.__dict__.pop("forward", None)
        self.modules, self.weights = [], []
        if self.attending is not None:
            short_rows.attend_plainly(self.attending)
            self.attending = None
        self.forward.reset("the accelerations that it needs are not used")


def accelerate(
    model: PeftModel,
    forward: Forward,
    speed: SpeedConfig,
    run: Callable[[], torch.Tensor],
    free: int,
    prove: bool = True,
    padded: bool = False,
) -> Applied:
    """Replace what `speed` allows and the model's modules permit, and note in `forward` what its callers must know of it.

    All are tried together, forward and backward, on the model's own calls. If that fails or moves the numbers, each is tried on top
    of those that went well, and what does not is left out with its reason: an acceleration never stops a run.

    Args:
        run: a pass of the model through `forward`, in evaluation; gives a tensor that is compared before and after.
        free: bytes of which dequantized weights may take a share.
        prove: whether results are compared; False for a model whose tensors have no content.
        padded: whether `run` gives the model padding, without which nothing is known of how it reads that.
    """
    forward.reset("")
    dropout.install(model)
    wanted = [name for name in _STEPS if getattr(speed, name) and (name != "unpadded" or (padded and prove))]
    with torch.enable_grad():
        plain = _unchanged(model, run) if prove else None
        calls = _watched(model, run)
        applied, reason = _tried(model, forward, speed, wanted, calls, free, plain, run)
        if not reason:
            forward.weights.update(applied.weights)
            return applied
        kept: list[str] = []
        refused: list[str] = []
        for name in wanted:
            _, reason = _tried(model, forward, speed, [*kept, name], calls, free, plain, run, keep=False)
            kept += [] if reason else [name]
            refused += [f"no {name}: {reason}"] if reason else []
        applied, reason = _tried(model, forward, speed, kept, calls, free, plain, run)
    forward.weights.update(applied.weights)
    applied.lines = ([f"none: {reason}"] if reason else applied.lines) + refused
    return applied


def _unchanged(model: PeftModel, run: Callable[[], torch.Tensor]) -> _Outcome:
    """What the model gives as it is.

    Raises:
        BaseModelError: it cannot be run on these rows at all.
    """
    try:
        return _outcome(model, run)
    except LoraLabError:
        raise
    except Exception as error:  # whatever a model of another make raises of what it is given
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise BaseModelError(
            f"model.path: {base_of(model).config.model_type} cannot be run on these rows ({reason}). Use another base or task."
        ) from error


def _tried(
    model: PeftModel,
    forward: Forward,
    speed: SpeedConfig,
    wanted: list[str],
    calls: _Calls,
    free: int,
    plain: _Outcome | None,
    run: Callable[[], torch.Tensor],
    keep: bool = True,
) -> tuple[Applied, str]:
    """The model with these accelerations, and why they cannot be used; undone then, or where they are not to be kept."""
    applied, reason = Applied(forward), ""
    try:
        _apply(model, speed, wanted, calls, free, applied, prove=plain is not None)
        reason = "" if plain is None else plain.differs_from(_outcome(model, run))
    except Exception as error:  # whatever a model of another make raises here is about the acceleration alone
        if is_out_of_memory(error):
            applied.undo()
            raise
        shard.reset(model)
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
    if reason or not keep:
        applied.undo()
    return applied, reason


def _apply(
    model: PeftModel, speed: SpeedConfig, wanted: list[str], calls: _Calls, free: int, applied: Applied, prove: bool
) -> None:
    scratch, on_device = Scratch(), base_of(model).device.type in liger.DEVICES
    kernels = liger.kernels() if "liger_kernels" in wanted and on_device else None
    projections, refused = _projections(model)
    if "fused_mlp" in wanted:
        _fuse_mlps(model, projections, calls, scratch, applied, prove, kernels)
    if "fused_dense" in wanted:
        _fuse_dense(model, projections, scratch, applied)
    if "fused_projections" in wanted:
        _fuse_projections(projections, calls.order, scratch, applied)
        _tell_heads(model, applied)
    if refused:
        applied.lines.append(f"plain: {refused}")
    applied.forward.unshareable = _alone(model, applied, refused)
    if "fused_norms" in wanted:
        _fuse_norms(model, calls, applied, prove, kernels)
    if "varlen_attention" in wanted:
        _join_attention(model, applied)
    if "short_rows" in wanted and short_rows.attend(base_of(model), applied.forward):
        applied.attending = base_of(model)
        if "unpadded" in wanted:
            _take_padding_out(base_of(model), "last_layer_rows" in wanted, applied)
        applied.lines.append(f"attention of rows up to {short_rows.LONGEST} tokens by matrix products")
    layer = rows.last_layer(base_of(model))
    if "last_layer_rows" in wanted and layer is not None:
        applied.replace(layer, rows.forward_of(layer))
        applied.forward.wanted_rows = True
        applied.lines.append("last layer only where there is a loss")
    _keep_weights(model, speed, free, applied)
    if "fused_4bit" in wanted:
        _fuse_few_rows(applied, base_of(model).dtype, prove)
    if "prefix_cache" in wanted:
        _keep_prefix(model, free, applied)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What a model gave, forward and backward."""

    output: torch.Tensor
    gradients: dict[str, torch.Tensor]
    rounding: float

    def differs_from(self, other: _Outcome) -> str:
        """Why another outcome is not the same up to rounding; gradients pass through twice as many layers."""
        gap = _gap([self.output], [other.output])
        if not gap <= self.rounding:
            return f"it would change this model's outputs by {gap:.1e} of their norm"
        gap = _gap(self.gradients.values(), [other.gradients[name] for name in self.gradients])
        return "" if gap <= 5 * self.rounding else f"it would change this model's gradients by {gap:.1e} of their norm"


def _gap(ones: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> float:
    pairs = [(one.float(), other.float()) for one, other in zip(ones, others, strict=True)]
    apart = sum(float((other - one).square().sum()) for one, other in pairs)
    norm = sum(float(one.square().sum()) for one, _ in pairs)
    return math.sqrt(apart / norm) if norm else math.sqrt(apart)


def _outcome(model: PeftModel, run: Callable[[], torch.Tensor]) -> _Outcome:
    """A forward pass and, from the mean square of what it gives, a backward pass; no gradient is left behind."""
    output = run()
    parameters = trainable(model)
    gradients: dict[str, torch.Tensor] = {}
    if output.requires_grad:
        scale = 2**12 if base_of(model).dtype == torch.float16 else 1  # smaller gradients would be lost
        found = torch.autograd.grad(
            output.float().square().mean() * scale, list(parameters.values()), allow_unused=True
        )
        gradients = {name: one for name, one in zip(parameters, found, strict=True) if one is not None}
    return _Outcome(output.detach(), gradients, _ROUNDING[base_of(model).dtype])


@dataclasses.dataclass(frozen=True)
class _Calls:
    """How the modules of a model were called in a forward pass."""

    order: list[
        tuple[str, int]
    ]  # linear layers, each with the number of what it read: the same one after another, the same number
    single: dict[str, torch.Tensor]  # of modules that were always called with one tensor alone: the first


def _alone(model: PeftModel, applied: Applied, refused: str) -> str:
    """Why several members cannot share a pass: each adapter's layers must know whose rows they see."""
    if refused:
        return refused
    replaced = {id(inner) for module in applied.modules for inner in module.modules()}
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if not adapted:
        return "the adapter sits on no layer that knows whose rows it sees"
    told = {id(module) for module in applied.modules}
    if any(isinstance(module, AuxiliaryTrainingWrapper) and id(module) not in told for module in model.modules()):
        return "modules that are trained whole, or rows of them, know no members"
    lacking = [name for name, module in adapted if id(module) not in replaced]
    return f"{len(lacking)} layers compute by themselves (the first: {lacking[0]})" if lacking else ""


def _projections(model: PeftModel) -> tuple[dict[str, Projection], str]:
    """Linear layers of frozen weights by name, and why adapted ones are not among them."""
    head = base_of(model).get_output_embeddings()
    found: dict[str, Projection] = {}
    reasons: dict[str, int] = {}
    inside = ""
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{name}."
            reason = _unfit(module)
            if reason:
                reasons[reason] = reasons.get(reason, 0) + 1
            else:
                found[name] = Projection(module)
        elif (
            type(module) in _PLAIN
            and module is not head
            and not module.weight.requires_grad
            and ".modules_to_save." not in name
            and ".original_module" not in name
        ):
            found[name] = Projection(module)
    return found, ", ".join(f"{count} layers with {reason}" for reason, count in reasons.items())


def _unfit(module: Any) -> str:
    """Why an adapted layer stays plain; empty if it need not."""
    if not isinstance(module, AnyLoraLayer):
        return f"{type(module).__module__.split('.')[-2]}.{type(module).__name__}"  # such as vera.Linear
    if type(module) not in _ADAPTED or type(module.base_layer) not in _PLAIN:
        return type(module.base_layer).__name__
    if module.lora_variant:
        return "DoRA" if any(module.use_dora.values()) else "a LoRA variant"
    if any(module.lora_bias.values()) or getattr(module, "fan_in_fan_out", False) is True:
        return "a LoRA bias"
    return ""


def _watched(model: PeftModel, run: Callable[[], torch.Tensor]) -> _Calls:
    """Watch a forward pass."""
    projections, _ = _projections(model)
    order: list[tuple[str, int]] = []
    last: list[Any] = [None]  # the only input that is held: while it lives, nothing else is taken for it
    single: dict[str, torch.Tensor] = {}
    other: set[str] = set()

    def note(name: str, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if name in projections and inputs:
            number = order[-1][1] if order else 0
            order.append((name, number if inputs[0] is last[0] else number + 1))
            last[0] = inputs[0]
        if len(inputs) == 1 and not named and isinstance(inputs[0], torch.Tensor):
            single.setdefault(name, inputs[0])
        else:
            other.add(name)

    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, named, name=name: note(name, inputs, named), with_kwargs=True
        )
        for name, module in model.named_modules()
        if name in projections or _is_norm(module) or hasattr(module, "act_fn")
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return _Calls(order, {name: tensor for name, tensor in single.items() if name not in other})


def _fuse_mlps(
    model: PeftModel,
    projections: dict[str, Projection],
    calls: _Calls,
    scratch: Scratch,
    applied: Applied,
    prove: bool,
    kernels: liger.Kernels | None,
) -> None:
    count, other = 0, ""
    for name, module in model.named_modules():
        parts = [f"{name}.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
        if not (hasattr(module, "act_fn") and all(part in projections for part in parts)):
            continue
        gate, up, down = (projections[part] for part in parts)
        act = mlp.activation(module.act_fn)
        if act is None:
            other = f"activation {type(module.act_fn).__name__}"
            continue
        if name not in calls.single:
            other = f"{type(module).__name__} is called with more than one tensor, or never"
            continue
        fused = FusedMLP(module, [gate, up], down, scratch, applied.forward.routing, mlp.Gate(act))
        if prove and not _equal(module, fused, calls.single[name]):
            other = f"{type(module).__name__} computes something else"
            continue
        if kernels is not None and act[0] is silu:
            fused.gate = liger.Gate(kernels)
            if prove and not _equal(module, fused, calls.single[name]):
                raise ArithmeticError("its gate computes something else")
        applied.replace(module, fused.forward)
        applied.weights += fused.weights
        for part in parts:
            del projections[part]
        count += 1
    if count or other:
        applied.lines.append(f"gated MLP fused: {count}" + (f" (not: {other})" if other else ""))


def _fuse_dense(model: PeftModel, projections: dict[str, Projection], scratch: Scratch, applied: Applied) -> None:
    """Linear layers with what follows them, on a CPU: elsewhere dropout draws its masks in a kernel of its own."""
    if base_of(model).device.type != "cpu":
        return
    routing, count = applied.forward.routing, 0
    for name, module in model.named_modules():
        own = projections.get(f"{name}.dense")
        if own is None:
            continue
        act = dense.activation_of(module)
        fused: dense.FusedActivation | dense.FusedOutput
        if act is not None:
            fused = dense.FusedActivation(module, own, scratch, routing, act)
        elif dense.is_output(module):
            fused = dense.FusedOutput(module, own, scratch, routing)
        else:
            continue
        applied.replace(module, fused.forward)
        applied.weights.append(fused.weight)
        del projections[f"{name}.dense"]
        count += 1
    if count:
        applied.lines.append(f"layers fused with what follows them: {count}")


@torch.no_grad()
def _equal(module: nn.Module, fused: FusedMLP, seen: torch.Tensor) -> bool:
    plain, own = module(seen), fused.forward(seen)
    return isinstance(plain, torch.Tensor) and _gap([plain], [own]) <= _ROUNDING[_computing(seen)]


def _computing(x: torch.Tensor) -> torch.dtype:
    return computed_in(x[:0]).dtype


def _fuse_projections(
    projections: dict[str, Projection], order: list[tuple[str, int]], scratch: Scratch, applied: Applied
) -> None:
    sizes: dict[int, int] = {}
    for names in _same_input(projections, order):
        own = [projections[name] for name in names]
        if not any(one.adapted or isinstance(one.base, QUANTIZED) for one in own):
            continue
        group = Group(own, scratch, applied.forward.routing)
        for place, one in enumerate(own):
            applied.replace(one.module, group.forward(place))
        applied.weights.append(group.weight)
        sizes[len(own)] = sizes.get(len(own), 0) + 1
    if sizes:
        parts = ", ".join(f"{count} x {size}" for size, count in sorted(sizes.items(), reverse=True))
        applied.lines.append(f"projections fused: {parts}")


def _same_input(projections: dict[str, Projection], order: list[tuple[str, int]]) -> Iterator[list[str]]:
    """Names of the layers that are called once each, one after another, with the same tensor."""
    calls: dict[str, int] = {}
    for name, _ in order:
        calls[name] = calls.get(name, 0) + 1
    groups: list[tuple[int, list[str]]] = []
    for name, number in order:
        if name not in projections:
            groups.append((number, []))
        elif calls[name] > 1:
            groups.append((number, [name]))
        elif groups and groups[-1][0] == number and groups[-1][1] and calls[groups[-1][1][0]] == 1:
            groups[-1][1].append(name)
        else:
            groups.append((number, [name]))
    yield from map(list, dict.fromkeys(tuple(names) for _, names in groups if names))


def _tell_heads(model: PeftModel, applied: Applied) -> None:
    """Let modules that are trained whole know whose rows they see, where rows are padded."""
    if applied.forward.packed:
        return
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            applied.replace(module, heads.forward_of(module, applied.forward.routing))


def _is_norm(module: nn.Module) -> bool:
    return "RMSNorm" in type(module).__name__ or "T5LayerNorm" in type(module).__name__


def _fuse_norms(model: PeftModel, calls: _Calls, applied: Applied, prove: bool, kernels: liger.Kernels | None) -> None:
    count = 0
    for name, module in model.named_modules():
        if not _is_norm(module) or name not in calls.single:  # gated norms are called with two
            continue
        found = norm.of_module(module, calls.single[name], prove)
        if found is None:
            continue
        forward = norm.forward_of(module, *found) if kernels is None else liger.norm_forward_of(kernels, module, *found)
        applied.replace(module, forward)
        count += 1
    if count:
        applied.lines.append(f"RMS norms fused: {count}" + (", by Liger's kernels" if kernels else ""))


def _join_attention(model: PeftModel, applied: Applied) -> None:
    """Let the attention of packed rows be one call for a layer, on a device that has such a kernel."""
    forward, base = applied.forward, base_of(model)
    if not (forward.packed and forward.together and base.device.type in varlen.DEVICES and base.dtype in varlen.DTYPES):
        return
    if varlen.kernel() is None:
        applied.lines.append("attention row by row (this torch has no varlen_attn with windows)")
        return
    forward.varlen_attention = True
    applied.lines.append("attention of all rows in one call")


def _take_padding_out(base: PreTrainedModel, rows_only: bool, applied: Applied) -> None:
    layers = unpadded.layers_of(base)
    if not layers:
        return
    attention = unpadded.attention_of(layers[-1]) if rows_only and applied.forward.one_place else None
    for place, layer in enumerate(layers):
        applied.replace(layer, unpadded.forward_of(layers, place, first_only=attention is not None))
    applied.forward.unpadded = True
    if attention is not None:
        applied.replace(attention, unpadded.first_only_of(attention))
        applied.lines.append("last layer only where it is read")
    applied.lines.append(f"no padding in {len(layers)} layers")


def _keep_weights(model: PeftModel, speed: SpeedConfig, free: int, applied: Applied) -> None:
    """Decide whether quantized weights are dequantized once or in every pass."""
    needed = sum(weight.num_bytes(base_of(model).dtype) for weight in applied.weights)
    if not needed:
        return
    keep = needed <= _KEEP_SHARE * free if speed.dequantize == "auto" else speed.dequantize == "once"
    for weight in applied.weights:
        weight.keep = keep
    applied.kept_bytes = needed if keep else 0
    amount = f"{needed / 2**30:.2f} GiB, {free / 2**30:.1f} free"
    applied.lines.append(f"quantized weights dequantized {'once' if keep else 'in every pass'} ({amount})")


@torch.no_grad()
def _fuse_few_rows(applied: Applied, dtype: torch.dtype, prove: bool) -> None:
    """Multiply few rows by 4-bit weights as they are where nobody learns from it, as in generation."""
    weights = [weight for weight in applied.weights if weight.fusible]
    for weight in weights:
        weight.fused = True
    if prove:
        moved = max((_moved_by_fusing(weight, dtype) for weight in weights), default=0.0)
        if not moved <= _ROUNDING[dtype]:
            raise ArithmeticError(f"it would change a product by {moved:.1e} of its norm")
    if weights:
        applied.lines.append(f"4-bit products of few rows fused: {len(weights)}")


def _moved_by_fusing(weight: FrozenWeight, dtype: torch.dtype) -> float:
    x = torch.randn(4, weight.in_features, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    return _gap([weight.times(x)], [weight.times(x, learned=False)])


def _keep_prefix(model: PeftModel, free: int, applied: Applied) -> None:
    found = prefix.find(model, free)
    if isinstance(found, str):
        applied.lines.append(f"no frozen prefix is kept: {found}")
        return
    for place, layer in enumerate(found.layers):
        applied.replace(layer, found.forward_of(place))
    applied.forward.kept_prefix = True
    applied.lines.append(f"{len(found.layers)} frozen layers once for each row (up to {found.limit / 2**30:.1f} GiB)")
