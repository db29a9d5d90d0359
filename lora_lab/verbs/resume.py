"""`lora-lab resume`: resume an interrupted run, or a sweep."""

from __future__ import annotations

from lora_lab.errors import ConfigError
from lora_lab.run import takes
from lora_lab.verbs.base import RUN, Told, Verb, Word, before_libraries, run_folder

_EXAMPLES = """\
  lora-lab resume run=runs/demo/2026-01-31_12-00-00
  lora-lab resume sweep=runs/demo/sweep_2026-01-31_12-00-00

Resumes from the newest valid checkpoint; the result is bit-identical to an uninterrupted run. The run's own
configuration holds; base and data must be unchanged.
"""


def _run(told: Told) -> int:
    folder = told.word("sweep")
    if folder is not None:
        return _sweep(told, folder)
    folder = run_folder(told)
    from lora_lab.run import parallel, pipeline, trained

    _, config = trained.open_trained(folder, takes.RESUME, told.overrides)
    code = parallel.elsewhere(config.hardware, lambda: ["resume", f"run={folder}", *told.overrides])
    if code is None:
        pipeline.resume(folder, told.overrides)
    return code or 0


def _sweep(told: Told, folder: str) -> int:
    told.refuse("run", "sweep names the runs already. Drop one of them.")
    if told.overrides:
        raise ConfigError(
            f"{told.overrides[0]}: resume takes no overrides, because it would not be the same sweep any more."
        )
    before_libraries()
    from lora_lab.sweep import sweep

    members = told.word("members")
    command = ["resume", f"sweep={folder}", *([] if members is None else [f"members={members}"])]
    return sweep.resume(folder, None if members is None else members.split(","), command)


VERB = Verb(
    summary="resume an interrupted run",
    examples=_EXAMPLES,
    run=_run,
    takes=takes.RESUME,
    together=True,
    arguments=(RUN, Word("sweep"), Word("members", beside="sweep")),
    others=("continue",),
)
