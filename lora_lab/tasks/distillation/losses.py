"""Divergences of a student's distributions from a teacher's, of logarithms of probabilities, for each token by itself.

Where a teacher's likeliest tokens alone are known, both distributions are compared on these tokens and all others together as one more
class. To put classes together never raises a divergence (log-sum inequality), so what is found is a lower bound; it is exact where all
tokens are kept. See docs/tasks.md for how far off it may be.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import log_softmax

_LEAST = -1e4  # stands for the logarithm of 0: 0 * -inf is not a number, and exp(-1e4) is 0


def classes(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logarithms of the probabilities of some tokens, and of all others together.

    Args:
        logits: [S, V], already divided by a temperature.
        tokens: [S, k] int64, all different in a row.

    Returns:
        [S, k + 1] float32, the last for the others; [S, V] in the order of `tokens` where k = V and no others are left.
    """
    if tokens.shape[1] == logits.shape[1]:
        return log_softmax(logits, -1).gather(1, tokens)
    total = logits.logsumexp(1, keepdim=True)
    others = logits.scatter(1, tokens, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, tokens), others], 1) - total


def forward_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student), [S, C] each -> [S]: what the teacher holds likely, the student must."""
    teacher, student = teacher.clamp_min(_LEAST), student.clamp_min(_LEAST)
    return (teacher.exp() * (teacher - student)).sum(1)


def reverse_kl(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher), [S, C] each -> [S]: what the teacher holds unlikely, the student must (MiniLLM, arXiv:2306.08543)."""
    return forward_kl(student, teacher)


def jensen_shannon(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """The generalized Jensen-Shannon divergence of GKD (arXiv:2306.13649), [S, C] each -> [S], with the mixture
    M = beta * teacher + (1 - beta) * student: beta * KL(teacher || M) + (1 - beta) * KL(student || M)."""
    mixture = torch.logaddexp(teacher.clamp_min(_LEAST) + math.log(beta), student.clamp_min(_LEAST) + math.log1p(-beta))
    return beta * forward_kl(teacher, mixture) + (1 - beta) * forward_kl(student, mixture)
