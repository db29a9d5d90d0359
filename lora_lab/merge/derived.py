"""Runs that are not trained but made of trained adapters: combined from several, or shrunk to a lower rank."""

from __future__ import annotations

import dataclasses
from typing import Any

from lora_lab.adapters import files
from lora_lab.adapters.deltas import Deltas
from lora_lab.config.merge import MergeConfig
from lora_lab.config.run import RunConfig
from lora_lab.run import run_dir
from lora_lab.run.run_dir import RunDir
from lora_lab.run.setup import Setup
from lora_lab.runtime import storage


def make(
    config: RunConfig,
    adapter: Deltas,
    setup: Setup,
    made_of: Any,
    base: dict[str, float] | None,
    tuned: dict[str, float] | None,
) -> RunDir:
    """Make the run folder `config.run_dir` with an adapter in it, as if it had been trained.

    Args:
        config: its `adapter` is the adapter's (see `lora.of_scale_one`).
        adapter: of ranks up to `config.adapter.r`.
        setup: the base, data and task that belong to it.
        made_of: which runs' adapters, and how; for `lora_lab.json` and `result.json`.
        base: metrics of the base on the held-out rows, as far as they are known.
        tuned: the same of the adapter.
    """
    config = dataclasses.replace(config, merge=_without_adapters(config.merge))
    with run_dir.created(config) as run:
        run_dir.write_manifest(run, config, setup.base, setup.data_hashes(), made_of)
        peft_config = config.adapter.peft_config(setup.kind.peft_task_type)
        peft_config.modules_to_save = list(setup.kind.whole) or None
        with storage.new_folder(run.adapter) as temporary:
            state = adapter.tensors(config.adapter.r)
            learned = setup.task.learned
            files.write_tensors(temporary, state, peft_config, config, setup.base, learned, made_of=made_of)
        result = {"made_of": made_of, "base": base, "tuned": tuned, "versions": run_dir.versions()}
        storage.write_text(run.result, storage.dump_json(result))
    return run


def _without_adapters(merge: MergeConfig) -> MergeConfig:
    """The derived run is merged like any other."""
    plain, names = MergeConfig(), ("adapters", "weights", "method", "rank", "density", "search_trials")
    return dataclasses.replace(merge, **{name: getattr(plain, name) for name in names})
