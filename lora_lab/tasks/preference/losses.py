"""Losses on preferred and rejected answers, as functions of log-probabilities; no model, no reduction.

Shapes, the same everywhere: B pairs (KTO: B single answers); `chosen` and `rejected` [B] float32 are the summed
log-probabilities of an answer's tokens under the policy, `reference_chosen` and `reference_rejected` [B] float32 the
same under the frozen reference, without gradient; `chosen_tokens` and `rejected_tokens` [B] count those tokens, at
least 1 each. Every loss is [B], one number per pair that depends on no other pair, so that any split of a step adds up.

Values are those of TRL 1.16 for the same inputs (`benchmarks/preference_reference.py`); where TRL and the paper differ,
the function says so.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

# The smallest log-probability that float32's log-softmax tells from 0 is 1.2e-7; its mean over 1e5 tokens is still
# larger than this. Only an exact 0, whose odds are infinite, is moved.
_CERTAIN = -1e-12


def dpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Direct preference optimization (arXiv:2305.18290, equation 7): a logistic loss on the margin of implicit rewards.

    `label_smoothing` is the share of pairs taken to be labelled the wrong way round (conservative DPO, Mitchell
    2023, "A note on DPO with noisy preferences & relationship to IPO"). TRL 1.16 has dropped it from
    `loss_type="sigmoid"`, where it has no effect; its "robust" loss is another one (arXiv:2403.00409), which divides
    by 1 - 2 label_smoothing and can be negative.
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return _logistic(beta * margin, label_smoothing)


def ipo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Identity preference optimization (arXiv:2310.12036, equation 17): the margin is pulled to 1 / (2 beta).

    `beta` is the paper's tau. The paper writes summed log-probabilities; this takes their mean per token, as TRL does
    after asking the authors, or the square would grow with the length of the answers.
    """
    margin = (chosen - reference_chosen) / chosen_tokens - (rejected - reference_rejected) / rejected_tokens
    return (margin - 1 / (2 * beta)).square()


def simpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Simple preference optimization (arXiv:2405.14734, equation 6): no reference, mean log-probability as reward.

    `gamma` is the paper's target margin of beta * mean log-probability, and TRL's `simpo_gamma`: TRL subtracts
    gamma / beta before it multiplies by beta. The ratio gamma / beta that the paper's own recipes tune
    (`gamma_beta_ratio`) is therefore not `gamma`. Smoothing is TRL's addition. The value is TRL's with `cpo_alpha=0`;
    its default of 1 adds a cross-entropy that SimPO does not have.
    """
    margin = chosen / chosen_tokens - rejected / rejected_tokens
    return _logistic(beta * margin - gamma, label_smoothing)


def orpo(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Odds ratio preference optimization (arXiv:2403.07691, equation 6): learn the chosen answer, and prefer it.

    The first term is the mean negative log-likelihood of the tokens of the pair's chosen answer. TRL takes it over the
    prompt's tokens too, and averages over all tokens of a batch instead of per pair: the two are equal for one pair
    whose prompt is a single token. `beta` is the paper's lambda and weights `odds_ratio`.
    """
    return -chosen / chosen_tokens + beta * odds_ratio(chosen, rejected, chosen_tokens, rejected_tokens)


def odds_ratio(
    chosen: torch.Tensor, rejected: torch.Tensor, chosen_tokens: torch.Tensor, rejected_tokens: torch.Tensor
) -> torch.Tensor:
    """ORPO's second term without its weight (arXiv:2403.07691, equation 7): -log sigmoid of the log odds ratio, [B].

    An answer's probability is exp of its mean log-probability. One of exactly 1 counts as exp(-1e-12), so that values
    and gradients stay finite.
    """
    return -logsigmoid(_log_odds(chosen / chosen_tokens) - _log_odds(rejected / rejected_tokens))


def kto(
    policy: torch.Tensor,
    reference: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Kahneman-Tversky optimization (arXiv:2402.01306, equation 7): answers marked good or bad one by one, no pairs.

    The paper's lambda_y - v(x, y): a good answer's log-ratio is to lie above `kl`, a bad one's below.

    Args:
        policy: [B] summed log-probability of each answer.
        reference: [B] the same under the reference.
        desirable: [B] bool.
        kl: scalar, at least 0, without gradient: `kto_kl` of the whole step. One taken per micro-batch would make the
            loss depend on how the step is split.
        beta: how fast the loss saturates.
        desirable_weight: the paper's lambda_D.
        undesirable_weight: lambda_U.
    """
    gain = beta * (policy - reference - kl)
    # sigmoid(-x) is 1 - sigmoid(x), without cancellation for large x
    return torch.where(desirable, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


def kto_kl(policy_mismatched: torch.Tensor, reference_mismatched: torch.Tensor) -> torch.Tensor:
    """KTO's reference point (arXiv:2402.01306, section 4.1): an estimate of KL(policy || reference), scalar, detached.

    Both are [M], summed log-probabilities of answers that belong to other prompts than the one they follow. A biased
    estimate, which the paper clamps at 0 as well.
    """
    return (policy_mismatched - reference_mismatched).mean().clamp(min=0).detach()


def rewards(policy: torch.Tensor, reference: torch.Tensor | None, tokens: torch.Tensor, beta: float) -> torch.Tensor:
    """Implicit rewards of answers for logs, [B], detached. The rule is TRL's, and follows from the reference alone.

    With a reference (DPO, IPO, KTO): beta * (policy - reference) of summed log-probabilities, for IPO as well, although
    its loss takes means. `tokens` is not used. Without one (SimPO, ORPO): beta * policy / tokens. SimPO's target margin
    is in neither.
    """
    return beta * (policy / tokens if reference is None else policy - reference).detach()


def _logistic(margin: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """[B] -> [B]: cross-entropy of sigmoid(margin) against the label 1 - label_smoothing."""
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def _log_odds(mean: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of p = exp(mean), [B] -> [B].

    expm1 keeps 1 - p exact where p is close to 1. Where p is close to 0, log(1 - p) loses digits, but not the sum: it
    is added to a `mean` that is many times larger. That makes the usual second branch, and its gradients of 0 * inf,
    unnecessary.
    """
    mean = mean.clamp(max=_CERTAIN)
    return mean - torch.log(-torch.expm1(mean))
