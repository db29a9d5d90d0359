"""`lora-lab methods`: the adapter methods, and what each can do."""

from __future__ import annotations

from lora_lab.errors import ConfigError
from lora_lab.verbs.base import Told, Verb, Word, before_libraries

_EXAMPLES = """\
  lora-lab methods                            every method: bases it trains on, merge, exports, sweeps
  lora-lab methods adapter=hira               one of them: its paper, its settings, what stands against it
"""


def _run(told: Told) -> int:
    if told.overrides:
        raise ConfigError(
            f"{told.overrides[0]}: no effect here. Say at most adapter=NAME, such as lora-lab methods adapter=vera."
        )
    before_libraries()
    from lora_lab.plan import methods

    name = told.word("adapter")
    if name is None:
        methods.show()
    else:
        methods.show_one(name)
    return 0


VERB = Verb(
    summary="list the adapter methods and what each can do",
    examples=_EXAMPLES,
    run=_run,
    arguments=(Word("adapter"),),
    output_is_all=True,
    others=("adapters", "peft"),
)
