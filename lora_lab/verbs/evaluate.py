"""`lora-lab evaluate`: measure base and adapter on held-out rows."""

from __future__ import annotations

from lora_lab.run import takes
from lora_lab.verbs.base import RUN, Told, Verb, run_folder

_EXAMPLES = """\
  lora-lab evaluate run=DIR
  lora-lab evaluate run=DIR data.eval=other.jsonl task.generate_rows=100
  lora-lab evaluate run=DIR 'evaluate.suite=[hellaswag]' evaluate.limit=200   tasks of lm-eval (evaluate.tasks_dir: your own), of base and adapter
"""


def _run(told: Told) -> int:
    folder = run_folder(told)
    from lora_lab.run import pipeline

    pipeline.evaluate(folder, told.overrides)
    return 0


VERB = Verb(
    summary="measure base and adapter on held-out rows",
    examples=_EXAMPLES,
    run=_run,
    takes=takes.EVALUATE,
    arguments=(RUN,),
    others=("eval", "test"),
)
