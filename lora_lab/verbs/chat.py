"""`lora-lab chat`: talk to the base with its trained adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from transformers import TextStreamer

from lora_lab.errors import ConfigError
from lora_lab.run.prepared import load_trained, prepare
from lora_lab.run.trained import open_trained
from lora_lab.runtime import console


class _Shown(TextStreamer):
    """Answers as they come, made safe for the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """transformers' hook for text that is final."""
        console.stream(text, "\n" if stream_end else "")


def chat(path: str, overrides: list[str]) -> None:
    """`lora-lab chat`: talk to the base with its trained adapter, in turns or with one `prompt=...`."""
    prompts = [text.partition("=")[2] for text in overrides if text.startswith("prompt=")]
    run, config = open_trained(path, "chat", [text for text in overrides if not text.startswith("prompt=")])
    if not config.task.answers:
        raise ConfigError(
            f"run={path}: trained for task={config.task.name}, which does not answer. Try lora-lab evaluate."
        )
    prepared = prepare(
        dataclasses.replace(config, data=dataclasses.replace(config.data, eval=None, eval_ratio=None)),
        need_train=False,
        trained=run,
    )
    model = load_trained(run, prepared)
    streamer = _Shown(prepared.encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    for text in prompts or _typed():
        messages.append({"role": "user", "content": _whole(text)})
        rendered = prepared.encoder.prompt(messages)
        with prepared.accelerator.autocast():
            answer = prepared.task.generate(model, [rendered], streamer=streamer)[0]
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
