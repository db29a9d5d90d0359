"""A trained run is what its folder says: it is opened with what may still be told about it, and a sentence for everything else.

Adapter, base, tokenizer, template and task come from the folder and are compared with what was recorded when it was trained. What may
be told (`takes.py`) is where things lie now, which rows to measure on, and what is to be made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_lab.config import compose
from lora_lab.config.compose import leaves
from lora_lab.config.run import RunConfig, all_keys
from lora_lab.errors import ConfigError, nearest
from lora_lab.run import run_dir
from lora_lab.run.run_dir import RunDir
from lora_lab.run.takes import Takes
from lora_lab.runtime import console
from lora_lab.schema.groups import GROUPS

_LOCAL_TRACKERS = ("auto", "none", "tensorboard")


def open_trained(path: str, takes: Takes, overrides: Sequence[str]) -> tuple[RunDir, RunConfig]:
    """The run folder that `run=DIR` names and its configuration with what was told about it; loads no torch.

    Raises:
        RunError: there is no run, or its `config.yaml` was edited.
        ConfigError: an override that has no effect on a trained run.
    """
    run = run_dir.open_existing(path)
    overrides = _without_implied(overrides)
    _refuse([text for text in overrides if _is_key(text) and not takes.covers(_key(text))], takes, path)
    own = read(run)
    groups = [text for text in overrides if _key(text) in GROUPS]
    _refuse([text for text in groups if not _only_changes(text, takes, own)], takes, path)
    config = compose.load(run.config, overrides)
    return run, without_uploads(config, [_key(text) for text in overrides])


def _without_implied(overrides: Sequence[str]) -> list[str]:
    """The overrides without what `data.eval` says as well: rows of its own are no share of the training rows."""
    if not any(_key(text) == "data.eval" for text in overrides):
        return list(overrides)
    return [text for text in overrides if text not in ("data.eval_ratio=null", "data.stratify=null")]


def read(run: RunDir) -> RunConfig:
    """The configuration that a run was begun with.

    Raises:
        RunError: `config.yaml` was edited since.
        ConfigError: it cannot be read.
    """
    config = compose.load(run.config)
    run_dir.check_config(run, config)
    return config


def keys_of(takes: Takes) -> list[str]:
    """Every key of the configuration that is taken."""
    return [key for key in all_keys() if takes.covers(key)]


def _key(text: str) -> str:
    return text.partition("=")[0].lstrip("+~")


def _is_key(text: str) -> bool:
    """Whether an override sets a key, a part of one, or a whole section; unknown keys are told with the nearest one elsewhere."""
    key = _key(text)
    return key not in GROUPS and any(
        f"{known}.".startswith(f"{key}.") or f"{key}.".startswith(f"{known}.") for known in all_keys()
    )


def _only_changes(text: str, takes: Takes, own: RunConfig) -> bool:
    """Whether a group's choice changes nothing but what is taken."""
    group, told = _key(text), compose.chosen(compose.parse_override(text))
    now = dict(leaves(dataclasses.asdict(own)))
    return all(takes.covers(key) for key, value in leaves(told, f"{group}.") if now.get(key) != value)


def _refuse(overrides: Sequence[str], takes: Takes, path: str) -> None:
    if takes.because and overrides:
        raise ConfigError(f"{overrides[0]}: {takes.because}")
    if overrides:
        raise ConfigError(*(_no_effect(text, takes, path) for text in overrides))


def _no_effect(text: str, takes: Takes, path: str) -> str:
    return (
        f"{text}: no effect on a trained run, which is what {path} says.{nearest(_key(text), keys_of(takes), cutoff=0.8)} "
        f"What lora-lab {takes.command} takes: lora-lab {takes.command.partition(' ')[0]} --help"
    )


def without_uploads(config: RunConfig, told: Sequence[str] = ()) -> RunConfig:
    """The configuration without what would send something elsewhere: a folder that was received does not choose where to.

    Args:
        told: keys of the command line; what they say counts.
    """
    changes: dict[str, Any] = {}
    if "export.push_to_hub" not in told:
        changes["export"] = dataclasses.replace(config.export, push_to_hub=None)
    if config.tracker.name not in _LOCAL_TRACKERS and not any(key.startswith("tracker") for key in told):
        changes["tracker"] = dataclasses.replace(config.tracker, name="none")
    return dataclasses.replace(config, **changes)


def tell_uploads(run: RunDir, config: RunConfig) -> None:
    """Say what the run's folder asks to be sent elsewhere, and that it will not be.

    Args:
        config: see `without_uploads`.
    """
    own = compose.load(run.config)
    if own.export.push_to_hub != config.export.push_to_hub:
        hint = f"lora-lab export run={run.path} export.push_to_hub={own.export.push_to_hub}"
        console.say("hub", f"nothing is uploaded because a folder says so; to upload: {hint}")
    if own.tracker.name != config.tracker.name:
        hint = f"lora-lab resume run={run.path} tracker={own.tracker.name}"
        console.say("tracker", f"curves go into metrics.jsonl only; to continue in {own.tracker.name} too: {hint}")
