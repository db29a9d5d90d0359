"""Optuna as the chooser of a sweep's points: asked for a batch, told what each of its runs was worth."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.errors import ConfigError, RunError
from lora_lab.runtime import console, reading, storage
from lora_lab.sweep.jobs import Outcome

if TYPE_CHECKING:
    import optuna


_ANEW = "Move the journal away to begin the search anew; finished runs with the same values are kept."


class Search:
    """A study in a journal file; an interrupted one resumes with the batch that was being trained."""

    def __init__(self, space: dict[str, dict[str, Any]], journal: Path, sampler: str, seed: int):
        """
        Args:
            space: for each key {"choices": [...]}, {"low", "high", "log"} or {"low", "high", "step"} (integers, ends included).

        Raises:
            ConfigError: Optuna is not installed, nothing is to be searched, or there is no such sampler.
            RunError: the journal is damaged before its last line.
        """
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise ConfigError("hydra/sweeper=optuna_cohort: needs Optuna. pip install 'lora-lab[hpo]'") from error
        samplers = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        }
        if sampler not in samplers:
            raise ConfigError(f"hydra.sweeper.sampler={sampler}: there are {' and '.join(samplers)}.")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = {key: _distribution(key, values) for key, values in space.items()}
        if not self.space:
            raise ConfigError(
                "hydra/sweeper=optuna_cohort: nothing to search. Write such as optim.lr='tag(log,interval(1e-5,1e-3))'."
            )
        _mend(journal)
        with reading.reading(journal, RunError, _ANEW):
            self.study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(journal))),
                study_name="sweep",
                sampler=samplers[sampler](),
                load_if_exists=True,
            )
        begun = self.study.get_trials(states=[optuna.trial.TrialState.RUNNING])
        self._left = [trial for trial in begun if trial.params.keys() == self.space.keys()]
        for trial in begun:
            if trial not in self._left:  # killed between the lines that say what is to be tried
                self.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if self._left:
            console.say("search", f"{len(self._left)} trials were interrupted and are resumed")

    def ask(self, batch: int, most: int) -> list[optuna.trial.Trial | optuna.trial.FrozenTrial]:
        """The next trials to train, of unlike points; none when there are enough.

        A trial that repeats an earlier one's point is told what that was worth, and one that repeats a point of its own batch
        will be.
        """
        asked, self._left = self._left, []
        self._twins: dict[int, list[Any]] = {}
        found: list[optuna.trial.Trial | optuna.trial.FrozenTrial] = [
            trial for trial in asked if not self._repeats(trial, asked[: asked.index(trial)])
        ]
        while not asked and len(found) < batch and len(self.study.trials) < most:
            trial = self.study.ask(self.space)
            if not self._repeats(trial, found):
                found.append(trial)
        return found

    def _repeats(self, trial: Any, batch: Sequence[Any]) -> bool:
        """Whether a trial's point is known already, or will be."""
        from optuna.trial import TrialState

        for twin in batch:
            if twin.params == trial.params:
                self._twins.setdefault(twin.number, []).append(trial)
                return True
        for earlier in self.study.get_trials(states=[TrialState.COMPLETE, TrialState.PRUNED]):
            if earlier.params == trial.params:
                self._tell(trial, Outcome(earlier.value, earlier.last_step))
                return True
        return False

    def chosen(self, trial: optuna.trial.Trial | optuna.trial.FrozenTrial) -> list[str]:
        """A trial's values as overrides."""
        return [f"{key}={_text(trial.params[key])}" for key in self.space]

    def tell(self, batch: Sequence[Any], outcomes: Sequence[Outcome]) -> None:
        """Tell what the runs of a batch were worth."""
        for asked, outcome in zip(batch, outcomes, strict=True):
            for trial in (asked, *self._twins.get(asked.number, ())):
                self._tell(trial, outcome)

    def _tell(self, asked: Any, outcome: Outcome) -> None:
        from optuna.trial import Trial, TrialState

        trial = Trial(self.study, asked._trial_id)
        if outcome.score is None:
            self.study.tell(trial, state=TrialState.FAIL)
        elif outcome.stopped_at is None:
            self.study.tell(trial, outcome.score)
        else:
            trial.report(outcome.score, outcome.stopped_at)
            self.study.tell(trial, state=TrialState.PRUNED)


def _mend(journal: Path) -> None:
    """Move the torn end of a journal, as a kill or a full disk leaves it, into a file beside it; Optuna would fail on it.

    Raises:
        RunError: a line before the last one is damaged, so what was torn cannot be told.
    """
    if not os.path.lexists(journal):
        return
    if journal.is_symlink():
        raise RunError(f"{journal}: a link, which may lead anywhere. {_ANEW}")
    content = reading.read_bytes(journal, RunError, 2**30)
    lines = content.splitlines(keepends=True)
    bad = next((place for place, line in enumerate(lines) if not _is_entry(line)), None)
    if bad is None:
        return
    if bad < len(lines) - 1:
        raise RunError(f"{journal}: line {bad + 1} of {len(lines)} is damaged, and not only the last one. {_ANEW}")
    torn = next(
        path for n in itertools.count(1) if not os.path.lexists(path := journal.with_name(f"{journal.name}.torn{n}"))
    )
    storage.write_text(torn, lines[bad].decode("utf-8", "backslashreplace"))
    storage.write_text(journal, b"".join(lines[:bad]).decode("utf-8"))
    console.say("search", f"{journal}: its last line is torn; it was moved to {torn.name}, and the search continues")


def _is_entry(line: bytes) -> bool:
    """Whether a line of the journal is whole."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _distribution(key: str, values: dict[str, Any]) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    try:
        if "choices" in values:
            return CategoricalDistribution(values["choices"])
        return IntDistribution(**values) if "step" in values else FloatDistribution(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key}: cannot be searched ({error}). Write a,b or interval(a,b) or range(1,9).") from error


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
