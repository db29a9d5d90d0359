"""A trained run that answers: opened for generation alone, without any rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

from lora_lab.data.formats import Message, RowError
from lora_lab.errors import ConfigError, DataError
from lora_lab.run import takes
from lora_lab.run.prepared import Trained
from lora_lab.run.setup import Live
from lora_lab.run.trained import open_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answering:
    """The base with a run's adapter, and what turns a question into its prompt: the template and the cleaning of the training."""

    def __init__(self, live: Live):
        self._live = live

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the model go, and give its memory back."""
        self._live.close()

    @classmethod
    def open(cls, path: str, overrides: Sequence[str] = (), chat: bool = False) -> Self:
        """Load a run's base and adapter, for a `with` block or until `close`.

        Args:
            overrides: of `lora-lab chat`.
            chat: answers to conversations are wanted.

        Raises:
            ConfigError: the run's task does not answer.
        """
        run, config = open_trained(path, takes.CHAT, overrides)
        if not (config.task.answers if chat else config.task.generates):
            raise ConfigError(
                f"run={path}: trained for task={config.task.name}, which does not answer. Try lora-lab evaluate."
            )
        without_rows = dataclasses.replace(config.data, eval=None, eval_ratio=None)
        return cls(Trained.of(run, dataclasses.replace(config, data=without_rows)).loaded())

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._live.setup.encoder.tokenizer

    def answers(self, prompts: Sequence[str | list[Message]], **options: Any) -> list[str]:
        """An answer to each prompt, greedy or by beams.

        Args:
            prompts: a text, or the messages so far.
            options: of transformers' `generate`.

        Raises:
            DataError: a prompt that the model cannot be given.
        """
        given = [self._given(prompt, number) for number, prompt in enumerate(prompts, start=1)]
        task: Any = self._live.setup.task  # one that generates
        with self._live.autocast():
            found: list[str] = task.generate(self._live.model, given, **options)
        return found

    def _given(self, prompt: str | list[Message], number: int) -> str:
        """What the model is given for a prompt."""
        encoder: Any = self._live.setup.encoder  # of a task that answers: of chats, or of texts
        try:
            if encoder.chat:
                messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
                return str(encoder.prompt(messages))
            if not isinstance(prompt, str):
                raise RowError("not text", "this run turns one text into another. Give a text, not messages.")
            return str(encoder.cleaned(prompt))
        except RowError as error:
            raise DataError(f"prompt {number}: {error}") from error
