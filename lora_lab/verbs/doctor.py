"""`lora-lab doctor`: whether this machine has what runs need."""

from __future__ import annotations

from lora_lab.errors import ConfigError
from lora_lab.verbs.base import Option, Told, Verb, before_libraries

_EXAMPLES = """\
  lora-lab doctor             versions, devices, memory, disk, hub, bases, extras: a line each, with the remedy
  lora-lab doctor --json      the same for other programs

Exit code 1 if there is a problem; a note is something that some work without. The hub is asked once, for 3 seconds at most; with
HF_HUB_OFFLINE=1 not at all.
"""


def _run(told: Told) -> int:
    if told.overrides:
        raise ConfigError(
            f"{told.overrides[0]}: no effect here. lora-lab doctor looks at the machine; lora-lab plan at a run."
        )
    before_libraries()
    import dataclasses
    import json

    from lora_lab.plan import doctor
    from lora_lab.runtime import console

    lines = doctor.examine()
    if told.options.json:
        console.stream(json.dumps([dataclasses.asdict(line) for line in lines], ensure_ascii=False, indent=1), "\n")
    else:
        doctor.show(lines)
    return 1 if any(line.state == "problem" for line in lines) else 0


VERB = Verb(
    summary="check this machine, and say what would mend it",
    examples=_EXAMPLES,
    run=_run,
    arguments=(Option("--json", action="store_true", help="print a list of objects"),),
    filters=True,
    output_is_all=True,
    exit_1="found a problem",
    others=("check", "info", "env", "version"),
)
