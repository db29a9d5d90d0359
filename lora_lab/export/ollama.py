"""Ollama's Modelfile for a GGUF file: how conversations are written, where answers end.

Ollama's templates are Go's and a model's own is Jinja, so the strings around each turn are found by rendering it; a template that
does more than to put strings around turns is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from itertools import takewhile
from typing import TYPE_CHECKING

from lora_lab.data.formats import RowError
from lora_lab.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lora_lab.data.chat import ChatEncoder
    from lora_lab.data.encode import Encoder

_SYSTEM, _USER, _ANSWER = "(what the system says)", "(what the user says)", "(what the answer says)"


@dataclasses.dataclass(frozen=True)
class Turns:
    """The strings that a chat template puts before and after what is said."""

    start: str  # before the first turn, where there is no system message
    system: tuple[str, str]
    user: tuple[str, str]
    answer: tuple[str, str]

    def rendered(self, messages: list[dict[str, str]]) -> str:
        """A conversation up to the answer that is to come, as `template` would write it."""
        around = {"system": self.system, "user": self.user, "assistant": self.answer}
        text = "" if messages[0]["role"] == "system" else self.start
        for message in messages:
            before, after = around[message["role"]]
            text += before + message["content"] + after
        return text + self.answer[0]

    def template(self) -> str:
        """As Ollama's Go template."""
        roles = (("system", self.system), ("user", self.user), ("assistant", self.answer))
        turns = "".join(
            f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
            for role, (before, after) in roles
        )
        start = f"{{{{ if not .System }}}}{self.start}{{{{ end }}}}" if self.start else ""
        return f"{start}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{self.answer[0]}"


def turns(encoder: ChatEncoder) -> Turns:
    """What the encoder's chat template puts around turns, checked on conversations of several.

    Raises:
        ConfigError: it does more than that.
    """
    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
    answer = {"role": "assistant", "content": _ANSWER}
    adds = encoder.tokenizer.bos_token_id in encoder.marks.before

    def render(messages: list[dict[str, str]], asked: bool = True) -> str:
        rendered = encoder.template.text(messages, None, add_generation_prompt=asked)
        # llama.cpp puts the first token there by itself, where the tokenizer does; it must not be taken for a part of a turn
        return rendered.removeprefix(encoder.tokenizer.bos_token) if adds else rendered

    try:
        found = _solve(render, system, user, answer)
        wrong = any(
            found.rendered(messages) != render(messages)
            for messages in ([user], [system, user], [user, answer, user], [system, user, answer, user, answer, user])
        )
    except (ValueError, RowError, DataError) as error:
        raise _refused(str(error)) from error
    if wrong:
        raise _refused("what it writes around a turn depends on the other turns")
    if any("{{" in text or '"""' in text for text in (found.start, *found.system, *found.user, *found.answer)):
        raise _refused("it writes braces or quotes that Ollama would read")
    return found


def _solve(render: Callable[..., str], system: dict, user: dict, answer: dict) -> Turns:
    before, end = render([user]).split(_USER)
    after_user = render([user], False).split(_USER)[1]
    to_answer = end.removeprefix(after_user)
    _, rest = render([user, answer, user]).split(_ANSWER)
    between, _ = rest.split(_USER)
    to_system, rest = render([system, user]).split(_SYSTEM)
    middle, _ = rest.split(_USER)
    cut = _common_ending(before, between, middle)
    to_user = before[len(before) - cut :]
    return Turns(
        start=before[: len(before) - cut],
        system=(to_system, middle[: len(middle) - cut]),
        user=(to_user, after_user),
        answer=(to_answer, between[: len(between) - cut]),
    )


def _common_ending(*texts: str) -> int:
    """The length of the longest ending that all texts have."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*(text[::-1] for text in texts), strict=False))
    return sum(1 for _ in alike)


def _refused(reason: str) -> ConfigError:
    return ConfigError(
        f"export.targets: ollama: the chat template cannot be written as Ollama's ({reason}). Export gguf instead: llama.cpp and "
        "LM Studio read the model's own template from it."
    )


def rendered(modelfile: str, messages: list[dict[str, str]]) -> str:
    """A conversation as Ollama writes it by a Modelfile, as far as `modelfile` uses Go's text/template.

    Ollama gives the template all messages, those of one role that follow each other as one, and what the system says apart
    (https://docs.ollama.com/template).
    """
    [template] = re.findall(r'^TEMPLATE """(.*?)"""', modelfile, re.DOTALL | re.MULTILINE)
    told: list[dict[str, str]] = []
    for message in messages:
        if told and told[-1]["role"] == message["role"]:
            told[-1]["content"] += f"\n\n{message['content']}"
        else:
            told.append({"role": message["role"], "content": message["content"] or ""})
    system = any(message["role"] == "system" for message in told)
    found = re.sub(
        r"\{\{ if not \.System \}\}(.*?)\{\{ end \}\}",
        lambda m: "" if system else m[1],
        template,
        count=1,
        flags=re.DOTALL,
    )
    before, _, rest = found.partition("{{ range .Messages }}")
    body, after = re.fullmatch(r"((?:\{\{ if eq .*?\{\{ end \}\})*)\{\{ end \}\}(.*)", rest, re.DOTALL).groups()
    turns = re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ \.Content \}\}(.*?)\{\{ end \}\}', body, re.DOTALL)
    said = [
        opening + message["content"] + closing
        for message in told
        for role, opening, closing in turns
        if role == message["role"]
    ]
    return before + "".join(said) + after


def stops(modelfile: str) -> list[str]:
    """The texts at which Ollama stops by a Modelfile."""
    return re.findall(r'^PARAMETER stop "(.*)"$', modelfile, re.MULTILINE)


def modelfile(gguf: str, encoder: Encoder) -> str:
    """The text of a Modelfile; of a model that continues texts, with nothing around them.

    Args:
        gguf: name of the GGUF file beside it.
    """
    if not encoder.chat:
        return f'FROM ./{gguf}\nTEMPLATE """{{{{ .Prompt }}}}"""\n'
    stops = "".join(f'PARAMETER stop "{encoder.tokenizer.decode([token])}"\n' for token in encoder.end_tokens())
    return f'FROM ./{gguf}\nTEMPLATE """{turns(encoder).template()}"""\n{stops}'
