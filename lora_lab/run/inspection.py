"""`lora-lab inspect`: why a trained model says what it says of some rows, where its adapter works, and which training rows taught it.

Everything is in `inspect.json`; the page and the terminal show it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lora_lab.adapters import deltas
from lora_lab.adapters.attach import without_adapter
from lora_lab.base.tokenizer import decode
from lora_lab.data.dataset import Dataset, spread_examples
from lora_lab.data.encode import Example
from lora_lab.errors import ConfigError
from lora_lab.explain import ablation, anatomy, attributions, influence, variants
from lora_lab.explain.attributions import Attribution
from lora_lab.explain.influence import Influence
from lora_lab.report import inspect_report
from lora_lab.run import takes
from lora_lab.run.answering import predicted, unlabelled
from lora_lab.run.prepared import Trained
from lora_lab.run.setup import Live, Setup
from lora_lab.run.trained import open_trained
from lora_lab.runtime import console, storage

JSON, PAGE = "inspect.json", "inspect.html"
_ABLATED, _LOOKED_AT = 64, 256  # held-out rows: that layers are switched off for; of which the worst are explained
_NAMED = 5  # training rows that are named for and against
_CHARS = 400  # of a text


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be explained."""

    rows: Sequence[str] = ()  # held-out rows by number or name; none: those with the highest loss
    texts: Sequence[str] = ()  # rows without a label
    count: int = 4  # held-out rows, where none are named
    among: int = 1000  # training rows that are looked through, evenly spread; 0: none


def inspect(path: str, overrides: Sequence[str], asked: Asked) -> dict[str, Any]:
    """Explain rows of a trained run, its layers and where its answers come from; what is written.

    Raises:
        ConfigError: there is nothing to explain, or a row that is not there.
        DataError: a text that cannot be used.
    """
    run, config = open_trained(path, takes.INSPECT, overrides)
    trained = Trained.of(run, config, need_train=asked.among > 0)
    setup = trained.setup
    _check(setup, asked)
    with trained.loaded() as live:
        rows = [*_texts(live, asked.texts), *_held_out(live, asked)]
        found = {
            "run": str(run.path),
            "task": config.task.name,
            "explains": setup.task.explains,
            "base": "the base under the trained head" if setup.kind.new_modules else "the base",
            "layers": _layers(live, trained),
            "rows": _explained(live, rows),
            "taught": _taught(live, trained, rows, asked.among),
        }
    storage.write_text(run.path / JSON, storage.dump_json(found))
    inspect_report.write(run.path / PAGE, found)
    inspect_report.show(found)
    console.say("page", run.path / PAGE)
    return found


def _check(setup: Setup, asked: Asked) -> None:
    if asked.texts and not setup.config.task.predicts:
        raise _no_label(setup, asked.texts[0])
    if setup.held_out is None and not asked.texts:
        raise ConfigError("data.eval: the run has no held-out rows. Name some: lora-lab inspect run=DIR data.eval=FILE")
    if setup.held_out is None and asked.rows:
        raise ConfigError(f"row={asked.rows[0]}: the run has no held-out rows. Name some with data.eval=FILE.")


def _no_label(setup: Setup, text: str) -> ConfigError:
    return ConfigError(
        f"text={text}: what task={setup.config.task.name} says of a text is no label, and a row with one is needed. Name rows with labels: "
        "lora-lab inspect run=DIR data.eval=FILE"
    )


# -- the rows -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row to be explained."""

    example: Example  # with what was said in the place of its label, where that is one
    expected: str  # '': it has no label
    said: str  # '': nothing is said of such rows


def _texts(live: Live, texts: Sequence[str]) -> list[_Row]:
    found = []
    for number, text in enumerate(texts, start=1):
        example = dataclasses.replace(unlabelled(live.setup, {"text": text}, number)[0], origin=f"text {number}")
        row = _row(live, example)
        if not row.said:
            raise _no_label(live.setup, text)
        found.append(dataclasses.replace(row, expected=""))
    return found


def _held_out(live: Live, asked: Asked) -> list[_Row]:
    """The named rows, or those of the highest loss among evenly spread ones."""
    setup = live.setup
    if setup.held_out is None or (asked.texts and not asked.rows):
        return []
    if asked.rows:
        return [_row(live, _named(setup.held_out, name)) for name in asked.rows]
    examples = spread_examples(setup.held_out, _LOOKED_AT)
    order = range(len(examples))
    if not setup.config.task.compares_rows:
        with live.autocast():
            losses = setup.task.losses_of(live.model, examples)
        order = np.argsort(-losses[:, 0] / losses[:, 1], kind="stable").tolist()
    chosen: dict[str, Example] = {}
    for place in order:
        chosen.setdefault(examples[place].origin, examples[place])
    return [_row(live, example) for example in [*chosen.values()][: asked.count]]


def _named(data: Dataset, name: str) -> Example:
    """
    Raises:
        ConfigError: there is no such row, or there are several.
    """
    wanted = f" row {name}" if name.isdecimal() else name
    found = {example.origin: example for example in data if example.origin == name or example.origin.endswith(wanted)}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ConfigError(f"row={name}: may be {' or '.join([*found][:3])}. Write which: 'row={next(iter(found))}'")
    raise ConfigError(
        f"row={name}: no held-out row that is used is called so. They have the numbers that they have in their file, from 1; the first is "
        f"{data[0][0].origin!r}."
    )


def _row(live: Live, example: Example) -> _Row:
    setup, expected = live.setup, live.setup.encoder.shown(example)
    if not setup.config.task.predicts or setup.config.task.generates:
        return _Row(example, expected, "")
    with live.autocast():
        found = predicted(setup, live.model, [example])[example.origin]
    said = setup.task.as_said(example, found)
    if said is None:
        return _Row(example, expected, "")
    score = f" ({found['score']:.3f})" if "score" in found else ""
    return _Row(said, expected, f"{setup.encoder.shown(said)}{score}")


@contextlib.contextmanager
def _base(live: Live) -> Iterator[None]:
    """Inside the block the model is the base, under a trained head where the base has none of its own: what a head says that was never trained
    means nothing."""
    new = live.setup.kind.new_modules
    if not new:
        with without_adapter(live.model):
            yield
        return
    with variants.off(live.model, [name for name in variants.adapted(live.model) if name not in new]):
        yield


def _explained(live: Live, rows: Sequence[_Row]) -> list[dict[str, Any]]:
    found = []
    with console.steps("tokens", 2 * len(rows)) as progress:
        for row in rows:
            tuned = attributions.explain(live, row.example)
            progress.advance()
            with _base(live):
                base = attributions.explain(live, row.example)
            progress.advance()
            models = {"base": _attribution(live, base), "tuned": _attribution(live, tuned)}
            found.append({"row": row.example.origin, "expected": row.expected, "said": row.said, **models})
    return found


def _attribution(live: Live, found: Attribution) -> dict[str, Any]:
    tokenizer = live.setup.encoder.tokenizer
    texts = [[decode(tokenizer, [token]) for token in row.tolist()] for row in found.tokens]
    return {
        "output": found.output,
        "output_of_nothing": found.empty,
        "completeness_error": found.error,
        "relative_error": found.relative_error,
        "steps": found.steps,
        "sequences": [
            {"tokens": words, "integrated_gradients": own.tolist(), "gradient_x_input": product.tolist()}
            for words, own, product in zip(texts, found.integrated, found.gradient_input, strict=True)
        ],
    }


# -- the layers ---------------------------------------------------------------------------------------------------------


def _layers(live: Live, trained: Trained) -> dict[str, Any]:
    """The update's size in each part of the model, and how far the loss rises without it."""
    against = deltas.reason_against(trained.run.adapter)
    updates = [] if against else anatomy.updates(live.model, deltas.read(trained.run.adapter, trained.setup.skeleton()))
    parts = variants.parts(live.model)
    found: dict[str, dict[str, Any]] = {name: {"part": name} for name in parts}
    for name, own in found.items():
        inside = [one for one in updates if one.module in parts[name]]
        if inside:
            own |= {
                "size": _root(one.norm for one in inside) / _root(one.weight_norm for one in inside),
                "effective_rank": sum(one.effective_rank for one in inside) / len(inside),
                "energy": sum(one.energy for one in inside),
            }
    return {
        "parts": [*found.values()],
        "updates": [{**dataclasses.asdict(one), "size": one.size} for one in updates],
        "no_updates": f"{trained.setup.config.adapter.label}: {against}" if against else "",
        "ablation": _ablated(live, parts, found),
    }


def _root(values: Iterable[float]) -> float:
    return math.sqrt(sum(value**2 for value in values))


def _ablated(live: Live, parts: dict[str, list[str]], found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How the rises were measured; they go into `found`."""
    setup, task = live.setup, live.setup.config.task
    if setup.held_out is None or not parts:
        reason = "there are no held-out rows" if parts else "the adapter sits in no layer"
        return {"rows": 0, "reason": reason}
    if task.compares_rows:
        return {"rows": 0, "reason": f"task={task.name} compares the rows of a pass, so a row has no loss of its own"}
    examples = spread_examples(setup.held_out, _ABLATED)
    everything = [name for names in parts.values() for name in names]
    losses, turns = ablation.losses(live, examples, [(), *parts.values(), everything])
    figures = ablation.rises(losses, examples)
    for name, (rise, margin) in zip(parts, figures[1:-1], strict=True):
        found[name] |= {"rise": rise, "margin": margin if math.isfinite(margin) else None}
    whole = losses[0, :, 0].sum() / losses[0, :, 1].sum()
    rows = len({example.origin for example in examples})
    return {"rows": rows, "loss": float(whole), "rise_without_all": figures[-1][0], "in_turns": turns, "reason": ""}


# -- the training rows --------------------------------------------------------------------------------------------------


def _taught(live: Live, trained: Trained, rows: Sequence[_Row], among: int) -> dict[str, Any]:
    setup = trained.setup
    if not among:
        return {"reason": "among=0", "rows": []}
    if setup.config.task.compares_rows:
        return {
            "reason": f"task={setup.config.task.name} compares the rows of a pass, so none taught alone",
            "rows": [],
        }
    data = setup.training_rows()
    total = len(data)
    data = data if isinstance(data, Dataset) else data.sample(among)
    examples = spread_examples(data, among)
    found = influence.influence(live, [row.example for row in rows], examples, influence.states(trained.run))
    return {
        "reason": "",
        "looked_at": len(examples),
        "of": total,
        "states": found.states,
        "in_turns": found.reason,
        "rows": [_teachers(setup, row, examples, found, place) for place, row in enumerate(rows)],
    }


def _teachers(setup: Setup, row: _Row, examples: list[Example], found: Influence, place: int) -> dict[str, Any]:
    shares, cosines = found.shares[place], found.cosines[place]
    order = np.argsort(-shares, kind="stable").tolist()
    named = {
        side: [
            _teacher(setup, examples[one], float(shares[one]), float(cosines[one])) for one in _first(examples, places)
        ]
        for side, places in (("for", order), ("against", order[::-1]))
    }
    return {"row": row.example.origin, "label": setup.encoder.shown(row.example), **named}


def _first(examples: list[Example], order: Sequence[int]) -> list[int]:
    """The first examples of different rows."""
    chosen: dict[str, int] = {}
    for place in order:
        chosen.setdefault(examples[place].origin, place)
        if len(chosen) == _NAMED:
            break
    return [*chosen.values()]


def _teacher(setup: Setup, example: Example, share: float, cosine: float) -> dict[str, Any]:
    text = decode(setup.encoder.tokenizer, example.input_ids, skip_special_tokens=True).strip()
    return {
        "row": example.origin,
        "share": share,
        "cosine": cosine,
        "label": setup.encoder.shown(example),
        "text": text if len(text) <= _CHARS else f"{text[:_CHARS]} …",
    }
