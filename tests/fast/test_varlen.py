"""Attention of all packed rows in one call, beside the loop over rows that it stands for.

torch has these kernels for CUDA alone. Elsewhere a function written from their documentation stands in for them, which shows that
they are told the right thing: where rows begin, what a window and a scale mean, which heads share keys.
"""

# ruff: noqa: F811  (a fixture of another file)
from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.data.collate import pack
from lora_lab.data.encode import Example
from lora_lab.fast import segments, varlen
from tests.fast.test_fast import assert_same, families, first_step  # noqa: F401

LENGTHS = [[5], [1, 1], [7, 3, 12], [4, 20, 4, 1]]


def documented(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), **_):
    """What torch.nn.attention.varlen says that `varlen_attn` computes, row by row: [T, H, d]."""
    assert cu_seq_q.dtype == torch.int32
    out = []
    begins = cu_seq_q.tolist()
    assert begins[0] == 0
    assert begins[-1] == len(query)
    assert max(b - a for a, b in itertools.pairwise(begins)) == max_q == max_k
    groups = query.shape[1] // key.shape[1]
    for a, b in itertools.pairwise(begins):
        q, k, v = query[a:b], key[a:b].repeat_interleave(groups, 1), value[a:b].repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
        behind, ahead = window_size
        seen = (distance >= -ahead) & ((distance <= behind) if behind >= 0 else True)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(out)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(varlen, "DEVICES", ("cpu",))
    monkeypatch.setattr(varlen, "DTYPES", (torch.float32, torch.float64))
    monkeypatch.setattr(varlen, "kernel", lambda: documented)


def attended(lengths, heads, window, device="cpu", dtype=torch.float64, **extra):
    """Output and gradients of the attention for packed rows."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, sum(lengths), 16, dtype=torch.float64) for n in (*heads, heads[1]))
    direction = torch.randn(1, sum(lengths), heads[0], 16, dtype=torch.float64)
    q, k, v, direction = (x.to(device, dtype) for x in (q, k, v, direction))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = segments._segment_attention(
        None, q, k, v, None, segment_lengths=lengths, scaling=0.3, sliding_window=window, **extra
    )
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def batch_of(lengths, device="cpu"):
    return pack([Example(torch.ones(n).long().numpy(), torch.ones(n).numpy(), "row") for n in lengths], device)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_beginnings_of_rows_are_found_on_the_device(lengths):
    found = varlen.starts(batch_of(lengths).position_ids, len(lengths))
    assert found.dtype == torch.int32
    assert found.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("window", [None, 6])
def test_one_call_gives_what_a_call_for_each_row_gives(on_cpu, lengths, heads, window):
    begins = varlen.starts(batch_of(lengths).position_ids, len(lengths))
    found = attended(lengths, heads, window, segment_starts=begins)
    for one, other in zip(found, attended(lengths, heads, window), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("more", [[], ["train.gradient_checkpointing=true"]], ids=["", "checkpointed"])
def test_a_model_learns_the_same_with_one_call(families, config_of, on_cpu, kind, more, capsys):
    given = [f"model.path={families[kind]}", "speed.block_attention=false", *more]
    fast = first_step(config_of(*given))
    assert "attention of all rows in one call" in capsys.readouterr().out
    assert fast[2].setup.task.forward.varlen_attention
    assert_same(fast, first_step(config_of(*given, "speed=plain")))


def test_attention_in_one_call_that_computes_something_else_is_left_out(
    families, config_of, on_cpu, monkeypatch, capsys
):
    """A window that is one token too wide, as it would be were it counted in another way."""
    wider = lambda *given, window_size, **more: documented(*given, window_size=(window_size[0] + 1, 0), **more)  # noqa: E731
    monkeypatch.setattr(varlen, "kernel", lambda: wider)
    fast = first_step(config_of(f"model.path={families['gemma3_text']}"))
    assert "no varlen_attention: it would change this model's outputs" in capsys.readouterr().out
    assert not fast[2].setup.task.forward.varlen_attention


def test_heads_that_the_kernels_do_not_take_go_row_by_row(monkeypatch):
    def asked(size=64, dtype=torch.bfloat16, device="cuda", value=None, dropout=0.0):
        with FakeTensorMode():
            heads = torch.empty(1, 2, 5, size, dtype=dtype, device=device)
            return varlen.takes(heads, heads.narrow(-1, 0, value or size), dropout)

    assert asked()
    assert asked(dtype=torch.float16)
    refused = (
        {"size": 100},
        {"size": 512},
        {"dtype": torch.float32},
        {"device": "cpu"},
        {"value": 32},
        {"dropout": 0.1},
    )
    assert not any(asked(**one) for one in refused)
    monkeypatch.setattr(varlen, "kernel", lambda: None)  # an older torch
    assert not asked()


class Launches(TorchDispatchMode):
    """Counts the operations that a device would be told to do."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace != "prim":  # what asks a tensor for its device
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [1, 64])
def test_a_layer_attends_in_one_launch(rows):
    """Dry: on CUDA tensors without content, forward."""
    lengths = [9] * rows
    with FakeTensorMode(), torch.no_grad():
        q, k = (torch.empty(1, n, sum(lengths), 64, dtype=torch.bfloat16, device="cuda") for n in (8, 2))
        begins = torch.empty(rows + 1, dtype=torch.int32, device="cuda")
        with Launches() as one:
            out, _ = segments._segment_attention(None, q, k, k, None, segment_lengths=lengths, segment_starts=begins)
    assert out.shape == (1, sum(lengths), 8, 64)
    assert one.names == ["torch_attn._varlen_attn.default"]


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [*LENGTHS, [300, 20, 7, 257, 25]], ids=str)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_on_a_card_one_call_gives_what_a_call_for_each_row_gives(lengths, heads, window):
    """As near to float64 as the loop over rows is, up to chance."""
    begins = varlen.starts(batch_of(lengths, "cuda").position_ids, len(lengths))
    found = attended(lengths, heads, window, "cuda", torch.bfloat16, segment_starts=begins)
    plain = attended(lengths, heads, window, "cuda", torch.bfloat16)
    exact = attended(lengths, heads, window)
    for one, other, true in zip(found, plain, exact, strict=True):
        gaps = [(tensor.double().cpu() - true).norm() / true.norm().clamp(min=1e-6) for tensor in (one, other)]
        assert gaps[0] <= max(1.5 * gaps[1], 5e-3)
