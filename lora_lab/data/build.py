"""`data.train` and `data.eval` as the configuration wants them: read, encoded, limited, split, without what policies drop."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lora_lab.config.data import DataConfig, Source
from lora_lab.data import augment, clean, sources, store
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.data.encode import Encoder
from lora_lab.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows of a run."""

    train: Dataset | Stream | None
    held_out: Dataset | None


def build(config: DataConfig, encoder: Encoder, need_train: bool = True, refuse: bool = True) -> Data:
    """Read and encode the rows of a run.

    Args:
        need_train: the training rows are wanted too (they are read anyway when the held-out rows are a share of them).
        refuse: raise for rows that the policies call errors; otherwise they are only counted in the reports.

    Raises:
        DataError: a file or rows that cannot be used, or no rows left.
    """
    clean.require(config.clean, config.clean_language)
    augment.require(config.augment)
    train: Dataset | Stream | None = None
    held_out: Dataset | None = None
    if config.eval is not None:
        held_out = _read("data.eval", config.eval, config.max_eval_rows, encoder.for_held_out(), refuse)
    if config.streaming and need_train:
        files = sources.find("data.train", config.train, config.sample_by, config.field)
        train = Stream("data.train", files, encoder, _weights(config.train))
    elif need_train or config.eval_ratio is not None:
        train = _read("data.train", config.train, config.max_train_rows, encoder, refuse)
    if config.eval_ratio is not None:
        assert isinstance(train, Dataset)  # a stream has no share of its rows held out
        refuse_empty(train)
        train, held_out = split(train, config.eval_ratio, config.split_seed, encoder.kept_together)
    if config.shared == "drop" and isinstance(train, Dataset) and held_out is not None:
        train = _without(train, np.isin(train.digests, held_out.digests), "also held out")
    if encoder.augmenter is not None and not isinstance(train, Stream):
        encoder.augmenter.let_go()  # the base will need the memory
    for data in (train, held_out):
        if isinstance(data, Dataset) and refuse:
            refuse_empty(data)
    _refuse_without_effect(config, [part for part in (train, held_out) if part is not None])
    return Data(train if need_train else None, held_out)


def in_blocks(data: Data, max_tokens: int) -> Data:
    """Short rows put together up to `max_tokens`, where the rows are stored."""
    train = data.train.in_blocks(max_tokens) if isinstance(data.train, Dataset) else data.train
    held_out = None if data.held_out is None else data.held_out.in_blocks(max_tokens)
    return Data(train, held_out)


def _refuse_without_effect(config: DataConfig, parts: list[Dataset | Stream]) -> None:
    """Options that only some rows know.

    Raises:
        ConfigError: there are no such rows.
    """
    if not parts:  # chat reads none
        return
    labelled = {"text_label", "pair_label", "token_labels"} & {name for part in parts for name in part.formats}
    if config.label_names is not None and not labelled:
        raise ConfigError(
            "data.label_names: no effect, because no file has labelled rows. Drop it, or check data.format."
        )
    suffixes = {Path(name).name.removesuffix(".gz").rpartition(".")[2] for part in parts for name in part.files}
    if config.sample_by != "line" and "txt" not in suffixes:
        raise ConfigError(f"data.sample_by={config.sample_by}: no effect, because no file is a .txt file. Drop it.")
    if config.field is not None and "json" not in suffixes:
        raise ConfigError(f"data.field={config.field}: no effect, because no file is a .json file. Drop it.")


def refuse_empty(data: Dataset) -> None:
    """Raise if no example is left, saying which policy dropped how many rows.

    Raises:
        DataError: as said.
    """
    if len(data):
        return
    dropped = ", ".join(f"{count} {kind}" for kind, count in data.rows_dropped.items())
    first = next((s for report in data.reports for kept in report.sentences.values() for s in kept), "")
    raise DataError(
        f"{data.key}: none of the {data.rows_read} rows is left: {dropped}. {f'The first: {first} ' if first else ''}"
        "Fix the rows, or loosen the policy (data.max_tokens, data.too_long, data.unusable)."
    )


def _weights(names: Any) -> list[float] | None:
    weights = [s.weight for s in names if isinstance(s, Source)] if isinstance(names, list) else []
    return [weight for weight in weights if weight is not None] or None  # all are told, or none


def _read(key: str, names: Any, limit: int | None, encoder: Encoder, refuse: bool) -> Dataset:
    """All rows of one key, encoded."""
    config = encoder.config
    entries, origins, files, rows, left = [], [], {}, [], limit
    for file in sources.find(key, names, config.sample_by, config.field):
        if left is not None and left <= 0:
            break
        entry = store.open_entry(file, encoder, left, refuse)
        if refuse:
            store.refuse_rows(key, entry.report, config)  # it may have been encoded for a look
        entries.append(entry)
        origins.append(np.full(len(entry.table), file.number))
        rows.append(entry.table.column("row").to_numpy() + (len(entries) << 40))
        files[str(file.path)] = entry.digest
        left = None if left is None else left - entry.report.rows
    table = pa.concat_tables([entry.table for entry in entries])
    data = Dataset(
        key,
        table,
        np.arange(len(table)),
        np.concatenate(origins),
        np.concatenate(rows),
        [entry.report for entry in entries],
        files,
        _weights(names),
        cached=all(entry.cached for entry in entries),
    )
    return _without(data, data.repeated, "duplicates") if config.duplicates == "drop" else data


def _without(data: Dataset, dropped: np.ndarray, why: str) -> Dataset:
    """The data without some examples, their rows counted under `why`."""
    rows = len(np.unique(data.rows[dropped]))
    return dataclasses.replace(data.only(~dropped), dropped={**data.dropped, **({why: rows} if rows else {})})


def split(data: Dataset, ratio: float, seed: int, together: str | None = None) -> tuple[Dataset, Dataset]:
    """Hold out a share of the rows, within each stratum.

    A row's side follows from its content and the seed alone: equal rows stay together, and adding rows moves few others.

    Args:
        together: a column of text; rows that are equal there stay together.

    Raises:
        DataError: one side would be empty.
    """
    draws = np.array([_draw(digest, seed) for digest in _digests(data, together)])
    strata = np.array([str(s) for s in data.table.column("stratum").take(pa.array(data.chosen)).to_pylist()])
    held = np.zeros(len(data), dtype=bool)
    for stratum in np.unique(strata):
        inside = strata == stratum
        different = np.unique(draws[inside])
        limit = round(ratio * len(different))
        held |= inside & (draws < different[limit] if limit < len(different) else inside)
    if held.all() or not held.any():
        parted = len(np.unique(strata))
        strata_too = f", or leave out data.stratify, whose column has {parted} different values" if parted > 1 else ""
        raise DataError(
            f"data.eval_ratio={ratio:g}: of {data.rows_used} rows, {len(np.unique(data.rows[held]))} would be held out. Both sides "
            f"need at least one: change the ratio{strata_too}, or add rows."
        )
    original = data.table.column("copy").to_numpy()[data.chosen] == 0
    sides = []
    for key, mask in (("data.train", ~held), ("data.eval", held & original)):
        others = len(np.unique(data.rows)) - len(np.unique(data.rows[mask]))
        sides.append(dataclasses.replace(data.only(mask), key=key, other_side=others))
    return sides[0], dataclasses.replace(sides[1], weights=None)


def _digests(data: Dataset, together: str | None) -> list[int]:
    """For each example a number that only its content decides."""
    if together is None:
        return [int(digest) for digest in data.digests]
    texts = data.table.column(together).take(pa.array(data.chosen)).to_pylist()
    return [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") for text in texts]


def _draw(digest: int, seed: int) -> int:
    """A number below 2**63 that only content and seed decide."""
    mixed = hashlib.blake2b(digest.to_bytes(8, "little") + seed.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(mixed, "little") >> 1
