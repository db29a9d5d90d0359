"""Calibration, choice of rows and suspicious labels, beside what the field's libraries say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lora_lab.explain import calibration, choosing, suspicious


def test_a_temperature_gives_the_probabilities_that_labels_were_drawn_with():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(4000, 3)) * 2
    shares = calibration.probabilities(logits)
    labels = np.array([draw.choice(3, p=row) for row in shares])
    assert calibration.temperature(logits, labels) == pytest.approx(1, abs=0.1)
    found = calibration.temperature(logits * 5, labels)  # a model that is too sure
    assert found == pytest.approx(5, abs=0.5)
    np.testing.assert_array_equal(calibration.probabilities(logits * 5, found).argmax(1), logits.argmax(1))
    assert calibration.probabilities(np.array([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]


def test_what_is_right_above_a_threshold_is_counted_with_its_bound():
    shares = np.array([[0.96, 0.04], [0.2, 0.8], [0.97, 0.03], [0.01, 0.99]])
    found = calibration.above(shares, np.array([0, 1, 1, 1]), 0.95)
    assert (found.rows, found.right) == (3, 2)
    assert found.precision == pytest.approx(2 / 3)
    # Clopper and Pearson: with this share, so many right ones or more come in 5 % of all draws
    assert stats.binom.sf(1, 3, found.at_least) == pytest.approx(0.05)
    none = calibration.above(shares, np.array([0, 1, 1, 1]), 0.999)
    assert (none.rows, none.precision, none.at_least) == (0, 0.0, 0.0)


def test_uncertain_rows_are_those_whose_likeliest_class_is_the_least_likely():
    shares = np.array([[0.9, 0.1], [0.5, 0.5], [0.3, 0.7], [0.45, 0.55]])
    assert choosing.uncertain(shares, 3) == [1, 3, 2]


@pytest.mark.parametrize("labelled", [0, 3, 1500])
def test_diverse_rows_are_each_the_farthest_from_those_before(labelled):
    draw = np.random.default_rng(1)
    rows, known = draw.normal(size=(40, 5)), draw.normal(size=(labelled, 5))
    rows, known = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (rows, known))
    found = choosing.diverse(rows, known, 6)
    assert len(set(found)) == 6
    before = list(known)
    for number, place in enumerate(found):
        if before:
            distances = 1 - (rows @ np.array(before).T).max(1)
            distances[found[:number]] = -1
            assert distances[place] == pytest.approx(distances.max())
        before.append(rows[place])
    assert sorted(choosing.diverse(rows[:4], known, 9)) == [0, 1, 2, 3]


def test_rows_at_random_are_the_seeds():
    assert choosing.at_random(100, 5, 3) == choosing.at_random(100, 5, 3) != choosing.at_random(100, 5, 4)
    assert choosing.at_random(3, 5, 0) == [0, 1, 2]


def blobs(classes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors around a middle for each class, their true labels, and labels of which a tenth is turned."""
    draw = np.random.default_rng(seed)
    true = draw.integers(0, classes, 300)
    vectors = draw.normal(size=(classes, 8))[true] * 4 + draw.normal(size=(300, 8))
    turned = draw.random(300) < 0.1
    return vectors, true, np.where(turned, (true + draw.integers(1, classes, 300)) % classes, true)


@pytest.mark.parametrize("classes", [2, 5])
def test_turned_labels_are_found(classes):
    vectors, true, labels = blobs(classes, classes)
    found = suspicious.suspicious(suspicious.out_of_fold(vectors, labels, 5, 0), labels)
    turned = set(np.flatnonzero(true != labels).tolist())
    hits = turned & set(found.tolist())
    assert len(hits) >= 0.6 * len(turned)
    assert len(hits) >= 0.8 * len(found)


@pytest.mark.parametrize("classes", [2, 5])
def test_suspicious_labels_are_cleanlabs(classes):
    cleanlab = pytest.importorskip("cleanlab.filter")
    vectors, _, labels = blobs(classes, 10 + classes)
    shares = suspicious.out_of_fold(vectors, labels, 5, 0)
    theirs = cleanlab.find_label_issues(
        labels, shares, filter_by="confident_learning", return_indices_ranked_by="self_confidence", n_jobs=1
    )
    assert suspicious.suspicious(shares, labels).tolist() == theirs.tolist()
