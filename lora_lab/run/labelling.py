"""`lora-lab label`: rows of a pool without labels, chosen to be labelled by hand, or with the labels that a trained classifier is sure of.

`lora-lab data check=labels`: labels of training rows that are likely to be wrong.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lora_lab.adapters.attach import base_of, without_adapter
from lora_lab.base.tokenizer import decode
from lora_lab.config.run import RunConfig
from lora_lab.data import sources
from lora_lab.data.dataset import Dataset, spread_examples
from lora_lab.data.encode import Example
from lora_lab.data.formats import RowError
from lora_lab.data.sources import Row
from lora_lab.errors import ConfigError, DataError
from lora_lab.explain import calibration, choosing, suspicious
from lora_lab.explain.calibration import Above
from lora_lab.explain.features import features
from lora_lab.run import takes
from lora_lab.run.answering import asked
from lora_lab.run.predictions import PREFIX, new_jsonl, write_rows
from lora_lab.run.prepared import Trained, prepare
from lora_lab.run.setup import Live, Setup
from lora_lab.run.trained import open_trained
from lora_lab.runtime import console
from lora_lab.tasks.base import eval_batches

Way = Literal["uncertain", "diverse", "random"]
_SAMPLED, _LEAST, _FOLDS, _SHOWN = (
    20_000,
    3,
    5,
    80,
)  # streamed rows that are looked at; rows of a class; folds; letters of a text
_KNOWN = 2000  # training rows that diverse rows are to be far from, evenly spread


@dataclasses.dataclass(frozen=True)
class Choose:
    """Rows to be labelled by hand."""

    way: Way
    count: int


@dataclasses.dataclass(frozen=True)
class Accept:
    """Rows that get the model's label."""

    threshold: float  # of the calibrated probability
    precision: float  # share of labels that must be right, with 95 % confidence


def label(path: str, overrides: Sequence[str], pool: str, out: str, wish: Choose | Accept) -> int:
    """Write rows of a pool in the format that `data.train` reads; how many.

    Raises:
        ConfigError: the run's task gives no row one class, `out` is there, or labels cannot be accepted with this precision.
        DataError: the pool cannot be read.
    """
    run, config = open_trained(path, takes.LABEL, overrides)
    if not config.task.one_class:
        raise ConfigError(
            f"run={path}: task={config.task.name} gives rows no single class. Name a run of task=classification."
        )
    place = new_jsonl(out)
    trained = Trained.of(run, config, need_train=isinstance(wish, Choose) and wish.way == "diverse")
    setup = trained.setup
    if isinstance(wish, Accept) and setup.held_out is None:
        raise ConfigError(
            f"accept={wish.threshold:g}: how sure the model may be believed is measured on held-out rows, and the run has none. Name some: "
            "data.eval=FILE"
        )
    rows, examples = _pool(setup, pool)
    with trained.loaded() as live:
        if isinstance(wish, Choose):
            chosen = _chosen(live, rows, examples, wish)
        else:
            chosen = _accepted(live, rows, examples, wish)
    write_rows(place, chosen)
    console.say("written", f"{place}: {len(chosen):,} of {len(rows):,} rows")
    return len(chosen)


def _pool(setup: Setup, name: str) -> tuple[list[dict[str, Any]], list[Example]]:
    """The rows that can be used as the file has them, and as the model sees them.

    Raises:
        DataError: none can.
    """
    rows, examples, problems = [], [], []
    config = setup.config.data
    for file in sources.find("pool", name, config.sample_by, config.field):
        for row in file.rows():
            try:
                found = asked(setup, Row(row.number, row.values, row.problem), file.name)
            except RowError as error:
                problems.append(f"{file.name} row {row.number}: {error}")
                continue
            assert not isinstance(found, str), "a task of classes generates nothing"
            rows.append(row.values)
            examples.append(found[0])
    if not rows:
        raise DataError(f"pool={name}: no row can be used. {problems[0] if problems else 'There is none.'}")
    if problems:
        console.say("left out", f"{len(problems):,} rows of the pool cannot be used; the first: {problems[0]}")
    return rows, examples


def logits_of(live: Live, examples: Sequence[Example]) -> np.ndarray:
    """[n, C] float32: the tuned model's score of each class."""
    task, found = live.setup.task, np.zeros((0, 0), dtype=np.float32)
    lengths = np.array([example.num_tokens for example in examples])
    with torch.no_grad(), live.autocast(), console.steps("classes", len(examples)) as progress:
        for places in eval_batches(lengths, task.forward.together):
            batch = task.collate([examples[place] for place in places], np.random.default_rng(0))
            logits = task.logits(live.model, batch.to(live.model.device)).cpu().numpy()
            found = found if found.size else np.zeros((len(examples), logits.shape[1]), dtype=np.float32)
            found[places] = logits
            progress.advance(len(places))
    return found


# -- rows to be labelled by hand ----------------------------------------------------------------------------------------


def _chosen(live: Live, rows: list[dict[str, Any]], examples: list[Example], wish: Choose) -> list[dict[str, Any]]:
    setup = live.setup
    shares = calibration.probabilities(logits_of(live, examples))
    if wish.way == "uncertain":
        places = choosing.uncertain(shares, wish.count)
    elif wish.way == "diverse":
        data = setup.training_rows()
        known = spread_examples(data if isinstance(data, Dataset) else data.sample(_KNOWN), _KNOWN)
        with without_adapter(live.model), setup.task.forward.plain(live.model), live.autocast():
            base: Any = base_of(live.model)
            vectors = features(base, setup.task, [*examples, *known], "vectors")
        places = choosing.diverse(vectors[: len(examples)], vectors[len(examples) :], wish.count)
    else:
        places = choosing.at_random(len(rows), wish.count, setup.config.seed)
    if len(places) < wish.count:
        console.say("label", f"the pool has {len(places):,} rows that can be used, fewer than count={wish.count:,}")
    column, labels = _column(setup), setup.task.learned["labels"]
    console.say("label", f"fill the column {column} of each row; until then data.train refuses it")
    return [
        {**rows[place], column: None, f"{PREFIX}label": labels[int(shares[place].argmax())],
         f"{PREFIX}score": float(shares[place].max())}
        for place in places
    ]  # fmt: skip


def _column(setup: Setup) -> str:
    """What the rows' files call the label."""
    return (setup.config.data.columns or {}).get("label", "label")


# -- labels that are accepted -------------------------------------------------------------------------------------------


def _accepted(live: Live, rows: list[dict[str, Any]], examples: list[Example], wish: Accept) -> list[dict[str, Any]]:
    """
    Raises:
        ConfigError: too few labels are right on held-out rows, or that cannot be told of so few.
    """
    setup = live.setup
    labels = setup.task.learned["labels"]
    held_out = list(setup.held_out_rows())
    true = np.array([labels.index(example["labels"][0]) for example in held_out])
    logits = logits_of(live, held_out)
    heat = calibration.temperature(logits, true)
    seen = calibration.above(calibration.probabilities(logits, heat), true, wish.threshold)
    console.say("calibrated", f"temperature {heat:.3f}, on {len(held_out):,} held-out rows")
    _check(seen, wish, len(held_out))
    shares = calibration.probabilities(logits_of(live, examples), heat)
    places = np.flatnonzero(shares.max(1) >= wish.threshold)
    expected = float((1 - shares[places].max(1)).mean()) if len(places) else 0.0
    console.say(
        "accepted",
        f"{len(places):,} of {len(rows):,} rows; expected to be wrong: {expected:.1%}, by the calibrated probabilities. Of {seen.rows:,} such held-out "
        f"rows {1 - seen.precision:.1%} were, and with 95 % confidence at most {1 - seen.at_least:.1%} are",
    )
    _show_classes(labels, true, shares[places].argmax(1))
    column = _column(setup)
    return [
        {**rows[place], column: labels[int(shares[place].argmax())], f"{PREFIX}score": float(shares[place].max())}
        for place in places.tolist()
    ]


def _check(seen: Above, wish: Accept, rows: int) -> None:
    if seen.at_least >= wish.precision:
        return
    if seen.rows and seen.precision >= wish.precision:
        why = "which so few cannot prove. Hold more rows out (data.eval=FILE), or ask for less"
    else:
        why = "which is not enough. Raise accept, train on more rows, or ask for less"
    raise ConfigError(
        f"precision={wish.precision:g}: of {rows:,} held-out rows {seen.rows:,} reach accept={wish.threshold:g}, and {seen.precision:.1%} of their "
        f"labels are right (at least {seen.at_least:.1%} with 95 % confidence), {why}. Nothing is written."
    )


def _show_classes(labels: Sequence[str], true: np.ndarray, accepted: np.ndarray) -> None:
    """Sure labels lean to easy classes."""
    cells = []
    for number, name in enumerate(labels):
        own = int((accepted == number).sum())
        cells.append([name, own, own / max(1, len(accepted)), float((true == number).mean())])
    console.show_table("accepted labels", ["class", "rows", "share", "share of held-out rows"], cells)


# -- labels that are there already --------------------------------------------------------------------------------------


def check_labels(config: RunConfig, out: Path) -> list[dict[str, Any]]:
    """Write the training rows whose labels are likely to be wrong, the least likely label first, as the frozen base's vectors tell them
    apart: nothing is trained but a logistic regression on parts of the rows.

    Raises:
        ConfigError: the task gives no row one class, or too few rows of two classes are there.
    """
    if not config.task.one_class:
        raise ConfigError(
            f"check=labels: task={config.task.name} gives rows no single class. It is for task=classification."
        )
    setup = prepare(config)
    data = setup.training_rows()
    data = data if isinstance(data, Dataset) else data.sample(_SAMPLED)
    examples = [example for example in data if not example.copy]
    kept, folds = _of_large_classes([example["labels"][0] for example in examples])
    names = setup.task.learned["labels"]
    examples = [examples[place] for place in kept]
    labels = np.array([names.index(example["labels"][0]) for example in examples])
    present, numbers = np.unique(labels, return_inverse=True)
    [base] = setup.bases()
    vectors = features(base.eval(), setup.task, examples, "vectors")
    shares = suspicious.out_of_fold(vectors, numbers, folds, config.seed)
    places = suspicious.suspicious(shares, numbers)
    found = [
        _suspect(setup, examples[place], names[present[shares[place].argmax()]], shares[place], numbers[place])
        for place in places
    ]
    write_rows(out, found)
    title = f"{len(found):,} of {len(examples):,} labels are likely to be wrong ({len(found) / len(examples):.1%}); {folds} folds"
    cells = [
        [one["row"], one["label"], one["likelier"], one["probability_of_label"], one["text"][:_SHOWN]]
        for one in found[:20]
    ]
    console.show_table(title, ["row", "label", "likelier", "probability of the label", "text"], cells, slice(3, 4))
    console.say("written", out)
    return found


def _of_large_classes(labels: Sequence[str]) -> tuple[list[int], int]:
    """Places of the rows whose classes have enough rows to be told apart from folds, and how many folds.

    Raises:
        ConfigError: fewer than two classes have.
    """
    counts = collections.Counter(labels)
    small = [name for name, count in counts.items() if count < _LEAST]
    if len(counts) - len(small) < 2:
        raise ConfigError(
            f"check=labels: fewer than two classes have {_LEAST} rows, so none can be learned from the others' folds."
        )
    if small:
        console.say("left out", f"classes of fewer than {_LEAST} rows: {', '.join(small[:10])}")
    folds = min(_FOLDS, *(count for count in counts.values() if count >= _LEAST))
    return [place for place, name in enumerate(labels) if name not in small], folds


def _suspect(setup: Setup, example: Example, likelier: str, shares: np.ndarray, own: int) -> dict[str, Any]:
    text = decode(setup.encoder.tokenizer, example.input_ids, skip_special_tokens=True).strip()
    return {
        "row": example.origin, "label": example["labels"][0], "likelier": likelier, "probability_of_label": float(shares[own]),
        "probability_of_likelier": float(shares.max()), "text": text,
    }  # fmt: skip
