"""Optuna as the chooser of a sweep's points: asked for a batch, told what each of its runs was worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Transformer

from lora_lab import console
from lora_lab.errors import ConfigError
from lora_lab.sweep.jobs import Outcome

if TYPE_CHECKING:
    import optuna


class Search:
    """A study in a journal file; one that was interrupted goes on with the batch that was being trained."""

    def __init__(self, overrides: Sequence[Override], journal: Path, sampler: str, seed: int):
        """
        Args:
            overrides: `key=a,b`, `key=interval(a,b)` (`tag(log,interval(a,b))`) and `key=range(a,b)` are searched, others fixed.

        Raises:
            ConfigError: Optuna is not installed, nothing is to be searched, or there is no such sampler.
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
        self.fixed = [override.input_line for override in overrides if not override.is_sweep_override()]
        self.space = {o.get_key_element(): _distribution(o) for o in overrides if o.is_sweep_override()}
        if not self.space:
            raise ConfigError(
                "hydra/sweeper=optuna_cohort: nothing to search. Write such as optim.lr='tag(log,interval(1e-5,1e-3))'."
            )
        storage = JournalStorage(JournalFileBackend(str(journal)))
        self.study = optuna.create_study(
            storage=storage, study_name="sweep", sampler=samplers[sampler](), load_if_exists=True
        )
        self._left = self.study.get_trials(states=[optuna.trial.TrialState.RUNNING])
        if self._left:
            console.say("search", f"{len(self._left)} trials were interrupted and go on")

    def ask(self, batch: int, most: int) -> list[optuna.trial.Trial | optuna.trial.FrozenTrial]:
        """The next trials to train; none when there are enough."""
        if self._left:
            left, self._left = self._left, []
            return left
        count = min(batch, most - len(self.study.trials))
        return [self.study.ask(self.space) for _ in range(count)]

    def chosen(self, trial: optuna.trial.Trial | optuna.trial.FrozenTrial) -> list[str]:
        """A trial's values as overrides."""
        return [f"{key}={_text(trial.params[key])}" for key in self.space]

    def tell(self, batch: Sequence[Any], outcomes: Sequence[Outcome]) -> None:
        """Tell what the runs of a batch were worth."""
        from optuna.trial import Trial, TrialState

        for asked, outcome in zip(batch, outcomes, strict=True):
            trial = Trial(self.study, asked._trial_id)
            if outcome.stopped_at is not None and outcome.score is not None:
                trial.report(outcome.score, outcome.stopped_at)
                self.study.tell(trial, state=TrialState.PRUNED)
            elif outcome.score is not None:
                self.study.tell(trial, outcome.score)
            else:
                self.study.tell(trial, state=TrialState.FAIL)


def _distribution(override: Override) -> optuna.distributions.BaseDistribution:
    import optuna

    value, key = override.value(), override.get_key_element()
    if isinstance(value, IntervalSweep):
        return optuna.distributions.FloatDistribution(value.start, value.end, log="log" in value.tags)
    if isinstance(value, RangeSweep) and all(isinstance(bound, int) for bound in (value.start, value.stop, value.step)):
        return optuna.distributions.IntDistribution(value.start, value.stop - 1, step=value.step)
    if isinstance(value, ChoiceSweep):
        return optuna.distributions.CategoricalDistribution(
            list(override.sweep_iterator(transformer=Transformer.encode))
        )
    raise ConfigError(f"{key}: cannot be searched. Write a choice (a,b), interval(a,b) or a range of integers.")


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
