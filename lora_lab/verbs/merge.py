"""`lora-lab merge`: one run, the run that a sweep recommends, or several runs as one adapter."""

from __future__ import annotations

import os

from lora_lab.errors import ConfigError
from lora_lab.run import takes
from lora_lab.verbs.base import RUN, Told, Verb, Word, before_libraries, run_folder

_EXAMPLES = """\
  lora-lab merge run=DIR
  lora-lab merge run=DIR export.dtype=float32
  lora-lab merge sweep=DIR                                the recommended run; or member=3
  lora-lab merge 'merge.adapters=[A,B,C]'                   one adapter of several, in a run folder of its own, and that merged
  lora-lab merge 'merge.adapters=[A,B]' 'merge.weights=[0.7,0.3]' merge.method=ties run_dir=DIR

Adds the adapter to the base, saves DIR/merged, loads that in a fresh process with plain transformers, compares it with the
trained model on held-out rows, and keeps it only if it agrees (limits: the merge section). After training on a quantized
base, the better of two targets is chosen by measurement (merge.base).
"""


def _run(told: Told) -> int:
    folder, adapters = told.word("sweep"), told.word("merge.adapters")
    if folder is not None:
        return _of_sweep(told, folder)
    if adapters is not None:
        return _combine(told, adapters)
    folder = run_folder(told)
    from lora_lab.run import pipeline

    pipeline.merge(folder, told.overrides)
    return 0


def _of_sweep(told: Told, folder: str) -> int:
    for word in ("run", "merge.adapters"):
        told.refuse(word, "sweep names the run already. Drop one of them.")
    before_libraries()
    from lora_lab.sweep import sweep

    sweep.merge(folder, told.overrides, told.word("member"))
    return 0


def _combine(told: Told, adapters: str) -> int:
    from lora_lab.config.compose import parse_override

    text = f"merge.adapters={adapters}"
    named = _named(text, parse_override(text).value())
    told.refuse("run", "merge.adapters names the runs already. Drop it; run_dir=DIR is where the new run goes.")
    before_libraries()
    from lora_lab.run import pipeline

    pipeline.combine(named, [*told.overrides, text])
    return 0


def _named(text: str, value: object) -> list[str]:
    """The run folders of `merge.adapters`.

    Raises:
        ConfigError: no list of two or more different folders that are there.
    """
    if not isinstance(value, list):
        folders = text.partition("=")[2].strip("[] ").split(",")
        if len(folders) > 1:  # a path holds a bracket, a quote or the like
            line = ",".join(f'"{folder.strip()}"' for folder in folders)
            raise ConfigError(
                f"{text}: not a list that can be read. Put each path in quotes, and the whole: 'merge.adapters=[{line}]'"
            )
        raise ConfigError(f"{text}: name two or more run folders in a list: 'merge.adapters=[runs/a,runs/b]'")
    named = [str(name) for name in value]
    if len(named) < 2:
        raise ConfigError(f"{text}: this is one; name two or more run folders: 'merge.adapters=[runs/a,runs/b]'")
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{text}: {twice} is named twice. Name two or more different run folders.")
    missing = [name for name in named if not os.path.isdir(os.path.expanduser(name))]
    if missing:
        raise ConfigError(f"{text}: {missing[0]}: no run there (looked from {os.getcwd()}). Name run folders.")
    return named


VERB = Verb(
    summary="merge one adapter or several into the base, and verify the result",
    examples=_EXAMPLES,
    run=_run,
    takes=takes.MERGE,
    arguments=(RUN, Word("sweep"), Word("member", beside="sweep"), Word("merge.adapters")),
    others=("fuse", "merge-lora"),
)
