"""Where every value of a configuration comes from, and what every key means: `lora-lab config`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from lora_lab.config.compose import GROUPS, compose_prepared, conf_dir, leaves, one_file, parse_override, started
from lora_lab.config.quoting import plain_keys
from lora_lab.config.run import RunConfig, all_keys
from lora_lab.errors import ConfigError
from lora_lab.runtime.reading import read_yaml
from lora_lab.schema.sections import only_for, rule


def explain(overrides: Sequence[str], config_dir: str | None = None) -> tuple[RunConfig, dict[str, str]]:
    """The composed configuration, and for each key the file or override that set its value (or 'default')."""
    config, prepared = compose_prepared(overrides, config_dir, tell=False)
    with started():
        loader = GlobalHydra.instance().config_loader()
        chosen = loader.compute_defaults_list("run", prepared, RunMode.RUN).defaults
    folders = [conf_dir(), *([Path(config_dir)] if config_dir is not None else [])]
    origins: dict[str, str] = {}
    for default in chosen:
        file = next(
            (f / f"{default.config_path}.yaml" for f in folders if (f / f"{default.config_path}.yaml").is_file()), None
        )
        if file is not None:
            origins.update(_origins_in(file, default.package))
    for text in overrides:
        override = parse_override(one_file(text))
        if override.key_or_group not in GROUPS:
            origins.update(
                {key: f"override {text}" for key, _ in _under(override.key_or_group, plain_keys(override.value()))}
            )
    told = {parse_override(text).key_or_group for text in overrides}
    for text in prepared:
        key = text.lstrip("+~").partition("=")[0]
        if key in all_keys() and key not in told:
            origins[key] = "default, because an override leaves it without effect"
    values = dict(leaves(dataclasses.asdict(config)))
    return config, {key: origins.get(key, "default") for key in values}


def _origins_in(file: Path, package: str | None) -> Iterable[tuple[str, str]]:
    tree = read_yaml(file, ConfigError) or {}
    tree.pop("defaults", None)
    shown = os.path.relpath(file, conf_dir().parent) if file.is_relative_to(conf_dir().parent) else str(file)
    return [(key, shown) for key, _ in _under(package or "", tree)]


def _under(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    return leaves(value, f"{prefix}." if prefix else "")


def key_rows() -> list[tuple[str, str, str, str]]:
    """Every key with its default, its type and limits, and its meaning, for `lora-lab config --keys`."""
    knowing = only_for(RunConfig)
    return [
        (
            key,
            rule(info),
            "???" if info.is_required() else as_override(info.get_default(call_default_factory=True)),
            f"{', '.join(knowing[key])}: {info.description}" if key in knowing else info.description or "",
        )
        for key, info in all_keys().items()
    ]


def as_override(value: Any) -> str:
    """A value as one would type it on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
