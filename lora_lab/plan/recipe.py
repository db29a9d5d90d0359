"""`lora-lab init`: a recipe for a data file, whose rows were read with its base before it was written."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_lab.base import load
from lora_lab.base.positions import usable_positions
from lora_lab.config import compose
from lora_lab.config.run import RunConfig
from lora_lab.data import build, check, guess, sources
from lora_lab.data.build import Data
from lora_lab.data.dataset import Dataset
from lora_lab.data.encode import TOO_LONG
from lora_lab.data.guess import Guess
from lora_lab.data.sources import DataFile, HubData
from lora_lab.errors import BaseModelError, ConfigError, DataError
from lora_lab.plan import bases, plan
from lora_lab.plan.bases import Base
from lora_lab.run import prepared
from lora_lab.run.prepared import ResolvedBase
from lora_lab.run.setup import Stages
from lora_lab.runtime import console, storage
from lora_lab.runtime.memory import free_bytes
from lora_lab.runtime.reading import read_yaml
from lora_lab.schema.groups import GROUPS, choices, conf_dir
from lora_lab.tasks import TASKS
from lora_lab.tasks.section import TaskSection

_KEY = "data.train"
_FOLDER = "mine/recipe"  # of recipes that are not told where to go
_LOOK_ROWS = 50_000  # that are read with the base, at most
_HELD_OUT, _OF_FEW, _MOST_HELD_OUT = 0.1, 0.25, 1_000
_MOST_TOKENS = {"encoder": 512, "encoder-decoder": 512, "decoder": 1_024}  # what is longer is cut or left out
_STEPS = 100  # what small data are repeated for
_MOST_EPOCHS, _SMALL_BATCH = 10, 16
_CPU_TOKENS = 150_000  # of a decoder: a CPU of two cores takes some ten minutes
_UNUSABLE = 0.05  # share of rows that may be left out without asking
_LEFT_OUT = (TOO_LONG, "duplicates", "held out", "for training", "also held out")  # rows that are as usable as others
_ANSWERS = 32  # held-out rows whose answers are generated
_BESIDE = (
    ("train", "validation"),
    ("train", "valid"),
    ("train", "dev"),
    ("train", "val"),
    ("train", "eval"),
    ("train", "test"),
)
_PLAIN_NAMES = ("train", "data", "dataset", "rows", "all", "input")  # the folder says more


def init(name: str, out: str | None, overrides: Sequence[str]) -> Path:
    """Write a recipe for a data file and say what was assumed.

    Args:
        name: of a file, a folder, a pattern or a data set on the hub, as `data.train` takes it.
        out: where to: FOLDER/recipe/NAME.yaml.
        overrides: what the recipe is to say, whatever the file looks like.

    Raises:
        ConfigError: `out` is there, or no recipe could lie there.
        DataError: the file cannot be read, or its rows cannot be used as they are.
        BaseModelError: no base for these rows is here, and the hub is out of reach.
    """
    told = _Told.of(overrides)
    place = _place(out, name)
    draft = _Draft(name, told)
    files = sources.find(_KEY, name, told.values.get("data.sample_by", "line"), told.values.get("data.field"))
    guessed, section = _understood(files[0], told)
    draft.begin(files, guessed, section)
    for base in _bases(told, section, guessed):
        draft.take(base)
        found, data, problems = _tried(draft)
        if not problems:
            break
    else:
        raise DataError(f"{_KEY}={name}: {problems[0]}")
    draft.fit(found, data)
    _prove(draft)
    draft.possible += _others(draft)
    text = draft.text(place)
    _composed(text, place.stem)  # as it will be read
    storage.make_folders(place.parent)
    storage.write_text(place, text)
    _say(draft, place)
    return place


# -- what is asked for ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Told:
    """What the user wants of the recipe."""

    groups: dict[str, str]
    values: dict[str, Any]

    @classmethod
    def of(cls, overrides: Sequence[str]) -> _Told:
        """
        Raises:
            ConfigError: an override that no recipe can hold.
        """
        groups: dict[str, str] = {}
        values: dict[str, Any] = {}
        problems = compose.prepare(overrides)[1]
        for text in [] if problems else overrides:
            override = compose.parse_override(text)
            key, value = override.key_or_group, override.value()
            if key in ("recipe", "data", "sweep") or key.startswith(("hydra", "data.train")):
                problems.append(f"{text}: a recipe for a data file is written. Leave it out.")
            elif key in GROUPS:
                groups[key] = value
            else:
                values[key] = compose.value_of(override)
        if problems:
            raise ConfigError(*problems)
        return cls(groups, values)


def _place(out: str | None, name: str) -> Path:
    """Where the recipe goes.

    Raises:
        ConfigError: there is a file, or recipes are not looked for there.
    """
    place = Path(out).expanduser() if out is not None else Path(_FOLDER) / f"{_named(name)}.yaml"
    if place.suffix != ".yaml" or place.parent.name != "recipe":
        raise ConfigError(
            f"out={place}: recipes are found in a folder called recipe. Write out=mine/recipe/{place.stem}.yaml"
        )
    if place.stem in choices("recipe"):
        raise ConfigError(f"out={place}: lora_lab has a recipe of that name, which goes first. Choose another name.")
    if place.exists() or place.is_symlink():
        raise ConfigError(f"out={place}: exists. Name another file: out=mine/recipe/NAME.yaml, or remove it.")
    return place


def _named(name: str) -> str:
    """The name of a recipe for a file: its own, or its folder's where that says more."""
    path = Path(name.removeprefix(sources.HUB))
    stem = path.name.partition(".")[0]
    if stem.lower() in _PLAIN_NAMES and path.absolute().parent.name:
        stem = path.absolute().parent.name
    stem = re.sub(r"\W+", "_", stem).strip("_") or "own"
    return f"my_{stem}" if stem in choices("recipe") else stem


def _understood(file: DataFile | HubData, told: _Told) -> tuple[Guess, TaskSection]:
    """What the file holds, and the task for it."""
    columns = told.values.get("data.columns")
    asked = told.groups.get("task")
    if asked is not None:
        options = {key.partition(".")[2]: value for key, value in told.values.items() if key.startswith("task.")}
        every = [*TASKS[asked].meant_for.values(), options]
        formats = {name for one in every for name in TASKS[asked](**{**one, **options}).formats}
        guessed = guess.look(file, sorted(formats), columns)
        return guessed, TASKS[asked](**{**TASKS[asked].meant_for.get(guessed.format, {}), **options})
    meant = {name for task in TASKS.values() for name in task.meant_for}
    guessed = guess.look(file, sorted(meant), columns)
    for task in _tasks_for(guessed):
        options = dict(task.meant_for.get(guessed.format, {}))
        if guessed.is_several and "multi_label" in _fields(task):
            options["multi_label"] = True
        return guessed, task(**options)
    raise DataError(f"{_KEY}={file.path}: no task learns from rows of the format {guessed.format}.")


def _tasks_for(guessed: Guess) -> Iterator[type[TaskSection]]:
    """Tasks that the rows are for, the likeliest first."""
    meant = [task for task in TASKS.values() if guessed.format in task.meant_for]
    yield from (task for task in meant if task.numbers == guessed.is_numbers and _has_base(task, guessed))
    yield from (task for name, task in TASKS.items() if guessed.format in task(name=name).formats)


def _has_base(task: type[TaskSection], guessed: Guess) -> bool:
    """Whether a base for the task is here: a decoder does what an encoder-decoder does."""
    return not task.encoder_decoder or any(bases.fitting("encoder-decoder", guessed.scripts, here=True))


def _fields(task: type[TaskSection] | TaskSection) -> set[str]:
    return {field.name for field in dataclasses.fields(task)}


def _bases(told: _Told, section: TaskSection, guessed: Guess) -> Iterator[Base | None]:
    """Bases to try; None: the user's own.

    Raises:
        BaseModelError: there is none.
    """
    if "model" in told.groups or "model.path" in told.values:
        yield None
        return
    kind = bases.kind_of(section)
    found = list(bases.fitting(kind, guessed.scripts))
    if not found:
        known = [base for base in bases.shipped() if base.kind == kind and base.knows(guessed.scripts)]
        bring = "".join(f" Or bring {base.name} here: {bases.way_to(base)}." for base in known[:1])
        raise BaseModelError(
            f"no {kind} for texts in {' and '.join(sorted(guessed.scripts))} letters is on this machine, and the hub is switched off "
            f"(HF_HUB_OFFLINE). Name one: model=hub model.path=FOLDER, or switch the hub on.{bring}"
        )
    yield from found


# -- the recipe -------------------------------------------------------------------------------------------------------


class _Draft:
    """A recipe while it is found out; `notes` say why a value is there."""

    def __init__(self, name: str, told: _Told):
        self.name, self.told = name, told
        self.groups: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        self.notes: dict[str, str] = {}
        self.assumed: list[str] = []
        self.possible: list[str] = []

    def begin(self, files: list[DataFile | HubData], guessed: Guess, section: TaskSection) -> None:
        """What follows from the rows alone."""
        self.guessed, self.section, self.files = guessed, section, files
        self.rows = sum(sum(1 for _ in file.rows()) for file in files)
        self.groups["task"] = section.name
        self.set("data.train", self.name)
        if guessed.columns:
            self.set("data.columns", guessed.columns, "our names: those of the file")
        if self._is_paragraphs():
            self.set("data.sample_by", "paragraph", "blank lines part the text")
        self._hold_out()
        options = dataclasses.asdict(section)
        defaults = dataclasses.asdict(type(section)(name=section.name))
        for name in ("loss", "multi_label"):
            if options.get(name) != defaults.get(name):
                self.set(f"task.{name}", options[name])
        if "language" in options and "Chinese" in guessed.scripts:
            self.set("task.language", "zh", "how answers are split into words")
        if guessed.languages and "prefix" in options:
            self.set("task.prefix", "translate {} to {}: ".format(*guessed.languages))
        self._say_what_it_is()

    def _is_paragraphs(self) -> bool:
        [file, *_] = self.files
        if not isinstance(file, DataFile) or file.kind != "text" or file.zipped:
            return False
        with open(file.path, encoding="utf-8", errors="replace") as stream:
            lines = [line.strip() for _, line in zip(range(2_000), stream, strict=False)]
        whole = [len(line) for line in lines if line]
        return len(lines) - len(whole) >= 0.05 * len(lines) and bool(whole) and float(np.median(whole)) < 200

    def _hold_out(self) -> None:
        other = _beside(self.files, self.guessed)
        if other is not None:
            self.set("data.eval", str(other), "held-out rows beside the file")
            self.assumed.append(
                f"{other.name} has the rows to measure on; data.eval=null data.eval_ratio=0.1 holds some of yours out"
            )
            return
        ratio = min(_HELD_OUT, round(_MOST_HELD_OUT / max(1, self.rows), 4))
        self.set("data.eval_ratio", ratio, "of the rows are held out to measure on; data.eval=FILE names others")
        if "label" in self._columns and not self.section.numbers and not self.guessed.is_several:
            self.set("data.stratify", "label", "each class keeps its share on both sides")

    def hold_out_otherwise(self) -> bool:
        """Of a few rows hold some more out, whatever their classes; False if that is done already."""
        if self.values.get("data.eval_ratio") in (None, _OF_FEW):
            return False
        self.set("data.stratify", None)
        self.set("data.eval_ratio", _OF_FEW, "of the few rows are held out to measure on; more would say more")
        return True

    @property
    def _columns(self) -> tuple[str, ...]:
        from lora_lab.data.formats import FORMATS

        return FORMATS[self.guessed.format].columns

    def _say_what_it_is(self) -> None:
        guessed, task = self.guessed, self.section.name
        scripts = " and ".join(sorted(guessed.scripts))
        self.assumed.insert(
            0,
            f"task={task}, because the columns are those of {guessed.format} ({', '.join(guessed.there)}); letters are {scripts}",
        )
        if guessed.names:
            self.assumed.append(f"classes are called as column {guessed.names} says")
        if guessed.left:
            self.assumed.append(f"not read: {', '.join(guessed.left[:10])}{' ...' if len(guessed.left) > 10 else ''}")
        others = [
            name
            for name, one in TASKS.items()
            if name != task and guessed.format in one(name=name).formats and (not one.numbers or guessed.is_numbers)
        ]
        if others:
            self.possible.append(f"task={' or task='.join(others)} can learn from these rows too")

    def take(self, base: Base | None) -> None:
        """A base, and what the shipped recipe that is nearest says of training it."""
        model = base.name if base is not None else self.told.groups.get("model", "hub")
        nearest = _nearest(self.section.name, model, bases.kind_of(self.section) if base is None else base.kind)
        self.like = nearest.name
        if base is not None and base.on_hub:
            self.groups["model"] = "hub"
            self.set("model.path", base.name, base.what)
        else:
            self.groups["model"] = model
        self.base = base
        self.groups["quant"] = nearest.quant
        self.set("model.dtype", nearest.values.get("model.dtype"))
        for key in ("optim.lr", "train.epochs", "train.batch_size", "train.micro_batch_size"):
            self.set(key, nearest.values.get(key))
        kind = bases.kind_of(self.section)
        self.most_tokens = _MOST_TOKENS[kind]
        if self.section.in_pieces or "max_tokens" in nearest.values:
            self.most_tokens = nearest.values.get("data.max_tokens", self.most_tokens)

    def set(self, key: str, value: Any, note: str = "") -> None:
        """Say something; None: nothing. What the user told stands."""
        self.values.pop(key, None)
        self.notes.pop(key, None)
        if value is None or key in self.told.values:
            return
        self.values[key] = value
        if note:
            self.notes[key] = note

    def fit(self, found: ResolvedBase, data: Data) -> None:
        """What the rows' lengths and number decide."""
        train = data.train
        assert isinstance(train, Dataset)
        self._limit(train, data.held_out)
        dropped = {kind for part in (train, data.held_out) if part is not None for kind in part.rows_dropped}
        if "duplicates" in dropped:
            self.set("data.duplicates", "drop", f"{train.rows_dropped.get('duplicates', 0)} rows are there twice")
        if (
            "data.eval" in self.values
            and data.held_out is not None
            and np.isin(train.digests, data.held_out.digests).any()
        ):
            self.set("data.shared", "drop", "rows that are held out are not learned")
        if self._unusable(train):
            self.set("data.unusable", "drop", "rows that cannot be used are left out; lora-lab data lists them")
        rows = round(self.rows * len(train) / max(1, train.rows_read))
        self._steps(rows, float(train.lengths.mean()))
        if self.section.generates:
            held = len(data.held_out) if data.held_out is not None else 0
            self.set("task.generate_rows", min(_ANSWERS, held), "held-out rows that are answered and measured")
            self.set("task.max_new_tokens", self._answer_tokens(found), "longest answer")

    def _limit(self, train: Dataset, held_out: Dataset | None) -> None:
        apart = (
            held_out if "data.eval" in self.values or "data.eval" in self.told.values else None
        )  # else of the same rows
        too_long = sum(one.rows_dropped.get(TOO_LONG, 0) for one in (train, apart) if one is not None)
        longest = max(int(one.lengths.max()) for one in (train, held_out) if one is not None and len(one))
        if self.section.in_pieces:
            self.set("data.max_tokens", self.most_tokens, "tokens of a piece of text")
            return
        if not too_long:
            rounded = max(16, -(-longest * 5 // 4 // 16) * 16)  # rows that are added later may be a little longer
            self.set("data.max_tokens", min(rounded, self.most_tokens), f"the longest row has {longest}")
            return
        self.set("data.max_tokens", self.most_tokens, f"{too_long} rows are longer")
        self.set("data.too_long", "truncate_prompt" if self.section.cuts and self.section.predicts else "drop")

    def _unusable(self, train: Dataset) -> bool:
        return bool(set(train.rows_dropped) - {*_LEFT_OUT})

    def _steps(self, rows: int, tokens: float) -> None:
        batch = self._value("train.batch_size", 8)
        if rows < _STEPS * batch and batch > _SMALL_BATCH:
            batch = _SMALL_BATCH
            self.set("train.batch_size", batch)
        per_epoch = -(-rows // batch)
        epochs = min(_MOST_EPOCHS, max(self._value("train.epochs", 1), -(-_STEPS // per_epoch)))
        self.set("train.epochs", epochs, f"{per_epoch * epochs} steps" if epochs > 1 else "")
        if self.on_cpu and self.section.packed and epochs * rows * tokens > _CPU_TOKENS:
            most = max(20, round(_CPU_TOKENS / (batch * tokens)))
            if most < epochs * per_epoch:
                self.set("train.epochs", -(-most // per_epoch))
                self.set(
                    "train.max_steps",
                    most,
                    f"of {epochs * per_epoch}, because a CPU takes long; remove the line to see every row",
                )

    def _value(self, key: str, default: Any) -> Any:
        return self.told.values.get(key, self.values.get(key, default))

    def _answer_tokens(self, found: ResolvedBase) -> int:
        answers = [
            record.target or (record.messages or [{}])[-1].get("content") or "" for record in self.guessed.records[:500]
        ]
        lengths = [len(found.encoder.tokenizer(str(one))["input_ids"]) for one in answers]
        return int(min(256, max(16, -(-np.percentile(lengths, 95) // 16) * 16)))

    @functools.cached_property
    def on_cpu(self) -> bool:
        config = self.config()
        return load.torch_device(config.hardware).type == "cpu"

    @property
    def limits(self) -> dict[str, int]:
        """Rows that are read for the recipe, of files with very many."""
        return {"data.max_train_rows": _LOOK_ROWS} if self.rows > _LOOK_ROWS else {}

    # -- as a file ----------------------------------------------------------------------------------------------------

    def config(self, **more: Any) -> RunConfig:
        """The recipe, as it is now, composed."""
        return _composed(self._yaml(more), "draft")

    def text(self, place: Path) -> str:
        """The recipe with what was assumed and what else would do, as comments."""
        folder = place.parent.parent
        return "".join(f"{line}\n" for line in self._head(folder, place.stem)) + self._yaml({"name": place.stem})

    def _head(self, folder: Path, name: str) -> Iterator[str]:
        yield "# @package _global_"
        yield f"# {console.shown(self.name)}: {self.rows:,} rows. Written by lora-lab init; change what you like."
        yield f"#   {command(folder, name)}"
        yield "# Assumed:"
        yield from (f"#   {console.shown(line)}" for line in self.assumed)
        yield "# Also possible:"
        yield from (f"#   {console.shown(line)}" for line in self.possible)

    def _yaml(self, more: Mapping[str, Any]) -> str:
        groups = {**self.groups, **self.told.groups}
        values = {**self.values, **self.told.values, **more}
        lines = ["defaults:"]
        lines += [f"  - override /{group}: {_scalar(groups[group])}" for group in GROUPS if group in groups]
        lines.append("")
        tree: dict[str, Any] = {}
        for key, value in values.items():
            *parents, last = key.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        order = ["name", *GROUPS]
        for key in sorted(tree, key=lambda key: order.index(key) if key in order else len(order)):
            lines += self._lines(key, tree[key], key)
        return "\n".join(lines) + "\n"

    def _lines(self, key: str, value: Any, dotted: str, indent: str = "") -> Iterator[str]:
        is_section = isinstance(value, dict) and dotted != "data.columns"
        if is_section:
            yield f"{indent}{key}:"
            for name, one in value.items():
                yield from self._lines(name, one, f"{dotted}.{name}", f"{indent}  ")
            return
        note = self.notes.get(dotted, "")
        yield f"{indent}{key}: {_scalar(value)}" + (f"  # {note}" if note else "")


def _scalar(value: Any) -> str:
    """A value as YAML in one line, which is what JSON is, with quotes only where they are needed."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(key)}: {_scalar(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_scalar, value)) + "]"
    if isinstance(value, str) and re.fullmatch(
        r"(?!(?:null|true|false|yes|no|on|off|y|n)$)[^\W\d][\w./-]*", value, re.IGNORECASE
    ):
        return value
    return json.dumps(value, ensure_ascii=False)


def command(folder: Path, name: str) -> str:
    """The command line that trains a recipe."""
    import shlex

    return f"lora-lab train --config-dir {shlex.quote(str(folder))} recipe={shlex.quote(name)}"


def _composed(text: str, name: str) -> RunConfig:
    """The configuration that a recipe makes, read as its file will be."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe" / f"{name}.yaml"
        file.parent.mkdir()
        body = text if text.startswith("# @package") else f"# @package _global_\n{text}"
        file.write_text(body, encoding="utf-8")
        return compose.compose([f"recipe={name}", "run_dir=runs/init"], folder)


# -- held-out rows ----------------------------------------------------------------------------------------------------


def _beside(files: Sequence[DataFile | HubData], guessed: Guess) -> Path | None:
    """A file that is named as held-out rows are, and has the same columns."""
    [file, *others] = files
    if others or not isinstance(file, DataFile) or "train" not in file.path.name.lower():
        return None
    there = {path.name.lower(): path for path in file.path.parent.iterdir() if path.is_file() and path != file.path}
    stem, kinds = (
        file.path.name.lower().partition(".")[0],
        {".jsonl", ".jsonl.gz", *(f"{kind}" for kind in sources.KINDS)},
    )
    for train, other in _BESIDE:
        for kind in kinds:
            path = there.get(f"{stem.replace(train, other)}{kind}")
            if path is not None and _is_like(path, guessed):
                return path
    return None


def _is_like(path: Path, guessed: Guess) -> bool:
    try:
        [file] = sources.find("data.eval", str(path))
        found = guess.look(file, [guessed.format])
    except DataError:
        return False
    return set(guessed.columns.values()) <= set(found.there)


# -- recipes that are shipped -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Shipped:
    """What a shipped recipe chooses."""

    name: str
    task: str
    model: str
    quant: str
    values: dict[str, Any]


@functools.cache
def _shipped() -> list[_Shipped]:
    found = []
    for name in choices("recipe"):
        tree = read_yaml(conf_dir() / "recipe" / f"{name}.yaml", ConfigError)
        chosen = {key.removeprefix("override /"): one for entry in tree["defaults"] for key, one in entry.items()}
        found.append(
            _Shipped(
                name,
                chosen.get("task", "causal_lm"),
                chosen.get("model", "smollm2_135m"),
                chosen.get("quant", "nf4"),
                {key: _number(value) for key, value in compose.leaves(tree) if key != "defaults"},
            )
        )
    return found


def _number(value: Any) -> Any:
    """2e-3, which YAML takes for a text."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+e-?\d+", value) else value


def _nearest(task: str, model: str, kind: str) -> _Shipped:
    """The shipped recipe that is nearest to a task on a base: of both, of the task, of such bases."""

    def rank(one: _Shipped) -> tuple[bool, bool, bool]:
        base = bases.of(one.model)
        return base is None or base.kind != kind, one.task != task, one.model != model

    return min(_shipped(), key=rank)


# -- trying it --------------------------------------------------------------------------------------------------------


def _tried(draft: _Draft) -> tuple[ResolvedBase, Data, list[str]]:
    """Read the rows with the base; what keeps it from learning of them."""
    limit = {"data.max_tokens": draft.most_tokens, "data.unusable": "drop", "data.duplicates": "drop"}
    if not draft.section.in_pieces:
        limit["data.too_long"] = "drop"
    more = {key: value for key, value in limit.items() if key not in draft.told.values}
    config = draft.config(**more, **draft.limits)
    found = prepared.find_base(config, weights=False)
    positions = usable_positions(found.model)
    if positions is not None and positions < draft.most_tokens:
        draft.most_tokens = positions
        return _tried(draft)
    try:
        data = build.build(config.data, found.encoder)
    except DataError:
        if not draft.hold_out_otherwise():
            raise
        return _tried(draft)
    train = data.train
    assert isinstance(train, Dataset)
    findings = [one.sentence for one in check.check(data, config.data, found.encoder) if one.level == "error"]
    unusable = {kind: count for kind, count in train.rows_dropped.items() if kind not in _LEFT_OUT}
    if sum(unusable.values()) > _UNUSABLE * train.rows_read:
        kind = max(unusable, key=unusable.__getitem__)
        first = next((report.sentences[kind][0] for report in train.reports if report.sentences.get(kind)), "")
        findings.append(
            f"{sum(unusable.values())} of {train.rows_read} rows cannot be used ({', '.join(unusable)}). {first}"
        )
    return found, data, findings


def _prove(draft: _Draft) -> None:
    """Read the rows as training will, and take smaller forward passes where a step would not fit into the memory that is free.

    Raises:
        LoraLabError: whatever would keep the recipe from training.
    """
    config = draft.config(**draft.limits)
    device = load.torch_device(config.hardware)
    data, found, task = prepared.build_data(config, prepared.find_base(config, weights=False))
    assert data.train is not None
    setup = prepared.assemble(config, found, data, task, device, Stages())
    free, batch = free_bytes(device), config.train.micro_batch_size or config.train.batch_size
    while True:
        try:
            peak = plan.needed(setup, plan.foresee(setup.config, task, data.train, data.held_out)).peak
        except Exception as error:  # of whatever torch or a model of another make does with tensors without content
            draft.assumed.append(
                f"it fits into memory, which cannot be estimated for this model ({type(error).__name__})"
            )
            return
        if peak <= free or batch == 1 or "train.micro_batch_size" in draft.told.values:
            break
        batch //= 2
        draft.set("train.micro_batch_size", batch, f"rows of a forward pass: {free / 2**30:.0f} GiB are free")
        setup = dataclasses.replace(setup, config=draft.config(**draft.limits))
    draft.assumed.append(f"training needs about {peak / 2**30:.1f} GiB of the {free / 2**30:.0f} GiB that are free")


def _others(draft: _Draft) -> Iterator[str]:
    """Bases that would do as well."""
    free = free_bytes(load.torch_device(draft.config().hardware)) / 2**30
    if draft.base is None:
        return
    names = [one.name for one in bases.fitting(draft.base.kind, draft.guessed.scripts) if one.name != draft.base.name]
    for name in names[:1]:
        yield f"{'model=hub model.path=' if '/' in name else 'model='}{name}, another base for these letters"
    if larger := bases.larger(draft.base.kind, free, draft.on_cpu):
        yield f"{larger}, a larger base"


def _say(draft: _Draft, place: Path) -> None:
    for line in draft.assumed:
        console.say("assumed", line)
    for line in draft.possible:
        console.say("possible", line)
    console.say("like", f"recipe={draft.like}, whose learning rate and batches it has")
    console.say("recipe", place)
    console.say("next", command(place.parent.parent, place.stem))
