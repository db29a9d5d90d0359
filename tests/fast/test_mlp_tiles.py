# ruff: noqa: F811  (a fixture of another file)
"""The gated MLP of a long row, some tokens at a time."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.nn.functional import silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lab.fast import mlp
from lora_lab.fast.frozen import FrozenWeight, Scratch
from lora_lab.fast.linear import Layout
from tests.fast.test_fast import assert_same, families, first_step  # noqa: F401


class Peak(TorchDispatchMode):
    """How many bytes the tensors that are made inside hold at most, all together."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage(), given)
        return out

    def _note(self, storage, given):
        if storage._cdata in given or storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size):
        self.now -= size


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["adapter.lora_dropout=0.3"],
        ["quant=nf4", "speed.dequantize=always"],
        ["adapter.target_modules=[q_proj,up_proj]"],
        ["train.gradient_checkpointing=true"],
        ["model.path=gemma3_text"],
    ],
    ids=" ".join,
)
def test_a_model_learns_the_same_in_tiles(families, config_of, monkeypatch, settings):
    given = [
        f"model.path={families['llama']}",
        *(one.replace("gemma3_text", str(families["gemma3_text"])) for one in settings),
    ]
    plain = [one for one in given if "dequantize" not in one]
    monkeypatch.setattr(mlp, "TILE_BYTES", 7 * 4 * 96)  # seven tokens
    tiles = []
    made = mlp._tiles
    monkeypatch.setattr(mlp, "_tiles", lambda *of: tiles.append(made(*of)) or tiles[-1])
    assert_same(first_step(config_of(*given)), first_step(config_of(*plain, "speed=plain")))
    assert max(map(len, tiles)) > 5


def step(tokens, width, tile_bytes, monkeypatch, dtype=torch.float32):
    """Output and gradients of one MLP with LoRA on all of it, and the most bytes that were held at once."""
    monkeypatch.setattr(mlp, "TILE_BYTES", tile_bytes)
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(a, b, bias=False).requires_grad_(False) for a, b in ((16, width), (16, width), (width, 16))
    ]
    weights = FrozenWeight(layers[:2], Scratch()), FrozenWeight(layers[2:], Scratch())
    x = torch.randn(1, tokens, 16, requires_grad=True)
    factors = [
        torch.randn(*shape).mul_(0.1).requires_grad_()
        for shape in ((4, 16), (width, 2), (width, 2), (2, width), (16, 2))
    ]
    layouts = [Layout(slice(None), [2, 2], [None, None])], [Layout(slice(None), [2], [None])]
    with Peak() as peak:
        out = mlp.GatedMLP.apply(x, weights, layouts, mlp.Gate(mlp.ACTIVATIONS["SiLU"]), *factors)
        found = torch.autograd.grad(out, [x, *factors], torch.ones_like(out))
    return [out, *found], peak.most, (x, layers, factors)


def test_a_row_of_8000_tokens_in_tiles_is_the_same_and_holds_less(monkeypatch):
    tokens, width = 8000, 256
    wide = 4 * tokens * width  # bytes of a tensor as wide as the MLP
    whole, most, (x, layers, (a, b1, b2, a2, b3)) = step(tokens, width, 2 * wide, monkeypatch)
    tiled, less, _ = step(tokens, width, wide // 16, monkeypatch)
    for one, other in zip(tiled, whole, strict=True):
        assert (one - other).norm() <= 3e-6 * other.norm()  # 8,000 tokens are summed in another order
    gate, up = (layer(x) + x @ part.t() @ b.t() for layer, part, b in zip(layers, a.split(2), (b1, b2), strict=False))
    inner = silu(gate) * up
    plain = layers[2](inner) + inner @ a2.t() @ b3.t()
    expected = [plain, *torch.autograd.grad(plain, [x, a, b1, b2, a2, b3], torch.ones_like(plain))]
    for one, other in zip(tiled, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    # gate and up are kept; beside them three more, or three sixteenths, and what is as wide as the model
    narrow = 3 * 4 * tokens * 16
    assert 4.5 * wide < most
    assert less < 2.3 * wide + narrow


def test_a_graph_is_gone_through_once(monkeypatch):
    """Its memory is used again, so a second time would be wrong: torch refuses it."""
    x = torch.randn(1, 5, 8, requires_grad=True)
    layers = [torch.nn.Linear(8, 8, bias=False).requires_grad_(False) for _ in range(3)]
    weights = FrozenWeight(layers[:2], Scratch()), FrozenWeight(layers[2:], Scratch())
    out = mlp.GatedMLP.apply(x, weights, ([], []), mlp.Gate(mlp.ACTIVATIONS["SiLU"])).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
