"""Preference losses: equal to TRL's numbers, right gradients, any split adds up, nothing infinite at the extremes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lab.tasks.preference import losses as preference_losses

_FILE = json.loads((Path(__file__).parent / "preference_reference.json").read_text(encoding="utf-8"))
INPUTS = {entry["seed"]: entry for entry in _FILE["inputs"]}
CASES = _FILE["cases"]

# Ours and TRL's are computed in float64 and differ by the order of operations, with one exception: TRL casts ORPO's
# mean log-probabilities to float32, which moves a log odds ratio of up to 4 by a few 1e-7.
TOLERANCE = {"orpo": 1e-6}
_SAME = 1e-12
# What training sees: the same inputs, exact in float32, with beta * margin of up to 10 rounded at 6e-8 of itself.
_FLOAT32 = 1e-5

PAIRED = ["chosen", "rejected", "reference_chosen", "reference_rejected"]
NORMALIZED = ["chosen", "rejected", "chosen_tokens", "rejected_tokens"]
ARGUMENTS = {
    "dpo": PAIRED,
    "ipo": [*PAIRED, "chosen_tokens", "rejected_tokens"],
    "simpo": NORMALIZED,
    "orpo": NORMALIZED,
    "kto": ["chosen", "reference_chosen", "desirable", "kl"],
}
# One set of options per loss, for the tests that are not about values.
OPTIONS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1},
    "ipo": {"beta": 0.3},
    "simpo": {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.1},
    "orpo": {"beta": 0.25},
    "kto": {"beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.3},
}


def tensors(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs of a seed by argument name; counts stay int64, marks bool. `kl` among them."""
    named = {key: torch.tensor(value) for key, value in INPUTS[seed].items() if key not in ("seed", "desirable")}
    floats = {key: torch.tensor(INPUTS[seed][key], dtype=dtype) for key in named if not key.endswith("_tokens")}
    found = named | floats | {"desirable": torch.tensor(INPUTS[seed]["desirable"])}
    return found | {"kl": preference_losses.kto_kl(found["mismatched"], found["reference_mismatched"])}


def loss_of(name: str, inputs: dict[str, torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    return getattr(preference_losses, name)(*(inputs[key] for key in ARGUMENTS[name]), **options)


def described(case: dict[str, Any]) -> str:
    return "-".join([case["loss"], str(case["seed"]), *(f"{key}={value}" for key, value in case["options"].items())])


def test_every_loss_is_compared_at_several_betas():
    for name in ARGUMENTS:
        assert len({case["options"]["beta"] for case in CASES if case["loss"] == name}) > 1
    smoothed = {case["loss"] for case in CASES if case["options"].get("label_smoothing")}
    assert smoothed == {"dpo", "simpo"}
    assert {case["kl"][0] > 0 for case in CASES if case["loss"] == "kto"} == {True, False}  # KTO's clamp is met


@pytest.mark.parametrize("case", CASES, ids=described)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_and_rewards_are_trls(case, dtype):
    name, inputs = case["loss"], tensors(case["seed"], dtype)
    relative = TOLERANCE.get(name, _SAME) if dtype == torch.float64 else _FLOAT32

    def same(ours: torch.Tensor, key: str) -> None:
        assert ours.dtype == dtype
        # the absolute part is for rewards near 0
        torch.testing.assert_close(ours.double(), _expected(case, key), rtol=relative, atol=relative * 1e-3)

    same(loss_of(name, inputs, case["options"]), "losses")
    for side in ("chosen",) if name == "kto" else ("chosen", "rejected"):
        reference = None if name in ("simpo", "orpo") else inputs[f"reference_{side}"]
        same(
            preference_losses.rewards(inputs[side], reference, inputs[f"{side}_tokens"], case["options"]["beta"]),
            f"{side}_rewards",
        )
    if name == "orpo":
        same(preference_losses.odds_ratio(*(inputs[key] for key in NORMALIZED)), "odds_ratios")
    if name == "kto":
        same(inputs["kl"].expand(len(case["kl"])), "kl")


def _expected(case: dict[str, Any], key: str) -> torch.Tensor:
    return torch.tensor(case[key], dtype=torch.float64)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_gradients_are_those_of_the_values(name):
    inputs = tensors(0, torch.float64)
    trained = ["chosen"] if name == "kto" else ["chosen", "rejected"]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        return loss_of(name, inputs | dict(zip(trained, values, strict=True)), OPTIONS[name])

    assert torch.autograd.gradcheck(loss, [inputs[key].clone().requires_grad_() for key in trained])


@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo"])
def test_a_step_raises_the_chosen_answer_and_lowers_the_rejected(name):
    inputs = tensors(1, torch.float64)
    chosen, rejected = (inputs[key].requires_grad_() for key in ("chosen", "rejected"))
    loss_of(name, inputs, OPTIONS[name] | ({"label_smoothing": 0.0} if name != "orpo" else {})).sum().backward()
    assert (chosen.grad < 0).all()
    assert (rejected.grad > 0).all()


def test_kto_raises_desirable_answers_and_lowers_the_others():
    inputs = tensors(0, torch.float64)
    inputs["chosen"].requires_grad_()
    loss_of("kto", inputs, OPTIONS["kto"]).sum().backward()
    assert torch.equal(inputs["chosen"].grad < 0, inputs["desirable"])


@pytest.mark.parametrize("name", ARGUMENTS)
def test_any_split_adds_up(name):
    """Not bit for bit: a kernel may take another path for a vector's last elements."""
    inputs = tensors(2, torch.float64)
    whole = loss_of(name, inputs, OPTIONS[name])
    assert whole.shape == inputs["chosen"].shape
    for size in (1, 3):
        pieces = [
            loss_of(name, {k: v if k == "kl" else v[i : i + size] for k, v in inputs.items()}, OPTIONS[name])
            for i in range(0, len(whole), size)
        ]
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_extreme_log_probabilities_stay_finite(name):
    """Pairs of almost impossible, ordinary, almost certain and certain answers, in float32."""
    extremes = itertools.product([-1e4, -1.0, -1e-8, 0.0], repeat=2)
    chosen, rejected = (torch.tensor(side, requires_grad=True) for side in zip(*extremes, strict=True))
    count = len(chosen)
    inputs = {"chosen": chosen, "rejected": rejected, "kl": torch.tensor(0.0)}
    inputs |= {f"reference_{side}": torch.full((count,), -2.0) for side in ("chosen", "rejected")}
    inputs |= {f"{side}_tokens": torch.ones(count, dtype=torch.int64) for side in ("chosen", "rejected")}
    loss = loss_of(name, inputs | {"desirable": torch.arange(count) % 2 == 0}, OPTIONS[name])
    loss.sum().backward()
    assert loss.isfinite().all()
    for side in (chosen, rejected):
        assert side.grad is None or side.grad.isfinite().all()  # KTO has no rejected answers


@pytest.mark.parametrize("mean", [-1e4, -50.0, -1.0, -math.log(2), -1e-3, -1e-8])
def test_the_odds_ratio_keeps_its_digits_in_float32(mean):
    """Against an answer of even odds, whose log odds are 0: softplus(-log odds), here in closed form by float64."""
    log_odds = mean - math.log(-math.expm1(mean))
    expected = torch.nn.functional.softplus(-torch.tensor(log_odds, dtype=torch.float64))
    one = torch.ones(1)
    found = preference_losses.odds_ratio(one * mean, one * -math.log(2), one, one)
    # float32 rounds the log odds at 6e-8 of themselves; at 18.4 that is 1e-6 of exp(-18.4)
    torch.testing.assert_close(found.double(), expected.expand(1), rtol=2e-6, atol=0)


def test_the_reference_point_of_kto_is_not_trained_and_not_negative():
    policy = torch.tensor([-3.0, -5.0], requires_grad=True)
    above = preference_losses.kto_kl(policy, torch.tensor([-4.0, -7.0]))
    assert above.item() == 1.5
    assert not above.requires_grad
    assert preference_losses.kto_kl(policy, torch.tensor([0.0, 0.0])).item() == 0


def test_rewards_carry_no_gradient():
    policy, tokens = torch.tensor([-3.0], requires_grad=True), torch.tensor([2])
    for reference in (None, torch.tensor([-1.0])):
        assert not preference_losses.rewards(policy, reference, tokens, 0.1).requires_grad
