"""What TRL computes for the preference losses: python -m benchmarks.preference_reference [--out FILE]

Run it from the repository's root in an environment that has trl 1.16.0 beside this package's dependencies (`pip install
trl==1.16.0`). It writes tests/tasks/preference_reference.json, which the tests read; they do not need trl.

The trainers' own code runs, from a batch of token ids to loss and logged rewards: `DPOTrainer._compute_loss`,
`KTOTrainer._compute_loss`, and `get_batch_loss_metrics` of CPOTrainer and ORPOTrainer. Only the model is a stand-in,
which answers with fixed log-probabilities, and the trainers are made without their `__init__`. One pair at a time, so
that the mean TRL returns is the pair's loss. Everything is float64 but ORPO's odds ratio, which TRL casts to float32.

TRL 1.16 ignores `label_smoothing` in DPO's "sigmoid" loss. With smoothing, "aot" stands in: it sorts margins within the
batch before the same smoothed logistic loss, which leaves a batch of one pair as it is.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import trl
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

_TRL = "1.16.0"
_OUT = Path(__file__).parents[1] / "tests" / "tasks" / "preference_reference.json"
_SEEDS, _PAIRS, _MOST_TOKENS = (0, 1, 2), 4, 12
_GRID = 1024  # log-probabilities are multiples of 1/1024, so that their sums are exact in float32 too

_OPTIONS: dict[str, dict[str, list[float]]] = {
    "dpo": {"beta": [0.05, 0.1, 0.5], "label_smoothing": [0.0, 0.1, 0.3]},
    "ipo": {"beta": [0.05, 0.1, 0.5]},
    "simpo": {"beta": [2.0, 10.0], "gamma": [0.5, 1.6], "label_smoothing": [0.0, 0.1]},
    "orpo": {"beta": [0.1, 0.25, 1.0]},
    "kto": {"beta": [0.1, 0.5], "desirable_weight": [1.0, 0.7], "undesirable_weight": [1.0, 1.33]},
}


class Answers:
    """A stand-in for a model: it knows the log-probability of each token of each answer.

    A row of token ids is: the number of the answer (the whole prompt), then a 1 per token, then 0 as padding. The
    vocabulary has two tokens, so a token's log-probability fixes its logits.
    """

    training = True

    def __init__(self, answers: list[list[float]]):
        self.answers = answers

    def rows(self, *numbers: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [N, T] int64 of these answers, and where they are not padding, [N, T]."""
        lengths = [1 + len(self.answers[number]) for number in numbers]
        mask = torch.tensor([[int(t < length) for t in range(max(lengths))] for length in lengths])
        ids = mask.clone()
        ids[:, 0] = torch.tensor(numbers)
        return ids, mask

    def __call__(self, input_ids: torch.Tensor, **_: object) -> types.SimpleNamespace:
        """What transformers (`logits` [N, T, 2]) and TRL's fused head (the rest, [N, T - 1]) return, in float64."""
        logps = torch.zeros(input_ids.shape[0], input_ids.shape[1] - 1, dtype=torch.float64)
        logits = torch.zeros(*input_ids.shape, 2, dtype=torch.float64)
        for row, number in enumerate(input_ids[:, 0].tolist()):
            known = torch.tensor(self.answers[number], dtype=torch.float64)
            logps[row, : len(known)] = known
            logits[row, : len(known)] = torch.stack([torch.log(-torch.expm1(known)), known], dim=-1)
        unused = torch.zeros_like(logps)
        return types.SimpleNamespace(
            logits=logits, log_probs=logps, entropy=unused, mean_logits=unused, is_top1=unused.bool()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=_OUT)
    args = parser.parse_args()
    if trl.__version__ != _TRL:
        parser.error(f"trl is {trl.__version__}; the calls here are those of {_TRL}")
    data = [_answers(seed) for seed in _SEEDS]
    cases = [_case(name, options, rows) for name in _OPTIONS for options in _grid(_OPTIONS[name]) for rows in data]
    inputs = [{key: value for key, value in rows.items() if key != "model"} for rows in data]
    args.out.write_text(_text(inputs, cases), encoding="utf-8")
    print(f"{len(cases)} cases written to {args.out}")


def _answers(seed: int) -> dict[str, Any]:
    """Random answers: the model that gives them, their sums and token counts, and the reference's sums."""
    random = torch.Generator().manual_seed(seed)
    answers = [_tokens(random) for _ in range(3 * _PAIRS)]
    sums = [sum(answer) for answer in answers]
    # the policy gains on the reference in one seed and loses in the next, so that KTO's clamp is met as well
    gains = ((torch.randn(len(sums), generator=random) * 2 + 1 - seed) * _GRID).round() / _GRID
    references = [min(total - gain, -1 / _GRID) for total, gain in zip(sums, gains.tolist(), strict=True)]
    result: dict[str, Any] = {"seed": seed, "model": Answers(answers)}
    for place, name in enumerate(("chosen", "rejected", "mismatched")):
        part = slice(place * _PAIRS, (place + 1) * _PAIRS)
        result |= {name: sums[part], f"reference_{name}": references[part]}
        result[f"{name}_tokens"] = [len(answer) for answer in answers[part]]
    result["desirable"] = [bool((seed + row) % 3) for row in range(_PAIRS)]
    return result


def _tokens(random: torch.Generator) -> list[float]:
    count = int(torch.randint(1, _MOST_TOKENS + 1, (), generator=random))
    steps = torch.empty(count).exponential_(generator=random).mul(_GRID).round().clamp(min=1)
    return (-steps / _GRID).tolist()


def _grid(options: dict[str, list[float]]) -> Iterator[dict[str, float]]:
    return (dict(zip(options, values, strict=True)) for values in itertools.product(*options.values()))


def _case(name: str, options: dict[str, float], data: dict[str, Any]) -> dict[str, Any]:
    """TRL's numbers for every pair of `data`, one call per pair: lists of the same length."""
    run = {"dpo": _dpo, "ipo": _ipo, "simpo": _simpo, "orpo": _orpo, "kto": _kto}[name]
    found: dict[str, list[float]] = collections.defaultdict(list)
    for pair in range(_PAIRS):
        for key, value in run(data, pair, options).items():
            found[key].append(value)
    return {"loss": name, "seed": data["seed"], "options": options, **found}


def _trainer(kind: type, model: Answers, **attributes: object) -> Any:
    """A trainer with no more than its loss reads: one process, no auxiliary loss."""
    trainer = object.__new__(kind)
    trainer.model = model
    trainer.accelerator = types.SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer.aux_loss_enabled = False
    trainer._metrics = {"train": collections.defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    for key, value in attributes.items():
        setattr(trainer, key, value)
    return trainer


def _dpo(data: dict[str, Any], pair: int, options: dict[str, float]) -> dict[str, float]:
    return _with_reference("aot" if options["label_smoothing"] else "sigmoid", data, pair, **options)


def _ipo(data: dict[str, Any], pair: int, options: dict[str, float]) -> dict[str, float]:
    return _with_reference("ipo", data, pair, label_smoothing=0.0, **options)


def _with_reference(loss_type: str, data: dict[str, Any], pair: int, **options: float) -> dict[str, float]:
    model = data["model"]
    trainer = _trainer(DPOTrainer, model, loss_types=[loss_type], loss_weights=[1.0], **options)
    trainer.f_divergence_type, trainer.ld_alpha, trainer.use_weighting = "reverse_kl", None, False
    trainer.precompute_ref_logps = True
    ids, mask = model.rows(pair, _PAIRS + pair)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": _without_prompt(mask),
        "ref_chosen_logps": torch.tensor([data["reference_chosen"][pair]], dtype=torch.float64),
        "ref_rejected_logps": torch.tensor([data["reference_rejected"][pair]], dtype=torch.float64),
    }
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    [chosen], [rejected] = (trainer._metrics["train"][f"rewards/{side}"] for side in ("chosen", "rejected"))
    return {"losses": loss.item(), "chosen_rewards": chosen, "rejected_rewards": rejected}


def _simpo(data: dict[str, Any], pair: int, options: dict[str, float]) -> dict[str, float]:
    own = {"beta": options["beta"], "simpo_gamma": options["gamma"], "label_smoothing": options["label_smoothing"]}
    trainer = _trainer(CPOTrainer, data["model"], loss_type="simpo", cpo_alpha=0.0, alpha=0.0, pad_token_id=0, **own)
    return _without_reference(trainer, data, pair)[0]


def _orpo(data: dict[str, Any], pair: int, options: dict[str, float]) -> dict[str, float]:
    trainer = _trainer(ORPOTrainer, data["model"], padding_value=0, **options)
    found, metrics = _without_reference(trainer, data, pair)
    return found | {"odds_ratios": -metrics["log_odds_ratio"]}


def _without_reference(trainer: Any, data: dict[str, Any], pair: int) -> tuple[dict[str, float], dict[str, float]]:
    """TRL's loss and rewards of one pair, and all its metrics."""
    trainer.is_encoder_decoder = False
    batch = {}
    for side, number in (("chosen", pair), ("rejected", _PAIRS + pair)):
        ids, mask = trainer.model.rows(number)
        labels = ids.masked_fill(_without_prompt(mask) == 0, -100)
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    found = {"losses": loss.item()}
    return found | {f"{side}_rewards": metrics[f"rewards/{side}"] for side in ("chosen", "rejected")}, metrics


def _kto(data: dict[str, Any], pair: int, options: dict[str, float]) -> dict[str, float]:
    """The chosen answers, some of them marked undesirable; the KL of each is that of all mismatched answers."""
    model, desirable = data["model"], data["desirable"][pair]
    trainer = _trainer(KTOTrainer, model, loss_type="kto", calculate_KL=True, precompute_ref_logps=True, **options)
    ids, mask = model.rows(pair)
    kl_ids, kl_mask = model.rows(*range(2 * _PAIRS, 3 * _PAIRS))
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": _without_prompt(mask),
        "KL_input_ids": kl_ids,
        "KL_attention_mask": kl_mask,
        "KL_completion_mask": _without_prompt(kl_mask),
        "label": torch.tensor([desirable]),
        "ref_logps": torch.tensor([data["reference_chosen"][pair]], dtype=torch.float64),
        "ref_KL_logps": torch.tensor(data["reference_mismatched"], dtype=torch.float64),
    }
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    metrics = trainer._metrics["train"]
    [reward] = metrics["rewards/chosen" if desirable else "rewards/rejected"]
    return {"losses": loss.item(), "chosen_rewards": reward, "kl": metrics["kl"][0]}


def _without_prompt(mask: torch.Tensor) -> torch.Tensor:
    """Where the answer's tokens are: `mask` [N, T] without the prompt's one token."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, 1:]], dim=1)


def _text(inputs: list[dict[str, Any]], cases: list[dict[str, Any]]) -> str:
    """JSON with one entry a line, so that a difference between two versions of TRL can be read."""
    head = json.dumps(f"TRL {trl.__version__}, by benchmarks/preference_reference.py")
    lists = [",\n  ".join(json.dumps(entry) for entry in entries) for entries in (inputs, cases)]
    return f'{{\n "from": {head},\n "inputs": [\n  {lists[0]}\n ],\n "cases": [\n  {lists[1]}\n ]\n}}\n'


if __name__ == "__main__":
    main()
