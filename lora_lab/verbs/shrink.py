"""`lora-lab shrink`: lower the rank of a trained adapter with equivalent loss."""

from __future__ import annotations

from lora_lab.run import takes
from lora_lab.verbs.base import RUN, Told, Verb, run_folder

_EXAMPLES = """\
  lora-lab shrink run=DIR                                  ranks 1, 2, 4, ... below the adapter's, each measured
  lora-lab shrink run=DIR 'shrink.ranks=[8,4]' shrink.tolerance=0.02 run_dir=OUT

The lowest rank whose held-out loss rises by no more than shrink.tolerance, with 95 % confidence, is saved as a run
folder (DIR/shrunk), which can be evaluated, merged and exported like any other.
"""


def _run(told: Told) -> int:
    folder = run_folder(told)
    from lora_lab.merge import shrink

    shrink.shrink(folder, told.overrides)
    return 0


VERB = Verb(
    summary="lower the rank of a trained adapter with equivalent loss",
    examples=_EXAMPLES,
    run=_run,
    takes=takes.SHRINK,
    arguments=(RUN,),
    others=("prune",),
)
