# ruff: noqa: F811  (a fixture of another file)
"""Products of few rows by 4-bit weights that nobody learns from, beside dequantizing. On a CPU bitsandbytes dequantizes inside, so what
is shown here is when it is asked and what it is told; on a card, that its kernels give the same."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.nn.functional import linear

from lora_lab.fast import frozen
from lora_lab.fast.frozen import FrozenWeight, Scratch
from tests.fast.test_fast import families, first_step  # noqa: F401


@pytest.fixture
def asked(monkeypatch):
    """Fused on a CPU too, with the number of rows of each product that bitsandbytes was asked for."""
    monkeypatch.setattr(frozen, "FUSED_DEVICES", ("cpu",))
    rows, own = [], frozen.matmul_4bit
    monkeypatch.setattr(frozen, "matmul_4bit", lambda x, *more, **named: rows.append(len(x)) or own(x, *more, **named))
    return rows


def weight_of(kind, nested, bias, device="cpu", dtype=torch.float32, width=128):
    torch.manual_seed(0)
    layers = [
        Linear4bit(width, size, bias=bias, compute_dtype=dtype, compress_statistics=nested, quant_type=kind)
        for size in (64, 192)
    ]
    weight = FrozenWeight([layer.to(dtype).to(device).requires_grad_(False) for layer in layers], Scratch())
    weight.fused = weight.fusible
    return weight


CASES = [("nf4", False, False), ("nf4", True, True), ("fp4", True, False)]


def gap(one, other):
    return (one.float() - other.float()).norm() / other.float().norm()


@pytest.mark.parametrize(("kind", "nested", "bias"), CASES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_few_rows_give_what_the_dequantized_weight_gives(asked, kind, nested, bias, dtype, limit):
    weight = weight_of(kind, nested, bias, dtype=dtype)
    x = torch.randn(5, 128).to(dtype)
    found = weight.times(x, learned=False)
    assert asked == [5, 5]
    assert found.shape == (5, 256)
    assert gap(found, linear(x, weight.dense(dtype), weight.bias(dtype))) <= limit


def test_many_rows_and_rows_that_are_learned_from_are_dequantized(asked):
    weight = weight_of("nf4", False, False)
    weight.times(torch.randn(5, 128))
    weight.times(torch.randn(frozen.FEW + 1, 128), learned=False)
    assert not asked
    assert not weight_of("nf4", False, False, width=96).fusible  # blocks of 64 do not divide its rows


def answers(config):
    *_, live = first_step(config)
    return live.measure("tuned").answers


def test_generation_alone_asks_for_fused_products(families, config_of, eval_file, asked, capsys):
    given = [
        f"model.path={families['llama']}", f"data.eval={eval_file}", "task.generate_rows=3", "task.max_new_tokens=8", "quant=nf4",
    ]  # fmt: skip
    first_step(config_of(*given))
    assert "4-bit products of few rows fused: 6" in capsys.readouterr().out  # two that read 96 numbers are not
    tried = len(asked)  # the proof
    asked.clear()
    found = answers(config_of(*given))
    assert len(asked) > tried
    assert max(asked) <= frozen.FEW
    asked.clear()
    plain = answers(config_of(*given, "speed.fused_4bit=false"))
    assert not asked
    assert found == plain


def test_fused_products_that_are_something_else_are_left_out(families, config_of, asked, monkeypatch, capsys):
    own = frozen.matmul_4bit
    monkeypatch.setattr(frozen, "matmul_4bit", lambda *given, **named: 1.1 * own(*given, **named))
    first_step(config_of(f"model.path={families['llama']}", "quant=nf4"))
    said = capsys.readouterr().out
    assert "no fused_4bit: ArithmeticError: it would change a product by 1.0e-01 of its norm" in said
    assert "projections fused" in said


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "nested", "bias"), CASES)
@pytest.mark.parametrize("rows", [1, 4, 32, 128])
def test_on_a_card_few_rows_give_what_the_dequantized_weight_gives(kind, nested, bias, rows):
    weight = weight_of(kind, nested, bias, "cuda", torch.bfloat16, width=1024)
    assert weight.fused
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    found = weight.times(x, learned=False)
    assert gap(found, linear(x, weight.dense(x.dtype), weight.bias(x.dtype))) <= 1e-2
