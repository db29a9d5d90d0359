"""Hydra composes: from group choices, recipes and `key=value` overrides to one plain tree, then one `RunConfig`.

hydra and omegaconf live here, in `hydra_app.py`, `origins.py` and `interpolation.py`, and in `hydra_plugins/`. Interpolations are
resolved here, once. What a file or an override may say to Hydra stands in `allowed.py`; a configuration that names code or
holds a secret of the environment is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_lab.adapters import reason_against
from lora_lab.config import allowed, interpolation, quoting
from lora_lab.config.run import SCHEMA_VERSION, RunConfig, all_keys, parse
from lora_lab.errors import ConfigError, LoraLabError, nearest
from lora_lab.runtime import environment
from lora_lab.runtime.reading import read_yaml
from lora_lab.schema import synonyms
from lora_lab.schema.groups import GROUPS, choices, conf_dir
from lora_lab.schema.sections import MISSING, default_of, renamed, sorted_out, unreadable

_MAX_OVERRIDE, _MAX_KEY = 100_000, 200  # characters


@functools.lru_cache(maxsize=1024)
def parse_override(text: str) -> Override:
    """Parse `key=value` by Hydra's grammar.

    That grammar knows only ASCII letters and a few signs outside quotes, and names hold more than that (`数据.jsonl`): they get
    their quotes here, in lists, mappings and sweeps too. A value that is none of these is taken as the text that it is.

    Raises:
        ConfigError: there is no `=` or no key, or a full-width sign stands where a plain one is meant.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{_short(text)}: not an override. Write key=value, such as {_plain_form(text)}.")
    if len(key) > _MAX_KEY:
        raise ConfigError(f"{_short(key)}: no key has more than {_MAX_KEY} characters.")
    if len(text) > _MAX_OVERRIDE:
        raise ConfigError(f"{_short(text)}: longer than {_MAX_OVERRIDE:,} characters. Write it in a recipe.")
    problem: Exception | None = None
    for form in (lambda: value, lambda: quoting.quoted(value), lambda: quoting.one_text(value)):
        try:
            return _parser().parse_override(f"{key}={form()}")
        except quoting.FullWidth as sign:
            raise ConfigError(
                f"{_short(text)}: {sign} is a full-width sign, which separates and quotes nothing here. Write "
                f"{_short(quoting.full_width(text))}, or put a name that has it in quotes: '{sign}'."
            ) from None
        except (*_UNREADABLE, quoting.NotReadable) as error:
            problem = error
    raise ConfigError(
        f"{_short(text)}: not an override ({_short(_first_line(problem))}). Write key=value, such as adapter.r=8."
    ) from problem


def value_of(override: Override) -> Any:
    """The plain value that an override sets."""
    return quoting.plain_keys(OmegaConf.to_container(OmegaConf.create({"value": override.value()})))["value"]


def _plain_form(text: str) -> str:
    """The line that was meant: with plain signs, or an example."""
    plain = quoting.full_width(text)
    return _short(plain) if "=" in plain.strip("=") else "adapter.r=8"


_UNREADABLE = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    RecursionError,
)  # the last two of absurd numbers and brackets


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def prepare(
    overrides: Sequence[str], config_dir: str | None = None, multirun: bool = False
) -> tuple[list[str], list[str]]:
    """Overrides in the form that Hydra is given, and a sentence for each that it cannot be given.

    A value override becomes `++key=value`, so that an unknown key reaches the schema, which names all of them at once,
    instead of stopping Hydra at the first. Group choices are checked here, because Hydra's own message is a page long.

    Args:
        multirun: an override may have several values.
    """
    prepared: list[str] = []
    problems = environment.leaking((text.partition("=")[0], text) for text in overrides)
    if problems:
        return prepared, problems
    for text in map(one_file, overrides):
        try:
            override = parse_override(text)
            refused = allowed.check_override(_short(text), override.key_or_group, override.package, override.value())
            refused = refused or ("" if multirun else _several(text, override))
            unknown = [refused] if refused else _unknown_choices(override, config_dir)
        except ConfigError as error:
            problems += error.problems
            continue
        problems += unknown
        if refused:
            continue
        if override.key_or_group in GROUPS:
            prepared += [] if unknown else [override.input_line or text]
        elif "/" in override.key_or_group:
            prepared.append(override.input_line or text)
        elif override.is_delete():
            problems.append(f"{_short(text)}: a key is set, not deleted. Write {override.key_or_group}=VALUE.")
        else:
            prepared.append(f"++{_one_by_one(override)}")
    if config_dir is not None and not os.path.isdir(config_dir):
        problems.append(f"--config-dir {config_dir}: no such folder.")
    elif config_dir is not None:
        folder = str(Path(config_dir).absolute()).replace("\\", "\\\\").replace("'", "\\'")
        prepared.append(f"hydra.searchpath=['lora_lab://{folder}']")  # read by hydra_plugins/lora_lab_files
    return prepared, problems


def _one_by_one(override: Override) -> str:
    """The override as Hydra is given it: of a function that chooses, the values themselves, because Hydra loses their quotes."""
    line = (override.input_line or "").lstrip("+")
    if not override.is_choice_sweep() or line.isascii():
        return line
    try:
        values = list(override.sweep_iterator())
    except _UNREADABLE:  # told later, with all other values that cannot be read
        return line
    return f"{line.partition('=')[0]}={','.join(map(quoting.written, values))}" if values else line


_FILES = ("data.train", "data.eval", "model.path")


def one_file(text: str) -> str:
    """The override with its value in quotes if it names a file that is there, such as `a,b.jsonl`, of which no part is."""
    key, _, value = text.partition("=")
    if key not in _FILES or "," not in value or value[0] in "[{'\"":
        return text
    parts = any(map(_is_there, value.split(",")))
    return f"{key}={quoting.one_text(value)}" if _is_there(value) and not parts else text


def _is_there(path: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(path.strip()))
    except (ValueError, OSError):  # a NUL, or half a character
        return False


def _several(text: str, override: Override) -> str:
    """A sentence if an override has several values, which a single run cannot have."""
    is_group, key = override.key_or_group in GROUPS, override.key_or_group
    if not override.is_sweep_override() or (is_group and not isinstance(override.value(), ChoiceSweep)):
        return ""
    value = text.partition("=")[2]
    ways = [f"a run for each: lora-lab train -m {_short(text)}"]
    if re.fullmatch(r"[+-]?\d+,\d+", value):
        ways.insert(0, f"a number with a decimal point: {key}={value.replace(',', '.')}")
    elif not is_group and isinstance(override.value(), ChoiceSweep):
        kinds = str(all_keys()[key].annotation) if key in all_keys() else ""
        ways += [f"one list: '{key}=[{_short(value)}]'"] if "list" in kinds else []
        ways += [f'one text: "{key}={_short(quoting.one_text(value))}"'] if "str" in kinds else []
    return f"{_short(text)}: several values, and this is one run. Write {'; or '.join(ways)}"


def _unknown_choices(override: Override, config_dir: str | None) -> list[str]:
    group = override.key_or_group
    if group not in GROUPS or override.is_delete():
        return []
    known = choices(group, config_dir)
    unknown = [
        f"{group}={value}: no such {group}.{_choice_meant(group, value, known)} There are: {', '.join(known) or 'none'}."
        for value in _values(override)
        if value not in known and value is not None
    ]
    return unknown + [
        f"{Path(config_dir) / group / value}.yaml: lora_lab has a {group} of that name, which goes first. Rename yours."
        for value in _values(override)
        if config_dir and value in known and _is_in(config_dir, group, value) and value in choices(group)
    ]


_OPENING = {
    "model": "model=hub model.path={}",
    "data": "data.train={}",
    "recipe": "--config-dir DIR recipe=NAME (DIR/recipe/NAME.yaml)",
}


def _choice_meant(group: str, value: Any, known: Sequence[str]) -> str:
    """' Did you mean ...?' for a choice that there is not."""
    if group == "adapter" and (reason := reason_against(value)):
        return f" lora_lab does not train it, because {reason}."
    found = synonyms.of_choice(group, value)
    is_place = isinstance(value, str) and ("/" in value or "." in value or _is_there(value))
    if not found and is_place and group in _OPENING:
        found = f" A name or a file of yours is given so: {_OPENING[group].format(value)}."
    return found or nearest(value, known)


def _values(override: Override) -> list[Any]:
    """What a group is set to: one choice, or each of a sweep's."""
    if not override.is_sweep_override():
        return [override.value()]
    if override.is_range_sweep() or override.is_interval_sweep():
        raise ConfigError(
            f"{_short(override.input_line or '')}: a range of choices. Name them: {override.key_or_group}=a,b"
        )
    try:
        return list(override.sweep_iterator())
    except _UNREADABLE as error:
        raise ConfigError(f"{_short(override.input_line or '')}: {_first_line(error)}. Name the choices.") from error


def _is_in(config_dir: str, group: str, choice: str) -> bool:
    """Whether the user's folder, if it is another than ours, has this choice."""
    mine = Path(config_dir) / group
    return (mine / f"{choice}.yaml").exists() and mine.resolve() != (conf_dir() / group).resolve()


def compose(overrides: Sequence[str], config_dir: str | None = None, multirun: bool = False) -> RunConfig:
    """Compose the configuration of one run and check it.

    Args:
        overrides: `key=value` and `group=choice`, as typed.
        config_dir: a folder with the user's own groups and recipes (`DIR/recipe/NAME.yaml`).
        multirun: the overrides hold sweeps; check the first point of each.
    """
    return compose_prepared(overrides, config_dir, multirun)[0]


def compose_prepared(
    overrides: Sequence[str], config_dir: str | None, multirun: bool = False, tell: bool = True
) -> tuple[RunConfig, list[str]]:
    """The checked configuration, and the prepared overrides; every problem of either kind is in one error.

    What an override leaves without effect of the recipe's settings goes with it: its default is among the prepared overrides.

    Args:
        tell: say what goes.
    """
    prepared, problems = prepare(overrides, config_dir, multirun)
    config = None
    try:
        single = [_first_point(text) for text in prepared] if multirun else prepared
        with composed(single) as tree:
            values = _without_missing(check(tree))
        gone = _void(values, prepared)
        if gone:
            single = [*single, *gone.values()]
            prepared = prepared if multirun else single  # other points may have a use for it
            with composed(single) as tree:
                values = _without_missing(check(tree))
        config = parse(values)
        if tell and gone and not problems:
            _tell(gone)
        for other in _other_choices(prepared) if multirun else ():
            with composed([*single, other]) as tree:
                check(tree)
    except ConfigError as error:
        # without the choices that are missing, keys that they would have set are not the user's mistake
        problems += [text for text in error.problems if not problems or "must be set" not in text]
    if problems or config is None:
        raise ConfigError(*map(environment.without_secrets, problems))
    return config, prepared


def _void(values: dict[str, Any], prepared: Sequence[str]) -> dict[str, str]:
    """What the overrides leave without effect: key -> the override that gives it its default."""
    overrides = [parse_override(text) for text in prepared]
    keys = [one.key_or_group for one in overrides if one.key_or_group in GROUPS or not one.is_sweep_override()]
    told = [key for key in keys if key != "recipe"]
    try:
        config = parse(values, told)
    except ConfigError:  # told when the whole is read
        return {}
    now, before = dict(leaves(dataclasses.asdict(config))), dict(leaves(renamed(values)[0]))
    gone = {
        key: f"++{key}={quoting.written(default_of(config, key))}"
        for key, value in now.items()
        if key in before and key in all_keys() and value != before[key] and value == default_of(config, key)
    }  # what is another value, but no default, was written in short: a source by its path and weight
    return gone | {key: f"~{key}" for key in sorted_out(RunConfig, values)[1]}


def _tell(gone: Iterable[str]) -> None:
    from lora_lab.runtime import console

    console.say("dropped", f"{', '.join(gone)}: without effect beside what was told")


def _other_choices(prepared: Sequence[str]) -> Iterator[str]:
    """Each choice of a swept group but the first: a sweep composes them when it is at work already."""
    for override in map(parse_override, prepared):
        if override.key_or_group in GROUPS and override.is_sweep_override():
            yield from (f"{override.key_or_group}={value}" for value in _values(override)[1:])


def _first_point(text: str) -> str:
    override = parse_override(text)
    if not override.is_sweep_override():
        return text
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{text.partition('=')[0]}={value.start}"
    try:
        first = next(iter(override.sweep_string_iterator()), None)
    except _UNREADABLE as error:
        raise ConfigError(f"{_short(text)}: {_first_line(error)}. Name the values.") from error
    if first is None:
        raise ConfigError(f"{_short(text)}: a sweep without values. Name some, or drop it.")
    return f"{text.partition('=')[0]}={first}"


@contextlib.contextmanager
def composed(prepared: Sequence[str]) -> Iterator[DictConfig]:
    """The composed tree; Hydra's state stands inside the block, and Hydra's errors become `ConfigError`."""
    with started():
        try:
            tree = hydra.compose("run", overrides=list(prepared), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"The configuration cannot be composed: {_explain(error)}") from error
        except (LoraLabError, MemoryError):
            raise
        except RecursionError as error:
            raise ConfigError(
                "The configuration cannot be composed: a file's defaults name that file again."
            ) from error
        except Exception as error:  # a defaults list of the user's that is no list of groups ends in any of them
            raise ConfigError(f"The configuration cannot be composed: {_explain(error)}") from error
        tree.hydra.job.num, tree.hydra.job.id = 0, "0"  # Hydra sets them for each run of a sweep
        yield tree


@contextlib.contextmanager
def started() -> Iterator[None]:
    """Hydra's state stands inside the block, with lora_lab's groups."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3", job_name="lora_lab"):
        yield


def to_run_config(tree: DictConfig, told: Iterable[str] = ()) -> RunConfig:
    """Resolve a composed tree and hand it to the schema.

    Args:
        told: keys and groups of the command line; what they leave without effect of a recipe's settings goes.

    Raises:
        ConfigError: interpolations that do not resolve, a `_target_`, a secret, or any problem the schema finds.
    """
    return parse(_without_missing(check(tree)), told)


_USED = ("launcher", "sweeper", "sweep")  # what Hydra makes use of in its own section


def check(tree: DictConfig) -> dict[str, Any]:
    """The resolved values of a tree in which nothing acts and nothing is secret; Hydra's own section is checked and left out.

    Raises:
        ConfigError: naming the key.
    """
    raw = quoting.plain_keys(OmegaConf.to_container(tree, resolve=False))
    composed = raw.get("hydra") if _is_composed(raw.get("hydra")) else None
    ours = {key: value for key, value in raw.items() if composed is None or key != "hydra"}
    used = {} if composed is None else {part: composed.get(part) for part in _USED}
    _refuse_code(ours)
    interpolation.check({**ours, "hydra": used} if used else ours)
    with _resolving():
        values = {key: quoting.plain_keys(_plain(tree, key)) for key in ours}
        acting = {part: _plain(tree.hydra, part) for part in used}
    if composed is not None:
        allowed.check_composed({**composed, **acting})
    shown = {**values, "hydra": {"sweep": acting["sweep"]}} if used else values
    secret = environment.leaking((key, value) for key, value in everything(shown) if not isinstance(value, dict))
    if secret:
        raise ConfigError(*secret)
    return values


def _is_composed(node: Any) -> bool:
    """Whether this is Hydra's own section, and not a key of that name in a run's `config.yaml`."""
    return isinstance(node, dict) and "launcher" in node and "runtime" in node


def _refuse_code(tree: dict[str, Any]) -> None:
    for key, value in everything(tree):
        if key.rpartition(".")[2] == "_target_":
            raise ConfigError(f"{key}={value}: a configuration never names code to run. Remove the key.")


def everything(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its key, whatever lies in lists included."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in inside:
        key = f"{prefix}[{name}]" if isinstance(node, list) else f"{prefix}.{name}" if prefix else str(name)
        yield key, value
        yield from everything(value, key)


@contextlib.contextmanager
def _resolving() -> Iterator[None]:
    try:
        yield
    except OmegaConfBaseException as error:
        raise ConfigError(f"The configuration does not resolve: {_explain(error)}") from error
    except RecursionError as error:
        raise ConfigError("The configuration has ${...} that are nested too deep. Write the values.") from error


def _plain(tree: DictConfig, key: str) -> Any:
    """One value of a tree, resolved."""
    if OmegaConf.is_missing(tree, key):
        return MISSING
    node = tree[key]
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _without_missing(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _without_missing(value) for key, value in node.items() if value != MISSING}


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its dotted key; an empty dict counts as a value."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), node


_ADVICE = re.compile(
    r"\s*(See https?://\S+ for details|To (sweep|append|override)\b[^.]*|Set the environment variable[^.]*)\.?"
)


def _explain(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = " ".join(line for line in lines if not line.startswith(("object_type=", "reference_type=", "full_key:")))
    told = _ADVICE.sub("", told).replace("LexerNoViableAltException: ", "").strip()
    return f"{told.rstrip('.') if len(told) <= 600 else told[:600] + '…'}."


def _first_line(error: Exception | None) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, with the version of the schema it was written for."""
    tree = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(config)}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def chosen(override: Override) -> dict[str, Any]:
    """What a shipped choice of a group says.

    Raises:
        ConfigError: there is no such choice, or it chooses other groups itself.
    """
    group = override.key_or_group
    unknown = _unknown_choices(override, None)
    if unknown or group == "recipe":
        raise ConfigError(*(unknown or [f"{override.input_line}: a run has its recipe already. Set single values."]))
    return read_yaml(conf_dir() / group / f"{override.value()}.yaml", ConfigError) or {}


def _of_version_1(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without the keys of other variants, all of which version 1 wrote: each had its default, or was refused."""
    if unreadable(tree):
        return tree  # told when it is read
    foreign = sorted_out(RunConfig, tree)[1]
    return {
        name: {key: value for key, value in node.items() if f"{name}.{key}" not in foreign or key in ("name", "method")}
        if isinstance(node, dict)
        else node
        for name, node in tree.items()
    }


def load(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's `config.yaml` and apply `key=value` and `group=choice` overrides to it.

    Raises:
        ConfigError: the file is missing, not YAML, from a newer lora_lab, or the result does not fit the schema.
    """
    tree = read_yaml(file, ConfigError)
    version = tree.pop("schema_version", None) if isinstance(tree, dict) else None
    if version not in (1, SCHEMA_VERSION):
        raise ConfigError(
            f"{file}: schema_version={version}, and this lora_lab reads {SCHEMA_VERSION}. Install the lora_lab that wrote it."
        )
    node, problems = OmegaConf.create(_of_version_1(tree) if version == 1 else tree), []
    for text in map(one_file, overrides):
        try:
            override = parse_override(text)
            several = _several(text, override)
            if several:
                problems.append(several)
            elif override.key_or_group in GROUPS:
                OmegaConf.update(node, override.key_or_group, chosen(override), merge=True, force_add=True)
            else:
                OmegaConf.update(node, override.key_or_group, override.value(), force_add=True)
        except ConfigError as error:
            problems += error.problems
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(f"{text}: not a value override ({_first_line(error)}).")
    if problems:
        raise ConfigError(*problems)
    return parse(_without_missing(check(node)), [parse_override(text).key_or_group for text in overrides])
