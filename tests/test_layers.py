"""Who may import whom: imports go down only, sections of the configuration are leaves without torch, no file is in a circle.

A room that is added takes its place in `FLOORS`. What contradicts the order is in `EXCEPTIONS` with its reason, and leaves the table
once it is true no more.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_lab

ROOT = Path(lora_lab.__file__).parent

# From top to bottom. A floor is a room, or files of one; a file belongs to the first floor that names it or its room.
FLOORS = (
    ("__main__",),
    ("cli", "api"),
    ("verbs",),
    ("ui",),
    ("serve",),
    ("sweep",),
    ("plan",),
    (
        "run.pipeline",
        "run.chat",
        "run.answering",
        "run.predictions",
        "run.evaluation",
        "run.mining",
        "run.inspection",
        "run.labelling",
    ),  # what a run does
    ("export",),
    ("merge", "trim"),
    ("verify",),
    ("explain", "suites"),
    ("report",),
    ("run",),  # a run made ready
    ("training",),
    ("tasks",),
    ("fast",),
    ("data", "demo"),
    ("adapters",),
    ("base",),
    ("run.run_dir", "run.trained", "run.takes"),  # a run's folder
    ("config",),
    ("runtime",),
    ("schema",),
    ("errors", ""),  # '': the package itself, whose names are loaded when they are used
)
_PLACES = {name: floor for floor, names in enumerate(FLOORS) for name in names}

EXCEPTIONS = {
    ("merge.merge", "export.text"): "a merged model is asked in messages, as an exported file is",
    ("config.data", "data.clean"): "the names of the cleaning steps",
    ("config.data", "data.formats"): "the names of the row formats",
    ("config.run", "adapters"): "the sections of adapters, by name",
    ("config.run", "tasks"): "the sections of tasks, by name",
    ("config.compose", "adapters"): "why some of peft's methods are not there",
    ("config.hydra_app", "sweep.jobs"): "what Hydra's launchers and sweepers hand over",
}

BESIDE = {  # what sections import beside the schema
    ("config.data", "data.clean"): "the names of the cleaning steps",
    ("config.data", "data.formats"): "the names of the row formats",
    ("data.augment", "data.clean"): "the names of languages",
    ("serve.config", "data.personal"): "the kinds of personal data",
    ("data.augment", "base.resolve"): "the section stands beside the code that it configures",
}


@functools.cache
def files() -> dict[str, ast.Module]:
    """Every file by its name without 'lora_lab.', parsed."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def _names(node: ast.AST, inside_functions: bool) -> Iterator[str]:
    """What is imported when the code runs: nothing under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _names(ast.Module([other], []), inside_functions)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _names(child, inside_functions)


@functools.cache
def imports(name: str, inside_functions: bool = True) -> frozenset[str]:
    """The files that a file imports."""
    found = set()
    for full in _names(files()[name], inside_functions):
        head, _, inner = full.partition(".")
        if head != "lora_lab":
            continue
        while inner not in files():  # a name inside a file
            inner = inner.rpartition(".")[0]
        found.add(inner)
    return frozenset(found - {name})


def is_section(name: str) -> bool:
    """Whether a file declares a section of the configuration."""
    classes = [node for node in files()[name].body if isinstance(node, ast.ClassDef)]
    return any(ast.unparse(mark).startswith("section") for node in classes for mark in node.decorator_list)


def floor(name: str) -> int:
    return _PLACES[name] if name in _PLACES else _PLACES[name.partition(".")[0]]


def test_every_file_has_its_floor():
    rooms = {name.partition(".")[0] for name in files()}
    assert rooms <= set(_PLACES), "a new room takes its place in FLOORS"
    assert {name for name in _PLACES if name not in files()} == set(), "a room that is gone leaves FLOORS"


def _upward() -> set[tuple[str, str]]:
    pairs = {(name, other) for name in files() for other in imports(name) if other and not is_section(other)}
    return {(name, other) for name, other in pairs if floor(other) < floor(name)}


def test_imports_go_down_only():
    assert _upward() - set(EXCEPTIONS) == set()


def test_exceptions_are_still_needed():
    assert set(EXCEPTIONS) - _upward() == set(), "remove them from the table"


SECTIONS = [name for name in files() if is_section(name)]


@pytest.mark.parametrize("name", [name for name in SECTIONS if name != "config.run"])
def test_sections_are_leaves(name):
    """Whoever reads a section, from whatever floor, loads little more than the schema with it. `config.run` puts them together."""
    others = {other for other in imports(name, inside_functions=False) if not is_section(other)}
    beside = {other for other in others if other.partition(".")[0] not in ("schema", "errors", name.partition(".")[0])}
    assert {(name, other) for other in beside} - set(BESIDE) == set()


def test_sections_load_no_torch():
    heavy = {"torch", "peft", "transformers", "accelerate", "datasets", "hydra"}
    code = (
        f"import sys, {', '.join(f'lora_lab.{name}' for name in SECTIONS)}; print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_is_in_a_circle():
    """Of imports at the top of files: one inside a function may go back to who called."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in imports(name, inside_functions=False):
                visit(other, (*path, name))
            done.add(name)

    for name in files():
        visit(name, ())
