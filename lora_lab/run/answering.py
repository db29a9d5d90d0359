"""A trained run that is asked: opened for generation or prediction alone, without any rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from lora_lab.config.run import RunConfig
from lora_lab.data import formats
from lora_lab.data.encode import Example
from lora_lab.data.formats import Message, RowError
from lora_lab.data.sources import Row, renamed
from lora_lab.errors import ConfigError, DataError
from lora_lab.run import takes
from lora_lab.run.prepared import Trained
from lora_lab.run.setup import Live, Setup
from lora_lab.run.trained import open_trained

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from lora_lab.run.run_dir import RunDir

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
        return cls(ready(*open_trained(path, takes.CHAT, overrides), chat).loaded())

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
        found = self.outcomes([Row(number, dict(row)) for number, row in enumerate(rows, start=1)], _NAME)
        said = []
        for one in found:
            if isinstance(one, DataError):
                raise one
            said.append(one)
        return said

    def outcomes(self, rows: Sequence[Row], name: str) -> list[dict[str, Any] | DataError]:
        """What the model says of each row, or why it cannot.

        Args:
            name: what the rows are called in messages.
        """
        setup = self._live.setup
        say: Callable[[list[Any]], list[dict[str, Any]]] = (
            self._generated if setup.config.task.generates else self._predicted
        )
        asked: list[Any] = [_asked_or_why(setup, row, name) for row in rows]
        found = iter(say([one for one in asked if not isinstance(one, DataError)]))
        return [
            one if isinstance(one, DataError) else setup.task.of_row(next(found), row.values)
            for one, row in zip(asked, rows, strict=True)
        ]

    def _generated(self, prompts: list[str]) -> list[dict[str, Any]]:
        task: Any = self._live.setup.task  # one that generates
        with self._live.autocast():
            return [{"answer": text} for text in task.generate(self._live.model, prompts)] if prompts else []

    def _predicted(self, rows: list[list[Example]]) -> list[dict[str, Any]]:
        setup = self._live.setup
        named = [
            dataclasses.replace(example, origin=str(number))
            for number, examples in enumerate(rows)
            for example in examples
        ]
        with self._live.autocast():
            found = predicted(setup, self._live.model, named)
        return [found[str(number)] for number in range(len(rows))]

    def _given(self, prompt: str | list[Message], number: int) -> str:
        return given(self._live.setup, prompt, number)


def ready(run: RunDir, config: RunConfig, chat: bool = False) -> Trained:
    """A trained run without rows of its own, before its weights are loaded.

    Args:
        chat: answers to conversations are wanted.

    Raises:
        ConfigError: the run's task neither answers nor predicts.
    """
    if not (config.task.answers if chat else config.task.generates or config.task.predicts):
        raise ConfigError(
            f"run={run.path}: trained for task={config.task.name}, which does not answer. Try lora-lab evaluate."
        )
    return Trained.of(run, without_rows(config))


def asked(setup: Setup, row: Row, name: str) -> str | list[Example]:
    """What the model is given for a row without its answer: a prompt, or examples.

    Raises:
        RowError: the row cannot be used.
        DataError: its columns are not those that the task reads.
    """
    if row.problem is not None:
        raise RowError("unreadable", row.problem)
    columns = {ours: theirs for ours, theirs in (setup.config.data.columns or {}).items() if theirs in row.values}
    values = setup.task.unlabelled(renamed(row, columns).values)
    section = setup.config.task
    format_name = formats.detect(f"{name} row {row.number}", list(values), "auto", section.formats)
    if section.generates:
        return setup.task.prompt(formats.read(values, format_name))
    [outcome] = setup.encoder.encode([Row(row.number, values)], name, format_name)
    if outcome.problem is not None:
        raise RowError(outcome.problem, outcome.sentence)
    return [setup.task.without_label(example) for example in outcome.examples if not example.copy]


def _asked_or_why(setup: Setup, row: Row, name: str) -> str | list[Example] | DataError:
    try:
        return asked(setup, row, name)
    except RowError as error:
        return DataError(f"{name} row {row.number}: {error}")
    except DataError as error:
        return error


def unlabelled(setup: Setup, row: Mapping[str, Any], number: int) -> list[Example]:
    """The examples of a row without a label, which is called `origin(number)`.

    Raises:
        DataError: it cannot be used.
    """
    found = _asked_or_why(setup, Row(number, dict(row)), _NAME)
    if isinstance(found, DataError):
        raise found
    assert not isinstance(found, str), f"task={setup.config.task.name} answers, and predicts nothing"
    return found


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
