"""What a run is, from top to bottom. Each stage is one call; each verb walks some of them.

find base -> build data -> load base -> attach adapter -> fit -> evaluate -> merge, export
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_lab.adapters import files
from lora_lab.adapters.attach import coverage
from lora_lab.config.run import RunConfig
from lora_lab.data.dataset import Dataset, first_examples
from lora_lab.errors import ConfigError, ExportError, Interrupted, LoraLabError, MergeError, NoRoomError, ProcessError
from lora_lab.export import targets
from lora_lab.merge.combine import combine as combine_adapters
from lora_lab.merge.merge import judged_on, reference
from lora_lab.merge.merge import merge as merge_adapter
from lora_lab.merge.merge import settings as merge_settings
from lora_lab.report import summary
from lora_lab.run import evaluation, parallel, run_dir, takes
from lora_lab.run.prepared import Trained, prepare
from lora_lab.run.run_dir import RunDir
from lora_lab.run.setup import ADAPTER, Live
from lora_lab.run.trained import open_trained, tell_uploads
from lora_lab.runtime import console, ranks, storage
from lora_lab.runtime.memory import first_line, is_out_of_memory, peak_gib, peak_reserved_gib
from lora_lab.suites import harness
from lora_lab.tasks.base import EvalResult
from lora_lab.training import checkpoint
from lora_lab.training.cohort import Member
from lora_lab.training.loop import Clock, fit
from lora_lab.verify import parity, probes


def train(config: RunConfig) -> RunDir:
    """`lora-lab train`: the whole walk in a new run folder."""
    if config.merge.adapters:
        raise ConfigError(
            "merge.adapters: no effect in training. Train first, then: lora-lab merge merge.adapters=[A,B]"
        )
    with parallel.joined(config.hardware, ["train"]) as own:
        parallel.same_configuration(config)
        return _train(parallel.own_configuration(config, own))


def _train(config: RunConfig) -> RunDir:
    run_dir.check_free(config)
    parallel.enough_passes(config)
    parallel.enough_to_shard(config)
    setup = prepare(config)
    targets.check(setup)
    parallel.same_rows(setup.base.recorded(), setup.data_hashes())
    live = setup.loaded()  # before there is a folder: a base that does not load leaves none
    with _stoppable(RunDir(Path(config.run_dir).expanduser())), run_dir.created(config) as run:
        run_dir.write_manifest(run, config, setup.base, setup.data_hashes())
        console.say("run", run.path)
        _walk(run, live, resume_from=None)
    return run


def resume(path: str, overrides: list[str]) -> RunDir:
    """`lora-lab resume`: go on from the newest valid checkpoint, to the same bytes as an uninterrupted run; of a trained run make what
    could not be made before."""
    hardware = open_trained(path, takes.RESUME, overrides)[1].hardware
    with parallel.joined(hardware, ["resume", *overrides]) as own:
        return _resume(parallel.copy_of(path, own), overrides, own)


def _resume(path: str, overrides: list[str], own: Path | None) -> RunDir:
    run, config = open_trained(path, takes.RESUME, overrides)
    config = parallel.own_configuration(config, own)
    with _stoppable(run), run.locked():
        result, damage = ranks.from_main(run_dir.read_result(run))
        if result is not None and not parallel.part():
            return run
        if result is not None and result.get(_UNMADE):
            _make_rest(run, config, result)
            return run
        if result is not None:
            console.say("run", f"{run.path} is finished; nothing to do. See {run.result.name}.")
            return run
        if damage:
            console.say("result", f"{damage} It is made again.")
        run_dir.refuse_derived(run)
        tell_uploads(run, config)
        parallel.enough_to_shard(config)
        setup = prepare(config, begun=run)
        run_dir.check_manifest(run, setup.base, setup.data_hashes())
        parallel.same_rows(setup.base.recorded(), setup.data_hashes())
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
    except ProcessError as error:
        if not (ranks.main() and run.config.is_file()):
            raise
        raise ProcessError(
            f"{error} Resume, with as many processes as you like: lora-lab resume run={run.path} hardware.processes=N"
        ) from error


def _walk(run: RunDir, live: Live, resume_from: Path | None) -> None:
    """evaluate the base -> fit -> evaluate -> result.json -> merge -> result.json

    Args:
        live: ends with the training, which makes room for the unquantized base.
    """
    trained, sharded = Trained(run, live.setup), live.setup.sharded
    with live:
        result = _fit(run, live, resume_from)
        if not parallel.part():
            return
        ending = _Ending(trained, result)
        as_trained = None if sharded else ending.as_trained(live)
    if sharded:  # the others have gone, and with them their parts of the base
        as_trained = ending.as_loaded()
    ending.make(as_trained)


def _make_rest(run: RunDir, config: RunConfig, result: dict[str, Any]) -> None:
    """What a finished training could not do: evaluate, merge, export."""
    console.say("resume", f"{run.path} is trained; making what is left: {', '.join(result[_UNMADE])}")
    trained = Trained.of(run, config, need_train=config.data.eval is None)
    with trained.loaded() as live:
        if "evaluate" in result[_UNMADE]:
            after = live.measure("tuned")
            del result[_UNMADE]["evaluate"]
            result |= {"tuned": after.metrics, "details": after.details or None}
        ending = _Ending(trained, result)
        as_trained = ending.as_trained(live)
    ending.make(as_trained)


_UNMADE = "unmade"  # in `result.json`: what could not be done after training, each with the reason


class _Ending:
    """What follows a training: whatever becomes of it, `result.json` has what was measured."""

    def __init__(self, trained: Trained, result: dict[str, Any]):
        """Write `result.json` for now: merging may take more memory than there is, and be ended by the system without a word."""
        self.trained, self.result = trained, result
        self.unmade = {name: text for name, text in result.get(_UNMADE, {}).items() if name == "evaluate"}
        self.errors: list[Exception] = [NoRoomError(text) for text in self.unmade.values()]
        if trained.setup.config.export.targets:
            self._write({**self.unmade, "export": "it was interrupted"})

    def as_trained(self, live: Live) -> parity.Reference | None:
        """See `_as_trained`; None: no target needs it, or it cannot be had."""
        return self._had(lambda: _as_trained(live))

    def as_loaded(self) -> parity.Reference | None:
        """The same, of a base that is loaded anew."""
        return self._had(lambda: reference(self.trained))

    def _had(self, said: Callable[[], parity.Reference]) -> parity.Reference | None:
        setup = self.trained.setup
        if not targets.needs_merged(setup.config.export.targets):
            return None
        try:
            with setup.stages("export"):
                return said()
        except Exception as error:
            self._refuse(error)
            return None

    def make(self, as_trained: parity.Reference | None) -> None:
        """`export.targets`, and the last `result.json`.

        Raises:
            Exception: the first that was met; what it is about is in `result.json`.
        """
        setup, run = self.trained.setup, self.trained.run
        if setup.config.export.targets:
            with setup.stages("export"):
                self._make_targets(as_trained)
        self.result["peak_memory_with_merge_gib"] = round(peak_gib(setup.device), 3)
        self.result["seconds"] = self.result["seconds"] | setup.stages.seconds
        self._write(self.unmade)
        summary.show_end(run, self.result, setup.config.task)
        if self.errors:
            raise self.errors[0]

    def _make_targets(self, as_trained: parity.Reference | None) -> None:
        if as_trained is not None:
            try:
                self.result["merge"] = merge_adapter(self.trained, as_trained)
            except Exception as error:
                self._refuse(error)
        merged = as_trained is not None and not self.result["merge"]["refused"]
        try:
            made, refused = _export(self.trained, merged)
        except Exception as error:
            self._note(error)
            return
        self.result["export"] = made
        self.errors += refused
        left = [name for name, one in made.items() if one.get("unmade")]
        if left:
            self.unmade["export"] = made[left[0]]["refused"][0]

    def _refuse(self, error: Exception) -> None:
        """There is no merged checkpoint."""
        told = targets.told_as(error, self.trained, "hf")
        self.result["merge"] = {"refused": [str(told)]}
        self.errors.append(told)
        if not isinstance(error, MergeError):
            self.unmade["merge"] = str(told)

    def _note(self, error: Exception) -> None:
        self.errors.append(targets.told_as(error, self.trained, "export"))
        self.unmade["export"] = str(self.errors[-1])

    def _write(self, unmade: dict[str, str]) -> None:
        self.result.pop(_UNMADE, None)
        if unmade:
            self.result[_UNMADE] = unmade
        storage.write_text(self.trained.run.result, storage.dump_json(self.result))


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
    run, after, setup = member.run, EvalResult({}), live.setup
    unmade: dict[str, Any] = {}
    with member.active():
        ranks.agreed(lambda: _write_adapter(member, live))
        result = _training_result(member, clock)
        if setup.held_out is not None:
            try:
                with setup.stages("evaluate"):
                    after = live.measure("tuned", member.measured)
            except NoRoomError as error:
                unmade[_UNMADE] = {"evaluate": str(error)}
                console.say("evaluate", f"{run.path}: {error}")
    baselines = {} if setup.held_out is None else setup.task.baselines(setup.held_out)
    if show and setup.held_out is not None and not unmade:
        _show_measured(setup.held_out, {**baselines, "base": before, "tuned": after})
    return result | {
        **_by_name(baselines),
        "base": before.metrics or None,
        "tuned": after.metrics or None,
        "details": after.details or None,
        "merge": None,
        "seconds": setup.stages.seconds,
        "versions": run_dir.versions(),
        **unmade,
    }


def _write_adapter(member: Member, live: Live) -> None:
    run, state = member.run, member.state
    with storage.new_folder(run.adapter, {"step": state.step, "best_step": state.best_step}) as temporary:
        files.write(temporary, member.model, member.name, member.config, member.base, member.task.learned)
    _keep_probes(member, live)


def _keep_probes(member: Member, live: Live) -> None:
    """Keep what the trained adapter says of a few rows, for whoever loads it later; a lack of memory keeps nobody from the rest."""
    try:
        with live.autocast():
            probes.write(member.run.path, member.run.adapter, member.model.eval(), member.task, live.setup.some_rows())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        console.say("probes", f"{member.run.path}: none are kept ({first_line(error)})")


def _training_result(member: Member, clock: Clock) -> dict[str, Any]:
    """What `result.json` says of the training itself."""
    state, device = member.state, member.model.device
    reserved = peak_reserved_gib(device)
    return {
        "steps": state.step,
        "stopped_early": state.stopped_early,
        "best_step": state.best_step,
        **({} if state.best_lost is None else {"best_lost": state.best_lost}),
        "train_loss": next((line["loss"] for line in reversed(member.log.read()) if "loss" in line), None),
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "tokens_per_second": clock.tokens_per_second,
        "peak_memory_gib": round(peak_gib(device), 3),
        "peak_memory_reserved_gib": None if reserved is None else round(reserved, 3),
        "own_memory_mib": round(member.memory / 2**20, 2),
        "train_seconds": round(member.seconds, 2),
        "coverage": dataclasses.asdict(coverage(member.model, member.name)),
    }


def _by_name(baselines: dict[str, EvalResult]) -> dict[str, Any]:
    """What a result says of them, if there are any."""
    return {"baselines": {name: one.metrics for name, one in baselines.items()}} if baselines else {}


def _show_measured(held_out: Dataset, found: dict[str, EvalResult]) -> None:
    """Metrics side by side, what does not fit into them, and some answers."""
    console.metrics_table(f"{len(held_out)} held-out rows", {name: one.metrics for name, one in found.items()})
    summary.show_details(found["tuned"].details)
    summary.show_samples({name: one.answers for name, one in found.items()})


def evaluate(path: str, overrides: list[str]) -> dict[str, Any]:
    """`lora-lab evaluate`: the base and the trained adapter on held-out rows and the tasks of a suite, into `evaluation.json`."""
    run, config = open_trained(path, takes.EVALUATE, overrides)
    suite = harness.load(config.evaluate) if config.evaluate.suite else None
    trained, shots = Trained.of(run, config, need_train=config.task.shots > 0), config.task.shots
    if trained.setup.held_out is None and suite is None:
        raise ConfigError(
            "data.eval: the run has no held-out rows. Name some: lora-lab evaluate run=DIR data.eval=FILE"
        )
    result: dict[str, Any] = {}
    with trained.loaded() as live:
        compared = None if suite is None else harness.measure(live, config.evaluate, suite)
        found: dict[str, EvalResult] = {}
        if live.setup.held_out is not None:
            found, result = _measured(live, shots)
        evaluation.write(run, live, found, compared or [])
    if compared is not None:
        harness.show(compared)
        result["suite"] = harness.as_result(config.evaluate, compared)
    storage.write_text(run.path / "evaluation.json", storage.dump_json(result))
    return result


def _measured(live: Live, shots: int) -> tuple[dict[str, EvalResult], dict[str, Any]]:
    """Base and adapter on the held-out rows, and what `evaluation.json` says of it.

    Args:
        shots: training rows in the prompts by which the base is measured once more.
    """
    held_out = live.setup.held_out_rows()
    baselines = live.setup.task.baselines(held_out)
    found = {"base": live.measure_base()}
    if shots:
        found[f"{shots}-shot"] = live.measure_few_shot()
    found["tuned"] = live.measure("tuned")
    _show_measured(held_out, {**baselines, **found})
    return found, {
        **_by_name(baselines),
        "data": held_out.files,
        "rows": len(held_out),
        **{name: one.metrics for name, one in found.items()},
        "details": found["tuned"].details or None,
    }


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
    refused: list[Exception] = []
    with run.locked():
        trained = Trained.of(run, config, need_train=config.data.eval is None)
        targets.check(trained.setup)
        if targets.needs_merged(config.export.targets) and not _is_merged(trained):
            try:
                _merge(trained)
            except MergeError as error:
                refused.append(error)
        report, problems = _export(trained, merged=not refused)
        refused += problems
    if refused:
        raise refused[0]
    return report


def combine(named: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """`lora-lab merge merge.adapters=[...]`: a run folder of the combined adapter, and its verified checkpoint."""
    return merge(str(combine_adapters(named, overrides).path), [])


def _merge(trained: Trained) -> dict[str, Any]:
    try:
        return merge_adapter(trained, reference(trained))
    except Exception as error:
        told = error if isinstance(error, LoraLabError) else targets.told_as(error, trained, "hf")
        if told is error:
            raise
        raise told from error


def _as_trained(live: Live) -> parity.Reference:
    """What the trained model says of the rows that a merge is judged on."""
    rows = judged_on(live.setup)
    return parity.Reference(rows, parity.logits(live.model.eval(), rows, inside=live.autocast))


def _is_merged(trained: Trained) -> bool:
    """Whether the merged checkpoint is there, whole, and made as the configuration says."""
    merged, settings = trained.run.merged, merge_settings(trained.setup.config)
    return merged.is_dir() and storage.verify(merged).get("made_with") == settings


def _export(trained: Trained, merged: bool) -> tuple[dict[str, dict[str, Any]], list[ExportError]]:
    """Make the targets; what was made, and the errors of what was not kept.

    Args:
        merged: whether there is a merged checkpoint.
    """
    setup = trained.setup
    rows = parity.probe(first_examples(setup.some_rows(), 64), 64, setup.task, targets.POSITIONS)
    report = targets.make(trained, rows, merged)
    return report, [ExportError(text) for one in report.values() for text in one.get("refused", ())]
