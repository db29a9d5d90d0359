# ruff: noqa: F811  (a fixture of another file)
"""What the accelerations that are made for a card launch there, beside what they stand for: dry, on tensors without content."""

from __future__ import annotations

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.fast import modules
from lora_lab.training import cohort
from tests.fast.test_fast import families  # noqa: F401

dry = pytest.importorskip("tests.no_card.dry", reason="no card to pretend")


class Launches(TorchDispatchMode):
    """Counts what a card would be told to do, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace != "prim":
            self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def launches(config, *others):
    """Of the first step, and where the host waits in it."""
    with dry.loaded(config, *others) as run:
        with Launches() as found:
            run.train(1)
        return found.count, run.waits["step 1"]


def test_packed_rows_attend_in_one_launch_a_layer(families, config_of, tmp_path):
    given = [f"model.path={families['llama']}", "model.dtype=bfloat16", "train.batch_size=16"]
    one, waits = launches(config_of(*given, f"run_dir={tmp_path}/one"))
    each, other_waits = launches(config_of(*given, "speed.varlen_attention=false", f"run_dir={tmp_path}/each"))
    assert one["torch_attn._varlen_attn.default"] == one["torch_attn._varlen_attn_backward.default"] == 2
    assert each["aten._scaled_dot_product_flash_attention.default"] == 2 * 16
    assert one.total() <= each.total() - 2 * 2 * 15  # forward and backward of two layers
    assert len(waits) == len(other_waits)


@pytest.mark.long
def test_members_who_are_alike_launch_once(families, config_of, tmp_path, monkeypatch):
    given = [f"model.path={families['llama']}", "model.dtype=bfloat16", "quant=nf4", "speed.dequantize=always"]
    learn, found = cohort.learn, []
    passed = Launches()

    def counted(*shares):
        with passed:
            learn(*shares)

    monkeypatch.setattr(cohort, "learn", counted)  # which the dry run calls
    for name in ("at_once", "in_turn"):
        configs = [config_of(*given, f"optim.lr=0.00{i}", f"run_dir={tmp_path}/{name}{i}") for i in range(1, 9)]
        with dry.loaded(*configs) as run:
            run.live.setup.task.forward.members = len(configs)
            if name == "in_turn":
                monkeypatch.setattr(modules, "_alike", lambda *_: False)
            passed = Launches()
            run.train(1)
            found.append((passed.count, len(run.waits["step 1"])))
    (at_once, waits), (in_turn, other_waits) = found
    assert at_once["aten.baddbmm_.default"] > 0
    assert 2.5 * at_once.total() < in_turn.total()
    assert waits == other_waits


@pytest.mark.long
def test_generation_multiplies_by_4_bits_as_they_are(families, config_of, tmp_path, eval_file):
    given = [
        f"model.path={families['llama']}", "model.dtype=bfloat16", "quant=nf4", "speed.dequantize=always", f"data.eval={eval_file}",
        "task.generate_rows=1", "task.max_new_tokens=4",
    ]  # fmt: skip
    found = []
    for fused in ("true", "false"):
        with dry.loaded(config_of(*given, f"speed.fused_4bit={fused}", f"run_dir={tmp_path}/{fused}")) as run:
            with Launches() as counted:
                run.measure()
            found.append(counted.count)
    assert found[0]["bitsandbytes.gemm_4bit.default"] > 0
    assert found[1]["bitsandbytes.gemm_4bit.default"] == 0
    assert found[0].total() < found[1].total()
