"""Row formats: each turns a row, checked, into one `Record`, whatever its columns were called."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lora_lab.data import hints
from lora_lab.data.conversations import (
    Message,
    checked_messages,
    conversation_in,
    history_of,
    other_roles,
    refuse_media,
    same_prompt,
    spoken,
    spoken_prompt,
    tools_of,
    turns_of,
    weight_of,
    with_prompt,
)
from lora_lab.data.values import RowError, decoded, list_of, shown, text_of
from lora_lab.errors import DataError, nearest

__all__ = [
    "FORMATS",
    "Format",
    "Message",
    "Record",
    "RowError",
    "class_name",
    "detect",
    "promised",
    "read",
    "unanswered",
    "unread",
    "weight_of",
]
_NOT_NUMBERS = (float("inf"), float("-inf"))
_UNCOUNTED = "-100"  # transformers' tag of tokens that the loss leaves out
BLANKS = "labels with blanks around them, which do not count"


T = TypeVar("T")


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
    notes: tuple[str, ...] = ()  # how the row was read, where that is worth saying; no part of its content

    def canonical(self) -> str:
        """The same text for the same content, to find equal rows."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "notes"}
        return json.dumps(content, ensure_ascii=False, sort_keys=True, default=str)


def promised(value: T | None) -> T:
    """A part of a record that rows of this format always have."""
    assert value is not None
    return value


@dataclasses.dataclass(frozen=True)
class Format:
    """How rows of one shape are read."""

    columns: tuple[str, ...]  # that a row must have
    read: Callable[[dict[str, Any], Sequence[str] | None], Record]  # (values, class names) -> record
    optional: tuple[str, ...] = ()  # that are read where a row has them
    typical: tuple[str, ...] = ()  # of the optional ones: with them the format is preferred to later ones
    answer: str | None = None  # the column of what is to be said of the others


# -- readers ------------------------------------------------------------------------------------------------------------


def _messages(values: dict[str, Any], _: Any = None) -> Record:
    given = decoded(values["messages"], "messages")
    messages = turns_of(given, "messages", whole=True)
    record = _conversation(messages, values)
    others = ", ".join(other_roles(given))
    return dataclasses.replace(record, notes=(f"roles {others} read as user, assistant or tool",)) if others else record


def _sharegpt(values: dict[str, Any], _: Any = None) -> Record:
    """`conversations` of {from, value} or {role, content}; function calls and their results are turns of their own."""
    return _conversation(turns_of(values["conversations"], "conversations"), values)


def _conversation(messages: list[Message], values: dict[str, Any]) -> Record:
    """A checked conversation with what the row's other columns say of it."""
    refuse_media(values, "the row")
    tools, functions = tools_of(values.get("tools")), tools_of(values.get("functions"))
    if tools and functions:
        raise RowError("tool", "the row has both 'tools' and 'functions'. Write all of them into 'tools'.")
    return Record(messages=checked_messages(messages, values.get("system")), tools=tools or functions)


def _prompt_completion(values: dict[str, Any], _: Any = None) -> Record:
    return _answered(values["prompt"], values["completion"], values)


def _preference(values: dict[str, Any], _: Any = None) -> Record:
    """Two answers to one prompt, the first of them better. Each may be a text, turns, or a whole conversation; then the prompt is
    what both begin with, and need not be given."""
    chosen, rejected = values["chosen"], values["rejected"]
    pair = [[answer] if isinstance(answer, dict) else conversation_in(answer)[0] for answer in (chosen, rejected)]
    if None not in pair:
        chosen, rejected = pair
    for column, answer in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(answer, (str, list)):
            raise RowError("not text", f"'{column}' must be text or messages, not {shown(answer)}.")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError(
            "not text", "one of 'chosen' and 'rejected' is a text and the other is messages. Give both alike."
        )
    prompt = next((values[name] for name in ("prompt", "conversations", "messages") if values.get(name)), None)
    better, worse = (
        _judged(prompt, answer, column, values) for answer, column in ((chosen, "chosen"), (rejected, "rejected"))
    )
    if not same_prompt(promised(better.messages), promised(worse.messages)):
        raise RowError(
            "prompt",
            "'chosen' and 'rejected' differ before their last answers. Both must answer the same conversation.",
        )
    return dataclasses.replace(better, rejected=worse.messages)


def _judged(prompt: Any, answer: Any, column: str, values: dict[str, Any]) -> Record:
    """The conversation that one of two answers makes with its prompt."""
    if prompt is not None:
        return _answered(prompt, answer, values, column)
    if isinstance(answer, list):
        return _conversation([*history_of(values.get("history")), *turns_of(answer, column, whole=True)], values)
    turns = spoken(answer)
    if turns is None:
        raise RowError(
            "prompt",
            f"'{column}' is a text, and the row has no 'prompt'. Name its column: data.columns={{prompt: YOURS}}.",
        )
    return _conversation(turns, values)


def _feedback(values: dict[str, Any], _: Any = None) -> Record:
    """One answer and whether it is good."""
    label = values["label"]
    if isinstance(label, str):  # CSV has nothing else
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower(), label)
    if not isinstance(label, bool) and label not in (0, 1):
        raise RowError("label", f"label {shown(label)} is neither true (a good answer) nor false.")
    record = _messages(values) if "messages" in values else _prompt_completion(values)
    return dataclasses.replace(record, label=bool(label))


def _answered(prompt: Any, answer: Any, values: dict[str, Any], column: str = "completion") -> Record:
    """A prompt (text or turns) and its answer (text, turns, or the whole conversation), after the turns of `history`."""
    prompt, answer = _turns_or_text(prompt, answer)
    history = history_of(values.get("history"))
    if isinstance(prompt, str) and isinstance(answer, str):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        record = _conversation([*history, *turns], values)
        return record if history else dataclasses.replace(record, text=prompt, target=answer)
    if isinstance(answer, list):
        answer = turns_of(answer, column, whole=True)
        if not answer:
            raise RowError(
                "empty", f"'{column}' is an empty list, so there is nothing to learn. Remove or fill the row."
            )
        if not isinstance(prompt, list):
            turns = with_prompt(text_of({"prompt": prompt}, "prompt"), answer, column)
            return _conversation([*history, *turns], values)
    else:
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(prompt, list):
        return _conversation([*history, {"role": "user", "content": prompt}, *answer], values)
    prompt = turns_of(prompt, "prompt", whole=True)
    repeated = bool(prompt) and answer[: len(prompt)] == prompt
    return _conversation([*history, *(answer if repeated else prompt + answer)], values)


def _turns_or_text(prompt: Any, answer: Any) -> tuple[Any, Any]:
    """Turns that a file of texts holds as text. JSON may be meant as the text that it is, unless both sides are turns."""
    (asked, asked_by_python), (answered, answered_by_python) = conversation_in(prompt), conversation_in(answer)
    if asked is not None and (answered is not None or asked_by_python):
        prompt = asked
    if answered is not None and (asked is not None or answered_by_python):
        answer = answered
    said = spoken_prompt(prompt)
    if said is not None and isinstance(answer, str):
        return said, spoken(answer) or answer.strip()
    return prompt, spoken(answer) or answer


def _alpaca(values: dict[str, Any], _: Any = None) -> Record:
    instruction, given = values["instruction"], values.get("input")
    if given is not None and not isinstance(given, str):
        raise RowError("not text", f"'input' must be text, not {type(given).__name__} ({shown(given)}).")
    content = f"{instruction}\n\n{given}" if given and isinstance(instruction, str) else instruction
    return _answered(content, values["output"], values)


def _question_answering(values: dict[str, Any], _: Any = None) -> Record:
    """SQuAD's rows. `answers` is {text: [...], answer_start: [...]}; every answer must stand where it says."""
    context, question = text_of(values, "context"), text_of(values, "question")
    answers = decoded(values["answers"], "answers")
    if (
        isinstance(answers, list) and answers and all(isinstance(answer, dict) for answer in answers)
    ):  # as in SQuAD's own file
        answers = {key: [answer.get(key) for answer in answers] for key in ("text", "answer_start")}
    texts = answers.get("text") if isinstance(answers, dict) else answers
    starts = answers.get("answer_start") if isinstance(answers, dict) else None
    texts, starts = (value if isinstance(value, list) else [value] for value in (texts, starts or []))
    if not texts or not all(isinstance(text, str) for text in texts):
        raise RowError("not text", f"'answers' must hold at least one text, not {shown(values['answers'])}.")
    if starts and (len(starts) != len(texts) or not all(isinstance(start, int) for start in starts)):
        raise RowError(
            "label", f"'answers' has {len(texts)} texts and the starts {shown(starts)}: each text needs one."
        )
    for text, start in zip(texts, starts, strict=False):
        if start < 0 or context[start : start + len(text)] != text:
            raise RowError("label", f"answer {shown(text)} is not at character {start} of the context.")
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
    return _labelled(text_of(values, "text"), None, values["label"], names)


def _pair_label(values: dict[str, Any], names: Sequence[str] | None = None) -> Record:
    return _labelled(text_of(values, "text"), text_of(values, "text_pair"), values["label"], names)


def _labelled(text: str, pair: str | None, given: Any, names: Sequence[str] | None) -> Record:
    """A label, or a list of them. Its name is the answer, so that a language model can learn it as well."""
    one = isinstance(given, str) and given.strip() in (names or ())  # a class may be called [x]
    given = given if one else list_of(given, "label")
    if isinstance(given, list) and any(isinstance(label, bool) for label in given):
        raise RowError(
            "label", f"label {shown(given)} holds true and false. Name the classes that the row has, such as [a, c]."
        )
    every = given if isinstance(given, list) else [given]
    labels = [_class(label, names) for label in every]
    if len(set(map(str, labels))) < len(labels):
        raise RowError("label", f"label {shown(given)} names a class twice.")
    answer = ", ".join(map(str, labels)) or "none"
    record = _answered(text if pair is None else f"{text}\n\n{pair}", answer, {})
    label = labels if isinstance(given, list) else labels[0]
    blanks = any(isinstance(label, str) and label != label.strip() for label in every)
    return dataclasses.replace(
        record, text=text, pair=pair, target=None, label=label, notes=(BLANKS,) if blanks else ()
    )


def _class(label: Any, names: Sequence[str] | None) -> str | int | float:
    """A label, checked; with `data.label_names` always one of these. Blanks around it do not count."""
    if isinstance(label, bool):
        label = _truth(label, names)
    if isinstance(label, str):
        label = label.strip()
    if not isinstance(label, (int, float, str)) or label == "" or label in _NOT_NUMBERS or label != label:
        raise RowError("label", f"label {shown(label)} is neither a class nor a number.")
    if names is None:
        return label
    label = str(label) if str(label) in names else label
    label = int(label) if counts(label) and label not in names else label
    if isinstance(label, str) and label not in names:
        raise RowError(
            "label", f"label {label!r} is not in data.label_names ({', '.join(names)}).{nearest(label, names)}"
        )
    if not isinstance(label, str) and (label != int(label) or not 0 <= label < len(names)):
        raise RowError("label", f"label {label!r} is out of range: data.label_names has classes 0 to {len(names) - 1}.")
    return label if isinstance(label, str) else names[int(label)]


def _truth(label: bool, names: Sequence[str] | None) -> str | int:
    """The class of true or false: of that name, or with two other names the second or the first."""
    name = "true" if label else "false"
    if names is None or name in names:
        return name
    if len(names) != 2:
        raise RowError(
            "label", f"label {name} is one of two classes, and data.label_names has {len(names)}: {', '.join(names)}."
        )
    return int(label)


def counts(label: Any) -> bool:
    """Whether a text is a whole number as one writes it; "007" and "00" are codes, and stay texts."""
    return isinstance(label, str) and label.isdecimal() and str(int(label)) == label


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
    tokens, tags = decoded(values["tokens"], "tokens"), decoded(values["tags"], "tags")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise RowError("not text", f"'tokens' must be a list of texts, not {shown(tokens)}.")
    if not isinstance(tags, list) or len(tags) != len(tokens):
        count = len(tags) if isinstance(tags, list) else "no list of"
        raise RowError("label", f"{len(tokens)} tokens and {count} tags: every token needs one.")
    return Record(tokens=tokens, label=[_tag(tag, names) for tag in tags])


def _tag(tag: Any, names: Sequence[str] | None) -> str:
    tag = tag.strip() if isinstance(tag, str) else tag
    if str(tag) == _UNCOUNTED and _UNCOUNTED not in (names or ()):
        raise RowError(
            "label",
            f"tag {tag} stands for words that do not count, such as pieces of words and the tokenizer's marks. Give whole words, "
            "each with a tag of its own (O where it has none); they are cut into tokens here.",
        )
    if names is not None and counts(tag) and tag not in names:
        tag = int(tag)
    number = isinstance(tag, int) and not isinstance(tag, bool)
    if number and names is None:
        raise RowError(
            "label",
            f"tag {tag} is a number, and what it stands for is not known. Name the tags in the order of their numbers, such as "
            "data.label_names=[O,B-PER,I-PER].",
        )
    if number and names is not None and 0 <= tag < len(names):
        return names[tag]
    if not isinstance(tag, str) or not tag or (names is not None and tag not in names):
        raise RowError(
            "label",
            f"tag {tag!r} is out of range"
            + (f": data.label_names has {len(names)}." if names else ": it must be a text."),
        )
    return tag


def _retrieval(values: dict[str, Any], _: Any = None) -> Record:
    """A text that is asked with, one that it should find, and any number of texts that it should not."""
    query, positive = (_filled(values, column) for column in ("query", "positive"))
    negatives = [
        text_of({column: text}, column) for column in ("negative", "negatives") for text in _texts(values, column)
    ]
    if positive in negatives:
        raise RowError("label", f"the positive {shown(positive)} is a negative of the row too. Remove one of the two.")
    if not all(text.strip() for text in negatives):
        raise RowError("empty", "a negative is empty. Remove it.")
    return Record(text=query, pair=positive, label=list(dict.fromkeys(negatives)))


def _texts(values: dict[str, Any], column: str) -> list[Any]:
    """What a column holds that may be a text, a list of texts, or left out."""
    given = values.get(column)
    if given is None or given == "":
        return []
    found = list_of(given, column)
    return found if isinstance(found, list) else [found]


def _filled(values: dict[str, Any], column: str) -> str:
    text = text_of(values, column)
    if not text.strip():
        raise RowError("empty", f"'{column}' is empty, so there is nothing to learn. Remove the row.")
    return text


def _scored_pair(values: dict[str, Any], _: Any = None) -> Record:
    one, other = (_filled(values, column) for column in ("text_a", "text_b"))
    try:
        score = float(values["score"])
    except (TypeError, ValueError, OverflowError):
        score = float("nan")
    if score != score or score in _NOT_NUMBERS:
        raise RowError("label", f"score {shown(values['score'])} is not a number.")
    return Record(text=one, pair=other, label=score)


def _plain(values: dict[str, Any], _: Any = None) -> Record:
    text = text_of(values, "text")
    if not text.strip():
        raise RowError("empty", "the text is empty, so there is nothing to learn. Remove the row.")
    return Record(text=text)


_ANY_ANSWER = "-"
_SPOKEN_WITH = ("system", "tools", "functions")
# Detected is the first format whose columns are all there, so the more particular come first.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages, _SPOKEN_WITH),
    "sharegpt": Format(("conversations",), _sharegpt, _SPOKEN_WITH),
    "preference": Format(
        ("chosen", "rejected"),
        _preference,
        ("prompt", "conversations", "messages", "history", *_SPOKEN_WITH),
        ("prompt",),
    ),
    "feedback_messages": Format(("messages", "label"), _feedback, _SPOKEN_WITH),
    "feedback": Format(("prompt", "completion", "label"), _feedback, ("history", *_SPOKEN_WITH)),
    "prompt_completion": Format(
        ("prompt", "completion"), _prompt_completion, ("history", *_SPOKEN_WITH), answer="completion"
    ),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "history", *_SPOKEN_WITH), answer="output"),
    "question_answering": Format(("question", "context", "answers"), _question_answering, answer="answers"),
    "source_target": Format(("source", "target"), _source_target, answer="target"),
    "retrieval": Format(("query", "positive"), _retrieval, ("negative", "negatives")),
    "scored_pair": Format(("text_a", "text_b", "score"), _scored_pair),
    "token_labels": Format(("tokens", "tags"), _token_labels, answer="tags"),
    "pair_label": Format(("text", "text_pair", "label"), _pair_label, answer="label"),
    "text_label": Format(("text", "label"), _text_label, answer="label"),
    "text": Format(("text",), _plain),
}


def detect(
    origin: str,
    columns: Sequence[str],
    name: str,
    of_task: Sequence[str] = tuple(FORMATS),
    mapping: dict[str, str] | None = None,
) -> str:
    """The format of rows with these columns; `name` is what the user asked for (`auto`: whichever fits).

    Args:
        of_task: names of the formats that the task can learn from.
        mapping: `data.columns`, by which some of the columns are named already.

    Raises:
        DataError: a named format lacks columns or is not for the task, or `auto` recognizes none; present columns are listed.
    """
    there = ", ".join(columns) or "none"
    if name == "auto":
        for typical in (True, False):
            for candidate, known in FORMATS.items():
                needed = {*known.columns, *(known.typical if typical else ())}
                if candidate in of_task and needed <= set(columns):
                    return _unless_prompt_is_elsewhere(candidate, columns, origin, mapping)
        formats = "; ".join(f"{name}: {', '.join(FORMATS[name].columns)}" for name in of_task)
        ready = _ready([FORMATS[name].columns for name in FORMATS if name in of_task], columns, mapping)
        way = f"Map them: {ready}. The task reads" if ready else "Map them with data.columns to one of:"
        raise DataError(f"{origin}: columns {there} fit no format of this task. {way} {formats}.")
    if name not in of_task:
        raise DataError(f"{origin}: data.format={name} is not for this task, which reads {', '.join(of_task)}.")
    missing = [column for column in FORMATS[name].columns if column not in columns]
    if missing:
        ready = _ready([FORMATS[name].columns], columns, mapping) or f"data.columns={{{missing[0]}: YOURS}}"
        raise DataError(
            f"{origin}: data.format={name} needs column '{missing[0]}', and the file has {there}. Map it: "
            f"{ready}.{nearest(missing[0], columns)}"
        )
    return name


def unanswered(values: dict[str, Any], of_task: Sequence[str]) -> dict[str, Any]:
    """A row that may lack its answer, as one that has some: what stands before an answer is what a model is asked.

    Args:
        of_task: names of the formats that the task can learn from.

    Raises:
        RowError: `messages` or `conversations` are none.
    """
    for column in ("messages", "conversations"):
        if column in values:
            turns = turns_of(values[column], column, whole=column == "messages")
            answered = bool(turns) and turns[-1]["role"] == "assistant"
            return {**values, column: turns if answered else [*turns, {"role": "assistant", "content": _ANY_ANSWER}]}
    for name, known in FORMATS.items():
        if name in of_task and known.answer and {*known.columns} - {known.answer} <= values.keys():
            context = values.get("context")
            any_answer = context[:1] if known.answer == "answers" and isinstance(context, str) else _ANY_ANSWER
            return {**values, known.answer: any_answer}
    return values


def _ready(formats: Sequence[Sequence[str]], columns: Sequence[str], given: dict[str, str] | None) -> str:
    """The whole `data.columns` option that would do, with what it says already; '' if no names are known to fit."""
    mapping = hints.mapping_for(formats, columns)
    return hints.option({**(given or {}), **mapping}) if mapping else ""


def _unless_prompt_is_elsewhere(name: str, columns: Sequence[str], origin: str, given: dict[str, str] | None) -> str:
    """Pairs whose prompt goes by another name must not be read as if they had none."""
    if name != "preference" or set(columns) & {"prompt", "conversations", "messages"}:
        return name
    ready = _ready([("prompt", "chosen", "rejected")], columns, given)
    if not ready:
        return name
    raise DataError(
        f"{origin}: columns chosen and rejected, and no prompt. One of {', '.join(columns)} may be it: {ready}."
    )


def known_columns() -> set[str]:
    """Every column that some format reads."""
    return {column for known in FORMATS.values() for column in (*known.columns, *known.optional)}


def unread(values: dict[str, Any], name: str) -> list[str]:
    """Columns of a row that its format never reads and that hold something."""
    known = FORMATS[name]
    read = (*known.columns, *known.optional)
    return [column for column, value in values.items() if column not in read and value not in (None, "", [], {})]


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
