"""What a run is, from top to bottom. Each stage is one call; each verb walks some of them.

find base -> build data -> load base -> attach adapter -> fit -> evaluate -> merge, export
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lora_lab.adapters import files
from lora_lab.adapters.attach import coverage
from lora_lab.config.run import RunConfig
from lora_lab.data.dataset import Dataset, first_examples
from lora_lab.errors import ConfigError, ExportError, Interrupted, MergeError
from lora_lab.export import targets
from lora_lab.export.job import Job
from lora_lab.merge.combine import combine as combine_adapters
from lora_lab.merge.merge import merge as merge_adapter
from lora_lab.merge.merge import settings as merge_settings
from lora_lab.report import summary
from lora_lab.run import run_dir, takes
from lora_lab.run.prepared import ADAPTER, Prepared, load_adapted, load_trained, prepare
from lora_lab.run.run_dir import RunDir
from lora_lab.run.trained import open_trained, tell_uploads
from lora_lab.runtime import console, storage
from lora_lab.tasks.base import Measured
from lora_lab.train import checkpoint
from lora_lab.train.cohort import Member
from lora_lab.train.loop import Clock, fit, peak_memory_gib
from lora_lab.verify import parity


def train(config: RunConfig) -> RunDir:
    """`lora-lab train`: the whole walk in a new run folder."""
    if config.merge.adapters:
        raise ConfigError(
            "merge.adapters: no effect in training. Train first, then: lora-lab merge merge.adapters=[A,B]"
        )
    run_dir.check_free(config)
    prepared = prepare(config)
    _check_targets(RunDir(Path(config.run_dir)), prepared)
    load_adapted(prepared)
    with _stoppable(RunDir(Path(config.run_dir).expanduser())), run_dir.created(config) as run:
        run_dir.write_manifest(run, config, prepared.base, prepared.data_hashes())
        console.say("run", run.path)
        _walk(run, prepared, resume_from=None)
    return run


def resume(path: str, overrides: list[str]) -> RunDir:
    """`lora-lab resume`: go on from the newest valid checkpoint, to the same bytes as an uninterrupted run."""
    run, config = open_trained(path, takes.RESUME, overrides)
    with _stoppable(run), run.locked():
        result, damage = run_dir.read_result(run)
        if result is not None:
            console.say("run", f"{run.path} is finished; nothing to do. See {run.result.name}.")
            return run
        if damage:
            console.say("result", f"{damage} It is made again.")
        run_dir.refuse_derived(run)
        tell_uploads(run, config)
        prepared = prepare(config, begun=run)
        run_dir.check_manifest(run, prepared.base, prepared.data_hashes())
        if run_dir.read_manifest(run) is None:  # stopped before it was written
            run_dir.write_manifest(run, config, prepared.base, prepared.data_hashes())
        found, skipped = checkpoint.newest_valid(run.checkpoints)
        for line in skipped:
            console.say("skipped", line)
        console.say("resume", f"from {found}" if found else "no valid checkpoint: from the first step")
        load_adapted(prepared)
        _walk(run, prepared, resume_from=found)
    return run


@contextmanager
def _stoppable(run: RunDir) -> Iterator[None]:
    """Tell whoever reports an interruption which run can be resumed, as soon as there is one."""
    try:
        yield
    except Interrupted as interruption:
        interruption.run = run.path if run.config.is_file() else None
        raise


def _walk(run: RunDir, prepared: Prepared, resume_from: Path | None) -> None:
    """evaluate the base -> fit -> evaluate -> merge -> result.json"""
    config = prepared.config
    member = Member(ADAPTER, config, run, prepared.base, prepared.model, prepared.train, prepared.task.learned)
    console.say("steps", summary.describe_steps(member, config))
    if resume_from is not None:
        checkpoint.restore(member, resume_from)
    member.log.rewind(member.state.step)
    before = measure_base(prepared)
    with prepared.stages("train"):
        clock = fit([member], prepared.train, prepared.held_out, prepared.task, prepared.accelerator)
    result = finish(member, prepared, before, clock, show=True)

    refused: list[MergeError] = []  # told at the end: the training itself is complete
    if config.export.targets:
        with prepared.stages("export"):
            result |= _make_targets(run, prepared, member, refused)
    result |= {"peak_memory_with_merge_gib": round(peak_memory_gib(), 3), "seconds": prepared.stages.seconds}
    storage.write_text(run.result, storage.dump_json(result))
    summary.show_end(run, result, config.task)
    if refused:
        raise refused[0]


def _make_targets(run: RunDir, prepared: Prepared, member: Member, refused: list[MergeError]) -> dict[str, Any]:
    """`export.targets` of a run that has just been trained; what `result.json` says of them.

    Args:
        refused: gets the errors of what was not kept.
    """
    rows, trained_logits = _probe(prepared)
    prepared.model = member.model = member.optimizer = member.parameters = None  # room for the unquantized base
    found: dict[str, Any] = {}
    if targets.needs_merged(prepared.config.export.targets):
        try:
            found["merge"] = _merge(run, prepared, rows, trained_logits)
        except MergeError as error:
            refused.append(error)
            found["merge"] = {"refused": [str(error)]}
    return found | {"export": _export(run, prepared, refused)}


def measure_base(prepared: Prepared) -> Measured:
    """The base on the held-out rows, if there are any."""
    if prepared.held_out is None:
        return Measured({})
    with prepared.stages("evaluate_base"):
        return prepared.measure_base()


def finish(member: Member, prepared: Prepared, before: Measured, clock: Clock, show: bool) -> dict[str, Any]:
    """Write a trained member's adapter and measure it; what its `result.json` says.

    Args:
        before: the base's metrics.
        show: whether metrics and answers are shown.
    """
    run, state, after = member.run, member.state, Measured({})
    with member.turn():
        with storage.new_folder(run.adapter, {"step": state.step, "best_step": state.best_step}) as temporary:
            files.write(temporary, member.model, member.name, member.config, member.base, member.learned)
        result = _training_result(member, clock)
        if prepared.held_out is not None:
            with prepared.stages("evaluate"):
                after = prepared.measure("tuned", member.measured)
    if show and prepared.held_out is not None:
        _show_measured(prepared.held_out, {"base": before, "tuned": after})
    return result | {
        "base": before.metrics or None,
        "tuned": after.metrics or None,
        "details": after.details or None,
        "merge": None,
        "seconds": prepared.stages.seconds,
        "versions": run_dir.versions(),
    }


def _training_result(member: Member, clock: Clock) -> dict[str, Any]:
    """What `result.json` says of the training itself."""
    state = member.state
    return {
        "steps": state.step,
        "stopped_early": state.stopped_early,
        "best_step": state.best_step,
        **({} if state.best_lost is None else {"best_lost": state.best_lost}),
        "train_loss": next((line["loss"] for line in reversed(member.log.read()) if "loss" in line), None),
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "tokens_per_second": clock.tokens_per_second,
        "peak_memory_gib": round(peak_memory_gib(), 3),
        "own_memory_mib": round(member.memory / 2**20, 2),
        "train_seconds": round(member.seconds, 2),
        "coverage": dataclasses.asdict(coverage(member.model, member.name)),
    }


def _show_measured(held_out: Dataset, found: dict[str, Measured]) -> None:
    """Metrics side by side, what does not fit into them, and some answers."""
    console.metrics_table(f"{len(held_out)} held-out rows", {name: one.metrics for name, one in found.items()})
    summary.show_details(found["tuned"].details)
    summary.show_samples({name: one.answers for name, one in found.items()})


def evaluate(path: str, overrides: list[str]) -> dict[str, Any]:
    """`lora-lab evaluate`: the base and the trained adapter on held-out rows, into `evaluation.json`."""
    run, config = open_trained(path, takes.EVALUATE, overrides)
    prepared = prepare(config, need_train=config.task.shots > 0, trained=run)
    if prepared.held_out is None:
        raise ConfigError(
            "data.eval: the run has no held-out rows. Name some: lora-lab evaluate run=DIR data.eval=FILE"
        )
    load_trained(run, prepared)
    found = {"base": prepared.measure_base()}
    if config.task.shots:
        found[f"{config.task.shots}-shot"] = prepared.measure_few_shot()
    found["tuned"] = prepared.measure("tuned")
    _show_measured(prepared.held_out, found)
    result = {
        "data": prepared.held_out.files,
        "rows": len(prepared.held_out),
        **{name: one.metrics for name, one in found.items()},
        "details": found["tuned"].details or None,
    }
    storage.write_text(run.path / "evaluation.json", storage.dump_json(result))
    return result


def merge(path: str, overrides: list[str]) -> dict[str, Any]:
    """`lora-lab merge`: a verified, deployable checkpoint in `merged/`."""
    run, config = open_trained(path, takes.MERGE, overrides)
    if config.adapter.against_merging:
        raise ConfigError(
            f"{path}: {config.adapter.label} cannot be merged, because {config.adapter.against_merging}. Use the adapter as it is: "
            f"lora-lab chat run={path}, or lora-lab export run={path} export.targets=[adapter]"
        )
    with run.locked():
        prepared = prepare(config, need_train=config.data.eval is None, trained=run)
        load_trained(run, prepared)
        rows, trained_logits = _probe(prepared)
        prepared.model = None  # room for the unquantized base
        report = _merge(run, prepared, rows, trained_logits)
    console.say("merged", f"{run.merged}: {prepared.kind.auto_class}.from_pretrained({str(run.merged)!r})")
    return report


def export(path: str, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """`lora-lab export`: `export.targets` of a trained run, each proved in its own loader, in `export/`.

    Raises:
        ConfigError: no targets, or one that could not load what would be made.
        ExportError: a target was refused; the others are kept.
    """
    run, config = open_trained(path, takes.EXPORT, overrides)
    if not config.export.targets:
        raise ConfigError(
            "export.targets: nothing to export. Say what: lora-lab export run=DIR export.targets=[gguf,ollama]"
        )
    refused: list[MergeError] = []
    with run.locked():
        prepared = prepare(config, need_train=config.data.eval is None, trained=run)
        _check_targets(run, prepared)
        if targets.needs_merged(config.export.targets) and not _is_merged(run, config):
            load_trained(run, prepared)
            rows, trained_logits = _probe(prepared)
            prepared.model = None
            try:
                _merge(run, prepared, rows, trained_logits)
            except MergeError as error:
                refused.append(error)
        report = _export(run, prepared, refused)
    if refused:
        raise refused[0]
    return report


def _is_merged(run: RunDir, config: RunConfig) -> bool:
    """Whether the merged checkpoint is there, whole, and made as the configuration says."""
    return run.merged.is_dir() and storage.verify(run.merged).get("made_with") == merge_settings(config)


def _export(run: RunDir, prepared: Prepared, refused: list[MergeError]) -> dict[str, dict[str, Any]]:
    """Make the targets; `refused` says whether the merge was, and gets the errors of what was not kept."""
    data = prepared.held_out or prepared.train
    rows = parity.probe(first_examples(data, 64), 64, prepared.task, targets.POSITIONS)
    report = targets.make(dataclasses.replace(_job(run, prepared), rows=rows), merged=not refused)
    refused += [ExportError(text) for one in report.values() for text in one.get("refused", ())]
    return report


def _check_targets(run: RunDir, prepared: Prepared) -> None:
    if prepared.config.export.targets or prepared.config.export.push_to_hub:
        targets.check(_job(run, prepared))


def _job(run: RunDir, prepared: Prepared) -> Job:
    return Job(run, prepared.config, prepared.base, prepared.kind, prepared.encoder, prepared.device)


def combine(named: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """`lora-lab merge merge.adapters=[...]`: a run folder of the combined adapter, and its verified checkpoint."""
    return merge(str(combine_adapters(named, overrides).path), [])


def _probe(prepared: Prepared) -> tuple[parity.Probe, list[torch.Tensor]]:
    """The rows that a merge is judged on, and the trained model's logits there."""
    data, count = prepared.held_out or prepared.train, prepared.config.merge.parity_rows
    rows = parity.probe(first_examples(data, count), count, prepared.task)
    with prepared.accelerator.autocast():
        return rows, parity.logits(prepared.model.eval(), rows)


def _merge(run: RunDir, prepared: Prepared, rows: parity.Probe, trained_logits: list[torch.Tensor]) -> dict[str, Any]:
    return merge_adapter(
        run, prepared.config, prepared.base, prepared.kind, prepared.encoder, rows, trained_logits, prepared.device
    )
