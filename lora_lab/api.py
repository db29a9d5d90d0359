"""lora_lab from Python: what a notebook or a script needs. Each function does what the verb of its name does.

    import lora_lab

    config = lora_lab.load_config("recipe=demo", "train.max_steps=20", "run_dir=runs/notebook")
    run = lora_lab.train(config)
    print(run.result["tuned"], run.metrics()[-1])

Importing this module loads neither torch nor Hydra. What the user can mend is a `LoraLabError`; no function ends the process.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.errors import ConfigError, RunError
from lora_lab.runtime import environment, launch

if TYPE_CHECKING:
    from lora_lab.config.run import RunConfig
    from lora_lab.data.formats import Message
    from lora_lab.run.answering import Answering
    from lora_lab.run.run_dir import RunDir


def load_config(*overrides: str, config_dir: str | os.PathLike[str] | None = None) -> RunConfig:
    """The configuration of a run, composed and checked as `lora-lab train` does it.

    Args:
        overrides: `key=value` and `group=choice`, as on the command line: `"recipe=demo"`, `"adapter.r=4"`.
        config_dir: a folder with recipes and groups of your own.

    Raises:
        ConfigError: with everything that is wrong.
    """
    from lora_lab.config import compose
    from lora_lab.verbs import VERBS
    from lora_lab.verbs.base import Told
    from lora_lab.verbs.train import refuse_upload

    Told.of("train", VERBS["train"], overrides, argparse.Namespace()).refuse_foreign()
    config = compose.compose(overrides, None if config_dir is None else os.fspath(config_dir))
    refuse_upload(config.export.push_to_hub, overrides)
    return config


def train(config: RunConfig) -> Run:
    """Train a run in a new folder, `config.run_dir`; evaluate it, and make `config.export.targets`.

    Args:
        config: of `load_config`, changed by `dataclasses.replace` or not; it is checked as a whole again.

    Raises:
        LoraLabError: as `lora-lab train`; a refused export is raised once the run is complete, and `open_run` opens it.
    """
    if config.hardware.processes not in (None, 1) and launch.place() is None:
        raise ConfigError(
            f"hardware.processes={config.hardware.processes}: a Python program is one process. Start it with torchrun, or train with "
            "lora-lab train hardware.processes=N and open the run with lora_lab.open_run."
        )
    environment.before_torch()  # without effect where the program has computed something before
    from lora_lab.config.run import parse

    config = parse(dataclasses.asdict(config))  # it may have been changed since it was composed
    from lora_lab.run import pipeline

    return Run(pipeline.train(config))


def open_run(path: str | os.PathLike[str]) -> Run:
    """A run that `lora-lab train` or `train` made.

    Raises:
        RunError: there is none, or its `config.yaml` was edited.
    """
    environment.before_torch()
    from lora_lab.run import run_dir

    return Run(run_dir.open_existing(os.fspath(path)))


class Run:
    """A trained run, or one that was begun.

        run = lora_lab.open_run("runs/demo/2026-01-31_12-00-00")
        run.evaluate("data.eval=other.jsonl")["tuned"]
        run.generate(["Order R-2041 for Graz: two oak tables. Name on the invoice is Maria Keller."])
        run.merge()["refused"]

    Overrides are those of the verb of the same name (`lora-lab evaluate --help`); any other has no effect on a trained run, and is
    a `ConfigError`.
    """

    def __init__(self, folder: RunDir):
        """See `open_run` and `train`.

        Raises:
            RunError: `config.yaml` was edited since the run began.
        """
        from lora_lab.run import trained

        self._folder = folder
        self._config = trained.read(folder)
        self._answering: tuple[tuple[str, ...], Answering] | None = None  # with the overrides that it was opened with

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """In a notebook: what it reached, and its curve."""
        from lora_lab.report import notebook

        return notebook.of_run(self.path)

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self._folder.path

    @property
    def config(self) -> RunConfig:
        """What the run was begun with."""
        return self._config

    @property
    def result(self) -> dict[str, Any]:
        """What `result.json` says: `base` and `tuned` are the metrics on held-out rows.

        Raises:
            RunError: the run is not finished.
        """
        from lora_lab.run import run_dir

        found, damage = run_dir.read_result(self._folder)
        if found is None:
            raise RunError(
                f"{damage or f'run={self.path}: not finished.'} To finish it: lora-lab resume run={self.path}"
            )
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """Every line of `metrics.jsonl`: `step`, and `loss`, `grad_norm`, `lr`, `tokens` of a step or `eval_*` of an evaluation.

        With pandas, `pandas.DataFrame(run.metrics())` is a table of them. Damaged lines are left out.
        """
        from lora_lab.runtime import tracking

        return tracking.read_lines(self.path / "metrics.jsonl")[0]

    def evaluate(self, *overrides: str) -> dict[str, Any]:
        """Measure the base and the adapter on held-out rows; what `evaluation.json` says."""
        self.unload()
        from lora_lab.run import pipeline

        return pipeline.evaluate(str(self.path), list(overrides))

    def merge(self, *overrides: str) -> dict[str, Any]:
        """Fold the adapter into the base, in `merged/` of the run's folder; what `merge_report.json` says.

        Raises:
            MergeError: the merged checkpoint is not the model that was trained; it is not kept.
        """
        self.unload()
        from lora_lab.run import pipeline

        return pipeline.merge(str(self.path), list(overrides))

    def export(self, *targets: str) -> dict[str, dict[str, Any]]:
        """Make what other programs load, in `export/` of the run's folder; what is said of each target.

        Args:
            targets: names of targets (`"gguf"`, `"vllm"`), and overrides (`"export.gguf_type=q8_0"`).

        Raises:
            ExportError: one was refused; the others are kept.
        """
        self.unload()
        names = [text for text in targets if "=" not in text]
        named = [f"export.targets=[{','.join(names)}]"] if names else []
        from lora_lab.run import pipeline

        return pipeline.export(str(self.path), [*named, *(text for text in targets if "=" in text)])

    def generate(self, prompts: Sequence[str | list[Message]], *overrides: str) -> list[str]:
        """An answer to each prompt, as `lora-lab chat` gives it: the template and the cleaning of the training, greedy or by beams.

        The model stays loaded for the next call with the same overrides, until `unload`.

        Args:
            prompts: texts, or conversations so far (messages with `role` and `content`).
            overrides: of `lora-lab chat`, such as `"task.max_new_tokens=64"`.

        Raises:
            ConfigError: the run's task does not answer.
            DataError: a prompt that the model cannot be given.
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts: one text, and a list of them is needed. Write run.generate([prompt]).")
        if not self.config.task.generates:
            raise ConfigError(
                f"run={self.path}: trained for task={self.config.task.name}, which does not answer. "
                f"{'Use run.predict.' if self.config.task.predicts else 'Use run.evaluate.'}"
            )
        return self._opened(overrides).answers(prompts)

    def predict(self, rows: Sequence[Mapping[str, Any]], *overrides: str) -> list[dict[str, Any]]:
        """What the model says of each row, which has the columns of the training rows but no label or answer.

        classification: `label` and `score` (with `task.multi_label`: `labels` and `scores`); regression: `value`;
        token_classification: `words`, `tags` and `entities`; question_answering, causal_lm and seq2seq: `answer`; reward: `reward` of
        `messages`, or of `prompt` and `completion`. `lora-lab predict` does it for files.

        The model stays loaded for the next call with the same overrides, until `unload`.

        Args:
            overrides: of `lora-lab chat`, such as `"hardware=cpu"`.

        Raises:
            ConfigError: the run's task predicts nothing of a row.
            DataError: a row that cannot be used, with its number.
        """
        if not (self.config.task.predicts or self.config.task.generates):
            raise ConfigError(
                f"run={self.path}: task={self.config.task.name} predicts nothing of a row by itself. Use run.evaluate."
            )
        return self._opened(overrides).predictions(rows)

    def _opened(self, overrides: tuple[str, ...]) -> Answering:
        if self._answering is None or self._answering[0] != overrides:
            self.unload()
            from lora_lab.run.answering import Answering

            self._answering = overrides, Answering.open(str(self.path), overrides)
        return self._answering[1]

    def unload(self) -> None:
        """Give the memory back that `generate` and `predict` hold."""
        if self._answering is not None:
            self._answering[1].close()
            self._answering = None
