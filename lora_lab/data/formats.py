"""Row formats: each turns a row, checked, into one `Record`, whatever its columns were called."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from lora_lab.data.limits import fault_of
from lora_lab.errors import DataError, nearest

Message = dict[str, Any]
_ROLES = ("system", "developer", "user", "assistant", "tool")
_NOT_NUMBERS = (float("inf"), float("-inf"))
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "function_call",
}  # fmt: skip


class RowError(Exception):
    """Why a row cannot be used: a kind to count it under, and a sentence."""

    def __init__(self, kind: str, sentence: str):
        super().__init__(sentence)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Record:
    """One row in its canonical form.

    Rows of most formats can be seen in two ways, and hold both: as a conversation (`messages`) that a language model
    continues, and as texts with what is to be found out about them.
    """

    messages: list[Message] | None = None  # a conversation; the assistant's turns are what is learned
    tools: list[dict[str, Any]] | None = None  # JSON schemas of the functions that the conversation may call
    rejected: list[Message] | None = None  # the conversation with the worse answer
    text: str | None = None  # a text; of a question about a context, the question
    pair: str | None = None  # a second text; of a question, the context
    target: str | None = None  # the text to be made of `text`
    tokens: list[str] | None = None  # words with one label each
    label: Any = (
        None  # a class, several, a number, a tag for each word, the answers' (text, start), or good (True) or bad
    )

    def canonical(self) -> str:
        """The same text for the same content, to find equal rows."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=True, default=str)


@dataclasses.dataclass(frozen=True)
class Format:
    """How rows of one shape are read."""

    columns: tuple[str, ...]  # that a row must have
    read: Callable[[dict[str, Any], Sequence[str] | None], Record]  # (values, class names) -> record


# -- readers ------------------------------------------------------------------------------------------------------------


def _messages(values: dict[str, Any], _: Any = None) -> Record:
    messages = _decoded(values["messages"], "messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError("not text", "'messages' must be a list of objects with role and content.")
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return _conversation(kept, values.get("tools"), values.get("system"))


def _sharegpt(values: dict[str, Any], _: Any = None) -> Record:
    """`conversations` of {from, value} or {role, content}; function calls and their results are turns of their own."""
    turns = _decoded(values["conversations"], "conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("not text", "'conversations' must be a list of objects with from and value.")
    messages: list[Message] = []
    for turn in turns:
        name, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        role = _SHAREGPT_ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise RowError("role", f"role {name!r} is not one of {known}.{nearest(name, _SHAREGPT_ROLES)}")
        extra = {key: turn[key] for key in ("train", "weight") if turn.get(key) is not None}
        if role == "function_call":
            messages.append({"role": "assistant", "tool_calls": _calls(content), **extra})
        else:
            messages.append({"role": role, "content": content, **extra})
    return _conversation(messages, values.get("tools"), values.get("system"))


def _calls(content: Any) -> list[dict[str, Any]]:
    calls = _decoded(content, "function_call")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError("tool", f"a function call must be JSON with name and arguments, not {_shown(content)}.")
    return [{"type": "function", "function": call} for call in calls]


def _prompt_completion(values: dict[str, Any], _: Any = None) -> Record:
    return _answered(values["prompt"], values["completion"], values)


def _preference(values: dict[str, Any], _: Any = None) -> Record:
    """Two answers to one prompt, the first of them better."""
    if not isinstance(values["rejected"], (str, list)):
        raise RowError("not text", f"'rejected' must be text or messages, not {_shown(values['rejected'])}.")
    better = _answered(values["prompt"], values["chosen"], values)
    worse = _answered(values["prompt"], values["rejected"], values)
    return dataclasses.replace(better, rejected=worse.messages)


def _feedback(values: dict[str, Any], _: Any = None) -> Record:
    """One answer and whether it is good."""
    if not isinstance(values["label"], bool) and values["label"] not in (0, 1):
        raise RowError("label", f"label {_shown(values['label'])} is neither true (a good answer) nor false.")
    record = _messages(values) if "messages" in values else _prompt_completion(values)
    return dataclasses.replace(record, label=bool(values["label"]))


def _answered(prompt: Any, answer: Any, values: dict[str, Any]) -> Record:
    if isinstance(prompt, list) and isinstance(answer, list):  # conversational form: two lists of messages
        return _messages({**values, "messages": prompt + answer})
    history = _decoded(values.get("history") or [], "history")
    if not isinstance(history, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in history):
        raise RowError("not text", f"'history' must be a list of pairs [question, answer], not {_shown(history)}.")
    turns = [part for pair in history for part in pair]
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate([*turns, prompt, answer])]
    record = _conversation(messages, values.get("tools"), values.get("system"))
    return record if turns else dataclasses.replace(record, text=prompt, target=answer)


def _alpaca(values: dict[str, Any], _: Any = None) -> Record:
    instruction, given = values["instruction"], values.get("input")
    if given is not None and not isinstance(given, str):
        raise RowError("not text", f"'input' must be text, not {type(given).__name__} ({_shown(given)}).")
    content = f"{instruction}\n\n{given}" if given and isinstance(instruction, str) else instruction
    return _answered(content, values["output"], values)


def _question_answering(values: dict[str, Any], _: Any = None) -> Record:
    """SQuAD's rows. `answers` is {text: [...], answer_start: [...]}; every answer must stand where it says."""
    context, question = _text(values, "context"), _text(values, "question")
    answers = _decoded(values["answers"], "answers")
    texts = answers.get("text") if isinstance(answers, dict) else answers
    starts = answers.get("answer_start") if isinstance(answers, dict) else None
    texts, starts = (value if isinstance(value, list) else [value] for value in (texts, starts or []))
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RowError("not text", f"'answers' must hold at least one text, not {_shown(values['answers'])}.")
    if starts and (len(starts) != len(texts) or not all(isinstance(start, int) for start in starts)):
        raise RowError(
            "label", f"'answers' has {len(texts)} texts and the starts {_shown(starts)}: each text needs one."
        )
    for text, start in zip(texts, starts, strict=False):
        if start < 0 or context[start : start + len(text)] != text:
            raise RowError("label", f"answer {_shown(text)} does not stand at character {start} of the context.")
    record = _answered(f"{context}\n\n{question}", texts[0], {})
    spans = (
        [[text, start] for text, start in zip(texts, starts, strict=True)]
        if starts
        else [[text, None] for text in texts]
    )
    return dataclasses.replace(record, text=question, pair=context, label=spans)


def _source_target(values: dict[str, Any], _: Any = None) -> Record:
    return _answered(values["source"], values["target"], {})


def _text_label(values: dict[str, Any], names: Sequence[str] | None = None) -> Record:
    return _labelled(_text(values, "text"), None, values["label"], names)


def _pair_label(values: dict[str, Any], names: Sequence[str] | None = None) -> Record:
    return _labelled(_text(values, "text"), _text(values, "text_pair"), values["label"], names)


def _labelled(text: str, pair: str | None, given: Any, names: Sequence[str] | None) -> Record:
    """A label, or a list of them. Its name is the answer, so that a language model can learn it as well."""
    if isinstance(given, str) and given.startswith("["):  # a list in a CSV file
        with contextlib.suppress(ValueError, RecursionError):
            given = json.loads(given)
        if problem := fault_of(given):
            raise RowError("label", f"the label {problem}")
    labels = [_class(label, names) for label in (given if isinstance(given, list) else [given])]
    if len(set(map(str, labels))) < len(labels):
        raise RowError("label", f"label {_shown(given)} names a class twice.")
    answer = ", ".join(map(str, labels)) or "none"
    record = _answered(text if pair is None else f"{text}\n\n{pair}", answer, {})
    label = labels if isinstance(given, list) else labels[0]
    return dataclasses.replace(record, text=text, pair=pair, target=None, label=label)


def _class(label: Any, names: Sequence[str] | None) -> str | int | float:
    """A label, checked; with `data.label_names` always one of these."""
    if (
        isinstance(label, bool)
        or not isinstance(label, (int, float, str))
        or label == ""
        or label in _NOT_NUMBERS
        or label != label
    ):
        raise RowError("label", f"label {_shown(label)} is neither a class nor a number.")
    if names is None:
        return label
    label = int(label) if isinstance(label, str) and label.isdecimal() and label not in names else label
    if isinstance(label, str) and label not in names:
        raise RowError(
            "label", f"label {label!r} is not in data.label_names ({', '.join(names)}).{nearest(label, names)}"
        )
    if not isinstance(label, str) and (label != int(label) or not 0 <= label < len(names)):
        raise RowError("label", f"label {label!r} is out of range: data.label_names has classes 0 to {len(names) - 1}.")
    return label if isinstance(label, str) else names[int(label)]


def class_name(label: Any) -> str:
    """The name of a class.

    Raises:
        RowError: a number that cannot count classes.
    """
    if isinstance(label, float) and label != int(label):
        raise RowError(
            "label", f"label {label!r} is a number between two classes. For numbers there is task=regression."
        )
    if isinstance(label, (int, float)) and label < 0:
        raise RowError("label", f"label {label!r} is negative; classes count from 0.")
    return label if isinstance(label, str) else str(int(label))


def _token_labels(values: dict[str, Any], names: Sequence[str] | None = None) -> Record:
    tokens, tags = _decoded(values["tokens"], "tokens"), _decoded(values["tags"], "tags")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise RowError("not text", f"'tokens' must be a list of texts, not {_shown(tokens)}.")
    if not isinstance(tags, list) or len(tags) != len(tokens):
        count = len(tags) if isinstance(tags, list) else "no list of"
        raise RowError("label", f"{len(tokens)} tokens and {count} tags: every token needs one.")
    return Record(tokens=tokens, label=[_tag(tag, names) for tag in tags])


def _tag(tag: Any, names: Sequence[str] | None) -> str:
    if isinstance(tag, int) and names is not None and 0 <= tag < len(names):
        return names[tag]
    if not isinstance(tag, str) or not tag or (names is not None and tag not in names):
        raise RowError(
            "label", f"tag {tag!r} is out of range" + (f": data.label_names has {len(names)}." if names else ".")
        )
    return tag


def _plain(values: dict[str, Any], _: Any = None) -> Record:
    text = _text(values, "text")
    if not text.strip():
        raise RowError("empty", "the text is empty, so there is nothing to learn. Remove the row.")
    return Record(text=text)


# Detected is the first format whose columns are all there, so the more particular come first.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages),
    "sharegpt": Format(("conversations",), _sharegpt),
    "preference": Format(("prompt", "chosen", "rejected"), _preference),
    "feedback_messages": Format(("messages", "label"), _feedback),
    "feedback": Format(("prompt", "completion", "label"), _feedback),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion),
    "alpaca": Format(("instruction", "output"), _alpaca),
    "question_answering": Format(("question", "context", "answers"), _question_answering),
    "source_target": Format(("source", "target"), _source_target),
    "token_labels": Format(("tokens", "tags"), _token_labels),
    "pair_label": Format(("text", "text_pair", "label"), _pair_label),
    "text_label": Format(("text", "label"), _text_label),
    "text": Format(("text",), _plain),
}


def detect(origin: str, columns: Sequence[str], name: str, of_task: Sequence[str] = tuple(FORMATS)) -> str:
    """The format of rows with these columns; `name` is what the user asked for (`auto`: whichever fits).

    Args:
        of_task: names of the formats that the task can learn from.

    Raises:
        DataError: a named format lacks columns or is not for the task, or `auto` recognizes none; present columns are listed.
    """
    there = ", ".join(columns) or "none"
    if name == "auto":
        for candidate, known in FORMATS.items():
            if candidate in of_task and set(known.columns) <= set(columns):
                return candidate
        formats = "; ".join(f"{name}: {', '.join(FORMATS[name].columns)}" for name in of_task)
        raise DataError(
            f"{origin}: columns {there} fit no format of this task. Map them with data.columns to one of: {formats}."
        )
    if name not in of_task:
        raise DataError(f"{origin}: data.format={name} is not for this task, which reads {', '.join(of_task)}.")
    missing = [column for column in FORMATS[name].columns if column not in columns]
    if missing:
        raise DataError(
            f"{origin}: data.format={name} needs column '{missing[0]}', and the file has {there}. Map it: "
            f"data.columns={{{missing[0]}: YOURS}}.{nearest(missing[0], columns)}"
        )
    return name


def read(values: dict[str, Any], name: str, label_names: Sequence[str] | None = None) -> Record:
    """The record of one row.

    Raises:
        RowError: the row cannot be used; the sentence names the value and the rule.
    """
    known = FORMATS[name]
    missing = [column for column in known.columns if column not in values]
    if missing:
        raise RowError(
            "missing column", f"column '{missing[0]}' is missing. The row has {', '.join(values) or 'none'}."
        )
    return known.read(values, label_names)


# -- conversations ------------------------------------------------------------------------------------------------------


def _conversation(messages: list[Message], tools: Any, system: Any) -> Record:
    """A checked conversation: known roles in a sensible order, texts everywhere, at least one answer to learn."""
    if isinstance(system, str) and system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    messages = _linked([_checked(message) for message in messages])
    _check_order(messages)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise RowError("masked", "no assistant message, so every label is masked and there is nothing to learn.")
    if not any(weight_of(message) for message in answers):
        raise RowError("masked", "no answer is to be trained on (train or weight), so every label is masked.")
    return Record(messages=messages, tools=_tools(tools))


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
        raise RowError("not text", f"the content of {_a(role)} message must be text, not {_shown(content)}.")
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
        checked["tool_calls"] = [_call(call) for call in _decoded(calls, "tool_calls")]
    return checked


def weight_of(message: Message, default: float = 1.0) -> float:
    """How much a message counts in the loss: `"train": false` is 0, `"weight"` is taken as it stands.

    Raises:
        RowError: a value that is neither.
    """
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError("not text", f"'train' of a message must be true or false, not {_shown(train)}.")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < 1e6
    ):
        raise RowError("not text", f"'weight' of a message must be a number from 0 on, not {_shown(weight)}.")
    if train is None and weight is None:
        return default
    return 0.0 if train is False else float(1.0 if weight is None else weight)


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError("tool", f"a tool call must have a function with a name, not {_shown(call)}.")
    arguments = _decoded(function.get("arguments", {}), "arguments")  # OpenAI's are JSON text; templates want objects
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


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    tools = _decoded(tools, "tools") if tools else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tool", f"'tools' must be a list of JSON schemas, not {_shown(tools)}.")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


# -- values -------------------------------------------------------------------------------------------------------------


def _text(values: dict[str, Any], column: str) -> str:
    value = values[column]
    if not isinstance(value, str):
        raise RowError("not text", f"'{column}' must be text, not {_shown(value)}.")
    if "\0" in value:
        raise RowError("not text", f"'{column}' holds a NUL character. Remove it.")
    return value


def _decoded(value: Any, column: str) -> Any:
    """Structures may be given as JSON text (CSV has nothing else)."""
    if not isinstance(value, str):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError("not text", f"'{column}' is neither a structure nor JSON text ({_shown(value)}).") from error
    if problem := fault_of(decoded):
        raise RowError("not text", f"'{column}' {problem}")
    return decoded


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _a(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"
