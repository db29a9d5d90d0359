"""What `${...}` in a configuration may do: name another value, or ask one of a few resolvers that can only read.

Checked before anything is resolved, on OmegaConf's own parse trees, because a few lines of references to references can grow
without bound.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser as Grammar
from omegaconf.grammar_parser import parse

from lora_lab.errors import ConfigError
from lora_lab.runtime.environment import WAY_OUT, secret_name

RESOLVERS = ("oc.env", "oc.select", "oc.dict.keys", "oc.dict.values", "now")
_NAMING = RESOLVERS[1:4]  # their argument is the name of another value
_MAX_TEXT = 4096
_MAX_WORK = 20_000_000  # in characters, an interpolation being worth 1,000
_Path = tuple[str, ...]


def check(tree: dict[str, Any]) -> None:
    """Refuse interpolations that ask other resolvers, name secrets, or grow too large.

    Args:
        tree: plain and unresolved.

    Raises:
        ConfigError: naming the key.
    """
    texts = {path: text for path, text in _texts(tree, ()) if "${" in text}
    try:
        wanted = {path: list(_asks(path, text)) for path, text in texts.items()}
        work = _Work(tree, wanted)
        for path in wanted:
            if work.of(path) > _MAX_WORK:
                raise ConfigError(f"{_key(path)}: its ${{...}} grow too large when they are resolved. Write the value.")
    except RecursionError as error:
        raise ConfigError("The configuration has ${...} that are nested too deep. Write the values.") from error


def _texts(node: Any, path: _Path) -> Iterator[tuple[_Path, str]]:
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in inside:
        yield from _texts(value, (*path, str(name)))
    if isinstance(node, str):
        yield path, node


def _key(path: _Path) -> str:
    return ".".join(path)


def _asks(path: _Path, text: str) -> Iterator[_Path]:
    """The path of each value that a text names."""
    if len(text) > _MAX_TEXT:
        raise ConfigError(f"{_key(path)}: text with ${{...}} of more than {_MAX_TEXT} characters. Write the value.")
    try:
        left = [parse(text)]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_key(path)}: not a valid ${{...}} ({str(error).partition(chr(10))[0]}).") from error
    while left:
        node = left.pop()
        left += getattr(node, "children", None) or []
        if isinstance(node, Grammar.InterpolationNodeContext):
            yield _named(path, node.getText()[2:-1])
        elif isinstance(node, Grammar.InterpolationResolverContext):
            yield from _asked(path, node)


def _asked(path: _Path, node: Grammar.InterpolationResolverContext) -> Iterator[_Path]:
    name = node.resolverName().getText()
    arguments = node.sequence()
    first = arguments.getChild(0).getText().strip().strip("'\"") if arguments is not None else ""
    if name not in RESOLVERS:
        raise ConfigError(
            f"{_key(path)}: ${{{name}:...}} is not a resolver that a configuration may ask. There are: {', '.join(RESOLVERS)}; "
            "${section.key} names another value."
        )
    if name == "oc.env" and secret_name(first):
        raise ConfigError(f"{_key(path)}: reads the secret {first} from the environment. {WAY_OUT}")
    if name in _NAMING:
        yield _named(path, first)


def _named(path: _Path, name: str) -> _Path:
    if "${" in name:
        raise ConfigError(f"{_key(path)}: the name of a value inside ${{...}} must be written literally.")
    dots = len(name) - len(name.lstrip("."))
    parts = tuple(part.strip("'\" ") for part in re.split(r"[.\[\]]+", name.lstrip(".")) if part)
    return path[: max(0, len(path) - dots)] + parts if dots else parts


class _Work:
    """How much it takes to resolve a value: its own text and that of all it names, again and again."""

    def __init__(self, tree: dict[str, Any], wanted: dict[_Path, list[_Path]]):
        self.tree, self.wanted = tree, wanted
        self.known: dict[_Path, int] = {}
        self.longest = max(map(len, os.environ.values()), default=0)

    def of(self, path: _Path) -> int:
        if path not in self.known:
            self.known[path] = 0  # a circle: OmegaConf names it
            self.known[path] = min(self._count(path), 2 * _MAX_WORK)
        return self.known[path]

    def _count(self, path: _Path) -> int:
        node = self.tree
        for place, name in enumerate(path):
            if isinstance(node, str):  # an interpolation on the way
                return self.of(path[:place])
            node = self._inside(node, name)
        if isinstance(node, str):
            named = self.wanted.get(path, ())
            own = 1000 + self.longest * node.count("oc.env") if "${" in node else 0
            return own + len(node) + sum(self.of(other) for other in named)
        names = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        return 50 + sum(self.of((*path, str(name))) for name in names)

    def _inside(self, node: Any, name: str) -> Any:
        if isinstance(node, dict):
            return node.get(name)
        if isinstance(node, list) and name.isdigit() and int(name) < len(node):
            return node[int(name)]
        return None
