"""Train, merge and compare every family that transformers lists: python -m benchmarks.architectures [--only TASK:FAMILY,...] [--faults]

Each family is built tiny with random weights (tests/families.py), trained three steps in float32, merged, and its loss compared with
what plain transformers compute of the merged checkpoint. Results are kept in benchmarks/results/architectures.json as they come, and
docs/architectures.md is written from them; families that the file already holds are not repeated. The file is of one state of the
sources and of one set of versions: it begins anew where they are others.

Everything is imported once, and each family has a forked process of its own, which ends with its memory and its time limit.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # threads do not survive a fork

import torch

from benchmarks.sources import ROOT, sources
from lora_lab.runtime import storage
from tests.families import TASKS, Outcome, attempt, families, preload

_RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
_DOCUMENT = ROOT / "docs" / "architectures.md"
_PACKAGES = ("torch", "transformers", "peft")
_SECONDS = 180  # for one family
_HEAD = """# Architectures

Every family that transformers {transformers} lists for four tasks, built tiny with random weights, trained three steps in float32 with
the default adapter and accelerations, merged, and reloaded by plain transformers. `make architectures` makes this page anew.

- **rows**: *packed*: several rows lie end to end in one forward pass, which was proved to change nothing; *padded*: the task fills rows up;
  *one by one*: this model lets packed rows see each other, or says something else of a padded row, so each has a pass of its own.
- **accelerations**: what was used of docs/speed.md, and what was left out and why; each was tried on the model before training.
- **merge**: the largest difference of a logit between the model as trained and the merged checkpoint in plain transformers.
- **loss**: the relative difference between the held-out loss that lora_lab reports and the one that plain transformers compute of the
  merged checkpoint, one text at a time.

Made with {versions}, by sources with the digest {sources}: {count} families trained, merged and compared, {refused} refused before training with a sentence, {not_built} that
transformers does not build tiny from these settings.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", help="TASK:FAMILY, FAMILY or TASK, separated by commas; these are repeated"
    )
    parser.add_argument("--faults", action="store_true", help="repeat what had a fault")
    parser.add_argument("--write", action="store_true", help="only write the page from the results that there are")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    known = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    if told.write:
        sys.exit(_written(known) or None)
    state = {"versions": {name: importlib.metadata.version(name) for name in _PACKAGES}, "sources": sources()}
    only = set(filter(None, told.only.split(",")))
    other = bool(known) and {name: known.get(name) for name in state} != state
    if other:
        print(f"{_RESULTS.name} is of other sources or versions: {'it is left as it is' if only else 'it begins anew'}")
    results: dict[str, dict[str, Any]] = {} if other else known.get("families", {})
    preload()
    for task, family in families():
        key, begun = f"{task}:{family}", time.perf_counter()
        if only and not only & {key, family, task}:
            continue
        if not only and key in results and not (told.faults and results[key]["fault"]):
            continue
        results[key] = _attempted(task, family)
        print(f"{key} {_summary(results[key])} ({time.perf_counter() - begun:.1f} s)", flush=True)
        if sources() != state["sources"]:
            sys.exit("the sources were changed in the meantime: what is kept is of those before. Begin again.")
        if not (only and other):
            storage.write_text(_RESULTS, storage.dump_json({**state, "families": results}))
    sys.exit(None if only and other else _written({**state, "families": results}) or None)


def _written(known: dict[str, Any]) -> str:
    """Write the page; a sentence on its faults."""
    _DOCUMENT.write_text(page(known["families"], known["versions"], known["sources"]), encoding="utf-8")
    faults = [key for key, one in known["families"].items() if one["fault"]]
    return f"faults: {', '.join(faults)}" if faults else ""


def _attempted(task: str, family: str) -> dict[str, Any]:
    """What came of one family, in a process of its own that has everything imported."""
    found = Outcome(task, family, fault="its process ended without a word")
    with tempfile.TemporaryDirectory(prefix="families_") as folder:
        worker = multiprocessing.get_context("fork").Process(target=_work, args=(task, family, Path(folder)))
        worker.start()
        worker.join(_SECONDS)
        if worker.is_alive():
            worker.kill()
            worker.join()
            found.fault = f"more than {_SECONDS} seconds"
        elif (Path(folder) / "outcome.json").exists():
            found = Outcome(**json.loads((Path(folder) / "outcome.json").read_text()))
    found.fault = found.fault and found.fault.partition("\n")[0]  # the rest names paths of this machine
    return {name: value for name, value in dataclasses.asdict(found).items() if name != "said"}


def _work(task: str, family: str, folder: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is nothing to look through for garbage
    os.environ["LORA_LAB_CACHE"] = f"{folder}/cache"
    try:
        found = attempt(task, family, folder / "family")
    except Exception as error:
        found = Outcome(task, family, fault=f"{type(error).__name__}: {error}")
    (folder / "outcome.json").write_text(json.dumps(dataclasses.asdict(found)))


def _summary(one: dict[str, Any]) -> str:
    if one["fault"]:
        return f"FAULT {one['fault'].partition(chr(10))[0][:300]}"
    if one["refused"] or one["not_built"]:
        return f"refused: {one['refused'][:200]}" if one["refused"] else f"not built: {one['not_built'][:200]}"
    return f"trained, {one['rows']}, merge {one['merged_gap']:.1e}, loss {one['own_gap']:.1e}"


def page(results: dict[str, dict[str, Any]], versions: dict[str, str], sources: str) -> str:
    """The document."""
    trained = [one for one in results.values() if one["trained"] and not one["fault"]]
    refused = [one for one in results.values() if one["refused"]]
    not_built = [one for one in results.values() if one["not_built"]]
    lines = [
        _HEAD.format(
            transformers=versions["transformers"],
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
            sources=sources, count=len(trained), refused=len(refused), not_built=len(not_built),
        )
    ]  # fmt: skip
    for task in TASKS:
        own = [one for one in trained if one["task"] == task]
        lines += [
            f"## task={task}",
            "",
            "| family | adapted | rows | accelerations | merge | loss |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {one['family']} | {one['adapted']} | {one['rows']} | {_cell(one['speed'])} | {one['merged_gap']:.1e} | {one['own_gap']:.1e} |"
            for one in own
        ]
        lines.append("")
    for title, key, part in (
        ("Refused before training", "refused", refused),
        ("Not built tiny", "not_built", not_built),
        ("Faults", "fault", [one for one in results.values() if one["fault"]]),
    ):
        if part:
            lines += [f"## {title}", "", "| task | family | reason |", "|---|---|---|"]
            lines += [f"| {one['task']} | {one['family']} | {_cell(one[key])} |" for one in part]
            lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.partition("\n")[0].replace("|", "\\|").replace("_", "\\_").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    main()
