"""What LoRA's two factors begin with where that is made of the base's weights or of training rows, and the form of an adapter that lets
the base stay as it is.

PiSSA, OLoRA, CorDA and LoRA-GA begin with factors A0, B0 whose product is not zero, and train them on a base of W - B0 A0. Here the
base stays W, frozen and shared: the adapter is a LoRA of twice the rank, B A - B0 A0 (see `Residual`). Both are the same function with the
same gradients, and what is saved lies on the published base. Weight decay, where there is any, leads back to the base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from lora_lab.adapters.attach import base_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_lab.adapters.methods.lora import LoraAdapter

_GAMMA = 16.0  # LoRA-GA's "stable" scale (arXiv:2407.05000)
_DAMPING = 0.01  # of CorDA's covariance, as a share of its mean diagonal: peft's

Factors = tuple[torch.Tensor, torch.Tensor]  # A [r, D], B [N, r]


@dataclasses.dataclass(frozen=True)
class Given:
    """What fresh adapters can be made of."""

    published: Callable[[], PreTrainedModel]  # loads the base unquantized
    passes: Callable[[int, bool], None]  # goes through so many training rows, one at a time; whether backward too


class Residual(nn.Module):
    """A factor of LoRA in the place of peft's linear layer, of which only the change trains: A - A0, or B - B0.

    Both factors together add B A - B0 A0. To peft, and in files, it is a factor of twice the rank: A and A - A0 one under another, B - B0
    and B0 side by side, because (B - B0) A + B0 (A - A0) is the same sum and cancels nothing: it is zero at the beginning, and little is
    lost in few bits.
    """

    def __init__(self, factor: nn.Linear, dim: int):
        """
        Args:
            dim: along which the rank lies: 0 of A [r, D], 1 of B [N, r].
        """
        super().__init__()
        self.initial: torch.Tensor
        half = factor.weight.detach().chunk(2, dim)[0]
        self.dim = dim
        self.change = nn.Parameter(torch.zeros_like(half))
        self.register_buffer("initial", half.clone())

    @property
    def weight(self) -> torch.Tensor:
        """Both halves."""
        halves = [self.change, self.initial] if self.dim else [self.initial + self.change, self.change]
        return torch.cat(halves, self.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight)

    @torch.no_grad()
    def take(self, whole: torch.Tensor) -> None:
        """Become what was saved, but for `initial`, which is not saved to the last bit."""
        self.change.copy_(whole.chunk(2, self.dim)[1 - self.dim])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *_: Any
    ) -> None:
        if f"{prefix}weight" in state_dict:
            self.take(state_dict[f"{prefix}weight"])
        elif strict:
            missing.append(f"{prefix}weight")


def divide(model: PeftModel, name: str) -> None:
    """Let the changes of a fresh adapter's factors train alone. peft has made it with twice the rank."""
    for layer in layers_of(model, name).values():
        layer.lora_A[name] = Residual(layer.lora_A[name], 0)
        layer.lora_B[name] = Residual(layer.lora_B[name], 1)


def initial(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """What the factors of a divided adapter began with, by names that files can have; before that, what they are."""
    found: dict[str, torch.Tensor] = {}
    for place, layer in layers_of(model, name).items():
        for kind in ("lora_A", "lora_B"):
            factor = getattr(layer, kind)[name]
            found[f"{place}.{kind}"] = getattr(factor, "initial", factor.weight)
    return found


def layers_of(model: PeftModel, name: str) -> dict[str, Any]:
    """The layers that an adapter of LoRA's is on, by their names in the base."""
    from peft.tuners.lora import LoraLayer

    found = base_of(model).named_modules()
    return {place: one for place, one in found if isinstance(one, LoraLayer) and name in one.lora_A}


@torch.no_grad()
def begin(adapter: LoraAdapter, model: PeftModel, name: str, given: Given) -> None:
    """Give a fresh adapter what its `init_lora_weights` says."""
    layers = layers_of(model, name)
    factors = _MADE_OF[adapter.beginning](adapter, layers, given)
    for place, layer in layers.items():
        scale = layer.scaling[name]
        rank = layer.r[name] // (2 if adapter.residual else 1)
        down, up = factors(place, layer, rank, scale)
        down, up = pad(down, (0, 0, 0, rank - len(down))), pad(up, (0, rank - up.shape[1]))  # a layer may be smaller
        if adapter.residual:
            layer.lora_A[name].initial.copy_(down)
            layer.lora_B[name].initial.copy_(up)
        else:
            layer.lora_A[name].weight.copy_(down)
            layer.lora_B[name].weight.copy_(up)
        if adapter.use_dora:  # its magnitudes are those of the weight that is adapted
            adapted = weight_of(layer.get_base_layer()) + scale * layer.lora_B[name].weight @ layer.lora_A[name].weight
            layer.lora_magnitude_vector[name].weight.copy_(torch.linalg.norm(adapted, dim=1))


def weight_of(layer: nn.Module) -> torch.Tensor:
    """A linear layer's weight [N, D] in float32, read back from its bits where it is quantized."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    weight = dequantize_module_weight(layer).detach().float()
    return weight.T if isinstance(layer, Conv1D) else weight


# -- made of a weight: (adapter, layers, what is given) -> (name, layer, rank, scale) -> A, B with scale * B A ------------------

_Made = Callable[[str, Any, int, float], Factors]


def _pissa(adapter: LoraAdapter, layers: dict[str, Any], given: Given) -> _Made:
    """The largest singular values of the weight (arXiv:2404.02948)."""
    return lambda place, layer, rank, scale: _principal(weight_of(layer.get_base_layer()), rank, scale, adapter.niter)


def _principal(weight: torch.Tensor, rank: int, scale: float, niter: int | None = None) -> Factors:
    if niter is None:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, min(rank, *weight.shape), niter=niter)
        vt = v.T
    half = (s[:rank] / scale).sqrt()
    return half[:, None] * vt[:rank], u[:, :rank] * half


def _olora(adapter: LoraAdapter, layers: dict[str, Any], given: Given) -> _Made:
    """The first columns and rows of the weight's QR decomposition (arXiv:2406.01775)."""

    def made(place: str, layer: Any, rank: int, scale: float) -> Factors:
        q, r = torch.linalg.qr(weight_of(layer.get_base_layer()))
        return r[:rank], q[:, :rank]

    return made


def _orthogonal(adapter: LoraAdapter, layers: dict[str, Any], given: Given) -> _Made:
    """Random factors with an orthogonal basis between them, of which A has every other vector and B the rest: B A is zero, and
    neither factor is (datta0.github.io/posts/rethink-lora-init; as peft draws them)."""

    def made(place: str, layer: Any, rank: int, scale: float) -> Factors:
        outputs, inputs = weight_of(layer.get_base_layer()).shape
        basis = torch.linalg.qr(torch.randn(rank, rank))[0]
        down = (torch.randn(inputs, rank // 2) @ basis[0::2]).T / 10
        return down, (torch.randn(rank // 2, outputs).T @ basis[1::2]) / 10

    return made


def _loftq(adapter: LoraAdapter, layers: dict[str, Any], given: Given) -> _Made:
    """The largest part of what quantizing took from the weight (arXiv:2310.08659, one iteration: the quantized weights stay)."""
    published = given.published()

    def made(place: str, layer: Any, rank: int, scale: float) -> Factors:
        seen = weight_of(layer.get_base_layer())
        return _principal(weight_of(published.get_submodule(place)).to(seen.device) - seen, rank, scale)

    return made


# -- made of training rows ----------------------------------------------------------------------------------------------


def _eva(adapter: LoraAdapter, layers: dict[str, Any], given: Given) -> _Made:
    """A: the directions in which what a layer reads varies most; B: zero (arXiv:2410.07170, the same rank in every layer)."""
    read = _moments(layers, functools.partial(given.passes, adapter.init_rows, False))

    def made(place: str, layer: Any, rank: int, scale: float) -> Factors:
        vectors = torch.linalg.eigh(read[place].double())[1].flip(1)  # the largest first
        return vectors[:, :rank].T, vectors.new_zeros(weight_of(layer.get_base_layer()).shape[0], rank)

    return made


def _corda(adapter: LoraAdapter, layers: dict[str, Any], given: Given) -> _Made:
    """Singular values of the weight times the covariance of what it reads (arXiv:2406.05223): the largest where the task is to be
    learned (ipm), the smallest where what the base knows is to be kept (kpm)."""
    read = _moments(layers, functools.partial(given.passes, adapter.init_rows, False))

    def made(place: str, layer: Any, rank: int, scale: float) -> Factors:
        moment = read[place].double()
        moment = moment / moment.diagonal().mean() + _DAMPING * torch.eye(len(moment), device=moment.device)
        u, s, vt = torch.linalg.svd(weight_of(layer.get_base_layer()).double() @ moment, full_matrices=False)
        kept = slice(0, rank) if adapter.corda_method == "ipm" else slice(max(len(s) - rank, 0), None)
        half = (s[kept] / scale).sqrt()
        return half[:, None] * torch.linalg.solve(moment, vt[kept].T).T, u[:, kept] * half

    return made


def _lora_ga(adapter: LoraAdapter, layers: dict[str, Any], given: Given) -> _Made:
    """Singular vectors of the gradient that full fine-tuning would begin with (arXiv:2407.05000, stable scale): A has the first ones on
    the right, B the next ones on the left."""
    gradients = _gradients(layers, functools.partial(given.passes, adapter.init_rows, True))

    def made(place: str, layer: Any, rank: int, scale: float) -> Factors:
        gradient = gradients[place]
        u, _, v = torch.svd_lowrank(gradient, min(4 * rank, *gradient.shape), niter=4)
        size = len(gradient) ** 0.25 / math.sqrt(_GAMMA)
        return size * v[:, :rank].T, size * u[:, rank : 2 * rank]

    return made


_MADE_OF: dict[str, Callable[[LoraAdapter, dict[str, Any], Given], _Made]] = {
    "pissa": _pissa,
    "olora": _olora,
    "orthogonal": _orthogonal,
    "loftq": _loftq,
    "eva": _eva,
    "corda": _corda,
    "lora_ga": _lora_ga,
}


def _moments(layers: dict[str, Any], run: Callable[[], None]) -> dict[str, torch.Tensor]:
    """The sum of x x^T [D, D] over all that each layer reads while something runs."""
    found: dict[str, torch.Tensor] = {}

    def note(place: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        found[place] = x.T @ x + found.get(place, 0.0)

    with _watched(layers, note):
        run()
    return _complete(layers, found)


def _gradients(layers: dict[str, Any], run: Callable[[], None]) -> dict[str, torch.Tensor]:
    """The gradient [N, D] of each layer's frozen weight, summed over all passes while something runs."""
    found: dict[str, torch.Tensor] = {}

    def note(place: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()

        def add(gradient: torch.Tensor) -> None:
            found[place] = gradient.reshape(-1, gradient.shape[-1]).float().T @ x + found.get(place, 0.0)

        if output.requires_grad:
            output.register_hook(add)

    with _watched(layers, note):
        run()
    return _complete(layers, found)


def _complete(layers: dict[str, Any], found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from lora_lab.errors import AdapterError

    unread = [place for place in layers if place not in found]
    if unread:
        raise AdapterError(
            f"adapter.init_lora_weights: no training row reaches {unread[0]} ({len(unread)} layers), so nothing is known of what it reads. Leave "
            "it out (adapter.exclude_modules), or set adapter.init_lora_weights=true."
        )
    return found


@contextlib.contextmanager
def _watched(layers: dict[str, Any], note: Callable[[str, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Inside the block each layer's calls are noted: its name, what it reads, what it gives; not those of the base without adapter."""

    def hook(place: str, module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if not module.disable_adapters:
            note(place, inputs[0], output)

    with contextlib.ExitStack() as stack:
        for place, layer in layers.items():
            stack.callback(layer.register_forward_hook(functools.partial(hook, place)).remove)
        yield
