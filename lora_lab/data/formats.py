"""Row formats: each turns a row into one conversation, a list of `{"role", "content"}` messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_lab.data.sources import Row, Rows
from lora_lab.errors import DataError, nearest

Message = dict[str, Any]
_ROLES = ("system", "user", "assistant", "tool", "developer")


def _messages(row: Row) -> list[Message]:
    messages = row.values["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{row.origin}: 'messages' must be a list of objects with role and content.")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _prompt_completion(row: Row) -> list[Message]:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # conversational form: two lists of messages
        return _messages(Row({"messages": prompt + completion}, row.origin))
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _alpaca(row: Row) -> list[Message]:
    instruction, given = row.values["instruction"], row.values.get("input")
    if given is not None and not isinstance(given, str):
        raise DataError(f"{row.origin}: 'input' must be text, not {type(given).__name__} ({given!r}).")
    content = f"{instruction}\n\n{given}" if given and isinstance(instruction, str) else instruction
    return [{"role": "user", "content": content}, {"role": "assistant", "content": row.values["output"]}]


# name -> (columns that a row must have, row -> messages). The first format whose columns are all there is detected.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], list[Message]]]] = {
    "messages": (("messages",), _messages),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
}


def detect(rows: Rows, name: str) -> list[str]:
    """The format of each file of `rows`, in order; `name` is `data.format`.

    Raises:
        DataError: a named format lacks columns, or `auto` recognizes none; present columns are listed.
    """
    return [_detect(rows.key, columns, name) for columns in rows.columns]


def _detect(key: str, columns: list[str], name: str) -> str:
    if name == "auto":
        for candidate, (required, _) in FORMATS.items():
            if set(required) <= set(columns):
                return candidate
        known = "; ".join(f"{name}: {', '.join(required)}" for name, (required, _) in FORMATS.items())
        raise DataError(f"{key}: columns {', '.join(columns)} fit no format. Rename them to one of: {known}.")
    missing = [column for column in FORMATS[name][0] if column not in columns]
    if missing:
        raise DataError(
            f"{key}: data.format={name} needs column '{missing[0]}', and the file has {', '.join(columns)}."
            f"{nearest(missing[0], columns)}"
        )
    return name


def conversation(row: Row, name: str) -> list[Message]:
    """The row's conversation, checked: known roles, texts everywhere, at least one non-empty answer.

    Raises:
        DataError: naming the row, the value and the rule.
    """
    messages = FORMATS[name][1](row)
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise DataError(f"{row.origin}: role {role!r} is not one of {', '.join(_ROLES)}.{nearest(role, _ROLES)}")
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise DataError(f"{row.origin}: the content of a {role} message must be text, not {content!r}.")
        if role == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
            raise DataError(f"{row.origin}: the answer is empty, so there is nothing to learn. Remove or fill the row.")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{row.origin}: no assistant message, so every label is masked and there is nothing to learn.")
    return messages
