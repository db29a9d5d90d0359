"""Single values of a row: texts, and structures that a file of texts (CSV) holds as JSON or as Python writes lists."""

from __future__ import annotations

import ast
import io
import json
import tokenize
import warnings
from typing import Any

from lora_lab.data.limits import fault_of

_MAX_LITERAL = 2**20  # characters of a Python literal; its parser needs a hundred times as much memory
_AS_JSON = 'Write it as JSON, such as ["a", "b"].'


class RowError(Exception):
    """Why a row cannot be used: a kind to count it under, and a sentence."""

    def __init__(self, kind: str, sentence: str):
        super().__init__(sentence)
        self.kind = kind


def loads(text: str) -> Any:
    """What JSON text holds.

    Raises:
        ValueError: not JSON, or an object has two keys of one name, of which the last would win.
        RecursionError: nested too deep.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(twice([key for key, _ in pairs], "key"))
    return found


def twice(names: list[str], what: str) -> str:
    """A sentence about the first name that comes up twice, with both places."""
    name = next(name for number, name in enumerate(names) if name and name in names[:number])
    first, second = [number for number, other in enumerate(names, start=1) if other == name][:2]
    return f"{what} {name!r} is there twice, as {what} {first} and {what} {second}; rename or remove one of them"


def text_of(values: dict[str, Any], column: str) -> str:
    """The text of a column.

    Raises:
        RowError: it is none.
    """
    value = values[column]
    if not isinstance(value, str):
        raise RowError("not text", f"'{column}' must be text, not {shown(value)}.")
    if "\0" in value:
        raise RowError("not text", f"'{column}' holds a NUL character. Remove it.")
    return value


def decoded(value: Any, column: str) -> Any:
    """A structure, which may be given as text: JSON, or a list or dict as Python writes it.

    Raises:
        RowError: text that is neither.
    """
    if not isinstance(value, str):
        return value
    try:
        found = loads(value)
    except (ValueError, RecursionError) as error:
        found = literal(value)
        if found is None:
            reason = f"; {error}" if "is there twice" in str(error) else ""
            raise RowError(
                "not text", f"'{column}' is neither a structure nor JSON text ({shown(value)}{reason}). {_AS_JSON}"
            ) from error
    if problem := fault_of(found):
        raise RowError("not text", f"'{column}' {problem}")
    return found


def literal(text: str) -> list[Any] | dict[Any, Any] | None:
    """The list or dict that Python would print so (`str` of a list is what pandas puts into CSV files); None for anything else.

    No code is run. Arrays are printed without commas, and two strings that no comma parts would become one: None.
    """
    text = text.strip()
    if text[:1] not in ("[", "(", "{") or len(text) > _MAX_LITERAL:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # an escape that Python does not know stays as it is
            tree = ast.parse(text, mode="eval")
        value = ast.literal_eval(tree)
        joined = _neighbours(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    if joined or any(_repeats(node) for node in ast.walk(tree) if isinstance(node, ast.Dict)):
        return None
    if isinstance(value, tuple):
        value = list(value)
    return value if isinstance(value, (list, dict)) else None


def _neighbours(text: str) -> bool:
    """Whether two strings stand side by side."""
    before = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT):
            continue
        if token.type == before == tokenize.STRING:
            return True
        before = token.type
    return False


def _repeats(node: ast.Dict) -> bool:
    keys = [ast.dump(key) for key in node.keys if key is not None]
    return len(set(keys)) < len(keys)


def list_of(value: Any, column: str) -> Any:
    """The list that a text stands for if it looks like one; other values as they are.

    Raises:
        RowError: a text that looks like a list and is none: it must not count as a text.
    """
    if not isinstance(value, str):
        return value
    stripped = value.strip()
    if not stripped.startswith(("[", "(", "array(")):
        return value
    try:
        found = loads(stripped)
    except (ValueError, RecursionError):
        found = literal(stripped)
    if isinstance(found, list):
        if problem := fault_of(found):
            raise RowError(column, f"the {column} {problem}")
        return found
    meant = (stripped[0] == "[" and stripped[-1] == "]") or stripped.startswith(("['", '["', "array("))
    if not meant:
        return value  # a text that begins with something in brackets
    raise RowError(
        column,
        f"{column} {shown(value)} looks like a list and cannot be read as one. {_AS_JSON} If it is the name of a class, name all "
        "classes with data.label_names.",
    )


def shown(value: Any) -> str:
    """A value for a message, not too long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
