"""What a run is, from top to bottom. Each stage is one call; each verb walks some of them.

find base -> build data -> load base -> attach adapter -> fit -> evaluate -> merge, export
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_lab.adapters import files
from lora_lab.adapters.attach import coverage
from lora_lab.config.run import RunConfig
from lora_lab.data.dataset import Dataset, first_examples
from lora_lab.errors import ConfigError, ExportError, Interrupted, MergeError
from lora_lab.export import targets
from lora_lab.merge.combine import combine as combine_adapters
from lora_lab.merge.merge import judged_on, reference
from lora_lab.merge.merge import merge as merge_adapter
from lora_lab.merge.merge import settings as merge_settings
from lora_lab.report import summary
from lora_lab.run import run_dir, takes
from lora_lab.run.prepared import Trained, prepare
from lora_lab.run.run_dir import RunDir
from lora_lab.run.setup import ADAPTER, Live
from lora_lab.run.trained import open_trained, tell_uploads
from lora_lab.runtime import console, storage
from lora_lab.tasks.base import EvalResult
from lora_lab.training import checkpoint
from lora_lab.training.cohort import Member
from lora_lab.training.loop import Clock, fit, peak_memory_gib
from lora_lab.verify import parity


def train(config: RunConfig) -> RunDir:
    """`lora-lab train`: the whole walk in a new run folder."""
    if config.merge.adapters:
        raise ConfigError(
            "merge.adapters: no effect in training. Train first, then: lora-lab merge merge.adapters=[A,B]"
        )
    run_dir.check_free(config)
    setup = prepare(config)
    targets.check(setup)
    live = setup.loaded()  # before there is a folder: a base that does not load leaves none
    with _stoppable(RunDir(Path(config.run_dir).expanduser())), run_dir.created(config) as run:
        run_dir.write_manifest(run, config, setup.base, setup.data_hashes())
        console.say("run", run.path)
        _walk(run, live, resume_from=None)
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
        setup = prepare(config, begun=run)
        run_dir.check_manifest(run, setup.base, setup.data_hashes())
        if run_dir.read_manifest(run) is None:  # stopped before it was written
            run_dir.write_manifest(run, config, setup.base, setup.data_hashes())
        found, skipped = checkpoint.newest_valid(run.checkpoints)
        for line in skipped:
            console.say("skipped", line)
        console.say("resume", f"from {found}" if found else "no valid checkpoint: from the first step")
        _walk(run, setup.loaded(), resume_from=found)
    return run


@contextmanager
def _stoppable(run: RunDir) -> Iterator[None]:
    """Tell whoever reports an interruption which run can be resumed, as soon as there is one."""
    try:
        yield
    except Interrupted as interruption:
        interruption.run = run.path if run.config.is_file() else None
        raise


def _walk(run: RunDir, live: Live, resume_from: Path | None) -> None:
    """evaluate the base -> fit -> evaluate -> merge -> result.json

    Args:
        live: ends with the training, which makes room for the unquantized base.
    """
    trained, config, stages = Trained(run, live.setup), live.setup.config, live.setup.stages
    refused: list[MergeError] = []  # told at the end: the training itself is complete
    with live:
        result, as_trained = _fit(run, live, resume_from), None
        if targets.needs_merged(config.export.targets):
            with stages("export"):
                as_trained = _as_trained(live)
    if config.export.targets:
        with stages("export"):
            result |= _make_targets(trained, as_trained, refused)
    result |= {"peak_memory_with_merge_gib": round(peak_memory_gib(), 3), "seconds": stages.seconds}
    storage.write_text(run.result, storage.dump_json(result))
    summary.show_end(run, result, config.task)
    if refused:
        raise refused[0]


def _fit(run: RunDir, live: Live, resume_from: Path | None) -> dict[str, Any]:
    """evaluate the base -> fit -> evaluate; what `result.json` says of it."""
    setup = live.setup
    member = Member(ADAPTER, setup.config, run, setup.base, live.model, setup.training_rows(), setup.task)
    console.say("steps", summary.describe_steps(member, setup.config))
    if resume_from is not None:
        checkpoint.restore(member, resume_from)
    member.log.rewind(member.state.step)
    before = measure_base(live)
    with setup.stages("train"):
        clock = fit([member], setup.training_rows(), setup.held_out, setup.accelerator)
    return finish(member, live, before, clock, show=True)


def _make_targets(trained: Trained, as_trained: parity.Reference | None, refused: list[MergeError]) -> dict[str, Any]:
    """`export.targets` of a run that has just been trained; what `result.json` says of them.

    Args:
        as_trained: see `_as_trained`; None: no target needs a merge.
        refused: gets the errors of what was not kept.
    """
    found: dict[str, Any] = {}
    if as_trained is not None:
        try:
            found["merge"] = merge_adapter(trained, as_trained)
        except MergeError as error:
            refused.append(error)
            found["merge"] = {"refused": [str(error)]}
    return found | {"export": _export(trained, refused)}


def measure_base(live: Live) -> EvalResult:
    """The base on the held-out rows, if there are any."""
    if live.setup.held_out is None:
        return EvalResult({})
    with live.setup.stages("evaluate_base"):
        return live.measure_base()


def finish(member: Member, live: Live, before: EvalResult, clock: Clock, show: bool) -> dict[str, Any]:
    """Write a trained member's adapter and measure it; what its `result.json` says.

    Args:
        before: the base's metrics.
        show: whether metrics and answers are shown.
    """
    run, state, after, setup = member.run, member.state, EvalResult({}), live.setup
    with member.active():
        with storage.new_folder(run.adapter, {"step": state.step, "best_step": state.best_step}) as temporary:
            files.write(temporary, member.model, member.name, member.config, member.base, member.task.learned)
        result = _training_result(member, clock)
        if setup.held_out is not None:
            with setup.stages("evaluate"):
                after = live.measure("tuned", member.measured)
    if show and setup.held_out is not None:
        _show_measured(setup.held_out, {"base": before, "tuned": after})
    return result | {
        "base": before.metrics or None,
        "tuned": after.metrics or None,
        "details": after.details or None,
        "merge": None,
        "seconds": setup.stages.seconds,
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


def _show_measured(held_out: Dataset, found: dict[str, EvalResult]) -> None:
    """Metrics side by side, what does not fit into them, and some answers."""
    console.metrics_table(f"{len(held_out)} held-out rows", {name: one.metrics for name, one in found.items()})
    summary.show_details(found["tuned"].details)
    summary.show_samples({name: one.answers for name, one in found.items()})


def evaluate(path: str, overrides: list[str]) -> dict[str, Any]:
    """`lora-lab evaluate`: the base and the trained adapter on held-out rows, into `evaluation.json`."""
    run, config = open_trained(path, takes.EVALUATE, overrides)
    trained, shots = Trained.of(run, config, need_train=config.task.shots > 0), config.task.shots
    held_out = trained.setup.held_out
    if held_out is None:
        raise ConfigError(
            "data.eval: the run has no held-out rows. Name some: lora-lab evaluate run=DIR data.eval=FILE"
        )
    with trained.loaded() as live:
        found = {"base": live.measure_base()}
        if shots:
            found[f"{shots}-shot"] = live.measure_few_shot()
        found["tuned"] = live.measure("tuned")
    _show_measured(held_out, found)
    result = {
        "data": held_out.files,
        "rows": len(held_out),
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
        trained = Trained.of(run, config, need_train=config.data.eval is None)
        report = _merge(trained)
    kind = trained.setup.kind.auto_class
    console.say("merged", f"{run.merged}: {kind}.from_pretrained({str(run.merged)!r})")
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
        trained = Trained.of(run, config, need_train=config.data.eval is None)
        targets.check(trained.setup)
        if targets.needs_merged(config.export.targets) and not _is_merged(trained):
            try:
                _merge(trained)
            except MergeError as error:
                refused.append(error)
        report = _export(trained, refused)
    if refused:
        raise refused[0]
    return report


def combine(named: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """`lora-lab merge merge.adapters=[...]`: a run folder of the combined adapter, and its verified checkpoint."""
    return merge(str(combine_adapters(named, overrides).path), [])


def _merge(trained: Trained) -> dict[str, Any]:
    return merge_adapter(trained, reference(trained))


def _as_trained(live: Live) -> parity.Reference:
    """What the trained model says of the rows that a merge is judged on."""
    rows = judged_on(live.setup)
    return parity.Reference(rows, parity.logits(live.model.eval(), rows, inside=live.autocast))


def _is_merged(trained: Trained) -> bool:
    """Whether the merged checkpoint is there, whole, and made as the configuration says."""
    merged, settings = trained.run.merged, merge_settings(trained.setup.config)
    return merged.is_dir() and storage.verify(merged).get("made_with") == settings


def _export(trained: Trained, refused: list[MergeError]) -> dict[str, dict[str, Any]]:
    """Make the targets; `refused` says whether the merge was, and gets the errors of what was not kept."""
    setup = trained.setup
    rows = parity.probe(first_examples(setup.some_rows(), 64), 64, setup.task, targets.POSITIONS)
    report = targets.make(trained, rows, merged=not refused)
    refused += [ExportError(text) for one in report.values() for text in one.get("refused", ())]
    return report
