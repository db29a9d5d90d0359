"""`lora-lab plan`: estimate layers, steps, memory, disk and time."""

from __future__ import annotations

from lora_lab.errors import ConfigError
from lora_lab.verbs.base import Told, Verb, Word, before_libraries

_EXAMPLES = """\
  lora-lab plan recipe=demo                             modules, steps, memory, disk: nothing is loaded
  lora-lab plan recipe=demo train.batch_size=32 quant=none
  lora-lab plan recipe=demo probe=true                  also loads the model, trains six steps, and says how long it takes
"""


def _run(told: Told) -> int:
    probe = told.word("probe")
    if probe not in (None, "true", "false"):
        raise ConfigError(f"probe={probe}: must be true or false.")
    from lora_lab.config import compose

    config = compose.compose(told.overrides, told.options.config_dir)
    before_libraries()
    from lora_lab.plan import plan

    plan.plan(config, probe=probe == "true")
    return 0


VERB = Verb(
    summary="estimate layers, steps, memory, disk and time",
    examples=_EXAMPLES,
    run=_run,
    arguments=(Word("probe"),),
    output_is_all=True,
    others=("estimate",),
)
