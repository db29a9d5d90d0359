"""How far the probabilities of a classifier can be trusted: temperature scaling (Guo et al. 2017, arXiv:1706.04599), and what is right above a
threshold."""

from __future__ import annotations

import dataclasses

import numpy as np

_RANGE = (0.05, 20.0)  # of temperatures that are tried


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """What logits [n, C] are divided by so that the log-likelihood of labels [n] is the highest; one number, so it changes no decision."""
    from scipy.optimize import minimize_scalar

    def cost(log_temperature: float) -> float:
        shares = probabilities(logits, float(np.exp(log_temperature)))
        return float(-np.log(np.maximum(shares[np.arange(len(labels)), labels], 1e-12)).mean())

    low, high = np.log(_RANGE)
    return float(np.exp(minimize_scalar(cost, bounds=(low, high), method="bounded").x))


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """[n, C] softmax of logits over a temperature."""
    scaled = logits / temperature
    found: np.ndarray = np.exp(scaled - scaled.max(1, keepdims=True))
    return found / found.sum(1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Above:
    """Rows whose most likely class has a probability of at least some threshold."""

    rows: int
    right: int
    at_least: float  # share that is right, at least, with 95 % confidence (one-sided, Clopper and Pearson)

    @property
    def precision(self) -> float:
        return self.right / self.rows if self.rows else 0.0


def above(shares: np.ndarray, labels: np.ndarray, threshold: float) -> Above:
    """Of probabilities [n, C] and true labels [n]."""
    from scipy.stats import beta

    sure = shares.max(1) >= threshold
    rows, right = int(sure.sum()), int((shares.argmax(1) == labels)[sure].sum())
    least = float(beta.ppf(0.05, right, rows - right + 1)) if right else 0.0
    return Above(rows, right, least)
