"""Conversations of rows: turns in every published shape become messages, checked, with roles in a sensible order."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from lora_lab.data.values import RowError, decoded, literal, loads, shown
from lora_lab.errors import nearest

Message = dict[str, Any]
_ROLES = ("system", "developer", "user", "assistant", "tool")
# Other names of roles, of ShareGPT and of data sets in its manner.
_OTHER_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bing": "assistant", "bard": "assistant",
    "bot": "assistant", "ai": "assistant", "observation": "tool", "function_response": "tool", "function": "tool",
    "function_call": "function_call",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")  # of an answer, beside its content
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# What is taken along of a turn of {from, value}.
_CARRIED = ("train", "weight", "tool_calls", "tool_call_id", "name", "function_call", *REASONING, *MEDIA)
# Names that the two sides of an earlier exchange go by.
_ASKED = ("instruction", "user", "human", "question", "prompt", "query", "input", "q")
_ANSWERED = ("output", "assistant", "gpt", "bot", "answer", "response", "completion", "reply", "a")


# -- turns of any shape -> messages -------------------------------------------------------------------------------------


def turns_of(value: Any, column: str, whole: bool = False) -> list[Message]:
    """Messages from a list of {role, content} or {from, value}; roles by their usual names, calls as turns of their own.

    Args:
        whole: keep every field of turns that have role and content (templates may use any).

    Raises:
        RowError: another shape, or an unknown role.
    """
    turns = decoded(value, column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("not text", f"'{column}' must be a list of objects with role and content (or from and value).")
    return [_turn(turn, whole and "from" not in turn) for turn in turns]


def _turn(turn: dict[str, Any], whole: bool) -> Message:
    role = role_of(turn.get("role") if whole else turn.get("from", turn.get("role")))
    message = {key: item for key, item in turn.items() if item is not None and (whole or key in _CARRIED)}
    message["role"] = role
    content = turn.get("content") if whole else turn.get("value", turn.get("content"))
    if role == "function_call":
        return {**message, "role": "assistant", "tool_calls": _calls(content)}
    if not whole or content is not None:
        message["content"] = content
    if message.get("function_call"):  # what OpenAI's tool_calls were called before
        message["tool_calls"] = _calls(message.pop("function_call"))
    return message


def role_of(name: Any) -> str:
    """Our name of a role.

    Raises:
        RowError: an unknown one.
    """
    plain = name.strip().lower() if isinstance(name, str) else name
    if isinstance(plain, str) and plain in _ROLES:
        return plain
    role = _OTHER_ROLES.get(plain) if isinstance(plain, str) else None
    if role is None:
        known = ", ".join((*_ROLES, *_OTHER_ROLES))
        raise RowError("role", f"role {name!r} is not one of {known}.{nearest(name, (*_ROLES, *_OTHER_ROLES))}")
    return role


def other_roles(value: Any) -> list[str]:
    """Names of roles in `messages` that are not ours, each once; for a sentence to the user."""
    names = [turn.get("role", turn.get("from")) for turn in value if isinstance(turn, dict)]
    return [name for name in dict.fromkeys(names) if isinstance(name, str) and name not in _ROLES]


def _calls(content: Any) -> list[dict[str, Any]]:
    calls = decoded(content, "function_call")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError("tool", f"a function call must be JSON with name and arguments, not {shown(content)}.")
    return [{"type": "function", "function": call} for call in calls]


def history_of(value: Any) -> list[Message]:
    """Earlier turns (Alpaca's `history`) as messages, from every published shape: a list of pairs, a flat list that begins with
    the user, a list of {role, content} or {from, value}, a list of {instruction, output} and the like; or text of one of these.

    Raises:
        RowError: another shape, or one that could mean two things.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    turns = decoded(value, "history")
    if not turns and isinstance(turns, (list, dict)):
        return []
    if not isinstance(turns, list):
        raise _no_history(value)
    if all(isinstance(turn, str) for turn in turns):
        if len(turns) % 2:
            raise RowError(
                "not text",
                f"'history' is a list of {len(turns)} texts, so a question or an answer is missing. Write pairs: "
                "[[question, answer], ...].",
            )
        return _alternating(turns)
    if all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in turns):
        _refuse_roles([turn[0] for turn in turns], value)
        return _alternating([text for pair in turns for text in pair])
    if all(isinstance(turn, dict) for turn in turns):
        if all(("role" in turn and "content" in turn) or ("from" in turn and "value" in turn) for turn in turns):
            return turns_of(turns, "history")
        return _alternating([text for turn in turns for text in _exchange(turn)])
    raise _no_history(value)


def _refuse_roles(questions: list[Any], value: Any) -> None:
    """Pairs of a role and a text are no pairs of a question and an answer: the roles would be trained on as questions."""
    names = {text.strip().lower() for text in questions if isinstance(text, str)}
    if names and names <= {*_ROLES, *_OTHER_ROLES}:
        raise _no_history(value)


def _alternating(texts: list[Any]) -> list[Message]:
    for text in texts:
        if not isinstance(text, str):
            raise RowError(
                "not text", f"'history' holds {shown(text)} where a text belongs. Write [[question, answer], ...]."
            )
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def _exchange(turn: dict[str, Any]) -> tuple[Any, Any]:
    """Question and answer of one earlier exchange."""
    asked, answered = ([name for name in names if turn.get(name)] for names in (_ASKED, _ANSWERED))
    if asked == ["instruction", "input"] and isinstance(turn["instruction"], str) and isinstance(turn["input"], str):
        asked = ["instruction"]
        turn = {**turn, "instruction": f"{turn['instruction']}\n\n{turn['input']}"}
    if len(asked) != 1 or len(answered) != 1:
        raise _no_history([turn])
    return turn[asked[0]], turn[answered[0]]


def _no_history(value: Any) -> RowError:
    return RowError(
        "not text",
        f"'history' must be a list of pairs [question, answer] or of objects with role and content, not {shown(value)}.",
    )


def is_conversation(value: Any) -> bool:
    """Whether it is a list of turns."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and (("role" in turn) or ("from" in turn)) for turn in value)
    )


def conversation_in(text: Any) -> tuple[list[dict[str, Any]] | None, bool]:
    """The turns that a value holds, as a list or as text of one; and whether Python wrote that text, so that it is no text of the
    user's in any case."""
    found: Any
    if not isinstance(text, str):
        return (text if is_conversation(text) else None), False
    if not text.lstrip().startswith("[") or "{" not in text[:100]:
        return None, False
    with contextlib.suppress(ValueError, RecursionError):
        found = loads(text)
        return (found if is_conversation(found) else None), False
    found = literal(text)
    return (found, True) if is_conversation(found) else (None, False)


def same_prompt(first: list[Message], second: list[Message]) -> bool:
    """Whether two conversations say the same before their last messages."""
    return [_said(message) for message in first[:-1]] == [_said(message) for message in second[:-1]]


def _said(message: Message) -> list[Any]:
    return [message.get(key) for key in ("role", "content", "tool_calls")]


def with_prompt(prompt: str, turns: list[Message], column: str) -> list[Message]:
    """The whole conversation from the text of its prompt and turns that either follow it or hold it.

    Raises:
        RowError: they begin with other turns than the prompt.
    """
    if turns[0]["role"] == "assistant":
        return [{"role": "user", "content": prompt}, *turns]
    contents = [
        turn["content"].strip() for turn in turns if turn["role"] == "user" and isinstance(turn["content"], str)
    ]
    if prompt.strip() and prompt.strip() not in contents:
        raise RowError(
            "prompt",
            f"'{column}' is a whole conversation, and no user's message in it equals the prompt {shown(prompt)}. Leave the prompt "
            "out (what both conversations begin with is the prompt), or give the answers alone.",
        )
    return turns


_SPOKEN = re.compile(r"\n\n(Human|Assistant):")


def spoken(text: Any) -> list[Message] | None:
    """The turns of a text of `\\n\\nHuman: ...\\n\\nAssistant: ...` (Anthropic's form); None for any other text."""
    if not isinstance(text, str) or not text.startswith("\n\nHuman:"):
        return None
    parts = _SPOKEN.split(text)[1:]
    return [
        {"role": role_of({"Human": "human", "Assistant": "assistant"}[who]), "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def spoken_prompt(text: Any) -> list[Message] | None:
    """The turns of such a text that ends where the assistant is to answer; None for any other text."""
    turns = spoken(text)
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        return turns[:-1]
    return turns


# -- media and reasoning, which a text model may lose -------------------------------------------------------------------


def refuse_media(fields: dict[str, Any], where: str) -> None:
    """Refuse pictures, sounds and films.

    Raises:
        RowError: naming the field that holds some.
    """
    for name in MEDIA:
        if fields.get(name):
            raise RowError(
                "not text",
                f"{where} holds {name}, which a text model cannot see, and the answer may be about it. Remove it from the data.",
            )


def refuse_lost_reasoning(messages: list[Message], template: str | None) -> None:
    """Refuse reasoning beside the content of an answer that the chat template does not show: it would be lost.

    Raises:
        RowError: naming the message.
    """
    for number, message in enumerate(messages, start=1):
        for name in REASONING:
            if message["role"] == "assistant" and message.get(name) and name not in (template or ""):
                raise RowError(
                    "reasoning",
                    f"message {number} has {name}, which the model's chat template does not show, so it would not be learned. "
                    f"Write it into the content (such as <think>...</think>), or remove {name} from the rows.",
                )


# -- checks -------------------------------------------------------------------------------------------------------------


def checked_messages(messages: list[Message], system: Any = None) -> list[Message]:
    """A checked conversation: known roles in a sensible order, texts everywhere, at least one answer to learn.

    Raises:
        RowError: it is none.
    """
    if system is not None and not isinstance(system, str):
        raise RowError("not text", f"'system' must be text, not {shown(system)}.")
    known = bool(messages) and messages[0].get("role") == "system" and messages[0].get("content") == system
    if system and system.strip() and not known:
        messages = [{"role": "system", "content": system}, *messages]
    messages = _linked([_checked(message) for message in messages])
    _check_order(messages)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RowError("masked", "no assistant message, so every label is masked and there is nothing to learn.")
    if not any(weight_of(message) for message in answers):
        raise RowError("masked", "no answer is to be trained on (train or weight), so every label is masked.")
    for number, message in enumerate(messages, start=1):
        refuse_media(message, f"message {number}")
    return messages


def _checked(message: Message) -> Message:
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise RowError("role", f"role {role!r} is not one of {', '.join(_ROLES)}.{nearest(role, _ROLES)}")
    if isinstance(content, list):  # OpenAI's parts
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise RowError("not text", f"the content of {_a(role)} message holds a part that is not text.")
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise RowError("not text", f"the content of {_a(role)} message must be text, not {shown(content)}.")
    if "\0" in (content or ""):
        raise RowError("not text", f"the content of {_a(role)} message holds a NUL character. Remove it.")
    if role == "assistant" and not (content or "").strip() and not calls:
        raise RowError("empty", "the answer is empty, so there is nothing to learn. Remove or fill the row.")
    if role == "user" and not (content or "").strip():
        raise RowError("empty", "the user's message is empty. Remove or fill the row.")
    if role != "assistant" and weight_of(message, 0.0):
        raise RowError("role", f"{_a(role)} message asks to be trained on; only the assistant's can be.")
    weight_of(message)
    checked = {**message, **({} if content is None else {"content": content})}
    if calls:
        checked["tool_calls"] = [_call(call) for call in decoded(calls, "tool_calls")]
    return checked


def weight_of(message: Message, default: float = 1.0) -> float:
    """How much a message counts in the loss: `"train": false` is 0, `"weight"` is taken as it stands.

    Raises:
        RowError: a value that is neither.
    """
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError("not text", f"'train' of a message must be true or false, not {shown(train)}.")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e6
    ):
        raise RowError("not text", f"'weight' of a message must be a number from 0 on, not {shown(weight)}.")
    if train is None and weight is None:
        return default
    return 0.0 if train is False else float(1.0 if weight is None else weight)


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("tool", f"a tool call must have a function with a name, not {shown(call)}.")
    arguments = decoded(function.get("arguments", {}), "arguments")  # OpenAI's are JSON text; templates want objects
    return (
        {"type": "function", **call, "function": {**function, "arguments": arguments}}
        if call is not function
        else {
            "type": "function",
            "function": {**function, "arguments": arguments},
        }
    )


def _linked(messages: list[Message]) -> list[Message]:
    """Give tool calls without an id one of nine characters (Mistral's templates ask for that), and their results too."""
    count, open_calls, linked = 0, [], []
    for message in messages:
        if message["role"] == "assistant" and "tool_calls" in message:
            calls = []
            for call in message["tool_calls"]:
                count += 1
                calls.append({**call, "id": call.get("id") or f"call{count:05d}"})
            open_calls = [(call["id"], call["function"]["name"]) for call in calls]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool" and open_calls:
            call_id, name = open_calls.pop(0)
            message = {"tool_call_id": call_id, "name": name, **message}
        linked.append(message)
    return linked


def _check_order(messages: list[Message]) -> None:
    """System messages first, then user and assistant in turns; a tool's result follows a call or another result."""
    before: Message | None = None
    for number, message in enumerate(messages, start=1):
        role, previous = message["role"], before["role"] if before else None
        fits = {
            "system": previous in (None, "system", "developer"),
            "developer": previous in (None, "system", "developer"),
            "user": previous in (None, "system", "developer", "assistant") and not (before or {}).get("tool_calls"),
            "assistant": previous in ("user", "tool"),
            "tool": previous == "tool" or bool((before or {}).get("tool_calls")),
        }[role]
        if not fits:
            where = "at the start" if previous is None else f"after {previous}"
            raise RowError(
                "role", f"message {number}: {_a(role)} message cannot stand {where}. Roles are out of order."
            )
        before = message


def tools_of(tools: Any) -> list[dict[str, Any]] | None:
    tools = decoded(tools, "tools") if tools else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tool", f"'tools' must be a list of JSON schemas, not {shown(tools)}.")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _a(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"
