"""`lora-lab runs`: the runs that are there, and how two of them differ."""

from __future__ import annotations

import os

from lora_lab.errors import ConfigError, RunError
from lora_lab.verbs.base import Option, Told, Verb, Word

FOLDER = "runs"  # where recipes put them

_EXAMPLES = """\
  lora-lab runs                                     every run below runs/: how far it is, what it reached
  lora-lab runs my/runs task=classification sort=accuracy
  lora-lab runs adapter=lora optim.lr=1e-3          those with these values
  lora-lab runs compare=runs/a,runs/b               in what two runs differ, and what each reached
  lora-lab runs --json                              the same for other programs
"""


def _run(told: Told) -> int:
    folder, pair = told.word("in") or FOLDER, told.word("compare")
    if pair is None and not os.path.isdir(folder):
        raise RunError(f"{folder}: no folder. Name one that holds runs: lora-lab runs FOLDER")
    from lora_lab.report import runs
    from lora_lab.runtime import console

    if pair is not None:
        folders = pair.split(",")
        if len(folders) != 2:
            raise ConfigError(f"compare={pair}: two runs are compared. Write compare=DIR,DIR")
        runs.show_difference(*(runs.open_one(folder) for folder in folders))
        return 0
    found, unread = runs.find(folder, told.overrides)
    if (metric := told.word("sort")) is not None:
        found = runs.ranked(found, metric)
    if told.options.json:
        console.stream(runs.as_json(found), "\n")
        return 0
    for sentence in unread:
        console.say("unread", sentence)
    runs.show(found, folder, metric)
    return 0


VERB = Verb(
    summary="list runs, and compare them",
    examples=_EXAMPLES,
    run=_run,
    arguments=(
        Word("in"),
        Word("sort"),
        Word("compare"),
        Option("--json", action="store_true", help="print a list of objects"),
    ),
    filters=True,
    bare="in",
    output_is_all=True,
    others=("ls", "list", "history", "compare", "diff"),
)
