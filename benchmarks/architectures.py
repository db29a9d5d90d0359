"""Train, merge and compare every family that transformers lists: python -m benchmarks.architectures [--only TASK:FAMILY,...] [--faults]

Each family is built tiny with random weights (tests/families.py), trained three steps in float32, merged, and its loss compared with
what plain transformers compute of the merged checkpoint. Results are kept in benchmarks/results/architectures.json as they come, and
docs/architectures.md is written from them; families that the file already holds, of the same versions, are not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from lora_lab import storage
from tests.families import TASKS, Outcome, attempt, families

_ROOT = Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks" / "results" / "architectures.json"
_DOCUMENT = _ROOT / "docs" / "architectures.md"
_PACKAGES = ("torch", "transformers", "peft")
_SECONDS = 180  # for one family
_HEAD = """# Architectures

Every family that transformers {transformers} lists for four tasks, built tiny with random weights, trained three steps in float32 with
the default adapter and accelerations, merged, and reloaded by plain transformers. `make architectures` makes this page anew.

- **rows**: *packed*: several rows lie end to end in one forward pass, which was proved to change nothing; *one by one*: this model lets
  packed rows see each other, so each has a pass of its own; *padded*: the task fills rows up.
- **accelerations**: what was used of docs/speed.md, and what was left out and why; each was tried on the model before training.
- **merge**: the largest difference of a logit between the model as trained and the merged checkpoint in plain transformers.
- **loss**: the relative difference between the held-out loss that lora_lab reports and the one that plain transformers compute of the
  merged checkpoint, one text at a time.

Made with {versions}: {count} families trained, merged and compared, {refused} refused before training with a sentence, {not_built} that
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
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    known = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    results: dict[str, dict[str, Any]] = known.get("families", {}) if known.get("versions") == versions else {}
    only = set(filter(None, told.only.split(",")))
    for task, family in families() if not told.write else ():
        key = f"{task}:{family}"
        if only and not only & {key, family, task}:
            continue
        if not only and key in results and not (told.faults and results[key]["fault"]):
            continue
        results[key] = _attempted(task, family)
        storage.write_text(_RESULTS, storage.dump_json({"versions": versions, "families": results}))
        print(key, _summary(results[key]), flush=True)
    _DOCUMENT.write_text(page(results, versions), encoding="utf-8")
    faults = [key for key, one in results.items() if one["fault"]]
    if faults:
        sys.exit(f"faults: {', '.join(faults)}")


def _attempted(task: str, family: str) -> dict[str, Any]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {_SECONDS} seconds")

    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory(prefix="families_") as folder:
        os.environ["LORA_LAB_CACHE"] = f"{folder}/cache"
        signal.alarm(_SECONDS)
        try:
            found = attempt(task, family, Path(folder) / "family")
        except Exception as error:
            found = Outcome(task, family, fault=f"{type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
    found.fault = found.fault and found.fault.partition("\n")[0]  # the rest names paths of this machine
    return {name: value for name, value in dataclasses.asdict(found).items() if name != "said"}


def _summary(one: dict[str, Any]) -> str:
    if one["fault"]:
        return f"FAULT {one['fault'].partition(chr(10))[0][:300]}"
    if one["refused"] or one["not_built"]:
        return f"refused: {one['refused'][:200]}" if one["refused"] else f"not built: {one['not_built'][:200]}"
    return f"trained, {one['rows']}, merge {one['merged_gap']:.1e}, loss {one['own_gap']:.1e}"


def page(results: dict[str, dict[str, Any]], versions: dict[str, str]) -> str:
    """The document."""
    trained = [one for one in results.values() if one["trained"] and not one["fault"]]
    refused = [one for one in results.values() if one["refused"]]
    not_built = [one for one in results.values() if one["not_built"]]
    lines = [
        _HEAD.format(
            transformers=versions["transformers"],
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
            count=len(trained), refused=len(refused), not_built=len(not_built),
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
