"""A frozen base that is spread over the processes of a run: each holds a part of every layer's weights, and a layer is put together for as
long as it computes.

torch's `fully_shard` does it, called directly on each layer. Adapters stay whole in each process, so gradients, updates and files are those
of a base that is not sharded. What stands outside the layers (embeddings, the last norm, heads) stays whole too.

A layer of 4-bit weights keeps beside them how they are quantized. bitsandbytes may write to both (it repacks weights on some CPUs, see
`load.load_model`), and what is gathered anew are the bytes of before: the first pass is right, later ones are not, and no error is raised. So
every layer is compared with what it gave before it was sharded, in several passes and in its gradient.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from lora_lab.base.layers import layers_of
from lora_lab.errors import ConfigError, LoraLabError
from lora_lab.runtime import ranks
from lora_lab.runtime.memory import is_out_of_memory

if TYPE_CHECKING:
    from torch import nn

FORMATS = ("none", "nf4", "fp4")  # of weights that can be sharded: plain tensors, whose description does not change
_PASSES = 3  # the first is right even where later ones are not
_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # the same products of the same weights


class _Gather:
    """torch's all-gather, as one of the exchanges of which it is known who did not come."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False
    ) -> Any:
        import torch.distributed as dist

        work: list[Any] = []
        ranks.meet(
            lambda: work.append(dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op))
        )
        return work[0]


def check_torch() -> None:
    """
    Raises:
        ConfigError: this torch gathers no weights as it is done here; it also shards no integers, which weights of 4 bits are.
    """
    import torch.distributed as dist

    if not hasattr(dist, "all_gather_single"):
        raise ConfigError(
            f"hardware.shard=true: torch {torch.__version__} is too old to share a base. Install torch 2.13 or newer, or set it false."
        )


def shard(
    model: nn.Module, frozen: Collection[nn.Parameter], run: Callable[[], object], device: torch.device
) -> tuple[int, int]:
    """Spread the weights of the model's layers over the processes, each of which calls this.

    Args:
        model: with its adapters, in evaluation.
        frozen: the parameters of the base. All others stay whole.
        run: a pass of the model; its tensors are on `device`.
        device: where the model computes. Weights that lie elsewhere come to it a layer at a time.

    Returns:
        How many layers were sharded, and bytes of their weights as a whole.

    Raises:
        ConfigError: there are no layers, or one is not what it was before.
    """
    from torch.distributed import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    own = {id(one) for one in frozen}
    layers = [layer for layer in layers_of(model) if any(id(one) in own for one in layer.parameters())]
    _check_layers(model, layers)
    for module in _outside(model, layers):
        module.to(device)
    with _without_cache(model):
        before = _references(layers, run, device)
    mesh = DeviceMesh.from_group(ranks.keep_step(), device.type)
    whole = 0
    for layer in layers:
        kept = {one for one in layer.parameters() if id(one) not in own}
        whole += sum(one.nbytes for one in layer.parameters() if one not in kept)
        layer.to(device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        layer.set_custom_all_gather(_Gather())  # type: ignore[operator]
    reason = _difference(layers, before, run)
    told = next(filter(None, ranks.gather(reason)), "")
    if told:
        raise ConfigError(
            f"hardware.shard=true: a sharded layer of this base is not what it was before: {told}. Set it false."
        )
    return len(layers), whole


def reset(model: nn.Module) -> None:
    """After an error inside a pass: let the coming one begin as if that had not been."""
    if not ranks.in_step():
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reset_iter_state()


def _check_layers(model: nn.Module, layers: list[nn.Module]) -> None:
    if not layers:
        raise ConfigError("hardware.shard=true: this base is no stack of layers. Set it false.")
    seen: dict[int, int] = {}
    for place, layer in enumerate(layers):
        if any(seen.setdefault(id(one), place) != place for one in layer.parameters()):
            raise ConfigError("hardware.shard=true: layers of this base share weights. Set it false.")
    settings = getattr(model, "config", None)
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if getattr(settings, name, 0):
            raise ConfigError(
                f"hardware.shard=true: this base leaves out layers by chance ({name} in config.json), and all processes must go "
                "through the same ones. Set it false."
            )


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Inside the block, layers keep no keys and values: one that is called again would attend to those of before as well."""
    config: Any = getattr(model, "config", None)
    settings: Any = None if config is None else config.get_text_config()
    before = getattr(settings, "use_cache", None)
    if before:
        settings.use_cache = False
    try:
        yield
    finally:
        if before:
            settings.use_cache = before


def _outside(model: nn.Module, layers: list[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules that have nothing to do with layers."""
    inside = set(layers)
    for module in model.children():
        if module in inside:
            continue
        if inside.isdisjoint(module.modules()):
            yield module
        else:
            yield from _outside(module, layers)


# -- the check ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Reference:
    """What a whole layer was given, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor
    gradient: torch.Tensor  # of what it gives, along a fixed direction, by the first tensor that it is given

    def differs_from(self, layer: nn.Module) -> str:
        """Why the layer is another one now."""
        limit = _ROUNDING.get(self.output.dtype, 1e-2)
        try:
            for number in range(_PASSES):
                with torch.no_grad():
                    gap = _gap(_first(layer(*self.args, **self.kwargs)), self.output)
                if not gap <= limit:
                    return f"its output in pass {number + 1} is off by {gap:.1e} of its norm"
            gap = _gap(_passed(layer, self.args, self.kwargs)[1], self.gradient)
        except Exception as error:  # whatever a layer of another make raises of weights that are not as it left them
            if isinstance(error, LoraLabError) or is_out_of_memory(error):
                raise
            return f"it raises {_line(error)}"
        return "" if gap <= limit else f"its gradient is off by {gap:.1e} of its norm"


def _references(
    layers: list[nn.Module], run: Callable[[], object], device: torch.device
) -> dict[nn.Module, _Reference]:
    """What each layer gives in a pass."""
    found: dict[nn.Module, _Reference] = {}

    def watch(layer: nn.Module) -> None:
        plain, home = layer.forward, next(layer.parameters()).device

        def forward(*args: Any, **kwargs: Any) -> Any:
            layer.to(device)
            given, gradient = _passed(plain, args, kwargs)
            found[layer] = _Reference(args, kwargs, _first(given), gradient)
            layer.to(home)
            return given

        layer.forward = forward

    for layer in layers:
        watch(layer)
    try:
        with torch.no_grad():
            run()
    except Exception as error:  # the same
        if isinstance(error, LoraLabError) or is_out_of_memory(error):
            raise
        raise ConfigError(
            f"hardware.shard=true: a layer of this base gives no gradient ({_line(error)}). Set it false."
        ) from error
    finally:
        for layer in layers:
            del layer.forward
    idle = next((type(layer).__name__ for layer in layers if layer not in found), "")
    if idle:
        raise ConfigError(f"hardware.shard=true: a {idle} of this base has no part in a pass over a row. Set it false.")
    return found


class _Enough(Exception):
    """The rest of a pass is not needed."""


def _difference(layers: list[nn.Module], before: dict[nn.Module, _Reference], run: Callable[[], object]) -> str:
    """Why a layer is another one now. They are looked at inside a pass, because what a task sets for its passes (which tokens see which,
    say) holds there alone."""
    found: list[str] = []

    def look(*_: Any) -> None:
        beginning.remove()
        found.extend(filter(None, (before[layer].differs_from(layer) for layer in layers)))
        raise _Enough

    beginning = layers[0].register_forward_pre_hook(look, prepend=True)
    with contextlib.suppress(_Enough), torch.no_grad():
        run()
    return next(iter(found), "")


def _passed(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """What a layer gives, and the gradient of that along a fixed direction by the first tensor of numbers that it is given."""
    read: list[torch.Tensor] = []

    def learned_from(one: torch.Tensor) -> torch.Tensor:
        if read or not one.is_floating_point():
            return one
        read.append(one.detach().clone().requires_grad_())
        return read[0]

    with torch.enable_grad():
        args, kwargs = tree_map_only(torch.Tensor, learned_from, (args, kwargs))
        given = call(*args, **kwargs)
        out = _first(given).float()
        # a mean square would be the same for whatever comes out of a last LayerNorm, and its gradient rounding
        along = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device)
        [gradient] = torch.autograd.grad((out * along).sum(), read)
    return tree_map_only(torch.Tensor, torch.Tensor.detach, given), gradient


def _first(given: Any) -> torch.Tensor:
    """The first tensor that a layer gives."""
    return next(one for one in tree_leaves(given) if isinstance(one, torch.Tensor))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _gap(one: torch.Tensor, other: torch.Tensor) -> float:
    one, other = one.float(), other.float()
    return float((one - other).norm() / other.norm().clamp_min(1e-30))
