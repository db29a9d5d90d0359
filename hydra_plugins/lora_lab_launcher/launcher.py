"""Hands all points of a sweep over at once, so that lora_lab can train them together.

Hydra imports every module in this namespace for every application, so this one imports nothing else and does nothing until it
is asked to launch. (No annotations as strings: Hydra's scan cannot read them beside dataclasses.)
"""

from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict


class CohortLauncher(Launcher):
    """`hydra/launcher=cohort`: one call for all points, in place of one after another.

    `cohort_slurm` and `cohort_local` train cohorts on other nodes, or in other processes, through submitit, and `cohort_ray` on the nodes of
    a Ray cluster.
    """

    def __init__(self, executor=None, workers=1, parameters=None):
        """
        Args:
            executor: of `lora_lab.sweep.engines`; None: train here.
            workers: cohorts at the same time; None: one for each card of this machine, or two on its CPU.
            parameters: the engine's own.
        """
        self.nodes = executor and {"executor": executor, "workers": workers, "parameters": _plain(parameters)}

    def setup(self, *, hydra_context, task_function, config):
        """Keep what `launch` needs."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides, initial_job_idx):
        """Compose each point and give them to the application's `cohort`, which returns a value for each."""
        cohort = getattr(self.task_function, "cohort", None)
        if cohort is None:
            raise RuntimeError("hydra/launcher=cohort is lora_lab's; use hydra/launcher=basic in other applications.")
        setup_globals()
        points = [self._point(overrides, initial_job_idx + place) for place, overrides in enumerate(job_overrides)]
        values = cohort([(tree, folder) for tree, folder, _ in points], self.nodes)
        return [
            JobReturn(
                overrides=list(overrides),
                cfg=tree,
                working_dir=str(folder),
                _return_value=value,
                status=JobStatus.COMPLETED,
            )
            for (tree, folder, overrides), value in zip(points, values, strict=True)
        ]

    def _point(self, overrides, number):
        tree = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(tree):
            tree.hydra.job.id, tree.hydra.job.num = f"job_id_{number}", number
        HydraConfig.instance().set_config(tree)
        return tree, Path(tree.hydra.sweep.dir) / str(tree.hydra.sweep.subdir), list(overrides)


def _plain(parameters):
    return (
        OmegaConf.to_container(parameters, resolve=True) if OmegaConf.is_config(parameters) else dict(parameters or {})
    )


_TARGET = "hydra_plugins.lora_lab_launcher.launcher.CohortLauncher"
_CHOICES: dict[str, dict[str, object]] = {
    "cohort": {},
    "cohort_local": {"executor": "local", "workers": None, "parameters": {"timeout_min": 10000}},
    "cohort_ray": {"executor": "ray", "workers": 4, "parameters": {"max_retries": 8}},
    "cohort_slurm": {"executor": "slurm", "workers": 4, "parameters": {"timeout_min": 600, "gpus_per_node": 1}},
}
for _name, _settings in _CHOICES.items():
    ConfigStore.instance().store(
        group="hydra/launcher", name=_name, node={"_target_": _TARGET, **_settings}, provider="lora_lab"
    )
