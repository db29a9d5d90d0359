"""`lora-lab config`: the resolved configuration, or every key."""

from __future__ import annotations

from lora_lab.verbs.base import Option, Told, Verb

_EXAMPLES = """\
  lora-lab config recipe=demo adapter.r=4     resolved values, each with the file or override that set it
  lora-lab config --keys                      every key: type and limits, default, meaning
"""


def _run(told: Told) -> int:
    import dataclasses

    from lora_lab.config.compose import leaves
    from lora_lab.config.origins import as_override, explain, key_rows
    from lora_lab.runtime import console

    if told.options.keys:
        for key, kind, default, meaning in key_rows():
            console.setting(key, default, f"{kind}. {meaning}")
        return 0
    config, origins = explain(told.overrides, told.options.config_dir)
    values = dict(leaves(dataclasses.asdict(config)))
    for key, origin in origins.items():
        console.setting(key, as_override(values[key]), origin)
    return 0


VERB = Verb(
    summary="show the resolved configuration and where each value comes from",
    examples=_EXAMPLES,
    run=_run,
    arguments=(Option("--keys", action="store_true", help="list every key with its meaning"),),
    foreign=(),
    output_is_all=True,
    others=("show",),
)
