"""Tasks of lm-eval in a folder of the user's: YAML of plain values beside their rows. Nothing in them is run.

lm-eval itself would import the Python files that `!function` names, and fill templates in without bounds. So its files are read here,
and it is given what they say as plain values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_lab.data import sources
from lora_lab.errors import DataError, nearest
from lora_lab.runtime import reading

KEY = "evaluate.tasks_dir"
_SUFFIXES = (".yaml", ".yml")
_KEYS = (  # of a task that are plain values
    "task", "task_alias", "tag", "include", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
    "test_split", "fewshot_split", "fewshot_config", "doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter",
    "fewshot_delimiter", "gen_prefix", "num_fewshot", "output_type", "generation_kwargs", "repeats", "filter_list", "metric_list",
    "metadata",
)  # fmt: skip
_CODE = ("class", "custom_dataset", "process_docs", "process_results", "unsafe_code", "use_prompt")
_KINDS = ("json", "csv", "parquet")
_ROWS = "dataset_kwargs: {data_files: {test: rows.jsonl}}"
_MOST = 1000  # files


def read(folder: str) -> dict[str, dict[str, Any]]:
    """The tasks that a folder and those below it hold, by name, as plain values of lm-eval's; rows are named, not read.

    Raises:
        DataError: naming the file, and what of it is not taken.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"{KEY}={folder}: no folder. Name one that holds tasks of lm-eval as .yaml files.")
    files = sorted(file for file in root.rglob("*") if file.suffix in _SUFFIXES)
    if len(files) > _MOST:
        raise DataError(f"{KEY}={folder}: more than {_MOST} tasks. Name a folder with those that are asked.")
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in files:
        task = _task(file, root)
        name = task.get("task")
        if name is None:  # what others include
            continue
        if not isinstance(name, str):
            raise DataError(f"{file}: task={name!r}: a group. Name its tasks in evaluate.suite instead.")
        if name in found:
            raise DataError(f"{file}: the task {name!r} is also in {found[name][0]}. Rename one.")
        _check(file, task)
        found[name] = file, task
    return {name: task for name, (_, task) in found.items()}


def chosen(folder: str, names: list[str]) -> list[dict[str, Any]]:
    """The tasks of `read` that are asked.

    Raises:
        DataError: one is not there.
    """
    tasks = read(folder)
    for name in names:
        if name not in tasks:
            raise DataError(
                f"evaluate.suite: no task {name!r} in {folder}.{nearest(name, tasks)} It has: {', '.join(sorted(tasks)) or 'none'}."
            )
    return [tasks[name] for name in names]


def rows(task: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a task, by their split.

    Raises:
        DataError: a row that cannot be read, with its file.
    """
    named: dict[str, list[str]] = task["dataset_kwargs"]["data_files"]
    return {split: [row for file in files for row in _rows(file)] for split, files in named.items()}


def _rows(file: str) -> Iterator[dict[str, Any]]:
    for one in sources.find(KEY, file):
        for row in one.rows():
            if row.problem is not None:
                raise DataError(f"{one.name} row {row.number}: {row.problem}")
            yield row.values


def _task(file: Path, root: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file says, with what it includes."""
    tree = _parsed(_within(file, root, f"{KEY}={root}"))
    if not isinstance(tree, dict):
        raise DataError(f"{file}: must hold the keys of a task, not {type(tree).__name__}.")
    _refuse_keys(file, tree)
    if "dataset_kwargs" in tree:
        tree["dataset_kwargs"] = _placed(file, root, tree["dataset_kwargs"])
    included = tree.pop("include", None)
    if included is None:
        return tree
    other = _within(file.parent / str(included), root, f"{file}: include={included}")
    if other in (*above, file):
        raise DataError(f"{file}: include={included}: it includes itself.")
    return {**_task(other, root, (*above, file)), **tree}


def _parsed(file: Path) -> Any:
    try:
        return reading.read_yaml(file, DataError)
    except DataError as error:
        if "!function" not in str(error):
            raise
        raise DataError(
            f"{error} It names code, and no file runs code here. Say it by templates (doc_to_text, doc_to_target, doc_to_choice), filters and "
            "lm-eval's own metrics, or make the column in the rows."
        ) from error


def _refuse_keys(file: Path, tree: dict[str, Any]) -> None:
    for key in tree:
        if key in _CODE:
            raise DataError(f"{file}: {key}: names code, and no file runs code here. Drop it.")
        if key == "group":
            raise DataError(f"{file}: group: name its tasks in evaluate.suite instead, and drop the file.")
        if key not in _KEYS:
            raise DataError(f"{file}: {key}: no key of a task that is read here.{nearest(key, _KEYS)}")


def _placed(file: Path, root: Path, told: Any) -> dict[str, Any]:
    """`dataset_kwargs` with the files of rows by their split, as paths inside the folder."""
    files = told.get("data_files") if isinstance(told, dict) else None
    if not files or set(told) != {"data_files"}:
        raise DataError(f"{file}: dataset_kwargs: name the files of rows and nothing else: {_ROWS}.")
    by_split = files if isinstance(files, dict) else {"train": files}
    return {
        "data_files": {
            str(split): [
                str(_within(file.parent / str(name), root, f"{file}: data_files"))
                for name in (names if isinstance(names, list) else [names])
            ]
            for split, names in by_split.items()
        }
    }


def _check(file: Path, task: dict[str, Any]) -> None:
    """Refuse a task whose rows do not lie in its folder, or whose metrics are not lm-eval's own."""
    if task.get("dataset_path") not in _KINDS or "dataset_kwargs" not in task:
        raise DataError(
            f"{file}: dataset_path={task.get('dataset_path')}: the rows of a task in a folder lie there too. Write dataset_path: json (or csv, "
            f"parquet) and {_ROWS}."
        )
    for metric in task.get("metric_list") or []:
        if not isinstance(metric, dict) or not isinstance(metric.get("metric"), str) or metric.get("hf_evaluate"):
            raise DataError(f"{file}: metric_list: {metric!r}: must name one of lm-eval's own metrics.")


def _within(file: Path, root: Path, what: str) -> Path:
    """
    Raises:
        DataError: it is not there, or lies elsewhere.
    """
    if not file.is_file():
        raise DataError(f"{what}: {file} is no file.")
    if not file.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{what}: {file} lies outside {root}. Put what a task reads into its folder.")
    return file
