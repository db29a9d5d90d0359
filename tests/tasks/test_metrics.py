"""Metrics: numbers worked out by hand or by another entry of the library, the cases without a value, and refusals."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from lora_lab.tasks import metrics as module
from lora_lab.tasks.metrics import (
    classification,
    entities,
    entities_in,
    multi_label,
    overlap,
    perplexity,
    regression,
    squad,
)

NAMES = ["a", "b", "c"]


def numbers(result):
    """Every number of a nested result, after checking that all of it is plain Python, ready for JSON."""
    if type(result) in (dict, list, tuple):
        return [n for part in (result.values() if type(result) is dict else result) for n in numbers(part)]
    assert type(result) in (int, float, str), type(result)
    return [] if type(result) is str else [result]


def test_classification_by_hand():
    # a: 1 of 2 found, 2 predicted; b: 2 of 2 found, 3 predicted; c: never predicted.
    measured, details = classification([0, 0, 1, 1, 2], [0, 1, 1, 1, 0], NAMES)
    assert measured == pytest.approx(
        {
            "accuracy": 3 / 5,
            "precision": (1 / 2 + 2 / 3 + 0) / 3,
            "recall": (1 / 2 + 1 + 0) / 3,
            "f1": (1 / 2 + 4 / 5 + 0) / 3,
            "f1_micro": 3 / 5,
            "f1_weighted": (2 * 1 / 2 + 2 * 4 / 5 + 1 * 0) / 5,
        }
    )
    assert details["per_class"]["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2}
    assert details["per_class"]["b"] == pytest.approx({"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "rows": 2})
    assert details["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 1}
    assert details["confusion_matrix"] == {"labels": NAMES, "rows": [[1, 1, 0], [0, 2, 0], [1, 0, 0]]}


def test_classification_equals_the_report():
    from sklearn.metrics import classification_report

    draw = np.random.default_rng(0)
    targets, predicted = draw.integers(0, 3, (2, 200)).tolist()
    measured, details = classification(targets, predicted, NAMES)
    report = classification_report(targets, predicted, target_names=NAMES, output_dict=True)
    assert measured == pytest.approx(
        {
            "accuracy": report["accuracy"],
            "precision": report["macro avg"]["precision"],
            "recall": report["macro avg"]["recall"],
            "f1": report["macro avg"]["f1-score"],
            "f1_micro": report["accuracy"],
            "f1_weighted": report["weighted avg"]["f1-score"],
        }
    )
    for name in NAMES:
        assert list(details["per_class"][name].values()) == pytest.approx(list(report[name].values()))


def test_classes_that_no_row_has_do_not_count_in_the_means():
    from sklearn.metrics import f1_score

    measured, details = classification([0, 0], [0, 0], ["a", "b"])
    assert (measured["accuracy"], measured["f1"], measured["f1_weighted"]) == (1.0, 1.0, 1.0)
    measured, _ = classification([0, 0], [0, 1], ["a", "b", "c"])  # one row is put into b, which then counts, as 0
    assert measured["f1"] == pytest.approx(f1_score([0, 0], [0, 1], average="macro", zero_division=0))
    assert measured["recall"] == 0.25
    assert details["confusion_matrix"]["rows"] == [[2, 0], [0, 0]]


def test_multi_label_by_hand():
    targets = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]])
    predicted = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]])
    # a: all right; b: 2 of 2 found, 3 predicted; c: its one row is missed. In all 4 found, 5 predicted, 5 true.
    measured, details = multi_label(targets, predicted, NAMES)
    assert measured == pytest.approx(
        {
            "accuracy": 3 / 5,
            "precision": (1 + 2 / 3 + 0) / 3,
            "recall": (1 + 1 + 0) / 3,
            "f1": (1 + 4 / 5 + 0) / 3,
            "f1_micro": 4 / 5,
            "hamming_loss": 2 / 15,
        }
    )
    assert list(details) == ["per_class"]
    assert details["per_class"]["b"] == pytest.approx({"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "rows": 2})
    assert details["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 1}


def test_multi_label_equals_the_report():
    from sklearn.metrics import classification_report

    targets, predicted = np.random.default_rng(1).integers(0, 2, (2, 100, 3))
    measured, details = multi_label(targets, predicted, NAMES)
    report = classification_report(targets, predicted, target_names=NAMES, output_dict=True, zero_division=0)
    assert [measured[name] for name in ("precision", "recall", "f1")] == pytest.approx(
        [report["macro avg"][name] for name in ("precision", "recall", "f1-score")]
    )
    assert measured["f1_micro"] == pytest.approx(report["micro avg"]["f1-score"])
    for name in NAMES:
        assert list(details["per_class"][name].values()) == pytest.approx(list(report[name].values()))


def test_one_label_is_not_read_as_two_classes():
    # The label: 1 of 2 found, 1 predicted. A mean with the class "not it" (2 of 2 found, 3 predicted) would be 0.7333.
    targets, predicted = np.array([[1], [1], [0], [0]]), np.array([[1], [0], [0], [0]])
    measured, _ = multi_label(targets, predicted, ["toxic"])
    assert (measured["precision"], measured["recall"], measured["accuracy"]) == (1.0, 0.5, 0.75)
    assert measured["f1"] == measured["f1_micro"] == pytest.approx(2 / 3)


def test_regression_by_hand():
    # Errors 0, 1, -1, 2. Deviations from the means: -1.5, -.5, .5, 1.5 and -2, 0, -1, 3. Ranks: 1, 2, 3, 4 and
    # 1, 3, 2, 4.
    assert regression([1, 2, 3, 4], [1, 3, 2, 6]) == pytest.approx(
        {"mse": 6 / 4, "mae": 4 / 4, "pearson": 7 / math.sqrt(5 * 14), "spearman": 1 - 6 * 2 / (4 * 15)}
    )


def test_regression_equals_numpy():
    targets, predicted = np.random.default_rng(2).normal(size=(2, 50)).astype(np.float32)
    measured = regression(targets, predicted)
    assert measured["pearson"] == pytest.approx(np.corrcoef(targets, predicted)[0, 1], abs=1e-6)
    ranks = targets.argsort().argsort(), predicted.argsort().argsort()
    assert measured["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert measured["mse"] == pytest.approx(np.square(targets - predicted).mean())


@pytest.mark.parametrize(
    ("targets", "predicted"),
    [
        ([1, 2, 3], [5, 5, 5]),
        ([5, 5, 5], [1, 2, 3]),
        ([0, 0], [0, 0]),
        ([1], [2]),
    ],
)
def test_no_correlation_of_a_constant(targets, predicted):
    measured = regression(targets, predicted)
    assert (measured["pearson"], measured["spearman"]) == (0.0, 0.0)
    assert measured["mse"] == pytest.approx(np.square(np.subtract(targets, predicted)).mean())


def test_two_rows_correlate():
    assert regression([1, 2], [30, 4]) == pytest.approx({"mse": 422.5, "mae": 15.5, "pearson": -1.0, "spearman": -1.0})


TRUE_TAGS = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG", "O"]]
FOUND_TAGS = [["B-PER", "I-PER", "O", "B-PER"], ["O", "O", "B-ORG"]]


def test_entities_by_hand():
    # 3 entities, 3 predicted, of which only the first person is right in type and place; 4 of 7 tags are right.
    measured, details = entities(TRUE_TAGS, FOUND_TAGS)
    assert measured == pytest.approx(
        {"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3, "f1_macro": (2 / 3 + 0 + 0) / 3, "accuracy": 4 / 7}
    )
    assert details == {
        "per_type": {
            "LOC": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "entities": 1},
            "ORG": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "entities": 1},
            "PER": {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "entities": 1},
        }
    }


def test_entities_have_places():
    tags = ["B-PER", "M-PER", "E-PER", "O", "S-LOC", "B-ORG", "B-ORG", "I-ORG"]
    assert entities_in(tags) == [
        {"type": kind, "first": first, "last": last}
        for kind, first, last in (("PER", 0, 2), ("LOC", 4, 4), ("ORG", 5, 5), ("ORG", 6, 7))
    ]
    assert entities_in(["O", "B", "I"]) == [{"type": "", "first": 1, "last": 2}]
    with pytest.raises(ValueError, match="tag 'NOUN'"):
        entities_in(["NOUN"])


def test_entities_equal_seqeval():
    from seqeval.metrics import f1_score, precision_score, recall_score

    draw = np.random.default_rng(3)
    tags = ["O", "B-PER", "I-PER", "E-PER", "S-PER", "B-LOC", "I-LOC"]
    targets, predicted = (draw.choice(tags, (40, 12)).tolist() for _ in range(2))
    measured, _ = entities(targets, predicted)
    assert measured["precision"] == pytest.approx(precision_score(targets, predicted))
    assert measured["recall"] == pytest.approx(recall_score(targets, predicted))
    assert measured["f1"] == pytest.approx(f1_score(targets, predicted))
    assert measured["f1_macro"] == pytest.approx(f1_score(targets, predicted, average="macro"))


@pytest.mark.parametrize(
    ("tags", "number"),
    [
        (["B-X", "I-X", "B-X", "O"], 2),  # IOB2
        (["I-X", "I-X", "B-X", "O"], 2),  # IOB: B- only where an entity follows another one
        (["B-X", "I-X", "E-X", "S-X", "B-X", "E-X"], 3),  # BIOES
        (["B-X", "M-X", "E-X", "S-X", "B-X", "E-X"], 3),  # BMES
        (["B-X", "M-X", "B-X"], 2),  # broken: the first entity has no end
        (["B-X", "M-X", "S-X"], 2),
        (["M-X", "E-X", "O", "E-X"], 2),  # broken: no beginning
        (["B", "E", "S"], 2),  # words rather than types
        (["B-X-Y", "I-X-Y"], 1),
    ],
)
def test_schemes(tags, number):
    measured, details = entities([tags], [tags])
    assert [scores["entities"] for scores in details["per_type"].values()] == [number]
    assert measured == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "f1_macro": 1.0, "accuracy": 1.0}


def test_bmes_counts_as_bioes():
    # 2 entities, 2 predicted, one of them right; 3 of 6 tags are right.
    targets = [["B-NAME", "M-NAME", "E-NAME", "O", "B-ORG", "E-ORG"]]
    predicted = [["B-NAME", "M-NAME", "E-NAME", "B-ORG", "M-ORG", "M-ORG"]]
    measured, details = entities(targets, predicted)
    assert measured == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5, "f1_macro": 0.5, "accuracy": 0.5})
    as_i = [[[tag.replace("M-", "I-") for tag in row] for row in rows] for rows in (targets, predicted)]
    assert entities(*as_i) == (measured, details)


def test_no_entities():
    missed, details = entities([["B-PER", "O"]], [["O", "O"]])
    assert missed == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "f1_macro": 0.0, "accuracy": 0.5}
    assert details["per_type"]["PER"]["entities"] == 1
    invented, details = entities([["O", "O"]], [["B-PER", "O"]])
    assert (invented["f1"], details["per_type"]["PER"]["entities"]) == (0.0, 0)
    neither, details = entities([["O", "O"], []], [["O", "O"], []])
    assert (neither["f1"], neither["f1_macro"], neither["accuracy"], details) == (0.0, 0.0, 1.0, {"per_type": {}})


@pytest.mark.parametrize("tag", ["PER", "X-PER", "o", "", "B-", "BPER", "O-PER", "U-PER"])
def test_tags_of_another_form_are_refused(tag):
    for targets, predicted in ([["O", tag]], [["O", "O"]]), ([["O", "O"]], [["O", tag]]):
        with pytest.raises(ValueError, match=f"tag '{tag}': must be O, or one of B, I, M, E, S"):
            entities(targets, predicted)


@pytest.mark.parametrize(
    ("prediction", "answers", "language", "exact_match", "f1"),
    [
        ("the Eiffel Tower!", ["Eiffel tower"], "en", 1, 1),
        ("in Paris", ["Paris, France", "Paris"], "en", 0, 2 / 3),  # 1 of 2 words, 1 of 1; with France only 1/2
        ("", ["Paris"], "en", 0, 0),
        ("Paris", [], "en", 0, 0),
        ("", [], "en", 1, 1),
        ("《北京大学》。", ["北京 大学"], "zh", 1, 1),
        ("上海市", ["上海", "北京"], "zh", 0, 0.8),  # 2 of 3 characters, 2 of 2
        ("海上", ["上海"], "zh", 0, 1),  # the order is not counted
        ("约１～２年", ["约１２年"], "zh", 1, 1),
        ("gpt4 模型", ["GPT4模型"], "zh", 1, 1),  # one run and two characters, with a space or without
        ("股", ["A股"], "zh", 0, 2 / 3),  # the A is no article
        ("a股", ["Ａ股"], "zh", 1, 1),
        ("二〇〇四", ["二〇一四"], "zh", 0, 0.75),
        ("", ["上海"], "zh", 0, 0),
        ("，。", ["上海"], "zh", 0, 0),
    ],
)
def test_squad(prediction, answers, language, exact_match, f1):
    # torchmetrics counts in float32
    expected = pytest.approx({"exact_match": exact_match, "f1": f1}, abs=1e-6)
    assert squad([prediction], [answers], language) == expected


def test_squad_is_the_mean_over_rows():
    measured = squad(["北京", "上海市", "广"], [["北京"], ["上海"], ["深圳"]], "zh")
    assert measured == pytest.approx({"exact_match": 1 / 3, "f1": 1.8 / 3}, abs=1e-6)


def test_english_overlap_by_hand():
    # Row 1: "cats" has the stem "cat", so 3 of 3 words and 3 of 5, 2 of 2 pairs and 2 of 4. Row 2 has nothing.
    measured = overlap(["The cats sat.", ""], ["the cat sat on mats", "a dog"], "en")
    assert measured["rouge1"] == measured["rougeL"] == pytest.approx(0.75 / 2)
    assert measured["rouge2"] == pytest.approx(2 / 3 / 2)
    assert measured["exact_match"] == 0.0


def test_chinese_overlap_by_hand():
    measured = overlap(["我喜欢苹果"], ["我喜欢香蕉"], "zh")
    assert measured == pytest.approx(
        {
            "rouge1": 3 / 5,
            "rouge2": 2 / 4,
            "rougeL": 3 / 5,
            # Runs of 1 to 4 tokens: 3/5, 2/4, 1/3, 0/2. The last counts as half a hit (Chen and Cherry 2014, method 3).
            "bleu": 100 * (3 / 5 * 2 / 4 * 1 / 3 * 0.5 / 2) ** (1 / 4),
            # The mean over runs of 1 to 5 characters; there is none of 6.
            "chrf": 100 * (3 / 5 + 2 / 4 + 1 / 3 + 0 / 2 + 0 / 1) / 5,
            "exact_match": 0.0,
        }
    )


@pytest.mark.parametrize(
    ("language", "tokenize", "predictions", "references"),
    [
        ("en", "13a", ["The quick fox jumps, doesn't it?", "Hello there."], ["The quick brown fox jumps.", "Hello!"]),
        ("zh", "zh", ["我们在2024年训练了GPT模型。", "你好，世界"], ["我们于2024年训练GPT-2模型。", "你好世界！"]),
    ],
)
def test_bleu_and_chrf_equal_sacrebleu(language, tokenize, predictions, references):
    import sacrebleu

    measured = overlap(predictions, references, language)
    assert 0 < measured["bleu"] < 100
    assert measured["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [references], tokenize=tokenize).score)
    assert measured["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score)


def test_chinese_rouge_has_words_of_other_scripts():
    # 我 用 gpt 4 _ 模 型 against 我 用 bert 模 型: 4 of 6 and 4 of 5.
    assert overlap(["我用GPT-4模型"], ["我用BERT模型"], "zh")["rouge1"] == pytest.approx(2 * 4 / (6 + 5))
    assert overlap(["GPT，模型。"], ["gpt 模型"], "zh")["rouge2"] == 1.0


@pytest.mark.parametrize(("language", "text"), [("en", "one two three four five"), ("zh", "今天天气很好")])
def test_equal_texts(language, text):
    measured = overlap([f" {text}\n"], [f"\n{text} "], language)
    expected = {"rouge1": 1, "rouge2": 1, "rougeL": 1, "bleu": 100, "chrf": 100, "exact_match": 1}
    assert measured == pytest.approx(expected)
    assert overlap([text, "x"], [text, "y"], language)["exact_match"] == 0.5


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(8)) == pytest.approx(8)
    assert perplexity(1e9) == perplexity(math.inf) == math.exp(700) < math.inf
    with pytest.raises(ValueError, match="NaN"):
        perplexity(math.nan)


ZEROS, ONES = np.zeros((3, 2), int), np.ones((3, 2), int)


@pytest.mark.parametrize(
    "call",
    [
        lambda: classification([0], [1], NAMES),
        lambda: classification([2, 2, 2], [0, 0, 0], NAMES),
        lambda: classification([0, 0], [0, 0], ["only"]),
        lambda: classification(np.arange(40), np.arange(40), [str(i) for i in range(40)]),
        lambda: multi_label(ZEROS, ZEROS, ["a", "b"]),
        lambda: multi_label(ZEROS, ONES, ["a", "b"]),
        lambda: multi_label(ONES, ZEROS, ["a", "b"]),
        lambda: multi_label(ONES, ONES, ["a", "b"]),
        lambda: multi_label(ONES[:1, :1], ZEROS[:1, :1], ["a"]),
        lambda: multi_label(ZEROS.astype(bool), ONES.astype(bool), ["a", "b"]),
        lambda: multi_label(ZEROS.astype(np.float32), ONES.astype(np.float32), ["a", "b"]),
        lambda: regression([0.1] * 3, [1, 1, 1 + 3e-16]),
        lambda: regression(np.float32([1, 2]), np.float32([1e30, 1e30])),
        lambda: regression([1e-300, 2e-300], [1e-300, 3e-300]),
        lambda: entities([["O"]], [["O"]]),
        lambda: entities([["B-X"]], [["O"]]),
        lambda: entities([["O"]], [["S-X"]]),
        lambda: squad([""], [[""]], "en"),
        lambda: squad(["。"], [[]], "zh"),
        lambda: overlap([""], [""], "en"),
        lambda: overlap([""], ["一"], "zh"),
        lambda: overlap(["!"], ["a"], "en"),
        lambda: perplexity(math.inf),
    ],
)
def test_no_nan_and_nothing_but_plain_numbers(call):
    values = numbers(call())
    assert values
    assert all(map(math.isfinite, values))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classification([], [], NAMES), "no rows"),
        (lambda: classification([0, 1], [0], NAMES), "1 predictions for 2 rows"),
        (lambda: classification([0, 3], [0, 1], NAMES), "class 3 is outside the 3 names"),
        (lambda: classification([0, 1], [0, -100], NAMES), "class -100 is outside"),
        (lambda: multi_label(ZEROS[:0], ZEROS[:0], ["a", "b"]), "no rows"),
        (lambda: multi_label(ZEROS, ZEROS, NAMES), r"targets \(3, 2\), predicted \(3, 2\): must be \[rows, 3 labels\]"),
        (lambda: multi_label(ZEROS, ZEROS[:, :1], ["a", "b"]), r"predicted \(3, 1\)"),
        (lambda: multi_label(ZEROS, 2 * ONES, ["a", "b"]), "must be 0 or 1"),
        (lambda: multi_label(2 * ONES, ONES, ["a", "b"]), "must be 0 or 1"),
        (lambda: regression([], []), "no rows"),
        (lambda: regression([1.0], [math.nan]), "NaN"),
        (lambda: regression([1.0, 2.0], [1.0, math.inf]), "infinity"),
        (lambda: entities([], []), "no rows"),
        (lambda: entities([[], []], [[], []]), "no tokens"),
        # As many tags in all, so only a look at each row can tell.
        (lambda: entities([["O"], ["O", "O"]], [["O", "O"], ["O"]]), "row 0: 2 predicted tags for 1 tokens"),
        (lambda: squad([], [], "en"), "no rows"),
        (lambda: squad(["a", "b"], [["a"]], "en"), "2 predictions for 1 rows"),
        (lambda: overlap([], [], "zh"), "no rows"),
        (lambda: overlap(["a"], ["a", "b"], "en"), "1 predictions for 2 rows"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_it_is_light():
    # By its path, because the package around it loads torch for the tasks.
    heavy = ["sklearn", "scipy", "seqeval", "sacrebleu", "rouge_score", "torchmetrics", "torch"]
    code = f"import runpy, sys; runpy.run_path({module.__file__!r}); print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
