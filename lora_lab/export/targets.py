"""`export.targets`: what each needs, is made of, and where it goes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lora_lab.adapters.base import AdapterSection
from lora_lab.errors import ConfigError, ExportError, LoraLabError, MergeError, RunError
from lora_lab.export import adapter, gguf, hub, quantized
from lora_lab.report import card
from lora_lab.run.prepared import Trained
from lora_lab.run.setup import Setup
from lora_lab.runtime import console, storage
from lora_lab.runtime.memory import first_line, is_out_of_memory
from lora_lab.runtime.reading import read_json
from lora_lab.verify.parity import Probe

POSITIONS = 256  # that llama.cpp is asked about, one by one


@dataclasses.dataclass(frozen=True)
class Target:
    """One thing that can be made of a trained adapter."""

    make: Callable[[Trained, Probe, Path], dict[str, Any]] | None  # None: the merged checkpoint itself
    check: Callable[[Setup], Iterable[str]]
    of_merged: bool = False  # made of the merged checkpoint
    of_deltas: bool = False  # made of the adapter's updates, as LoRA's two matrices


TARGETS = {
    "hf": Target(None, lambda setup: (), of_merged=True),
    "adapter": Target(adapter.make, adapter.check),
    "vllm": Target(adapter.make_vllm, adapter.check_vllm, of_deltas=True),
    "gguf": Target(gguf.make, functools.partial(gguf.check, target="gguf"), of_merged=True),
    "ollama": Target(
        functools.partial(gguf.make, with_modelfile=True),
        functools.partial(gguf.check, target="ollama"),
        of_merged=True,
    ),
    "gguf_lora": Target(gguf.make_lora, functools.partial(gguf.check, target="gguf_lora"), of_deltas=True),
    "quantized": Target(quantized.make, quantized.check, of_merged=True),
}


def check(setup: Setup) -> None:
    """Refuse, before any long work, targets that could not load what will be made.

    Raises:
        ConfigError: every reason.
    """
    problems = []
    for name in setup.config.export.targets:
        against = reason_against(setup.config.adapter, name)
        problems += [f"export.targets: {name}: {against}"] if against else TARGETS[name].check(setup)
    problems += hub.check(setup.config.export)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def reason_against(adapter: AdapterSection, name: str) -> str:
    """Why this target cannot be made of a method's adapters, and the way out; empty if it can."""
    target = TARGETS[name]
    needed = adapter.against_merging if target.of_merged else adapter.against_delta if target.of_deltas else ""
    against = f"cannot be made of {adapter.label}, because {needed}" if needed else adapter.against_target(name)
    if not against:
        return ""
    if target.of_merged or adapter.against_merging:
        return f"{against}. Export adapter, or train with adapter=lora."
    return f"{against}. Export {'gguf' if 'gguf' in name else 'hf'} (merged), or train with adapter=lora."


def needs_merged(targets: Iterable[str]) -> bool:
    return any(TARGETS[name].of_merged for name in targets)


def make(trained: Trained, rows: Probe, merged: bool = True) -> dict[str, dict[str, Any]]:
    """Make every target but hf in `export/<target>/` of the run, each published only if it was proved.

    Args:
        rows: what is compared on.
        merged: whether there is a merged checkpoint; without one, only what is made of the adapter alone.

    Returns:
        Of each target what was proved, or under `refused` why it was not kept; also in `export_report.json`. `unmade` is true where it
        was not judged: it could not be made as things are now.
    """
    run, export = trained.run, trained.setup.config.export
    report: dict[str, dict[str, Any]] = {}
    for name in export.targets:
        target = TARGETS[name]
        if target.make is None or (target.of_merged and not merged):
            continue
        folder = run.path / "export" / name
        try:
            with storage.new_folder(folder, {"base": trained.setup.base.fingerprint}) as temporary:
                found = target.make(trained, rows, temporary)
                (temporary / "README.md").write_text(card.card(trained, found), encoding="utf-8")
            report[name] = found | {"bytes": sum(file.stat().st_size for file in folder.iterdir())}
            console.say("export", f"{folder}: {_shown(report[name])}")
        except MergeError as error:
            report[name] = {"refused": [str(error)]}
            console.say("refused", error)
        except Exception as error:
            told = told_as(error, trained, name)
            if told is error:  # a disk, or a mistake of ours
                raise
            report[name] = {"refused": [str(told)], "unmade": True}
            console.say("refused", told)
    if report:
        _write(run.path / "export_report.json", report)
    published = {name: run.path / "export" / name for name, found in report.items() if "refused" not in found}
    if "hf" in export.targets and merged:
        published["hf"] = run.merged
    if export.push_to_hub and published:
        hub.push(published, export)
    return report


def told_as(error: Exception, trained: Trained, name: str) -> Exception:
    """What a user is told of an error that ended the making of a target: a refusal with the way out; an error that says enough, itself.

    Args:
        name: of the target; hf: the merged checkpoint.
    """
    if isinstance(error, MergeError | RunError) or not (isinstance(error, LoraLabError) or is_out_of_memory(error)):
        return error
    kind = MergeError if name == "hf" else ExportError
    if isinstance(error, LoraLabError):
        return kind(f"export.targets: {name} could not be made: {error}")
    run, on_gpu = trained.run.path, trained.setup.device.type == "cuda"
    where = "in main memory" if on_gpu else "on a machine with more of it"
    device = " hardware.device=cpu" if on_gpu else ""
    return kind(
        f"export.targets: memory ran out while {name} was made ({first_line(error)}). The adapter is complete: {trained.run.adapter}. Make "
        f"it {where}: lora-lab export run={run} export.targets=[{name}]{device}"
    )


def _write(file: Path, report: dict[str, dict[str, Any]]) -> None:
    """Add to what was said of other targets before."""
    before: dict[str, Any] = {}
    if file.exists():
        try:
            before = read_json(file, ExportError)
        except ExportError as error:
            console.say("report", f"{error} It is begun anew.")
    storage.write_text(file, storage.dump_json(before | report))


def _shown(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
    )
