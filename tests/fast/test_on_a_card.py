# ruff: noqa: F811  (a fixture of another file)
"""The accelerations on a card, with content: accelerated as plain, with all kernels that the machine has; members together as alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_lab.data.dataset import first_examples
from tests.fast.test_fast import families, first_step  # noqa: F401
from tests.fast.test_members_at_once import cohort, gradients

CUDA = "hardware=cuda"
LIMITS = {"float32": 1e-5, "bfloat16": 3e-2}  # of a gradient's norm; bfloat16: after two layers


def drop_as_the_accelerations_do(module, x):
    """nn.Dropout with the numbers in the order in which `modules.Projection.drawn` asks for them: on a card torch's own kernel takes
    them in another."""
    if not module.training or not module.p:
        return x
    return x * torch.empty_like(x).bernoulli_(1 - module.p) / (1 - module.p)


def gap(one, other) -> float:
    (_, found, _), (_, plain, _) = one, other
    apart = torch.cat([(found[name] - plain[name]).float().flatten() for name in plain])
    return (apart.norm() / torch.cat([g.float().flatten() for g in plain.values()]).norm()).item()


def test_the_plain_twin_draws_what_torch_draws_on_a_cpu():
    module, x = nn.Dropout(0.3), torch.randn(40, 16)
    found = []
    for forward in (module, lambda x: drop_as_the_accelerations_do(module, x)):
        torch.manual_seed(1)
        found.append(forward(x))
    torch.testing.assert_close(*found)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize(
    "settings",
    [[], ["quant=nf4", "speed.dequantize=always"], ["train.gradient_checkpointing=true"], ["adapter.lora_dropout=0.3"]],
    ids=" ".join,
)
def test_a_model_learns_what_its_plain_modules_learn(families, config_of, monkeypatch, kind, dtype, settings):
    given = [CUDA, f"model.path={families[kind]}", f"model.dtype={dtype}", *settings]
    plain = [one for one in given if "dequantize" not in one]
    monkeypatch.setattr(nn.Dropout, "forward", drop_as_the_accelerations_do)
    assert gap(first_step(config_of(*given)), first_step(config_of(*plain, "speed=plain"))) <= LIMITS[dtype]


@pytest.mark.gpu
def test_packed_rows_attend_in_one_call(families, config_of, capsys):
    first_step(config_of(CUDA, f"model.path={families['gemma3_text']}", "model.dtype=bfloat16"))
    assert "attention of all rows in one call" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_members_together_learn_what_each_learns_alone(families, config_of, tmp_path, dtype, dropout):
    given = [CUDA, f"model.path={families['llama']}", f"model.dtype={dtype}", f"adapter.lora_dropout={dropout}"]
    setup, members = cohort(config_of, tmp_path, [[*given, f"adapter.lora_alpha={alpha}"] for alpha in (2, 16, 32)])
    rows = first_examples(setup.train, 2)
    for member, found in zip(members, gradients(setup, members, [rows] * 3), strict=True):
        [alone] = gradients(setup, [member], [rows])
        assert (found - alone).norm() <= LIMITS[dtype] * alone.norm()
