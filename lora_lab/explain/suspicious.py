"""Labels that are likely to be wrong: confident learning (Northcutt et al. 2021, arXiv:1911.00068) over probabilities that come from folds which a
row was not in."""

from __future__ import annotations

import warnings

import numpy as np

_ROUNDING = 1e-6  # of probabilities that are compared


def out_of_fold(vectors: np.ndarray, labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """[n, C] the probability of each class for each row, by logistic regression on all folds but the row's own.

    Args:
        vectors: [n, D] float32.
        labels: [n] int64, the numbers of classes from 0 on; each class has at least two rows.
        folds: at most as many as the smallest class has rows.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found: np.ndarray = cross_val_predict(model, vectors, labels, cv=parts, method="predict_proba")
    return found


def suspicious(shares: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Places of the rows that confidently belong to another class than their label, the least likely labels first.

    A row belongs to a class confidently if its probability is at least the mean that the class has among rows labelled so; of several such
    classes the likeliest counts. Rows whose own label is the likeliest are left out. As cleanlab's filter_by='confident_learning'.

    Args:
        shares: [n, C] probabilities from folds that a row was not in.
        labels: [n] int64.
    """
    rows = np.arange(len(labels))
    present = np.unique(labels)
    limits = np.full(shares.shape[1], np.inf)
    for number in present:
        limits[number] = shares[labels == number, number].mean()
    confident = shares >= limits - _ROUNDING
    belongs = np.where(confident.sum(1) > 1, shares.argmax(1), confident.argmax(1))
    likeliest = shares[rows, labels] >= shares.max(1) - _ROUNDING
    found = np.flatnonzero(confident.any(1) & (belongs != labels) & ~likeliest)
    return found[np.argsort(shares[found, labels[found]], kind="stable")]
