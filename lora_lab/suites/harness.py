"""Ask base and adapter the tasks of lm-eval, and compare them row by row."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_lab.adapters.attach import without_adapter
from lora_lab.config.evaluate import EvaluateConfig
from lora_lab.errors import AdapterError, ConfigError, DataError
from lora_lab.runtime import console, reading
from lora_lab.suites import folder

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from lora_lab.run.setup import Live

_RESAMPLES, _SEED = 1000, 0
_CONFIDENCE = 0.95
_NAMED = 6  # tasks of a group, in its message


@dataclasses.dataclass(frozen=True)
class Compared:
    """A metric of a task, of base and tuned on the same rows."""

    task: str
    metric: str  # with its filter behind a comma, where the task has any
    rows: int
    shots: int
    higher_is_better: bool
    base: float
    tuned: float
    low: float | None  # 95 % interval of tuned - base, paired by rows; None: not of numbers
    high: float | None
    better: int | None  # rows that tuned does better than base; None: a row has no score of its own
    worse: int | None

    @property
    def says(self) -> str:
        """What became of it."""
        if self.low is None or self.high is None:
            return ""
        if self.low <= 0 <= self.high:
            return "no difference is seen"
        return "better" if (self.low > 0) == self.higher_is_better else "worse"


def check_extra() -> None:
    """
    Raises:
        ConfigError: lm-eval is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("evaluate.suite: needs lm-eval. pip install 'lora-lab[lm-eval]'")


def load(config: EvaluateConfig) -> dict[str, Any]:
    """The tasks of a suite with their rows, before any model is loaded: what lm-eval's `evaluate` takes.

    Raises:
        ConfigError: lm-eval is missing.
        DataError: a task is not there, or is none.
    """
    check_extra()
    chosen = None if config.tasks_dir is None else folder.chosen(config.tasks_dir, config.suite)
    from lm_eval.tasks import TaskManager

    with _as_we_run_it():
        manager = TaskManager(include_defaults=chosen is None)
        if chosen is None:
            _check_known(config.suite, manager)
        specs: list[Any] = config.suite if chosen is None else [_with_rows(task) for task in chosen]
        for spec in specs:
            _check_own(spec)
        way_out = (
            "lm-eval's own tasks bring their rows from the hub; without it name a folder of tasks: evaluate.tasks_dir=DIR"
            if chosen is None
            else "See the key that it names."
        )
        with reading.reading(f"evaluate.suite={config.suite}", DataError, way_out):
            found: dict[str, Any] = manager.load(specs)
    for task in found["tasks"].values():
        if config.few_shot is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=config.few_shot or 0)
    return found


def measure(live: Live, config: EvaluateConfig, tasks: dict[str, Any]) -> list[Compared]:
    """What base and tuned reach, on the same rows.

    Args:
        tasks: of `load`.

    Raises:
        AdapterError: both say the same of everything: the adapter has no effect.
    """
    with without_adapter(live.model):
        base, before = _asked(live, config, tasks, "base")
    tuned, after = _asked(live, config, tasks, "tuned")
    if before == after:
        raise AdapterError(
            f"evaluate.suite={config.suite}: base and adapter give the same likelihoods, all {len(before):,} of them to the last bit, so nothing is "
            "compared. The adapter changes nothing: look at its size in lora-lab inspect, and at optim.lr and train.max_steps of the run."
        )
    found = []
    for name, task in tasks["tasks"].items():
        for metric, rows in base[name].items():
            found.append(_compared(name, task, metric, rows, tuned[name][metric]))
    return found


def as_result(config: EvaluateConfig, found: list[Compared]) -> dict[str, Any]:
    """What `evaluation.json` says of a suite."""
    return {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "chat_template": config.chat_template,
        "limit": config.limit,
        "tasks": [dataclasses.asdict(one) | {"says": one.says} for one in found],
    }


def show(found: list[Compared]) -> None:
    """A table of all tasks."""
    rows = [
        [one.task, one.metric, one.rows, one.base, one.tuned, interval(one), one.better, one.worse, one.says]
        for one in found
    ]
    header = ["task", "metric", "rows", "base", "tuned", "tuned - base", "better", "worse", ""]
    console.show_table("Suite: tuned - base with its 95 % interval, paired by rows", header, rows, slice(2, 8))


def interval(one: Compared) -> str:
    """A difference with its interval."""
    between = "" if one.low is None else f" [{one.low:+.3g}, {one.high:+.3g}]"
    return f"{one.tuned - one.base:+.3g}{between}"


def _check_known(names: list[str], manager: TaskManager) -> None:
    from lora_lab.errors import nearest

    known, several = manager.all_tasks, {*manager.all_groups, *manager.all_tags}
    for name in names:
        if name not in known:
            raise DataError(
                f"evaluate.suite: lm-eval has no task {name!r}.{nearest(name, known, 0.8)} Or name a folder with tasks of your own: "
                "evaluate.tasks_dir=DIR"
            )
        if name in several:
            found = sorted(_tasks_in(manager, name))
            raise DataError(
                f"evaluate.suite: {name!r} is a group of {len(found)} tasks, and a group has no rows of its own that could be compared. Name its tasks: "
                f"evaluate.suite=[{','.join(found[:_NAMED])}{',...' if len(found) > _NAMED else ''}]"
            )


def _tasks_in(manager: TaskManager, name: str) -> set[str]:
    """The names of the tasks below a group or a tag of lm-eval."""
    entry = manager.task_index.get(name)
    if entry is None:  # the group's own file defines it
        return {name}
    below = entry.cfg.get("task") if entry.cfg else entry.tags
    if not isinstance(below, list | set):
        return {name}
    names = [one.get("group", one.get("task")) if isinstance(one, dict) else one for one in below]
    return set().union(*(_tasks_in(manager, str(one)) for one in names))


def _with_rows(task: dict[str, Any]) -> dict[str, Any]:
    """A task of a folder with its rows, read as all rows are."""
    from datasets import Dataset, DatasetDict

    plain = {key: value for key, value in task.items() if key not in ("dataset_path", "dataset_name", "dataset_kwargs")}
    with reading.reading(f"evaluate.suite: rows of {task['task']}", DataError, "Give each column values of one type."):
        rows = DatasetDict({split: Dataset.from_list(found) for split, found in folder.rows(task).items()})
    return {**plain, "custom_dataset": lambda **_: rows}


def _check_own(spec: Any) -> None:
    """Refuse a task whose metrics lm-eval would look for elsewhere: it runs what it finds."""
    import lm_eval.api.metrics  # noqa: F401  (it registers them)
    from lm_eval.api.registry import metric_registry

    for metric in spec.get("metric_list") or [] if isinstance(spec, dict) else []:
        name = metric["metric"]
        if name not in metric_registry:
            raise DataError(
                f"evaluate.suite: {spec['task']}: lm-eval has no metric {name!r} of its own. Name one that it has."
            )


@contextlib.contextmanager
def _as_we_run_it() -> Iterator[None]:
    """Inside the block lm-eval fills templates in a sandbox, because they come from files, and shows no bars of its own."""
    import lm_eval.api.task as theirs
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    sandbox = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    env, bar = utils.env, theirs.tqdm
    utils.env, theirs.tqdm = sandbox, functools.partial(bar, disable=True)
    try:
        yield
    finally:
        utils.env, theirs.tqdm = env, bar


def _asked(
    live: Live, config: EvaluateConfig, tasks: dict[str, Any], title: str
) -> tuple[dict[str, dict[str, list[Any]]], list[float]]:
    """What one model reached of each row, by task and metric, and all likelihoods that it said."""
    from lm_eval.evaluator import evaluate

    from lora_lab.suites.model import AsTrained

    model = AsTrained(live, title)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(live.setup.config.seed)
    options = {"limit": config.limit, "bootstrap_iters": 0, "apply_chat_template": config.chat_template}
    with (
        _as_we_run_it(),
        reading.reading(f"evaluate.suite={config.suite}", DataError, "See the task's templates and rows."),
    ):
        found = evaluate(model, tasks, fewshot_as_multiturn=config.chat_template, **options)
    return {name: _by_metric(rows) for name, rows in found["samples"].items()}, model.said


def _by_metric(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The values of a task's rows, in their order."""
    found: dict[str, list[Any]] = {}
    for sample in sorted(samples, key=lambda one: int(one["doc_id"])):
        for metric in sample["metrics"]:
            name = metric if sample["filter"] == "none" else f"{metric}, {sample['filter']}"
            found.setdefault(name, []).append(sample[metric])
    return found


def _compared(name: str, task: Any, metric: str, base: list[Any], tuned: list[Any]) -> Compared:
    kind = metric.partition(", ")[0]
    aggregate: Callable[[list[Any]], float] = task.aggregation()[kind]
    higher = bool(task.higher_is_better().get(kind, True))
    low, high = _interval(aggregate, base, tuned)
    alone = all(map(_is_number, (*base, *tuned)))
    sign = 1 if higher else -1
    moved = [sign * (after - before) for before, after in zip(base, tuned, strict=True)] if alone else []
    return Compared(
        name,
        metric,
        len(base),
        int(task.get_config("num_fewshot") or 0),
        higher,
        float(aggregate(base)),
        float(aggregate(tuned)),
        low,
        high,
        int(sum(one > 0 for one in moved)) if alone else None,
        int(sum(one < 0 for one in moved)) if alone else None,
    )


def _interval(
    aggregate: Callable[[list[Any]], float], base: list[Any], tuned: list[Any]
) -> tuple[float, float] | tuple[None, None]:
    """The 95 % interval of what tuned reaches above base: rows drawn again and again, for both the same (percentile bootstrap)."""
    if not all(_is_number(value) for row in (*base, *tuned) for value in (row if isinstance(row, tuple) else (row,))):
        return None, None  # of texts, which are measured all together
    draw = np.random.default_rng(_SEED)
    moved = []
    for _ in range(_RESAMPLES):
        places = draw.integers(0, len(base), len(base)).tolist()
        moved.append(aggregate([tuned[place] for place in places]) - aggregate([base[place] for place in places]))
    low, high = np.quantile(moved, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)
