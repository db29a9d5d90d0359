"""From a conversation to text: the model's own chat template, in training, evaluation and chat alike.

What is supervised follows from rendered prefixes: the template rendered up to an answer, with its generation prompt, is
exactly what the model will see before it answers; what the text adds after that prefix, up to and including the
end-of-turn token, is the answer. Some templates render a turn differently once others follow (Qwen 3 drops earlier
reasoning, Mistral moves the system message). Then the conversation becomes several examples, each as inference sees it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_lab.data.formats import Message, Record, RowError, promised, weight_of
from lora_lab.data.limits import MAX_ROW_CHARS, Bounds
from lora_lab.data.marks import Marks
from lora_lab.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RENDER_SECONDS = 1.0  # of processor time; real conversations take a thousandth
_ROW_SECONDS = 10.0  # for all renderings of a row: two for each answer
_RENDER_BYTES = 2**30  # more than the process has; the longest rows that are read take a fifth
_MAX_TEXT = 2 * MAX_ROW_CHARS
_MAX_BEGINNINGS = 2**26  # characters of all beginnings of a conversation, which are held together
_NOT_FOR_TEMPLATES = ("train", "weight")


@dataclasses.dataclass(frozen=True)
class Rendered:
    """The text of one training example and what is learned of it."""

    text: str
    spans: list[tuple[int, int, float]]  # [start, end) in characters and weight, in order
    end_missing: bool = False  # the tokenizer's end of sequence must follow, because the template has no end token
    plain: bool = False  # no template: the tokenizer adds what it puts around a text
    messages: list[Message] | None = None  # the conversation up to where the text ends
    tools: list[dict[str, Any]] | None = None
    turns: tuple[int, ...] = ()  # the message of each span, if they are answers

    def single_answers(self) -> list[Rendered]:
        """The same as examples of one answer each, every text but the last cut behind its answer."""
        *earlier, _ = zip(self.spans, self.turns, strict=True)
        cut = [
            dataclasses.replace(
                self,
                text=self.text[: span[1]],
                spans=[span],
                end_missing=False,
                messages=promised(self.messages)[: turn + 1],
                turns=(turn,),
            )
            for span, turn in earlier
        ]
        return [*cut, dataclasses.replace(self, spans=self.spans[-1:], turns=self.turns[-1:])]


class ChatTemplate:
    """The chat template of a tokenizer, with its variables (`data.chat_template_kwargs`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.kwargs = kwargs or {}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_tokens = tuple(sorted((special | {tokenizer.eos_token}) - {""}, key=len, reverse=True))
        self._native_tools: bool | None = None
        self._bounds: Bounds | None = None  # of the row that is being rendered
        self.put_before = ""  # what the template lacked at its beginning, see `begin_with`

    def begin_with(self, marks: Marks) -> None:
        """Let conversations begin as the tokenizer begins every text, where the template does not see to it.

        The tokenizer's own template is changed, so that whoever renders with the saved tokenizer sees the same text.

        Raises:
            DataError: as `text`.
        """
        bos = self.tokenizer.bos_token_id
        if not marks.opening or bos not in marks.before or not self.tokenizer.chat_template:
            return
        if any(text.startswith(marks.opening) for text in self._probed()):
            return
        written = "bos_token" if marks.before == (bos,) else json.dumps(marks.opening, ensure_ascii=False)
        self.tokenizer.chat_template = f"{{{{ {written} }}}}{self.tokenizer.chat_template}"
        self.put_before = marks.opening

    def _probed(self) -> list[str]:
        """The beginnings of conversations, as far as the template can render them."""
        user, system = {"role": "user", "content": "a"}, {"role": "system", "content": "b"}
        found = []
        for messages in ([user], [system, user]):
            with contextlib.suppress(RowError), self._row():
                found.append(self._rendered(messages, None, False))
        return found

    def text(
        self, messages: list[Message], tools: list[dict[str, Any]] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text: the only way to text for training, evaluation and chat.

        Raises:
            RowError: the template refuses the conversation.
            DataError: it does not come to an end, or takes more memory than any text needs.
        """
        with self._row():
            return self._text(messages, tools, add_generation_prompt)

    @contextlib.contextmanager
    def _row(self) -> Iterator[Bounds]:
        """The renderings of one conversation, which are bounded together."""
        if self._bounds is not None:
            yield self._bounds
            return
        try:
            with Bounds(_RENDER_BYTES, _ROW_SECONDS) as self._bounds:
                yield self._bounds
        except MemoryError as error:
            raise DataError(
                f"Stopped, because the model's chat template cannot render it (it takes more than {_RENDER_BYTES // 2**20} MiB of memory)."
            ) from error
        finally:
            self._bounds = None

    def _text(self, messages: list[Message], tools: Any, add_generation_prompt: bool = False) -> str:
        if (tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)) and not self.native_tools:
            messages, tools = _tools_as_text(messages, tools), None
        return self._rendered(messages, tools, add_generation_prompt)

    def _rendered(self, messages: list[Message], tools: Any, add_generation_prompt: bool) -> str:
        plain = [{k: v for k, v in message.items() if k not in _NOT_FOR_TEMPLATES} for message in messages]
        bounds = self._bounds
        assert bounds is not None  # of `_row`
        stopped = DataError(
            f"The model's chat template was stopped after {_RENDER_SECONDS:g} s: it does not end."
            if bounds.left > _RENDER_SECONDS
            else f"The model's chat template was stopped after {_ROW_SECONDS:g} s with one conversation."
        )
        try:
            with bounds.slice(_RENDER_SECONDS, stopped):
                text = self.tokenizer.apply_chat_template(
                    plain, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **self.kwargs
                )
        except _template_errors() as error:
            raise RowError("template", f"the model's chat template cannot render it ({error}).") from error
        assert isinstance(text, str)  # for one conversation
        if len(text) > _MAX_TEXT:
            raise DataError(
                f"The model's chat template makes {len(text):,} characters of one conversation, above {_MAX_TEXT:,}: no text is that long."
            )
        return text

    def check_variables(self) -> None:
        """Refuse variables that the template does not have: they would have no effect.

        Raises:
            ConfigError: naming the variable, and those that there are.
        """
        from jinja2 import meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        stopped = DataError(f"The model's chat template was not read in {_RENDER_SECONDS:g} s.")
        try:
            with self._row() as bounds, bounds.slice(_RENDER_SECONDS, stopped):
                parsed = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(
                    re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", self.tokenizer.chat_template)
                )
                known = meta.find_undeclared_variables(parsed)
        except _template_errors():
            return  # told with the first row
        known |= set(re.findall(r"\bset (\w+)", self.tokenizer.chat_template))
        for name in self.kwargs:
            if name not in known:
                raise ConfigError(
                    f"data.chat_template_kwargs.{name}: the model's chat template has no such variable.{nearest(name, known)}"
                )

    @property
    def native_tools(self) -> bool:
        """Whether the template shows tools, calls and results. If not, they are written as text (see `_tools_as_text`)."""
        if self._native_tools is None:
            try:
                with self._row():
                    shown = self._rendered(_TOOL_PROBE, [_PROBED_TOOL], False)
            except RowError:
                shown = ""
            self._native_tools = all(mark in shown for mark in ("probe_described", "probe_argument", "probe_result"))
        return self._native_tools

    @property
    def dated(self) -> bool:
        """Whether the text depends on the day on which it is rendered."""
        return "strftime_now" in (self.tokenizer.chat_template or "") and "date_string" not in self.kwargs

    def of_today(self) -> str | None:
        """A text that differs from day to day if the template's texts do; None if they do not.

        Raises:
            DataError: the template cannot write it.
        """
        return self.typed([{"role": "user", "content": "a"}]) if self.dated else None

    def typed(self, messages: list[Message], tools: list[dict[str, Any]] | None = None, prompt: bool = False) -> str:
        """As `text`, of a conversation that is in no row.

        Raises:
            DataError: whatever keeps the template from rendering it.
        """
        try:
            return self.text(messages, tools, prompt)
        except RowError as error:
            raise DataError(f"The conversation cannot be rendered: {error}") from error

    def examples(self, record: Record, supervise: str) -> list[Rendered]:
        """The training examples of one conversation: usually one.

        Args:
            supervise: 'answers' (the assistant's turns, each with its end-of-turn token), 'last_answer' or 'all'.

        Raises:
            RowError: the template cannot render the conversation, or shows an answer differently from how it would be generated.
        """
        with self._row():
            return self._examples(promised(record.messages), record.tools, supervise)

    def _examples(self, messages: list[Message], tools: Any, supervise: str) -> list[Rendered]:
        if supervise == "all":
            text = self._text(messages, tools)
            end_missing = messages[-1]["role"] == "assistant" and not self._end(text)[1]
            return [Rendered(text, [(0, len(text), 1.0)], end_missing, messages=messages, tools=tools)]
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = answers[-1:] if supervise == "last_answer" else answers
        wanted = [i for i in wanted if weight_of(messages[i])]
        if not wanted:
            raise RowError("masked", "the last answer is not to be trained on, so every label is masked.")
        turns = _Turns(self, messages, tools)
        found: list[Rendered] = []
        while wanted:
            cut, held = self._longest(turns, wanted, len(messages) if not found else wanted[-1] + 1)
            text = turns.through(cut - 1)
            spans = [(*turns.span(i), weight_of(messages[i])) for i in held]
            ended = messages[cut - 1]["role"] != "assistant" or turns.ended(cut - 1)
            found.append(Rendered(text, spans, not ended, messages=messages[:cut], tools=tools, turns=tuple(held)))
            wanted = [i for i in wanted if i not in held]
        return found[::-1]

    def _longest(self, turns: _Turns, wanted: list[int], longest: int) -> tuple[int, list[int]]:
        """How many messages the example of the last wanted answer holds, and which wanted answers are exact in it."""
        last = wanted[-1]
        for cut in dict.fromkeys((longest, last + 1)):
            held = [i for i in wanted if turns.exact(i, cut)]
            if last in held:
                return cut, held
        raise RowError(
            "template",
            f"the chat template renders message {last + 1} differently from the inference prompt: some leave the system "
            "message out of answered turns, or contradict data.chat_template_kwargs. Write what is lost into the user's message.",
        )

    def _end(self, text: str, start: int = 0) -> tuple[int, bool]:
        """Where the answer that starts at `start` ends: behind the first of the special tokens at the text's end, if any."""
        text = text.rstrip()
        end, ended = len(text), False
        while text.endswith(self.special_tokens, start):
            token = next(token for token in self.special_tokens if text.endswith(token, start))
            end, ended = len(text), True
            text = text[: -len(token)].rstrip()
        return end, ended


class _Turns:
    """Renderings of one conversation's beginnings, each made once."""

    def __init__(self, template: ChatTemplate, messages: list[Message], tools: Any):
        self.template, self.messages, self.tools = template, messages, tools
        self._texts: dict[tuple[int, bool], str] = {}
        self._ends: dict[int, tuple[int, bool]] = {}
        self._size = 0

    def _text(self, count: int, prompt: bool) -> str:
        if (count, prompt) not in self._texts:
            self._texts[count, prompt] = self._rendered(count, prompt)
        return self._texts[count, prompt]

    def _rendered(self, count: int, prompt: bool) -> str:
        text = self.template._text(self.messages[:count], self.tools, prompt)
        self._size += len(text)
        if self._size > _MAX_BEGINNINGS:
            raise RowError(
                "template",
                f"{len(self.messages)} messages are rendered up to each answer, and that is above {_MAX_BEGINNINGS:,} characters. "
                "Split the conversation.",
            )
        return text

    def through(self, turn: int) -> str:
        """The text up to and including message `turn`."""
        return self._text(turn + 1, False)

    def prompt(self, turn: int) -> str:
        """What the model sees before it gives message `turn`."""
        return self._text(turn, True)

    def _end(self, turn: int) -> tuple[int, bool]:
        if turn not in self._ends:
            self._ends[turn] = self.template._end(self.through(turn), len(self.prompt(turn)))
        return self._ends[turn]

    def ended(self, turn: int) -> bool:
        return self._end(turn)[1]

    def span(self, turn: int) -> tuple[int, int]:
        return len(self.prompt(turn)), self._end(turn)[0]

    def exact(self, turn: int, cut: int) -> bool:
        """Whether the text of the first `cut` messages shows answer `turn` as inference would see and give it."""
        if turn + 1 < cut and not self.ended(turn):
            return False  # an answer without an end token would never be taught to end
        start, end = self.span(turn)
        through = self.through(turn)
        return start < end and through.startswith(self.prompt(turn)) and self.through(cut - 1).startswith(through[:end])


def _template_errors() -> tuple[type[Exception], ...]:
    """What a template that does not fit, or is broken, raises: jinja's own errors (`raise_exception` among them), what Python's
    compiler says of its code, and what its expressions raise on the values of a row."""
    from jinja2 import TemplateError

    return (
        TemplateError, SyntaxError, AssertionError, NameError,  # of reading and compiling
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,  # of running
    )  # fmt: skip


def _tools_as_text(messages: list[Message], tools: list[dict[str, Any]] | None) -> list[Message]:
    """Tools, calls and results as ordinary messages, for templates that would leave them out without a word.

    The wording of the tags is the one that Hermes and Qwen models are trained on.
    """
    shown: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            if shown and shown[-1].get("results"):
                shown[-1]["content"] += f"\n{content}"
            else:
                shown.append({"role": "user", "content": content, "results": True})
        elif message.get("tool_calls"):
            calls = [_json({k: c["function"].get(k, {}) for k in ("name", "arguments")}) for c in message["tool_calls"]]
            text = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
            content = f"{message['content']}\n{text}" if message.get("content") else text
            shown.append({**{k: v for k, v in message.items() if k != "tool_calls"}, "content": content})
        else:
            shown.append(dict(message))
    shown = [{k: v for k, v in message.items() if k != "results"} for message in shown]
    if not tools:
        return shown
    listed = "\n".join(_json(tool) for tool in tools)
    text = (
        f"You can call these functions:\n<tools>\n{listed}\n</tools>\nTo call one, answer with:\n"
        '<tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>'
    )
    if shown and shown[0]["role"] == "system":
        return [{**shown[0], "content": f"{shown[0]['content']}\n\n{text}"}, *shown[1:]]
    return [{"role": "system", "content": text}, *shown]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_PROBED_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "probe_described",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": "x"}},
            "required": ["x"],
        },
    },
}
_TOOL_PROBE: list[Message] = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "id": "call00001",
                "function": {"name": "look_up", "arguments": {"x": "probe_argument"}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call00001", "name": "look_up", "content": "probe_result"},
    {"role": "assistant", "content": "b"},
]
