"""Hydra composes: from group choices, recipes and `key=value` overrides to one plain tree, then one `RunConfig`.

hydra and omegaconf live here, in `hydra_app.py` and in `explain.py` only. Interpolations are resolved here, once; a
configuration that names code (`_target_`) or reads a secret from the environment is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lora_lab.config import SCHEMA_VERSION, RunConfig, parse
from lora_lab.errors import ConfigError, nearest
from lora_lab.reading import read_yaml
from lora_lab.schema import MISSING

GROUPS = (
    "model quant adapter task data optim train hardware speed tracker export sweep recipe".split()
)  # folders of conf/, in the order of a run
_SECRET = re.compile(r"\$\{\s*oc\.env\s*:\s*\w*(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL)\w*", re.IGNORECASE)
_TRUSTED_TARGETS = ("hydra._internal.", "hydra_plugins.")  # Hydra's own launchers, sweepers and plugins


def conf_dir() -> Path:
    """The folder of the shipped groups and recipes: inside an installed wheel, or beside the package in a checkout."""
    installed = Path(__file__).parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "conf"


def choices(group: str, config_dir: str | None = None) -> list[str]:
    """Names that `group=NAME` accepts, the user's own folder included."""
    folders = [conf_dir() / group] + ([Path(config_dir) / group] if config_dir else [])
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})


def parse_override(text: str) -> Override:
    """Parse `key=value` by Hydra's grammar.

    That grammar knows only ASCII letters and a few signs outside quotes, and paths hold more than that (`数据.jsonl`):
    a value that it cannot read is taken as the text that it is.

    Raises:
        ConfigError: there is no `=` or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text}: not an override. Write key=value, such as adapter.r=8.")
    parser = OverridesParser.create()
    try:
        return parser.parse_override(text)
    except HydraException:
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    try:
        return parser.parse_override(f"{key}='{quoted}'")
    except HydraException as error:
        raise ConfigError(
            f"{text}: not an override ({_first_line(error)}). Write key=value, such as adapter.r=8."
        ) from error


def prepare(overrides: Sequence[str], config_dir: str | None = None) -> tuple[list[str], list[str]]:
    """Overrides in the form that Hydra is given, and a sentence for each that it cannot be given.

    A value override becomes `++key=value`, so that an unknown key reaches the schema, which names all of them at once,
    instead of stopping Hydra at the first. Group choices are checked here, because Hydra's own message is a page long.
    """
    prepared, problems = [], []
    for text in overrides:
        try:
            override = parse_override(text)
        except ConfigError as error:
            problems += error.problems
            continue
        unknown = _unknown_choices(override, config_dir)
        problems += unknown
        if override.key_or_group in GROUPS:
            prepared += [] if unknown else [override.input_line]
        elif override.key_or_group.startswith("hydra") or override.type is not OverrideType.CHANGE:
            prepared.append(override.input_line)
        else:
            prepared.append(f"++{override.input_line}")
    if config_dir is not None and not Path(config_dir).is_dir():
        problems.append(f"--config-dir {config_dir}: no such folder.")
    elif config_dir is not None:
        prepared.append(f"hydra.searchpath=['file://{Path(config_dir).absolute()}']")
    return prepared, problems


def _unknown_choices(override: Override, config_dir: str | None) -> list[str]:
    group, known = override.key_or_group, choices(override.key_or_group, config_dir)
    if group not in GROUPS or override.is_delete():
        return []
    values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
    return [
        f"{group}={value}: no such {group}.{nearest(value, known)} There are: {', '.join(known) or 'none'}."
        for value in values
        if value not in known and value is not None
    ]


def compose(overrides: Sequence[str], config_dir: str | None = None, multirun: bool = False) -> RunConfig:
    """Compose the configuration of one run and check it.

    Args:
        overrides: `key=value` and `group=choice`, as typed.
        config_dir: a folder with the user's own groups and recipes (`DIR/recipe/NAME.yaml`).
        multirun: the overrides hold sweeps; check the first point of each.
    """
    return compose_prepared(overrides, config_dir, multirun)[0]


def compose_prepared(
    overrides: Sequence[str], config_dir: str | None, multirun: bool = False
) -> tuple[RunConfig, list[str]]:
    """The checked configuration, and the prepared overrides; every problem of either kind is in one error."""
    prepared, problems = prepare(overrides, config_dir)
    single = [_first_point(text) for text in prepared] if multirun else prepared
    try:
        with composed(single) as tree:
            config = to_run_config(tree)
    except ConfigError as error:
        # without the choices that are missing, keys that they would have set are not the user's mistake
        problems += [text for text in error.problems if not problems or "must be set" not in text]
    if problems:
        raise ConfigError(*problems)
    return config, prepared


def _first_point(text: str) -> str:
    override = parse_override(text)
    if not override.is_sweep_override():
        return text
    first = override.value().start if override.is_interval_sweep() else next(iter(override.sweep_string_iterator()))
    return f"{text.partition('=')[0]}={first}"


@contextlib.contextmanager
def composed(prepared: Sequence[str]) -> Iterator[DictConfig]:
    """The composed tree; Hydra's state stands inside the block, and Hydra's errors become `ConfigError`."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3", job_name="lora_lab"):
        try:
            tree = hydra.compose("run", overrides=list(prepared), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(f"The configuration cannot be composed: {_explain(error)}") from error
        yield tree


def to_run_config(tree: DictConfig) -> RunConfig:
    """Resolve a composed tree and hand it to the schema.

    Raises:
        ConfigError: interpolations that do not resolve, a `_target_`, a secret, or any problem the schema finds.
    """
    refuse_code(tree)
    tree = tree.copy()
    with open_dict(tree):
        tree.pop("hydra", None)
    return parse(_resolved(tree))


def _resolved(tree: DictConfig) -> dict[str, Any]:
    secrets = _SECRET.findall(OmegaConf.to_yaml(tree, resolve=False))
    if secrets:
        raise ConfigError(
            "The configuration reads a secret from the environment, and configurations are saved with the run. Remove "
            "the ${oc.env:...}; libraries read HF_TOKEN, WANDB_API_KEY and the like from the environment themselves."
        )
    try:
        return _without_missing(OmegaConf.to_container(tree, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"The configuration does not resolve: {_explain(error)}") from error


def _without_missing(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _without_missing(value) for key, value in node.items() if value != MISSING}


def refuse_code(tree: DictConfig) -> None:
    """Refuse `_target_` keys: Hydra would call what they name. Only Hydra's own plugins may carry one.

    Raises:
        ConfigError: naming the key and its value.
    """
    for key, value in leaves(OmegaConf.to_container(tree, resolve=False)):
        trusted = key.startswith("hydra.") and str(value).startswith(_TRUSTED_TARGETS)
        if key.rpartition(".")[2] == "_target_" and not trusted:
            raise ConfigError(f"{key}={value}: a configuration never names code to run. Remove the key.")


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its dotted key; an empty dict counts as a value."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), node


def _explain(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        " ".join(line for line in lines if not line.startswith(("object_type=", "reference_type=", "full_key:"))) + "."
    )


def _first_line(error: Exception) -> str:
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


def load(file: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's `config.yaml` and apply `key=value` and `group=choice` overrides to it.

    Raises:
        ConfigError: the file is missing, not YAML, from a newer lora_lab, or the result does not fit the schema.
    """
    tree = read_yaml(file, ConfigError)
    version = tree.pop("schema_version", None) if isinstance(tree, dict) else None
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{file}: schema_version={version}, and this lora_lab reads {SCHEMA_VERSION}. Install the lora_lab that wrote it."
        )
    node, problems = OmegaConf.create(tree), []
    for text in overrides:
        try:
            override = parse_override(text)
            if override.key_or_group in GROUPS:
                OmegaConf.update(node, override.key_or_group, chosen(override), merge=True, force_add=True)
            else:
                OmegaConf.update(node, override.key_or_group, override.value(), force_add=True)
        except ConfigError as error:
            problems += error.problems
        except (HydraException, OmegaConfBaseException) as error:
            problems.append(f"{text}: not a value override ({_first_line(error)}).")
    if problems:
        raise ConfigError(*problems)
    return to_run_config(node)
