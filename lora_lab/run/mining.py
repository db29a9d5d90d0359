"""`lora-lab mine`: for each row of queries and documents, further documents that a trained retriever wrongly takes for right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_lab.data import formats, sources
from lora_lab.data.formats import Record, RowError, promised
from lora_lab.data.sources import Row
from lora_lab.errors import ConfigError, DataError
from lora_lab.run import takes
from lora_lab.run.answering import Answering, ready
from lora_lab.run.predictions import new_jsonl
from lora_lab.run.trained import open_trained
from lora_lab.runtime import console, storage
from lora_lab.tasks.embedding.looks import plain

_QUERIES = 256  # that are compared with all documents at once


def mine(path: str, overrides: Sequence[str], data: str, out: str, count: int, margin: float) -> None:
    """Write the rows of a file, each with up to `count` more negatives: the documents of other rows that come nearest to its query.

    Left out are documents that are right for an equal query, and those that come nearer than `margin` below the cosine of the row's own
    positive, because they are likely to be right too.

    Raises:
        ConfigError: the run's task gives no vectors, or `out` is there or no .jsonl.
        DataError: a row that cannot be used.
    """
    run, config = open_trained(path, takes.MINE, overrides)
    if not config.task.vectors or "retrieval" not in config.task.formats:
        raise ConfigError(f"run={path}: task={config.task.name} finds no documents. Name a run of task=embedding.")
    place = new_jsonl(out)
    rows = _rows(data, config.data.columns)
    model = Answering(ready(run, config).loaded())
    try:
        documents = list(dict.fromkeys(promised(row.pair) for row in rows))
        queries = list(dict.fromkeys(promised(row.text) for row in rows))
        there = _vectors(model, "document", documents)
        asked = dict(zip(queries, _vectors(model, "query", queries), strict=True))
    finally:
        model.close()
    places = {text: number for number, text in enumerate(documents)}
    right = _right(rows)
    found: list[dict[str, Any]] = []
    for start in range(0, len(rows), _QUERIES):
        part = rows[start : start + _QUERIES]
        scores = np.stack([asked[promised(row.text)] for row in part]) @ there.T
        for row, own in zip(part, scores, strict=True):
            query, positive = promised(row.text), promised(row.pair)
            most = own[places[positive]] - margin
            forbidden = right[plain(query)] | {plain(query), *map(plain, row.label)}
            negatives = _nearest(own, most, documents, forbidden, count)
            found.append({"query": query, "positive": positive, "negatives": [*row.label, *negatives]})
    with storage.new_file(place) as file:
        file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace") for row in found)
    mined = sum(len(one["negatives"]) - len(row.label) for one, row in zip(found, rows, strict=True))
    without = sum(not one["negatives"] for one in found)
    console.say("mined", f"{mined:,} negatives for {len(found):,} rows of {len(documents):,} documents")
    if without:
        console.say(
            "mined",
            f"{without:,} rows have none: every other document is right, or nearer than margin={margin:g} allows",
        )
    console.say("written", place)


def _rows(data: str, mapping: dict[str, str] | None) -> list[Record]:
    """
    Raises:
        DataError: the file cannot be read, or naming the first row that cannot be used.
    """
    found = []
    for file in sources.find("data", data):
        for row in file.rows():
            try:
                found.append(_record(row, mapping))
            except RowError as error:
                raise DataError(f"{file.name} row {row.number}: {error}") from error
    if not found:
        raise DataError(f"data={data}: no rows.")
    return found


def _record(row: Row, mapping: dict[str, str] | None) -> Record:
    if row.problem is not None:
        raise RowError("unreadable", row.problem)
    own = {ours: theirs for ours, theirs in (mapping or {}).items() if theirs in row.values}
    return formats.read(sources.renamed(row, own).values, "retrieval")


def _vectors(model: Answering, column: str, texts: list[str]) -> np.ndarray:
    """[texts, D] float32, of length 1."""
    said = model.predictions([{column: text} for text in texts])
    vectors = np.array([one["vector"] for one in said], dtype=np.float32)
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    return unit


def _right(rows: list[Record]) -> dict[str, set[str]]:
    """For each query the documents that are right for it; texts are compared without capitals, width and blanks."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(plain(promised(row.text)), set()).add(plain(promised(row.pair)))
    return found


def _nearest(scores: np.ndarray, most: float, documents: list[str], forbidden: set[str], count: int) -> list[str]:
    """The documents with the highest scores that are allowed, the highest first, none twice."""
    found: list[str] = []
    seen = set(forbidden)
    for place in np.argsort(-scores, kind="stable"):
        if len(found) == count:
            break
        text = documents[int(place)]
        if scores[place] <= most and plain(text) not in seen:
            seen.add(plain(text))
            found.append(text)
    return found
