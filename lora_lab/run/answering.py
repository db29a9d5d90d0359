"""A trained run that is asked: opened for generation or prediction alone, without any rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from lora_lab.config.run import RunConfig
from lora_lab.data import formats
from lora_lab.data.encode import Example
from lora_lab.data.formats import Message, RowError
from lora_lab.data.sources import Row
from lora_lab.errors import ConfigError, DataError
from lora_lab.run import takes
from lora_lab.run.prepared import Trained
from lora_lab.run.setup import Live, Setup
from lora_lab.run.trained import open_trained

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_NAME, _ROWS = "rows", 16  # what rows are called in messages; how many share a pass


def origin(number: int) -> str:
    """What a row is called."""
    return f"{_NAME} row {number}"


def without_rows(config: RunConfig) -> RunConfig:
    """The configuration of a run that is asked, and so reads no rows."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, eval=None, eval_ratio=None))


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
            ConfigError: the run's task neither answers nor predicts.
        """
        run, config = open_trained(path, takes.CHAT, overrides)
        if not (config.task.answers if chat else config.task.generates or config.task.predicts):
            raise ConfigError(
                f"run={path}: trained for task={config.task.name}, which does not answer. Try lora-lab evaluate."
            )
        return cls(Trained.of(run, without_rows(config)).loaded())

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

    def predictions(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the model says of each row, which needs no label.

        Raises:
            DataError: a row that cannot be used.
        """
        setup = self._live.setup
        examples = [one for number, row in enumerate(rows, start=1) for one in unlabelled(setup, row, number)]
        with self._live.autocast():
            found = predicted(setup, self._live.model, examples)
        return [found[origin(number)] for number in range(1, len(rows) + 1)]

    def _given(self, prompt: str | list[Message], number: int) -> str:
        return given(self._live.setup, prompt, number)


def unlabelled(setup: Setup, row: Mapping[str, Any], number: int) -> list[Example]:
    """The examples of a row without a label, which is called `origin(number)`.

    Raises:
        DataError: it cannot be used.
    """
    try:
        values = setup.task.unlabelled(dict(row))
    except RowError as error:
        raise DataError(f"{origin(number)}: {error}") from error
    name = formats.detect(origin(number), list(values), "auto", setup.config.task.formats)
    [outcome] = setup.encoder.encode([Row(number, values)], _NAME, name)
    if outcome.problem is not None:
        raise DataError(f"{origin(number)}: {outcome.sentence}")
    return [example for example in outcome.examples if not example.copy]


def predicted(setup: Setup, model: PeftModel, examples: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """What a model says of the rows that examples are of, by their origins; of several examples of a row the surest."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    order = sorted(range(len(examples)), key=lambda place: examples[place].num_tokens)
    for start in range(0, len(order), _ROWS):
        part = [examples[place] for place in order[start : start + _ROWS]]
        for group in [part] if setup.task.forward.together else [[one] for one in part]:
            for example, found in zip(group, setup.task.predict(model, group), strict=True):
                before = best.get(example.origin)
                best[example.origin] = found if before is None or found[0] > before[0] else before
    return {name: found for name, (_, found) in best.items()}


def given(setup: Setup, prompt: str | list[Message], number: int = 1) -> str:
    """What the model of a run that answers is given for a prompt: a text, or the messages so far.

    Raises:
        DataError: a prompt that it cannot be given.
    """
    encoder: Any = setup.encoder  # of a task that answers: of chats, or of texts
    try:
        if encoder.chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return str(encoder.prompt(messages))
        if not isinstance(prompt, str):
            raise RowError("not text", "this run turns one text into another. Give a text, not messages.")
        return str(encoder.cleaned(prompt))
    except RowError as error:
        raise DataError(f"prompt {number}: {error}") from error
