"""Lets Optuna choose the points of a sweep, a batch at a time, so that each batch trains as one cohort.

Hydra imports every module in this namespace for every application, so Optuna is imported when a search begins. (No annotations as
strings: Hydra's scan cannot read them beside dataclasses.)
"""

from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, RangeSweep, Transformer
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf


class OptunaCohortSweeper(Sweeper):
    """`hydra/sweeper=optuna_cohort`: trials in batches, told to a journal that survives a crash."""

    def __init__(self, trials, batch, sampler, seed):
        """
        Args:
            trials: how many points in all.
            batch: how many of them train together.
            sampler: 'tpe' or 'random'.
            seed: of the sampler.
        """
        self.trials, self.batch, self.sampler, self.seed = trials, batch, sampler, seed

    def setup(self, *, hydra_context, task_function, config):
        """Keep what `sweep` needs."""
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        """Ask, launch, tell, until there are enough trials."""
        from lora_lab.sweep.search import Search

        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        overrides = OverridesParser.create().parse_overrides(arguments)
        fixed = [one.input_line for one in overrides if not one.is_sweep_override()]
        space = {one.get_key_element(): _values(one) for one in overrides if one.is_sweep_override()}
        search = Search(space, folder / "optuna.journal", self.sampler, self.seed)
        while batch := search.ask(self.batch, self.trials):
            points = [(*fixed, *search.chosen(trial)) for trial in batch]
            returned = self.launcher.launch(points, initial_job_idx=batch[0].number)
            search.tell(batch, [one.return_value for one in returned])


def _values(override):
    value = override.value()
    if isinstance(value, IntervalSweep):
        return {"low": value.start, "high": value.end, "log": "log" in value.tags}
    if isinstance(value, RangeSweep) and all(isinstance(bound, int) for bound in (value.start, value.stop, value.step)):
        return {"low": value.start, "high": value.stop - 1, "step": value.step}
    return {"choices": list(override.sweep_iterator(transformer=Transformer.encode))}


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="optuna_cohort",
    node={
        "_target_": "hydra_plugins.lora_lab_sweeper.sweeper.OptunaCohortSweeper",
        "trials": 24,
        "batch": 8,
        "sampler": "tpe",
        "seed": 0,
    },
    provider="lora_lab",
)
