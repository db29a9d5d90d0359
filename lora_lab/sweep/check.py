"""What can be known of a sweep's runs before anything is loaded or any folder is made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from lora_lab.base import load
from lora_lab.base.resolve import PACKAGE
from lora_lab.config.run import RunConfig
from lora_lab.errors import AdapterError, ConfigError, LoraLabError
from lora_lab.sweep import ranking


def check(configs: Sequence[RunConfig]) -> None:
    """Refuse runs that could not be ranked, and adapters that would sit nowhere.

    Raises:
        ConfigError: every such problem.
    """
    problems: dict[str, None] = {}
    for config in _unlike(configs, "sweep", "task", "data"):
        try:
            ranking.check(config)
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    for config in _unlike(configs, "model", "task", "adapter"):
        problems.update(dict.fromkeys(_of_targets(config)))
    if problems:
        raise ConfigError(*problems)


def _unlike(configs: Sequence[RunConfig], *sections: str) -> list[RunConfig]:
    """One configuration of each kind that these sections tell apart."""
    found: dict[str, RunConfig] = {}
    for config in configs:
        tree = dataclasses.asdict(config)
        found.setdefault(json.dumps([tree[name] for name in sections], sort_keys=True), config)
    return list(found.values())


def _of_targets(config: RunConfig) -> list[str]:
    """A sentence for names that match no layer, as far as the base is a folder that is here."""
    place = config.model.path
    if not config.adapter.names_layers or not (place.startswith(PACKAGE) or Path(place).expanduser().exists()):
        return []
    try:
        folder, task = load.find(config.model).folder, config.task.load()
        model = load.skeleton(folder, load.ModelKind(auto_class=task.auto_class))
        whole = load.new_modules(model, folder, task.head)
    except LoraLabError:  # told by the runs themselves, with all that they know
        return []
    try:
        config.adapter.targets(model, (*whole, *config.adapter.retrained(model)))
    except AdapterError as error:
        return [str(error)]
    return []
