"""`lora-lab train`: one run, or with -m one for each combination of values."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_lab.config import forms
from lora_lab.errors import ConfigError, DataError, LoraLabError
from lora_lab.verbs.base import Option, Told, Verb, before_libraries

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig
    from lora_lab.sweep.jobs import Nodes, Outcome
    from lora_lab.sweep.sweep import Sweep

_OF_SWEEPS = ("sweep=", "sweep.", "hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher")

_EXAMPLES = """\
A run is composed from groups (GROUP=CHOICE) and single values (SECTION.KEY=VALUE):

  lora-lab train recipe=demo                              a shipped recipe, as it stands
  lora-lab train recipe=demo adapter.r=4 optim.lr=1e-4    the same with other values
  lora-lab train recipe=demo data.train=my.jsonl          on your rows (JSONL, JSON, CSV, Parquet)
  lora-lab train model=hub model.path=Qwen/Qwen3-8B data.train=my.jsonl quant=nf4
  lora-lab train -m recipe=demo adapter.r=4,8,16          one run for each value, together on one base; sweep=halving,
                                                          sweep.seeds=3, sweep.budget=30minutes: docs/sweeps.md
  lora-lab train --config-dir mine recipe=own             a recipe of yours: mine/recipe/own.yaml

groups:  model quant adapter task data optim train hardware speed tracker export sweep recipe
keys:    lora-lab config --keys lists every key with its meaning; lora-lab config recipe=demo shows values and origins
"""


def _run(told: Told) -> int:
    if told.options.multirun:
        return _multirun(told)
    alone = [text for text in told.overrides if text.lstrip("+").startswith(_OF_SWEEPS)]
    if alone:
        raise ConfigError(f"{alone[0]}: no effect on a single run. Add -m and several values, such as adapter.r=4,8.")
    from lora_lab.config import compose

    config = compose.compose(told.overrides, told.options.config_dir)
    refuse_upload(config.export.push_to_hub, told.overrides)
    before_libraries(config.hardware.threads)
    from lora_lab.run import parallel, pipeline

    code = parallel.elsewhere(config.hardware, lambda: _command(told))
    if code is None:
        pipeline.train(config)
    return code or 0


def _command(told: Told) -> list[str]:
    """The command line again."""
    options = ["-m"] if told.options.multirun else []
    if told.options.config_dir is not None:
        options += ["--config-dir", told.options.config_dir]
    return ["train", *options, *told.overrides]


def refuse_upload(repository: str | None, overrides: Sequence[str]) -> None:
    """A recipe does not choose where weights go.

    Raises:
        ConfigError: one does, and no override says so.
    """
    if repository is not None and not any(text.startswith("export.push_to_hub=") for text in overrides):
        raise ConfigError(
            f"export.push_to_hub={repository}: a recipe starts no upload. Say it on the command line: export.push_to_hub={repository}"
        )


class _Elsewhere(BaseException):
    """The sweep was trained in other processes, or along with the one that has it."""

    def __init__(self, code: int):
        self.code = code


def _multirun(told: Told) -> int:
    """Ordinary Hydra multirun. A run that fails leaves the others alone; all failures are listed at the end."""
    from lora_lab.config import hydra_app

    made: list[Sweep] = []

    def launch(configs: list[RunConfig], nodes: Nodes | None = None) -> list[Outcome]:
        return made[0].launch(configs, nodes)

    with contextlib.ExitStack() as processes:

        def check(configs: list[RunConfig]) -> None:
            before_libraries(configs[0].hardware.threads)
            from lora_lab.data import sources

            sources.check_there(configs)
            from lora_lab.sweep import check, sweep  # with torch

            check.check(configs)
            code = sweep.elsewhere(configs, processes, _command(told))
            if code is not None:
                raise _Elsewhere(code)
            made.append(sweep.Sweep())

        try:
            failures = hydra_app.multirun(told.overrides, told.options.config_dir, launch, check)
        except _Elsewhere as done:
            return done.code
        except (ConfigError, DataError) as error:
            raise LoraLabError(f"{error}{forms.commas(told.overrides, str(error))}") from error
        return made[0].end(failures)


VERB = Verb(
    summary="train an adapter; evaluate; merge if the recipe says so",
    examples=_EXAMPLES,
    run=_run,
    arguments=(Option("-m", "--multirun", action="store_true", help="one run for each combination of values"),),
    together=True,
    others=("finetune", "fine-tune", "sft", "fit", "run", "sweep"),
)
