"""`lora-lab chat`: talk to the base with its trained adapter."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import TextStreamer

from lora_lab.errors import ConfigError
from lora_lab.run.answering import Answering
from lora_lab.runtime import console


class _Shown(TextStreamer):
    """Answers as they come, made safe for the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """transformers' hook for text that is final."""
        console.stream(text, "\n" if stream_end else "")


def chat(path: str, overrides: list[str], prompts: list[str]) -> None:
    """`lora-lab chat`: talk to the base with its trained adapter, in turns; `prompts` are said first, and if there are any, alone."""
    with Answering.open(path, overrides, chat=True) as model:
        streamer = _Shown(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        messages: list[dict[str, str]] = []
        for text in prompts or _typed():
            messages.append({"role": "user", "content": _whole(text)})
            [answer] = model.answers([messages], streamer=streamer)
            messages.append({"role": "assistant", "content": answer})


def _whole(text: str) -> str:
    """The text of a terminal whose encoding could not hold it: bytes that Python kept as lone surrogates."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _typed() -> Iterator[str]:
    console.say("chat", "type a message; an empty line or Ctrl-D ends")
    while True:
        try:
            text = console.out.input("[bold green]> [/]")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"chat: what was typed is not {error.encoding} ({error.reason}). Set LC_ALL=C.UTF-8."
            ) from error
        if not text.strip():
            return
        yield text
