# ruff: noqa: F811  (a fixture of another file)
"""Members of a cohort whose products are made at once, beside one after another and alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.adapters.attach import attach
from lora_lab.base import load
from lora_lab.data.dataset import first_examples
from lora_lab.fast import modules
from lora_lab.run import prepared as stages
from lora_lab.run import run_dir
from lora_lab.run.setup import Live
from lora_lab.training.cohort import Member, learn, learning, share
from tests.fast.test_fast import families  # noqa: F401

# float32: one product over all members sums in another order (measured: at most 4e-7 of the gradient's norm)
ROUNDING = 1e-5


class Products(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def cohort(config_of, folder, settings):
    """Members on one base, with adapters that do something, and a row of its own length for each step of each."""
    configs = [config_of(*own, f"run_dir={folder}/{i}") for i, own in enumerate(settings)]
    setup = stages.prepare(configs[0])
    dtype, quant = configs[0].model.dtype, configs[0].quant
    model, members = load.load_model(setup.base, setup.kind, dtype, quant, setup.device, 0), []
    for i, config in enumerate(configs):
        model = attach(model, config.adapter, f"member{i}", setup.kind, config.seed)
        run = run_dir.create(config)
        members.append(Member(f"member{i}", config, run, setup.base, model, setup.train, setup.task))
    Live(setup, model).accelerate()
    torch.manual_seed(0)
    for member in members:
        for parameter in member.parameters.values():
            parameter.data.normal_(std=0.05)
    return setup, members


def gradients(setup, members, rows):
    """Each member's, of a pass that these share, each with rows of its own."""
    with learning(members):
        shares = [
            share(member, [own], 0, setup.accelerator, alone=len(members) == 1)
            for member, own in zip(members, rows, strict=True)
        ]
        learn(shares, 0, setup.accelerator)
    found = []
    for member in members:
        found.append(torch.cat([p.grad.flatten() for p in member.parameters.values() if p.grad is not None]))
        member.optimizer.zero_grad()
    return found


def assert_near(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() <= ROUNDING * other.norm()


@pytest.mark.parametrize(
    "common",
    [
        [],
        ["quant=nf4"],
        ["adapter.use_rslora=true", "adapter.target_modules=[q_proj,v_proj,up_proj]"],
        ["adapter.rank_pattern={q_proj: 7, down_proj: 2}", "train.gradient_checkpointing=true"],
    ],
    ids=" ".join,
)
def test_members_at_once_learn_what_each_learns_alone(families, config_of, tmp_path, monkeypatch, common):
    """Four with the same rows in other orders, and of other scale; the products are a fraction of those one after another."""
    given = [f"model.path={families['llama']}", *common]
    alphas = ("2", "16", "16", "32")
    setup, members = cohort(config_of, tmp_path, [[*given, f"adapter.lora_alpha={alpha}"] for alpha in alphas])
    examples = first_examples(setup.train, 2)
    rows = [examples, examples[::-1], examples, examples[::-1]]
    with Products() as at_once:
        found = gradients(setup, members, rows)
    assert_near(found, [gradients(setup, [member], [own])[0] for member, own in zip(members, rows, strict=True)])
    monkeypatch.setattr(modules, "_alike", lambda *_: False)
    with Products() as in_turn:
        assert_near(found, gradients(setup, members, rows))
    assert at_once.count["baddbmm_"] > 0
    assert in_turn.count["baddbmm_"] == 0
    adding = at_once.count["baddbmm_"] + at_once.count["addmm_"]
    assert 4 * at_once.count["baddbmm_"] + at_once.count["addmm_"] == in_turn.count["addmm_"] > 3 * adding


@pytest.mark.parametrize("unlike", ["rows", "ranks", "layers", "dropout"])
def test_members_that_are_not_alike_go_one_after_another(families, config_of, tmp_path, unlike):
    given = [f"model.path={families['llama']}"]
    more = {
        "ranks": ["adapter.r=2"], "layers": ["adapter.target_modules=[q_proj]"], "dropout": ["adapter.lora_dropout=0.1"], "rows": [],
    }[unlike]  # fmt: skip
    setup, members = cohort(config_of, tmp_path, [[*given, "adapter.target_modules=[q_proj,o_proj]"], [*given, *more]])
    examples = first_examples(setup.train, 3)
    rows = [examples[:1], examples[1:]] if unlike == "rows" else [examples, examples]
    with Products() as products:
        found = gradients(setup, members, rows)
    assert products.count["addmm_"] > 0
    assert products.count["baddbmm_"] == 0 or unlike == "layers"
    if unlike != "dropout":  # drawn from a generator of its own only where members share a pass
        assert_near(found, [gradients(setup, [member], [own])[0] for member, own in zip(members, rows, strict=True)])


def test_a_member_that_diverges_spoils_nobody_else(families, config_of, tmp_path):
    """Everything that is not a number stays with whom it belongs to."""
    setup, members = cohort(config_of, tmp_path, [[f"model.path={families['llama']}"]] * 3)
    examples = first_examples(setup.train, 2)
    for parameter in members[1].parameters.values():
        parameter.data.fill_(float("nan"))
    found = gradients(setup, members, [examples] * 3)
    assert not found[1].isfinite().any()
    assert_near([found[0], found[2]], [gradients(setup, [members[i]], [examples])[0] for i in (0, 2)])
