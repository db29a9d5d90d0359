"""What the rows look like to the model: for the terminal and as one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from lora_lab.base.tokenizer import decode
from lora_lab.config.data import DataConfig
from lora_lab.data.check import Finding
from lora_lab.data.dataset import Dataset
from lora_lab.data.readable import unknown_token_id
from lora_lab.data.store import label_counts
from lora_lab.report import pages
from lora_lab.runtime import console, storage

if TYPE_CHECKING:
    from lora_lab.data.encode import Encoder

_BINS = 12
_LABELS = 20
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


@dataclasses.dataclass(frozen=True)
class Shown:
    """One example as pieces of text of equal weight, and what is learned of it that is no token of its text."""

    origin: str
    tokens: int
    items: int
    pieces: list[tuple[str, float]]  # (text, weight): 0 is not trained on
    learned: str  # label, tags, answer, or the second text (a target; the worse answer)


@dataclasses.dataclass(frozen=True)
class Bin:
    """Examples of like length."""

    start: int  # tokens, inclusive
    end: int
    count: int
    share: float  # of the largest bin


@dataclasses.dataclass(frozen=True)
class Overview:
    """Everything that is shown of one data set."""

    key: str
    rows_read: int
    rows_used: int
    dropped: dict[str, int]
    examples: int
    formats: str
    tokens: int
    supervised_share: float
    by_token: bool  # tokens are learned, not rows as a whole
    percentiles: dict[str, int]
    bins: list[Bin]
    labels: dict[str, int]
    rows: list[Shown]
    unknown: str  # the token of what the base cannot read; empty where there is none


def overview(data: Dataset, encoder: Encoder, rows: int) -> Overview:
    """Figures of a data set, and `rows` of its examples: evenly spread, and the longest."""
    tokenizer = encoder.tokenizer
    lengths, supervised = data.lengths, data.supervised
    count = len(lengths)
    marks = {"shortest": 0, "median": 50, "95 %": 95, "99 %": 99, "longest": 100}
    spread = np.linspace(0, count - 1, num=max(1, rows - 1)).astype(int)
    places = list(dict.fromkeys([*map(int, spread), int(lengths.argmax())] if count else []))
    return Overview(
        key=data.key,
        rows_read=data.rows_read,
        rows_used=data.rows_used,
        dropped=data.rows_dropped,
        examples=count,
        formats=", ".join(dict.fromkeys(report.format for report in data.reports)),
        tokens=int(lengths.sum()),
        supervised_share=float(supervised.sum() / max(1, lengths.sum())),
        by_token=bool(supervised.sum() > count),
        percentiles={name: int(np.percentile(lengths, q)) for name, q in marks.items()} if count else {},
        bins=_bins(lengths) if count else [],
        labels=dict(list(label_counts(data.reports).items())[:_LABELS]),
        rows=[_shown(data, place, encoder) for place in places[:rows]],
        unknown=(tokenizer.unk_token or "") if unknown_token_id(tokenizer) is not None else "",
    )


def _bins(lengths: np.ndarray) -> list[Bin]:
    """At most `_BINS` of a round width, from the shortest to the longest."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    widths = (step * 10**power for power in itertools.count() for step in (1, 2, 5))
    width = next(one for one in widths if longest // one - shortest // one < _BINS)
    places, first = lengths // width, shortest // width
    counts = np.bincount(places - first)
    return [
        Bin(width * (first + place), width * (first + place + 1) - 1, int(count), count / counts.max())
        for place, count in enumerate(counts)
    ]


def _shown(data: Dataset, place: int, encoder: Encoder) -> Shown:
    [example] = data[place]
    edges = [0, *(np.flatnonzero(np.diff(example.weights)) + 1), len(example.input_ids)]
    pieces = [
        (decode(encoder.tokenizer, example.input_ids[start:end]), float(example.weights[start]))
        for start, end in itertools.pairwise(edges)
    ]
    return Shown(example.origin, example.num_tokens, example.num_items, pieces, encoder.shown(example))


def show(overviews: list[Overview], findings: list[Finding], config: DataConfig, rows: int) -> None:
    """Print everything: figures, some rows, findings."""
    for data in overviews:
        _show_counts(data)
        if data.examples:
            _show_lengths(data, config.max_tokens)
        if data.labels:
            total = sum(data.labels.values())
            table = [[label, count, f"{100 * count / total:.1f} %"] for label, count in data.labels.items()]
            console.show_table(f"{data.key}: labels", ["label", "rows", "share"], table)
        for row in data.rows[:rows]:
            _show_row(row, data.unknown)
    for finding in findings:
        console.out.print(Text(console.shown(finding), style=_STYLES[finding.level]))


def _show_counts(data: Overview) -> None:
    rows = [["read", data.rows_read], ["used", data.rows_used], *([why, count] for why, count in data.dropped.items())]
    console.show_table(f"{data.key}: rows ({data.formats})", ["", "rows"], rows)


def _show_lengths(data: Overview, limit: int) -> None:
    bars = [
        [
            f"{b.start}-{b.end}" if b.end > b.start else f"{b.start}",
            b.count,
            "█" * round(30 * b.share) or ("▏" if b.count else ""),
        ]
        for b in data.bins
    ]
    marks = ", ".join(f"{name} {value}" for name, value in data.percentiles.items())
    title = f"{data.key}: tokens of {data.examples} examples ({marks}; data.max_tokens={limit})"
    console.show_table(title, ["tokens", "examples", ""], bars, numbers=slice(1, 2))
    if data.by_token:
        console.say("trained", f"{100 * data.supervised_share:.1f} % of {data.tokens:,} tokens are trained on")


def _show_row(row: Shown, unknown: str) -> None:
    """Trained text stands out: green in a terminal, between ⟦ and ⟧ elsewhere. What the base cannot read is red."""
    text = Text(f"── {console.shown(row.origin)}: {row.tokens} tokens, {row.items} learned ", style="bold cyan")
    text.append("──\n")
    for piece, weight in ((console.shown(piece), weight) for piece, weight in row.pieces):
        mark = "" if weight in (0, 1) else f"(weight {weight:g})"
        if console.out.is_terminal:
            text.append(mark + piece, style="bold green" if weight else "default")
        else:
            text.append(f"⟦{mark}{piece}⟧" if weight else piece)
    if row.learned:
        text.append("\n→ ")
        text.append(console.shown(row.learned), style="bold green")
    if unknown:
        text.highlight_words([console.shown(unknown)], style="bold red")
    console.out.print(text)


def write_html(file: Path, overviews: list[Overview], findings: list[Finding], config: DataConfig, name: str) -> None:
    """The same as one page that needs nothing from elsewhere. Every text of the data is escaped."""
    page = pages.render("data.html.jinja", name=name, overviews=overviews, findings=findings, config=config)
    file.parent.mkdir(parents=True, exist_ok=True)
    storage.write_text(file, page)
