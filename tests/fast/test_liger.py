# ruff: noqa: F811  (a fixture of another file)
"""Liger's kernels beside the functions that they stand for. Triton needs a card; elsewhere functions written from their documentation
stand in, which shows what they are told, that they are proved, and that they are not needed."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from lora_lab.fast import liger, mlp, norm
from tests.fast.test_fast import assert_same, families, first_step  # noqa: F401


def documented_norm(x, weight, eps, offset, casting_mode, in_place):
    """`llama`: rounds before the weight; `gemma`: all of it in float32."""
    assert not in_place
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        return (weight + offset) * normal.to(x.dtype)
    assert casting_mode == "gemma"
    return (normal * (weight.float() + offset)).to(x.dtype)


def documented_gate(both):
    assert both.is_contiguous()
    gate, up = both.chunk(2, -1)
    return both, silu(gate) * up


def documented_gate_backward(both, dc, in_place):
    assert in_place
    with torch.enable_grad():
        leaf = both.detach().clone().requires_grad_()
        [gradient] = torch.autograd.grad(documented_gate(leaf)[1], leaf, dc)
    return both.copy_(gradient)


STAND_IN = liger.Kernels(documented_norm, documented_gate, documented_gate_backward)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(liger, "DEVICES", ("cpu",))
    monkeypatch.setattr(liger, "kernels", lambda: STAND_IN)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_a_model_learns_the_same_with_them(families, config_of, on_cpu, kind, capsys):
    given = f"model.path={families[kind]}"
    fast = first_step(config_of(given))
    said = capsys.readouterr().out
    assert "by Liger's kernels" in said
    assert "no liger_kernels" not in said
    layer = fast[2].model.get_base_model().model.layers[0]
    between = layer.mlp.forward.__self__.gate
    assert isinstance(between, mlp.Gate if kind == "gemma3_text" else liger.Gate)  # Gemma's gate is a GELU
    assert_same(fast, first_step(config_of(given, "speed=plain")))


@pytest.mark.parametrize("wrong", ["norm", "gate", "gate_backward"])
def test_a_kernel_that_computes_something_else_is_left_out(families, config_of, on_cpu, monkeypatch, capsys, wrong):
    kernels = {
        "norm": liger.Kernels(lambda *given: 1.1 * documented_norm(*given), documented_gate, documented_gate_backward),
        "gate": liger.Kernels(
            documented_norm, lambda both: (both, 1.1 * documented_gate(both)[1]), documented_gate_backward
        ),
        "gate_backward": liger.Kernels(
            documented_norm, documented_gate, lambda *given: documented_gate_backward(*given).mul_(1.1)
        ),
    }[wrong]
    monkeypatch.setattr(liger, "kernels", lambda: kernels)
    given = f"model.path={families['llama']}"
    fast = first_step(config_of(given))
    said = capsys.readouterr().out
    why = "ArithmeticError: its gate computes something else" if wrong == "gate" else "it would change this model's "
    assert f"no liger_kernels: {why}" in said
    assert "gated MLP fused: 2;" in said
    assert_same(fast, first_step(config_of(given, "speed=plain")))


def test_without_the_package_nothing_is_said_of_it(families, config_of, monkeypatch, capsys):
    monkeypatch.setattr(liger, "DEVICES", ("cpu",))
    monkeypatch.setattr(liger, "kernels", lambda: None)
    first_step(config_of(f"model.path={families['llama']}"))
    assert "iger" not in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("scale", ["weight", "1 + weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_card_a_norm_is_the_same(scale, dtype):
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.randn(256, device="cuda", dtype=dtype), requires_grad=False)
    x, direction = (torch.randn(3, 50, 256, device="cuda", dtype=dtype) for _ in range(2))
    x.requires_grad_()
    found = liger.norm_forward_of(liger.kernels(), module, 1e-6, scale)(x)
    plain = norm.RMSNorm.apply(x, module.weight, 1e-6, scale)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    pairs = [(found, plain), *((torch.autograd.grad(out, x, direction)[0] for out in (found, plain)),)]
    for one, other in pairs:
        assert (one - other).float().norm() <= limit * other.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_card_a_gate_is_the_same(dtype):
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    both, dinner = torch.randn(70, 512, device="cuda", dtype=dtype), torch.randn(70, 256, device="cuda", dtype=dtype)
    own, plain = liger.Gate(liger.kernels()), mlp.Gate(mlp.ACTIVATIONS["SiLU"])
    results = []
    for gate in (own, plain):
        held = both.clone()
        inner, kept = gate.again(held)
        gate.backward(held, kept, dinner.clone())
        results.append((inner, held))
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for one, other in zip(*results, strict=True):
        assert (one - other).float().norm() <= limit * other.float().norm()
