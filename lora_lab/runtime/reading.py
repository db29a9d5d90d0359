"""Read small files that somebody else may have written: a model's JSON, a recipe, a run folder that was received.

Each is a regular file (a named pipe would wait for ever), bounded in size, nesting and expansion before anything is made of it, and
whatever is wrong with it becomes a sentence that names the file. Large files (weights, rows) have readers of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lora_lab.errors import LoraLabError

MAX_BYTES = 64 * 2**20  # tokenizer.json of large vocabularies has 35 MB
MAX_YAML_BYTES = 2**20
_MAX_DEPTH = 100
_MAX_NODES = 100_000  # of a YAML file with its aliases written out
_KINDS: dict[type, str] = {dict: "a JSON object", list: "a JSON list"}


def read_bytes(file: Path, error: type[LoraLabError], max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file of at most `max_bytes`.

    Raises:
        error: the file is missing, no regular file, too large, or cannot be read.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as problem:
        raise error(f"{file}: cannot be read ({getattr(problem, 'strerror', None) or problem}).") from problem
    with open(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{file}: not a regular file. Replace it by one.")
        content = stream.read(min(found.st_size, max_bytes) + 1)  # a buffer of the limit would be 64 MiB
    if len(content) > max_bytes:
        raise error(f"{file}: larger than {_size(max_bytes)}, so it is not what its name says.")
    return content


def check_file(file: Path, error: type[LoraLabError], max_bytes: int | None = MAX_BYTES) -> None:
    """Check a file that a library will read: a regular one, and of at most `max_bytes` (None: of any size).

    Raises:
        error: it is missing, no regular file, or too large.
    """
    try:
        found = file.stat()
    except (OSError, ValueError) as problem:
        raise error(f"{file}: cannot be read ({getattr(problem, 'strerror', None) or problem}).") from problem
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{file}: not a regular file. Replace it by one.")
    if max_bytes is not None and found.st_size > max_bytes:
        raise error(f"{file}: larger than {max_bytes // 2**20} MiB, so it is not what its name says.")


def read_text(file: Path, error: type[LoraLabError], max_bytes: int = MAX_BYTES) -> str:
    """As `read_bytes`, as UTF-8 text.

    Raises:
        error: also what is not UTF-8, with the place.
    """
    try:
        return read_bytes(file, error, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{file}: byte {problem.start} is not UTF-8. Save the file as UTF-8.") from problem


def read_json(file: Path, error: type[LoraLabError], of: type = dict, max_bytes: int = MAX_BYTES) -> Any:
    """The object (or, with `of`, the list) that a JSON file holds.

    Raises:
        error: also what is not JSON, is nested too deep, or is of another kind.
    """
    text = read_text(file, error, max_bytes)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{file}: not valid JSON ({problem}).") from problem
    if not isinstance(tree, of):
        raise error(f"{file}: must hold {_KINDS.get(of, of.__name__)}, not {type(tree).__name__}.")
    if _depth(tree) > _MAX_DEPTH:
        raise error(f"{file}: nested deeper than {_MAX_DEPTH} levels. The file is not trusted.")
    return tree


def read_yaml(file: Path, error: type[LoraLabError]) -> Any:
    """What a YAML file holds: plain values only, each key once. What is wrong is told with line and column.

    Raises:
        error: also what is not YAML, has a key twice, names a type, is nested too deep, or grows too large through aliases.
    """
    return parse_yaml(file, read_text(file, error, MAX_YAML_BYTES), error)


def parse_yaml(file: Path, text: str, error: type[LoraLabError]) -> Any:
    """As `read_yaml`, of a text that was read from `file` already."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return None
        _check_yaml(file, root, error)
        return yaml.load(text, Loader=yaml.SafeLoader)
    except RecursionError as problem:
        raise error(f"{file}: nested deeper than {_MAX_DEPTH} levels. The file is not trusted.") from problem
    except yaml.MarkedYAMLError as problem:
        raise error(f"{file}{_place(problem.problem_mark)}: not valid YAML ({_reason(problem)}).") from problem
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as problem:
        raise error(f"{file}: not valid YAML ({str(problem).partition(chr(10))[0]}).") from problem


@contextlib.contextmanager
def reading(what: object, error: type[LoraLabError], way_out: str = "Copy or download it again.") -> Iterator[None]:
    """Inside the block a library reads `what`: whatever it raises becomes `error`, which names `what`.

    Memory that runs out and errors of ours go through as they are.
    """
    try:
        yield
    except (LoraLabError, MemoryError):
        raise
    except BaseException as problem:
        if (
            not isinstance(problem, Exception) and type(problem).__name__ != "PanicException"
        ):  # tokenizers' and safetensors'
            raise
        reason = str(problem).strip().partition("\n")[0] or type(problem).__name__
        raise error(f"{what}: cannot be read ({type(problem).__name__}: {reason}). {way_out}") from problem


def _size(count: int) -> str:
    return f"{count // 2**20} MiB" if count >= 2**20 else f"{count // 2**10} KiB"


def _depth(tree: Any) -> int:
    """Levels of lists and objects, without recursion."""
    deepest, left = 0, [(tree, 1)]
    while left:
        node, level = left.pop()
        deepest = max(deepest, level)
        inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        left += [(child, level + 1) for child in inside if isinstance(child, (dict, list))]
    return deepest


def _check_yaml(file: Path, root: yaml.Node, error: type[LoraLabError]) -> None:
    """Refuse what would grow too large, keys that stand twice, and mappings that contain themselves."""
    sizes: dict[int, int] = {}  # nodes below a node, with aliases written out; 0 while it is being counted

    def size(node: yaml.Node, level: int) -> int:
        if level > _MAX_DEPTH:
            raise error(f"{file}{_place(node.start_mark)}: nested deeper than {_MAX_DEPTH} levels.")
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise error(f"{file}{_place(node.start_mark)}: an alias of something that contains it.")
            return sizes[id(node)]
        sizes[id(node)] = 0
        children = []
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(file, node, error)
            children = [child for pair in node.value for child in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        sizes[id(node)] = 1 + sum(size(child, level + 1) for child in children)
        if sizes[id(node)] > _MAX_NODES:
            raise error(f"{file}{_place(node.start_mark)}: more than {_MAX_NODES:,} values, aliases written out.")
        return sizes[id(node)]

    size(root, 1)


def _refuse_twice(file: Path, node: yaml.MappingNode, error: type[LoraLabError]) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise error(f"{file}{_place(key.start_mark)}: the key '{key.value}' appears twice. Remove one.")
        seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))


def _place(mark: yaml.Mark | None) -> str:
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"


def _reason(problem: yaml.MarkedYAMLError) -> str:
    return " ".join(str(part) for part in (problem.context, problem.problem) if part)
