"""Ranking by words alone (BM25, as Lucene has it): what a trained retriever is compared with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

_CJK = "\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_PART = re.compile(rf"[{_CJK}]+|[^\W_{_CJK}]+")
_K1, _B = 1.5, 0.75


def words(text: str) -> list[str]:
    """Words in small letters; of a script without blanks its characters and their pairs."""
    found: list[str] = []
    for part in _PART.findall(text.lower()):
        if re.match(f"[{_CJK}]", part):
            found += [*part, *(part[place : place + 2] for place in range(len(part) - 1))]
        else:
            found.append(part)
    return found


class BM25:
    """Documents that can be asked."""

    def __init__(self, documents: Sequence[Sequence[str]]):
        """
        Args:
            documents: the words of each.
        """
        counts = [Counter(document) for document in documents]
        self._numbers = {word: number for number, word in enumerate(dict.fromkeys(w for one in counts for w in one))}
        lengths = np.array([len(document) for document in documents], dtype=np.float64)
        rows = np.repeat(np.arange(len(counts)), [len(one) for one in counts])
        columns = np.array([self._numbers[word] for one in counts for word in one], dtype=np.int64)
        often = np.array([count for one in counts for count in one.values()], dtype=np.float64)
        seen = np.bincount(columns, minlength=len(self._numbers))
        rare = np.log(1 + (len(documents) - seen + 0.5) / (seen + 0.5))
        size = _K1 * (1 - _B + _B * lengths / max(lengths.mean(), 1e-9))
        weights = rare[columns] * often / (often + size[rows])
        self._weights = csr_matrix((weights, (rows, columns)), shape=(len(counts), max(1, len(self._numbers))))

    def scores(self, query: Sequence[str]) -> np.ndarray:
        """[documents] how well each fits the words of a query."""
        asked = np.zeros(self._weights.shape[1])
        for word in query:
            if word in self._numbers:
                asked[self._numbers[word]] += 1
        found: np.ndarray = self._weights @ asked
        return found
