"""What Hydra does as an application: sweeps (`train -m`) and tab completion."""

from __future__ import annotations

import collections
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from lora_lab.config.compose import compose_prepared, composed, conf_dir, parse_override, to_run_config
from lora_lab.config.run import RunConfig, all_keys
from lora_lab.errors import ConfigError, LoraLabError, RunError
from lora_lab.schema.groups import GROUPS
from lora_lab.sweep.jobs import Nodes, Outcome

_MAX_POINTS, _MAX_TOLD = 10_000, 20
_COMPLETING = (
    "-sc",
    "--shell-completion",
    "install=",
    "uninstall=",
    "query=",
)  # Hydra knows other options, one of which unpickles


def multirun(
    overrides: Sequence[str],
    config_dir: str | None,
    launch: Callable[[list[RunConfig], Nodes | None], list[Outcome]],
    check: Callable[[list[RunConfig]], None] = lambda configs: None,
) -> list[tuple[str, LoraLabError]]:
    """Ordinary Hydra multirun, in `hydra.sweep.dir`: the cohort launcher gives all points that the sweeper asks for to `launch`
    at once, other launchers one after another.

    Args:
        check: refuses points by what the sweep does with them; asked before any folder is made.
        launch: trains these runs, here or on nodes; what each was worth.

    Returns:
        The folder and error of each point whose configuration cannot be used.

    Raises:
        ConfigError: the sweep has no points, one of them cannot be used, or `run_dir` is set (Hydra numbers the folders).
    """
    first, prepared = compose_prepared(overrides, config_dir, multirun=True)
    overriding = [parse_override(text) for text in prepared]
    told = _told(overriding)
    search = any(one.key_or_group == "hydra/sweeper" for one in overriding)
    if not (search or first.sweep.seeds or any(one.is_sweep_override() for one in overriding)):
        raise ConfigError(
            "-m: no key has several values, so this is one run. Give some, such as adapter.r=4,8, or drop -m."
        )
    if any(text.startswith("run_dir=") for text in overrides):
        raise ConfigError("run_dir: each run of a sweep has its own folder. Set hydra.sweep.dir=DIR instead.")
    points = math.prod(_width(text) for text in prepared)
    if points > _MAX_POINTS:
        raise ConfigError(f"The sweep has {points:,} points, and at most {_MAX_POINTS:,} are made. Give fewer values.")
    check(_every_point(prepared))
    failures: list[tuple[str, LoraLabError]] = []
    taken: set[Path] = set()  # the folders of runs that were launched

    def cohort(points: list[tuple[DictConfig, Path]], on: dict[str, Any] | None = None) -> list[Outcome]:
        configs = {}
        for place, (tree, folder) in enumerate(points):
            if folder in taken:
                raise ConfigError(
                    f"hydra.sweep.subdir: two runs of the sweep would share {folder}. Have ${{hydra.job.num}} in it."
                )
            taken.add(folder)
            try:
                with open_dict(tree):
                    tree.run_dir = str(folder)
                configs[place] = to_run_config(tree, told)
            except LoraLabError as error:
                failures.append((str(folder), error))
        values = dict(zip(configs, launch(list(configs.values()), Nodes(**on) if on else None), strict=True))
        return [values.get(place, Outcome(None)) for place in range(len(points))]

    def task(tree: DictConfig) -> Outcome:
        return cohort([(tree, Path(HydraConfig.get().runtime.output_dir))])[0]

    vars(task)["cohort"] = cohort  # what our launchers call instead
    try:
        _hydra_main(["-m", *prepared], "run", task)
    except OSError as error:
        if taken:  # the runs' own
            raise
        raise RunError(
            f"{error.filename}: the sweep's folder cannot be made ({error.strerror}). Set hydra.sweep.dir."
        ) from error
    return failures


def _every_point(prepared: Sequence[str]) -> list[RunConfig]:
    """The configuration of each point of a grid; of a search, which chooses its points later, those with each value alone.

    Raises:
        ConfigError: everything that is wrong with any of them.
    """
    values, told = [_values(text) for text in prepared], _told(map(parse_override, prepared))
    if any(parse_override(text).key_or_group == "hydra/sweeper" for text in prepared):
        firsts = [found[0] for found in values]
        points = [
            (*firsts[:n], value, *firsts[n + 1 :]) for n, found in enumerate(values) for value in found[:_MAX_POINTS]
        ]
        points = list(dict.fromkeys(points))
    else:
        points = list(itertools.product(*values))
    points.sort(key=lambda point: [text for text in point if not _is_light(text)])  # those of one composition together
    configs: list[RunConfig] = []
    wrong: collections.Counter[str] = collections.Counter()
    for heavy, group in itertools.groupby(points, lambda point: [text for text in point if not _is_light(text)]):
        with composed(heavy) as tree:
            OmegaConf.set_struct(tree, False)
            for point in group:
                try:
                    for text in filter(_is_light, point):
                        override = parse_override(text)
                        OmegaConf.update(tree, override.key_or_group, override.value(), merge=False, force_add=True)
                    configs.append(to_run_config(tree, told))
                except ConfigError as error:
                    wrong.update(error.problems)
                except OmegaConfBaseException as error:
                    wrong[f"The configuration cannot be composed: {error}"] += 1
    if wrong:
        raise ConfigError(
            *(
                text if n == len(points) else f"{text} ({n} of {len(points)} runs; none was begun)"
                for text, n in wrong.items()
            )
        )
    return configs


def _told(overrides: Iterable[Override]) -> set[str]:
    """Keys and groups that the command line says, but for the recipe."""
    return {one.key_or_group for one in overrides} - {"recipe"}


def _values(text: str) -> list[str]:
    """An override with each of its values; of an interval its ends."""
    override, key = parse_override(text), text.partition("=")[0]
    if not override.is_sweep_override():
        return [text]
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={end}" for end in (value.start, value.end)]
    try:
        return [f"{key}={value}" for value in override.sweep_string_iterator()] or [text]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{text}: {error}. Name the values.") from error


def _is_light(text: str) -> bool:
    """Whether an override only sets a value, so that it can be set in a tree that is composed already."""
    override = parse_override(text)
    key = override.key_or_group
    return (
        key not in GROUPS
        and not override.is_delete()
        and "/" not in key
        and not key.startswith("hydra")
        and not isinstance(override.value(), dict)
    )


def _width(text: str) -> int:
    """How many values an override of a grid has."""
    sweep = parse_override(text).value()
    if isinstance(sweep, ChoiceSweep):
        return len(sweep.list)
    if isinstance(sweep, RangeSweep) and sweep.start is not None and sweep.stop is not None:
        return max(1, math.ceil(abs((sweep.stop - sweep.start) / (sweep.step or 1))))
    return 1


def complete(arguments: Sequence[str], verb: str | None) -> None:
    """Answer a shell's question about the rest of a line, through Hydra's completion plugins."""
    defaults = {
        key: None if info.is_required() else info.get_default(call_default_factory=True)
        for key, info in all_keys().items()
    }
    node = OmegaConf.create({"defaults": ["_self_", "run"]})
    for key, value in defaults.items():
        OmegaConf.update(node, key, value, force_add=True)
    ConfigStore.instance().store(name="completion", node=node)
    if verb is not None:
        os.environ["COMP_LINE"] = os.environ.get("COMP_LINE", "").replace(f" {verb}", "", 1)
    known = [word for word in arguments if word.startswith(_COMPLETING)]
    _hydra_main(known, "completion", lambda tree: None)


def _hydra_main(arguments: Sequence[str], config_name: str, task: Callable[[DictConfig], Any]) -> None:
    GlobalHydra.instance().clear()
    before, sys.argv = sys.argv, ["lora-lab", *arguments]
    told = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra lets errors through then, instead of printing them and leaving
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"Hydra: {error}") from error
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        os.environ.update({} if told is None else {"HYDRA_FULL_ERROR": told})
