"""Metrics of predictions against what was expected, computed by the libraries that the field reports them with.

Shares lie in 0..1; BLEU and chrF in 0..100, as sacrebleu prints them. What a library leaves undefined (the precision
of a class that was never predicted, the correlation of a constant) is 0.0, so no result is ever NaN. Results are plain
Python numbers, lists and dicts, ready for JSON. Libraries are imported where they are used; none downloads anything.

Which way a metric is better is declared at the function that computes it (`reports`), and everything that compares runs asks
`lower_is_better`.
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from statistics import fmean
from typing import Any, Literal, TypeVar

import numpy as np

Language = Literal["en", "zh"]

# Chinese characters: the zero 〇, extension A, the unified block, compatibility forms, extensions B and later.
_CJK = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CJK_CHARACTER = re.compile(f"[{_CJK}]")
_CJK_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_TO_FULL_WIDTH = 0xFEE0  # from an ASCII character to its full-width form (Unicode, "Halfwidth and Fullwidth Forms")
_FULL_WIDTH_PUNCTUATION = frozenset(chr(ord(mark) + _TO_FULL_WIDTH) for mark in string.punctuation)
_FULL_WIDTH_LETTERS = {ord(letter): ord(letter) + _TO_FULL_WIDTH for letter in string.ascii_letters}
_TAG = re.compile("O|[BIMES](-.+)?")
_Function = TypeVar("_Function", bound=Callable[..., Any])
_LOWER: dict[str, bool] = {"loss": True}  # of every metric: whether lower is better


def reports(
    *others: Callable[..., Any], lower: Sequence[str] = (), higher: Sequence[str] = ()
) -> Callable[[_Function], _Function]:
    """Declare, at the function that computes them, which metrics it reports and which way each of them is better.

    Args:
        others: declared functions whose metrics it reports as well.
    """

    def declare(function: _Function) -> _Function:
        own = {**dict.fromkeys(lower, True), **dict.fromkeys(higher, False)}
        for name, is_lower in own.items():
            known = _LOWER.setdefault(name, is_lower)
            assert known == is_lower, f"{name}: {function.__qualname__} declares it the other way than before"
        vars(function)["reported"] = tuple(
            dict.fromkeys([*own, *(name for other in others for name in reported(other))])
        )
        return function

    return declare


def reported(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the metrics that a function declares; none for one that declares nothing."""
    return getattr(function, "reported", ())


def is_declared(name: str) -> bool:
    """Whether a function that was loaded declares which way a metric is better."""
    return name in _LOWER


def lower_is_better(name: str) -> bool:
    """Which way a metric is better. (One that no function declares is a mistake of ours, not of the user.)"""
    assert name in _LOWER, f"{name}: no function declares which way it is better; see tasks.metrics.reports"
    return _LOWER[name]


def as_cost(name: str, value: float) -> float:
    """The value such that lower is better."""
    return value if lower_is_better(name) else -value


@reports(higher=("accuracy", "precision", "recall", "f1", "f1_micro", "f1_weighted"))
def classification(
    targets: Sequence[int], predicted: Sequence[int], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """One class per row, by scikit-learn.

    Args:
        targets: the true class of each row, a place in `names`.
        predicted: the predicted class of each row, a place in `names`.
        names: every class, all different. Means over classes are, as scikit-learn's, over those that some row has or is put
            into: a class of neither has no precision or recall to take a mean of.

    Returns:
        Metrics: accuracy; precision, recall and f1, each the unweighted mean over classes (macro); f1_micro, which with
        one class per row equals accuracy; f1_weighted, the mean by true rows. All are shares.
        Details: per_class, by name: precision, recall, f1 and rows, how many truly are of the class; confusion_matrix:
        labels and rows, a count for each true class (row) and predicted class (column).

    Raises:
        ValueError: no rows, not as many predictions as targets, or a class outside `names`.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    _check_rows(targets, predicted)
    for place in (*targets, *predicted):
        if not 0 <= place < len(names):  # scikit-learn would drop the row without a word
            raise ValueError(f"class {place} is outside the {len(names)} names.")
    classes = range(len(names))
    macro, micro, weighted = (
        precision_recall_fscore_support(targets, predicted, average=average, zero_division=0)
        for average in ("macro", "micro", "weighted")
    )
    each = precision_recall_fscore_support(targets, predicted, labels=classes, average=None, zero_division=0)
    metrics = {
        "accuracy": float(accuracy_score(targets, predicted)),
        "precision": float(macro[0]),
        "recall": float(macro[1]),
        "f1": float(macro[2]),
        "f1_micro": float(micro[2]),
        "f1_weighted": float(weighted[2]),
    }
    with warnings.catch_warnings():
        # With one name it asks for `labels` even when they are given.
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        counts = confusion_matrix(targets, predicted, labels=classes).tolist()
    details = {
        "per_class": {name: _scores(*values) for name, values in zip(names, zip(*each, strict=True), strict=True)},
        "confusion_matrix": {"labels": list(names), "rows": counts},
    }
    return metrics, details


@reports(higher=("accuracy", "precision", "recall", "f1", "f1_micro"), lower=("hamming_loss",))
def multi_label(
    targets: np.ndarray, predicted: np.ndarray, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Any number of labels per row, by scikit-learn.

    Args:
        targets: [N, C], 1 where the row has the label, else 0.
        predicted: [N, C], likewise.
        names: the C labels, all different.

    Returns:
        Metrics: accuracy, the share of rows with every label right; precision, recall and f1, each the unweighted mean
        over labels (macro); f1_micro, over all N x C decisions; hamming_loss, the share of these that are wrong.
        Details: per_class, by name: precision, recall, f1 and rows, how many truly have the label.

    Raises:
        ValueError: no rows, shapes that differ from each other or from the names, or a value other than 0 and 1.
    """
    from sklearn.metrics import accuracy_score, hamming_loss, precision_recall_fscore_support

    _check_rows(targets, predicted)
    if targets.shape != predicted.shape or targets.shape != (len(targets), len(names)):
        raise ValueError(f"targets {targets.shape}, predicted {predicted.shape}: must be [rows, {len(names)} labels].")
    if not (np.isin(targets, (0, 1)).all() and np.isin(predicted, (0, 1)).all()):
        raise ValueError("targets and predicted: must be 0 or 1 everywhere.")
    # Column by column, not as one matrix: scikit-learn reads [N, 1] as one class per row, and would average 0 and 1.
    each: list[tuple[float, float, float]] = [
        precision_recall_fscore_support(true, found, average="binary", zero_division=0)[:3]
        for true, found in zip(targets.T, predicted.T, strict=True)
    ]
    precision, recall, f1 = (fmean(values) for values in zip(*each, strict=True))
    decisions = precision_recall_fscore_support(targets.ravel(), predicted.ravel(), average="binary", zero_division=0)
    metrics = {
        "accuracy": float(accuracy_score(targets, predicted)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "f1_micro": float(decisions[2]),
        "hamming_loss": float(hamming_loss(targets, predicted)),
    }
    rows = targets.sum(axis=0)
    return metrics, {"per_class": {name: _scores(*each[i], rows[i]) for i, name in enumerate(names)}}


FOUND_WITHIN = (1, 5, 10)  # of recall


@reports(higher=(*(f"recall@{count}" for count in FOUND_WITHIN), "mrr@10", "ndcg@10"))
def retrieval(ranks: Sequence[Sequence[int]]) -> dict[str, float]:
    """Where the documents stand that queries should find: as trec_eval computes it, the mean over all queries.

    Args:
        ranks: for each query the places, from 1 on, of all documents that are right for it.

    Raises:
        ValueError: no queries, or one for which nothing is right.
    """
    if not ranks or not all(ranks):
        raise ValueError("retrieval needs queries, each with at least one right document")
    found = {
        f"recall@{count}": fmean(sum(rank <= count for rank in own) / len(own) for own in ranks)
        for count in FOUND_WITHIN
    }
    first = [min(own) for own in ranks]
    found["mrr@10"] = fmean(1 / rank if rank <= 10 else 0.0 for rank in first)
    found["ndcg@10"] = fmean(
        sum(1 / math.log2(rank + 1) for rank in own if rank <= 10)
        / sum(1 / math.log2(place + 1) for place in range(1, min(len(own), 10) + 1))
        for own in ranks
    )
    return found


@reports(higher=("pearson", "spearman"))
def correlations(targets: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """pearson and spearman as in `regression`, of similarities, whose unit is not that of the targets."""
    found = regression(targets, predicted)
    return {name: found[name] for name in ("pearson", "spearman")}


@reports(lower=("mse", "mae"), higher=("pearson", "spearman"))
def regression(targets: Sequence[float] | np.ndarray, predicted: Sequence[float] | np.ndarray) -> dict[str, float]:
    """A number per row: errors by scikit-learn, correlations by scipy.

    Returns:
        mse, in the squared unit of the targets; mae, in their unit; pearson (linear) and spearman (by rank), -1..1.
        Both correlations are 0.0 where they are undefined: fewer than 2 rows, or the same value in every row.

    Raises:
        ValueError: no rows, not as many predictions as targets, or a value that is not finite.
    """
    from scipy.stats import DegenerateDataWarning, pearsonr, spearmanr
    from sklearn.metrics import mean_absolute_error, mean_squared_error

    _check_rows(targets, predicted)
    true, found = np.asarray(targets, np.float64), np.asarray(predicted, np.float64)
    metrics = {
        "mse": float(mean_squared_error(true, found)),
        "mae": float(mean_absolute_error(true, found)),
        "pearson": 0.0,
        "spearman": 0.0,
    }
    if len(true) < 2:
        return metrics
    with warnings.catch_warnings():
        # A constant, or values that differ by rounding alone: a model early in training may well predict that.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        for name, correlate in (("pearson", pearsonr), ("spearman", spearmanr)):
            value = float(correlate(true, found).statistic)
            metrics[name] = 0.0 if math.isnan(value) else value
    return metrics


@reports(higher=("precision", "recall", "f1", "f1_macro", "accuracy"))
def entities(targets: list[list[str]], predicted: list[list[str]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Named entities from the tags of tokens, by seqeval in its default mode, which follows conlleval.

    An entity counts as found if type, first and last token all agree. Tags are O, or B, I, M, E, S with "-type" (or
    alone: one type, named "_"): IOB, IOB2, BIOES and BMES. Where tags break their scheme the mode is lenient: an I-, M-
    or E- after O or after another type begins an entity, and an entity without E- ends where the next begins or at O.
    seqeval does not know M- and would lose the entity in B-X M-X B-X, so M- is shown to it as I-, which means the same.

    Args:
        targets: the true tags, a list per row.
        predicted: the predicted tags, as many in each row as in `targets`.

    Returns:
        Metrics, all shares: precision, recall and f1 over all entities (micro); f1_macro, the unweighted mean over the
        types that occur in targets or predictions; accuracy, over tokens, O included. With no entity in either, all but
        accuracy are 0.0.
        Details: per_type, by type: precision, recall, f1 and entities, how many there truly are.

    Raises:
        ValueError: no tokens, numbers of tags that differ, or a tag of another form, named in the message.
    """
    from seqeval.metrics import accuracy_score, classification_report

    _check_rows(targets, predicted)
    for row, (true, found) in enumerate(zip(targets, predicted, strict=True)):
        if len(true) != len(found):
            raise ValueError(f"row {row}: {len(found)} predicted tags for {len(true)} tokens.")
    if not any(targets):
        raise ValueError("no tokens, so there is nothing to measure.")
    true_tags, found_tags = _inside_as_i(targets), _inside_as_i(predicted)
    metrics = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "f1_macro": 0.0}
    metrics["accuracy"] = float(accuracy_score(targets, predicted))
    if all(tag == "O" for row in true_tags + found_tags for tag in row):
        return metrics, {"per_type": {}}  # seqeval would take the mean over no types, which is NaN
    report = classification_report(true_tags, found_tags, output_dict=True, zero_division=0)
    micro, macro, _ = (report.pop(f"{mean} avg") for mean in ("micro", "macro", "weighted"))
    metrics |= {
        "precision": float(micro["precision"]),
        "recall": float(micro["recall"]),
        "f1": float(micro["f1-score"]),
        "f1_macro": float(macro["f1-score"]),
    }
    per_type = {
        kind: {
            "precision": float(scores["precision"]),
            "recall": float(scores["recall"]),
            "f1": float(scores["f1-score"]),
            "entities": int(scores["support"]),
        }
        for kind, scores in report.items()
    }
    return metrics, {"per_type": per_type}


def entities_in(tags: list[str]) -> list[dict[str, Any]]:
    """The entities that tags mark: `type` ('' without one), and the places of their `first` and `last` token.

    By seqeval, as in `entities`.

    Raises:
        ValueError: a tag of another form.
    """
    from seqeval.metrics.sequence_labeling import get_entities

    [inside] = _inside_as_i([tags])
    return [
        {"type": kind if kind != "_" else "", "first": first, "last": last}
        for kind, first, last in get_entities(inside)
    ]


@reports(higher=("exact_match", "f1"))
def squad(predictions: list[str], answers: list[list[str]], language: Language) -> dict[str, float]:
    """Short answers against every answer that is right, by torchmetrics' form of the SQuAD script.

    Case and punctuation do not count, nor do a, an and the in English. In Chinese the words are single characters and
    runs of anything else between spaces, as in MLQA (github.com/facebookresearch/MLQA). CMRC 2018 splits text in much
    the same way, but its f1 counts only the longest run of words that both have in common, so it tends to be lower.

    Args:
        predictions: an answer per row.
        answers: the right ones of each row. None at all: the question has no answer, and "" is right, as in SQuAD 2.
        language: of the answers.

    Returns:
        exact_match: the share of rows that equal one of their answers; f1: the mean overlap of words with the answer
        that it is highest for.

    Raises:
        ValueError: no rows, or not as many lists of answers as predictions.
    """
    from torchmetrics.functional.text import squad as torchmetrics_squad

    _check_rows(answers, predictions)
    prepare = _spaced_characters if language == "zh" else str
    scores = torchmetrics_squad(
        [{"id": str(row), "prediction_text": prepare(text)} for row, text in enumerate(predictions)],
        [
            {"id": str(row), "answers": {"text": [prepare(text) for text in texts or [""]]}}
            for row, texts in enumerate(answers)
        ],
    )
    return {name: scores[name].item() / 100 for name in ("exact_match", "f1")}


@reports(higher=("rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact_match"))
def overlap(predictions: list[str], references: list[str], language: Language) -> dict[str, float]:
    """Free text against one reference per row, by rouge_score and sacrebleu.

    English ROUGE compares Porter stems of lower-case words in a-z and 0-9; Chinese ROUGE compares single characters,
    and words and numbers in other scripts. BLEU splits text by sacrebleu's tokenizers 13a and zh; it counts runs of up
    to four tokens over all rows together, so it is 0 where no prediction has four, even if all are right.

    Args:
        predictions: a text per row.
        references: a text per row.
        language: of the texts.

    Returns:
        rouge1, rouge2, rougeL: the mean over rows of the F-measure, shares; exact_match: the share of rows whose texts
        are equal but for white space at the ends; bleu and chrf (chrF2): of the whole corpus, 0..100.

    Raises:
        ValueError: no rows, or not as many references as predictions.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    _check_rows(references, predictions)
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True, tokenizer=_ChineseTokenizer() if language == "zh" else None)
    pairs = list(zip(references, predictions, strict=True))
    rouge = [scorer.score(reference, prediction) for reference, prediction in pairs]
    bleu = BLEU(tokenize={"en": "13a", "zh": "zh"}[language])
    return {
        **{kind: fmean(scores[kind].fmeasure for scores in rouge) for kind in kinds},
        "bleu": float(bleu.corpus_score(predictions, [references]).score),
        "chrf": float(CHRF().corpus_score(predictions, [references]).score),
        "exact_match": fmean(reference.strip() == prediction.strip() for reference, prediction in pairs),
    }


def paired_margin(losses: np.ndarray, whole: np.ndarray, origins: Sequence[str], confidence: float) -> float:
    """How far the mean difference of paired losses [n, 2] may lie below the true one, by how much rows differ in it (Student's t).

    Args:
        losses: of each example the sum and the weight that it is divided by, as `Task.losses_of` gives them.
        whole: the same of what is compared with.
        origins: the row of each example; several of one row count once.
        confidence: of one side.
    """
    from scipy import stats

    _, rows = np.unique(origins, return_inverse=True)
    differences = np.bincount(rows, losses[:, 0] - whole[:, 0])
    weights = np.bincount(rows, losses[:, 1])
    count = len(weights)
    if count < 2:
        return math.inf if differences.any() else 0.0
    spread = differences - weights * (differences.sum() / weights.sum())
    error = math.sqrt(count / (count - 1) * np.square(spread).sum()) / weights.sum()
    return float(stats.t.ppf(confidence, count - 1) * error)


@reports(lower=("perplexity",))
def perplexity(loss: float) -> float:
    """e to the power of `loss`, a mean cross-entropy in nats per token; a loss above 700 counts as 700, to stay finite.

    Raises:
        ValueError: the loss is NaN.
    """
    if math.isnan(loss):
        raise ValueError("the loss is NaN, which has no perplexity.")
    return math.exp(min(loss, 700.0))


class _ChineseTokenizer:
    """What RougeScorer asks of a tokenizer; its own one keeps a-z and 0-9 only."""

    def tokenize(self, text: str) -> list[str]:
        return _CJK_WORD.findall(text.lower())


def _check_rows(targets: Sized, predicted: Sized) -> None:
    if len(targets) != len(predicted):
        raise ValueError(f"{len(predicted)} predictions for {len(targets)} rows.")
    if not len(targets):
        raise ValueError("no rows, so there is nothing to measure.")


def _scores(precision: float, recall: float, f1: float, rows: int) -> dict[str, float]:
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1), "rows": int(rows)}


def _inside_as_i(rows: Iterable[Iterable[str]]) -> list[list[str]]:
    """The tags with I- for M-; ValueError for a tag that seqeval would warn of and then misread."""
    return [[_readable(tag) for tag in row] for row in rows]


def _readable(tag: str) -> str:
    if not _TAG.fullmatch(tag):
        raise ValueError(f"tag {tag!r}: must be O, or one of B, I, M, E, S followed by - and a type, such as B-PER.")
    return f"I{tag[1:]}" if tag.startswith("M") else tag


def _spaced_characters(text: str) -> str:
    """Chinese text without punctuation, spaces around each character, so that what splits at spaces counts characters.

    Latin letters become their full-width forms: the SQuAD script would drop the A of A股 as an article.
    """
    kept = (
        character
        for character in text
        if not unicodedata.category(character).startswith("P") and character not in _FULL_WIDTH_PUNCTUATION
    )
    return _CJK_CHARACTER.sub(r" \g<0> ", "".join(kept).translate(_FULL_WIDTH_LETTERS))
