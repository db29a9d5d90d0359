"""What a configuration file, or an override, may say to Hydra: a list of names. Everything else is refused.

Hydra acts on its own part of a configuration: it makes objects of whatever carries a `_target_`, opens the files of a logging
configuration, sets environment variables. A recipe is data, so it may only set what stands in this list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lab.errors import ConfigError, nearest

LAUNCHERS = ("cohort", "cohort_local", "cohort_ray", "cohort_slurm", "basic")
SWEEPERS = ("basic", "optuna_cohort")
TARGETS = {
    "launcher": (
        "hydra_plugins.lora_lab_launcher.launcher.CohortLauncher",
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    ),
    "sweeper": (
        "hydra_plugins.lora_lab_sweeper.sweeper.OptunaCohortSweeper",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
    ),
}
_COUNT = ("an integer, at least 1", lambda value: type(value) is int and value >= 1)
_COUNT_OR_NULL = ("an integer, at least 1, or null", lambda value: value is None or _COUNT[1](value))
_TEXT = ("a folder's name", lambda value: isinstance(value, str) and value.strip() != "")
# key -> what its value must be
KEYS = {
    "hydra.sweep.dir": _TEXT,
    "hydra.sweep.subdir": _TEXT,
    "hydra.launcher.workers": _COUNT_OR_NULL,
    "hydra.sweeper.trials": _COUNT,
    "hydra.sweeper.batch": _COUNT,
    "hydra.sweeper.sampler": ("one that is known; there are tpe and random", lambda value: value in ("tpe", "random")),
    "hydra.sweeper.seed": ("an integer from 0 to 4294967295", lambda value: type(value) is int and 0 <= value < 2**32),
    "hydra.sweeper.max_batch_size": _COUNT_OR_NULL,
}
# Of submitit's and Ray's parameters those that no shell reads, and that name no machine. The others (setup, srun_args, python, ...) can hold
# commands, so they are the command line's.
PARAMETERS = (
    *"timeout_min nodes tasks_per_node cpus_per_task gpus_per_node mem_gb".split(),
    *"num_cpus num_gpus max_retries".split(),
    *(f"slurm_{name}" for name in "partition account qos constraint time nodes mem mem_per_cpu mem_per_gpu".split()),
    *(f"slurm_{name}" for name in "cpus_per_task gpus_per_node gpus_per_task gres array_parallelism".split()),
)
_PARAMETERS = "hydra.launcher.parameters."
_WORD = re.compile(r"[\w.,:+@=/&|\[\]-]*")  # a value that stays one word of an sbatch line
_NO_CODE = "a configuration never names code to run. Remove the key."
_MAX_VALUES = 10_000
_SCALARS = (str, int, float, bool, type(None))
_WAY_OUT = (
    "A file may set hydra.sweep.dir and .subdir, hydra.launcher.workers, named hydra.launcher.parameters, "
    "hydra.sweeper.trials, .batch, .sampler, .seed and .max_batch_size. Remove the key."
)


def of_hydra(key: str) -> bool:
    """Whether a key, a group or a package is Hydra's own."""
    return re.split(r"[./@]", key.removeprefix("_global_").lstrip("./"), maxsplit=1)[0] == "hydra"


def check_override(text: str, key: str, package: str | None, value: Any) -> str | None:
    """Why an override of the command line is refused, if it is.

    Args:
        text: as typed.
        key: its key or group, without sign and package.
        package: what stands behind `@`.
        value: as parsed; None for a deletion.
    """
    if package is not None and of_hydra(package):
        return f"{text}: places a group among Hydra's own keys. Drop @{package}."
    if not of_hydra(key):
        return None
    if "/" in key:
        return _choice(text, key, value)
    if key.startswith(_PARAMETERS) and _flat(value):
        return None
    if key in KEYS and isinstance(value, _SCALARS):
        return None
    return f"{text}: not a key of Hydra's that lora_lab uses.{nearest(key, KEYS, cutoff=0.7)} It uses {', '.join(KEYS)} and {_PARAMETERS}*."


def _flat(value: Any) -> bool:
    return isinstance(value, _SCALARS) or (isinstance(value, list) and all(isinstance(one, _SCALARS) for one in value))


def _choice(where: str, group: str, value: Any) -> str | None:
    known = {"hydra/launcher": LAUNCHERS, "hydra/sweeper": SWEEPERS}.get(group)
    if known is None:
        return f"{where}: {group} is not a group that can be chosen. There are: hydra/launcher, hydra/sweeper."
    if value in known:
        return None
    return f"{where}: no such {group}.{nearest(value, known)} There are: {', '.join(known)}."


def check_file(file: Path, tree: Any, package: str | None) -> None:
    """Refuse what a user's group or recipe file may not say.

    Args:
        tree: as read, `defaults` included.
        package: of its `# @package` line.

    Raises:
        ConfigError: naming file and key.
    """
    if tree is None:
        raise ConfigError(f"{file}: holds nothing. Write key: value lines, or {{}} for a choice that changes nothing.")
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: must hold key: value lines, not {_kind(tree)}.")
    for number, (key, node) in enumerate(_nodes(tree)):
        _check_node(file, key, node)
        if number > _MAX_VALUES:
            raise ConfigError(f"{file}: more than {_MAX_VALUES:,} values. A configuration is not the place for data.")
    if package is not None and of_hydra(package):
        raise ConfigError(f"{file}: '# @package {package}' places the file among Hydra's own keys. Remove the line.")
    _check_defaults(file, tree.get("defaults"))
    if "hydra" in tree:
        _check_hydra(file, tree["hydra"])


def _nodes(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below a node, lists and mappings included, with its key."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in inside:
        key = f"{prefix}[{name}]" if isinstance(node, list) else f"{prefix}.{name}" if prefix else str(name)
        if not isinstance(name, (str, int)) or (isinstance(node, dict) and not isinstance(name, str)):
            yield key, name
        yield key, value
        yield from _nodes(value, key)


def _check_node(file: Path, key: str, node: Any) -> None:
    if key.rpartition(".")[2] == "_target_":
        raise ConfigError(f"{file}: {key}={node}: {_NO_CODE}")
    if not isinstance(node, (*_SCALARS, dict, list)):
        raise ConfigError(f"{file}: {key}: must be text, a number, true, false or null, not {_kind(node)}.")


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {list: "a list", dict: "a mapping", str: "text", bytes: "binary data"}
    return kinds.get(type(value), type(value).__name__)


def _check_defaults(file: Path, entries: Any) -> None:
    if entries is not None and not isinstance(entries, list):
        raise ConfigError(f"{file}: defaults={_shown(entries)}: must be a list, such as [override /quant: nf4].")
    for entry in entries or ():
        if not isinstance(entry, (str, dict)) or (isinstance(entry, dict) and len(entry) != 1):
            raise ConfigError(f"{file}: defaults: {_shown(entry)}: must be a file's name, or one GROUP: CHOICE.")
        for name, choice in entry.items() if isinstance(entry, dict) else [(entry, None)]:
            _check_default(file, f"defaults: {name}{'' if choice is None else f': {choice}'}", name, choice)


def _check_default(file: Path, where: str, name: str, choice: Any) -> None:
    if not isinstance(name, str) or not isinstance(choice, (str, list, type(None))):
        raise ConfigError(f"{file}: {where}: must be the name of a group or a file.")
    if "${" in where:
        raise ConfigError(f"{file}: {where}: a choice must be written literally, not as ${{...}}.")
    group, _, package = name.split(" ")[-1].partition("@")
    chosen = choice if isinstance(choice, list) else [choice]
    for part in (group.removeprefix("/"), *(one for one in chosen if isinstance(one, str))):
        if part.startswith("/") or ".." in part.split("/") or "\\" in part:
            raise ConfigError(f"{file}: {where}: leads out of the folder of configurations. Name a group in it.")
    if of_hydra(package):
        raise ConfigError(f"{file}: {where}: places a group among Hydra's own keys. Drop @{package}.")
    if not of_hydra(group):
        return
    if "launcher" in group:  # run.yaml chooses one, and Hydra lets the outermost file win
        raise ConfigError(
            f"{file}: {where}: no effect in a file. Choose it on the command line: hydra/launcher={choice}"
        )
    problem = _choice(f"{file}: {where}", group.removeprefix("/"), choice)
    if problem or package:
        raise ConfigError(problem or f"{file}: {where}: Hydra's groups have their place already. Drop @{package}.")


def _check_hydra(file: Path, node: Any) -> None:
    if not isinstance(node, dict):
        raise ConfigError(f"{file}: hydra={_shown(node)}: must be a mapping. {_WAY_OUT}")
    for key, value in _ends(node, "hydra"):
        name = key.removeprefix(_PARAMETERS)
        if key in KEYS and isinstance(value, _SCALARS):
            continue
        if key in KEYS or (key.startswith(_PARAMETERS) and name in PARAMETERS):
            if not isinstance(value, _SCALARS) or not _WORD.fullmatch(str(value)):
                raise ConfigError(f"{file}: {key}={_shown(value)}: must be a number or one plain word.")
            continue
        if key.startswith(_PARAMETERS):
            raise ConfigError(
                f"{file}: {key}={_shown(value)}: not a parameter that a file may set.{nearest(name, PARAMETERS)} Give it on the "
                f"command line, or use one of: {', '.join(PARAMETERS)}."
            )
        raise ConfigError(f"{file}: {key}={_shown(value)}: not a key that a file may set. {_WAY_OUT}")


def _ends(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from _ends(value, f"{prefix}.{name}")
    else:
        yield prefix, node


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def check_composed(node: dict[str, Any]) -> None:
    """Refuse a composed `hydra` section in which anything would act that the list does not name.

    Args:
        node: interpolations resolved in launcher, sweeper and sweep.

    Raises:
        ConfigError: naming the key.
    """
    job, silent = node.get("job") or {}, {"version": 1, "root": None, "disable_existing_loggers": False}
    fixed: dict[str, tuple[Any, Any]] = {
        "callbacks": (node.get("callbacks"), {}),
        "job.env_set": (job.get("env_set"), {}),
        "job.env_copy": (job.get("env_copy"), []),
        "job.chdir": (job.get("chdir"), None),
        "output_subdir": (node.get("output_subdir"), None),
        "hydra_logging": (node.get("hydra_logging"), silent),
        "job_logging": (node.get("job_logging"), silent),
        "verbose": (node.get("verbose"), False),
    }
    for key, (value, expected) in fixed.items():
        if value != expected:
            raise ConfigError(f"hydra.{key}={_shown(value)}: not a key that can be set here. {_WAY_OUT}")
    launcher = node.get("launcher") or {}
    idle = [] if launcher.get("executor") else [key for key in launcher if key != "_target_"]
    if idle and "_target_" in launcher:
        raise ConfigError(
            f"hydra.launcher.{idle[0]}: no effect with this launcher. Choose hydra/launcher=cohort_local, cohort_slurm or cohort_ray, or "
            "drop it."
        )
    for part in ("launcher", "sweeper", "sweep"):
        for key, value in _ends(node.get(part), f"hydra.{part}"):
            _check_made(part, key, value)


def _check_made(part: str, key: str, value: Any) -> None:
    if key.rpartition(".")[2] == "_target_":
        if key != f"hydra.{part}._target_" or value not in TARGETS.get(part, ()):
            raise ConfigError(f"{key}={_shown(value)}: {_NO_CODE}")
        return
    if key in KEYS:
        rule, holds = KEYS[key]
        if not holds(value):
            raise ConfigError(f"{key}={_shown(value)}: must be {rule}.")
        return
    if key in ("hydra.launcher.executor", "hydra.sweep") and isinstance(value, _SCALARS):
        return
    if key in ("hydra.launcher.parameters", "hydra.sweeper.params") and value in ({}, None):
        return
    if not (key.startswith(_PARAMETERS) and _flat(value)):
        raise ConfigError(f"{key}={_shown(value)}: not a key that can be set here. {_WAY_OUT}")
