"""What a file of rows seems to be for: its format and columns, what its labels are, and in which script it is written.

Nothing is decided here that the readers do not confirm: of all formats that the columns could be mapped to, the one that reads the rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_lab.data import hints, readable, sources
from lora_lab.data.formats import FORMATS, Format, Record, RowError, read
from lora_lab.data.sources import DataFile, HubData, Row
from lora_lab.errors import DataError

_LOOK_ROWS = 1_000  # that are read; files sorted by class show more than one only in many
_MOST_UNREADABLE = 0.2  # of the rows: a format that reads fewer than the others is not the file's
_MOST_CLASSES = 50  # whole numbers of more values than these are numbers
_FEW_CLASSES, _SHORT = 0.2, 40  # values that come again and again, each a word or two, are classes
# Columns that two languages of a translation are called by.
LANGUAGES = {
    "en": "English", "zh": "Chinese", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese", "ru": "Russian",
    "ja": "Japanese", "ko": "Korean", "ar": "Arabic", "nl": "Dutch", "pl": "Polish", "cs": "Czech", "tr": "Turkish", "vi": "Vietnamese",
    "th": "Thai", "hi": "Hindi", "uk": "Ukrainian", "ro": "Romanian", "sv": "Swedish", "fi": "Finnish",
}  # fmt: skip
_BY_NAME = {name.lower(): name for name in LANGUAGES.values()} | LANGUAGES | {
    "英文": "English", "英语": "English", "中文": "Chinese", "汉语": "Chinese"
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Guess:
    """What a look at the first rows of a file tells."""

    format: str
    columns: dict[str, str]  # `data.columns`: our names to the file's; empty: they have ours
    there: list[str]  # the columns of the file
    left: list[str]  # of them: those that are not read
    records: list[Record]  # the rows that could be read
    names: str  # a column of class names that stands beside numbered classes and is read in their place; or ''
    languages: tuple[str, str] | None  # of a translation whose columns say so

    @property
    def labels(self) -> list[Any]:
        return [record.label for record in self.records]

    @property
    def is_numbers(self) -> bool:
        """Whether the labels are numbers that do not count classes."""
        values = [_number(label) for label in self.labels]
        numbers = {value for value in values if value is not None}
        return None not in values and (len(numbers) > _MOST_CLASSES or any(value != int(value) for value in numbers))

    @property
    def is_several(self) -> bool:
        """Whether a row has any number of classes."""
        return any(isinstance(label, list) for label in self.labels)

    @property
    def scripts(self) -> set[str]:
        """What a base must read."""
        parts = [_given(record) for record in self.records]
        most = max(map(len, parts), default=0)  # texts of each side: a translation has two scripts
        found = {readable.script_of(part[place] for part in parts if place < len(part)) for place in range(most)}
        return {script for script in found if script} or {"Latin"}


def _given(record: Record) -> list[str]:
    """Texts of a row that a base must read; the names of classes are none."""
    if record.label is None or record.text is None:
        return readable.texts_of(record)
    return [text for text in (record.text, record.pair) if text]


def _number(label: Any) -> float | None:
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    with contextlib.suppress(ValueError):
        return float(label)
    return None


def look(
    file: DataFile | HubData, of_task: Sequence[str] | None = None, told: Mapping[str, str] | None = None
) -> Guess:
    """Look at the first rows of a file.

    Args:
        of_task: names of formats that are asked for; None: any.
        told: `data.columns`, as the user gave it.

    Raises:
        DataError: no format reads the rows; the sentence lists the columns and says how to name them.
    """
    rows = list(itertools.islice(file.rows(), _LOOK_ROWS))
    whole = [sources.renamed(row, dict(told or {})) for row in rows]
    readable_rows = [row for row in whole if row.problem is None]
    if not readable_rows:
        problem = (
            f"row {whole[0].number}: {whole[0].problem}" if whole else "no rows. Name a file with at least one row."
        )
        raise DataError(f"{file.key}={file.path}: {problem}")
    there = list(dict.fromkeys(column for row in readable_rows for column in row.values))
    found = [
        _tried(name, mapping, readable_rows) for name, mapping in _ways(there) if of_task is None or name in of_task
    ]
    best = min(found, key=lambda one: one.rank(readable_rows), default=None)
    if best is None or not best.records:
        raise DataError(_unknown(file, there, readable_rows, best, of_task))
    names = _class_names(best, readable_rows)
    mapping = {**best.columns, **({"label": names} if names else {})}
    known = FORMATS[best.format]
    used = {mapping.get(ours, ours) for ours in (*known.columns, *known.optional)}
    left = [column for column in there if column not in used]
    if names:
        best = _tried(best.format, mapping, readable_rows)
    return Guess(
        best.format, {**(told or {}), **mapping}, there, left, best.records, names, _languages(best.format, mapping)
    )


@dataclasses.dataclass(frozen=True)
class _Try:
    """A format with a mapping that makes the file's columns its own, and the rows that it reads."""

    format: str
    columns: dict[str, str]
    records: list[Record]
    problem: str  # of the first row that it does not read

    def rank(self, rows: Sequence[Row]) -> tuple[bool, int, int, bool, int]:
        """The better, the lower: reads the rows, reads most of the columns, changes few of their names, is made for such answers."""
        known = FORMATS[self.format]
        unread = len(self.records) < (1 - _MOST_UNREADABLE) * len(rows)
        columns = len({*known.columns, *known.typical} & ({*self.columns} | {*rows[0].values}))
        order = list(FORMATS).index(self.format)
        return unread, -columns, len(self.columns), self._sorts != self._classes(rows), order

    @property
    def _sorts(self) -> bool:
        return "label" in FORMATS[self.format].columns

    def _classes(self, rows: Sequence[Row]) -> bool:
        """Whether the column of answers holds a few values again and again."""
        answer = FORMATS[self.format].answer
        return answer is not None and _is_classes([row.values.get(self.columns.get(answer, answer)) for row in rows])


def _is_classes(values: Sequence[Any]) -> bool:
    texts = [str(value) for value in values]
    return len(set(texts)) <= max(2, _FEW_CLASSES * len(texts)) and max(map(len, texts), default=0) <= _SHORT


def _ways(there: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Formats that the columns are of, or could be mapped to."""
    for name, known in FORMATS.items():
        for needed in _needed(known):
            if set(needed) <= set(there):
                yield name, {}
                break
            mapping = hints.mapping_for([needed], there)
            if mapping is not None:
                yield name, mapping
                break
    pair = [column for column in there if column.lower() in _BY_NAME]
    if len(pair) == 2:
        yield "source_target", dict(zip(("source", "target"), pair, strict=True))


def _needed(known: Format) -> Iterator[tuple[str, ...]]:
    if known.typical:
        yield (*known.columns, *known.typical)
    yield known.columns


def _languages(name: str, mapping: Mapping[str, str]) -> tuple[str, str] | None:
    """What the columns of a translation say."""
    if name != "source_target" or not {"source", "target"} <= mapping.keys():
        return None
    source, target = (_BY_NAME.get(mapping[side].lower()) for side in ("source", "target"))
    return (source, target) if source and target else None


def _tried(name: str, mapping: dict[str, str], rows: Sequence[Row]) -> _Try:
    records, problem = [], ""
    for row in rows:
        values = sources.renamed(row, mapping)
        try:
            if values.problem is None:
                records.append(read(values.values, name))
        except RowError as error:
            problem = problem or f"row {row.number}: {error}"
    return _Try(name, mapping, records, problem)


def _class_names(best: _Try, rows: Sequence[Row]) -> str:
    """A column of texts that has one value for each numbered class; '' if there is none."""
    numbers = {str(label) for label in (record.label for record in best.records) if isinstance(label, int | str)}
    if "label" not in FORMATS[best.format].columns or not 1 < len(numbers) <= _MOST_CLASSES:
        return ""
    if not all(number.isdecimal() for number in numbers):
        return ""
    own = {best.columns.get(ours, ours) for ours in FORMATS[best.format].columns}
    label = best.columns.get("label", "label")
    for column in (column for column in rows[0].values if column not in own):
        pairs = {(str(row.values.get(label)), row.values.get(column)) for row in rows}
        texts = {text for _, text in pairs}
        if len(pairs) == len(numbers) == len(texts) and all(
            isinstance(text, str) and text.strip() and not text.isdecimal() for text in texts
        ):
            return column
    return ""


def _unknown(
    file: DataFile | HubData,
    there: Sequence[str],
    rows: Sequence[Row],
    best: _Try | None,
    of_task: Sequence[str] | None,
) -> str:
    place = f"{file.key}={file.path}"
    if best is not None:
        return f"{place}: its columns are those of {best.format}, and no row can be read: {best.problem}"
    asked = [name for name in FORMATS if of_task is None or name in of_task]
    formats = "; ".join(f"{name}: {', '.join(FORMATS[name].columns)}" for name in asked)
    proposed = _proposed(there, rows) if of_task is None or "text_label" in of_task else ""
    return (
        f"{place}: columns {', '.join(there)} fit no format{' of this task' if of_task else ''}. Say which is which"
        f"{f', such as {proposed}' if proposed else ' with data.columns={OURS: YOURS}'}. There are {formats}."
    )


def _proposed(there: Sequence[str], rows: Sequence[Row]) -> str:
    """The option for the longest texts and the classes among the columns; '' if there are no such columns."""
    values = {column: [row.values.get(column) for row in rows] for column in there}
    texts = {
        column: sum(len(str(one)) for one in found)
        for column, found in values.items()
        if all(isinstance(one, str) for one in found)
    }
    text = max(texts, key=texts.__getitem__, default=None)
    label = next((column for column in there if column != text and _is_classes(values[column])), None)
    return hints.option({"text": text, "label": label}) if text is not None and label is not None else ""
