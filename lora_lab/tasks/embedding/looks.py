"""What to know about rows of queries and documents before vectors are trained on them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from lora_lab.data.dataset import Dataset
from lora_lab.data.encode import Told

_NAMED = 3  # rows in a sentence


class _Row(NamedTuple):
    query: str
    positive: str
    negatives: list[str]
    origin: str


def look(train: Dataset | None, held_out: Dataset | None) -> list[Told]:
    """Texts that contradict each other, and what both sides share; texts are compared without capitals, width and blanks."""
    found: list[Told] = []
    rows = {part.key: list(_rows(part)) for part in (train, held_out) if part is not None}
    for key, own in rows.items():
        found += _contradictions(key, own) + _repeated(key, own)
    if train is not None and held_out is not None:
        found += _shared(train.key, rows[train.key], rows[held_out.key])
    return found


def _rows(data: Dataset) -> Iterator[_Row]:
    table = data.table.select(["texts", "origin", "copy"]).take(pa.array(data.chosen))
    for row in table.to_pylist():
        if not row["copy"]:
            query, positive, *negatives = map(plain, row["texts"])
            yield _Row(query, positive, negatives, row["origin"])


def plain(text: str) -> str:
    """A text without capitals, width and blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _contradictions(key: str, rows: list[_Row]) -> list[Told]:
    """Negatives that are right for an equal query."""
    right: dict[str, dict[str, str]] = {}
    for row in rows:
        right.setdefault(row.query, {}).setdefault(row.positive, row.origin)
    wrong = [
        f"{row.origin} (positive in {right[row.query][text]})"
        for row in rows
        for text in row.negatives
        if text in right[row.query]
    ]
    if not wrong:
        return []
    sentence = f"{len(wrong)} negatives are what an equal query should find: {_named(wrong)}. Remove them from the row."
    return [("warning", key, sentence)]


def _repeated(key: str, rows: list[_Row]) -> list[Told]:
    """Equal texts of several rows, which are masked where they meet in a step."""
    found: list[Told] = []
    for what, texts in (("query", [row.query for row in rows]), ("document", [row.positive for row in rows])):
        count = len(texts) - len(set(texts))
        if count:
            sentence = f"{count} of {len(rows)} rows have the {what} of an earlier row; in a step equal texts are no negatives of each other."
            found.append(("note", key, sentence))
    return found


def _shared(key: str, train: list[_Row], held_out: list[_Row]) -> list[Told]:
    """What is trained on and measured with."""
    trained_documents = {text for row in train for text in (row.positive, *row.negatives)}
    documents = [row for row in held_out if row.positive in trained_documents]
    trained_queries = {row.query for row in train}
    queries = [row for row in held_out if row.query in trained_queries]
    found: list[Told] = []
    if documents:
        sentence = (
            f"{len(documents)} of {len(held_out)} held-out rows ask for a document that training rows have too "
            f"({_named([row.origin for row in documents])}), so the figures are of documents that are known, not of new ones. "
            "data.eval_ratio keeps rows of one document on one side."
        )
        found.append(("warning", key, sentence))
    if queries:
        sentence = (
            f"{len(queries)} held-out queries are training queries too ({_named([row.origin for row in queries])})."
        )
        found.append(("warning", key, sentence))
    return found


def _named(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")
