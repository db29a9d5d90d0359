"""`lora-lab label`: rows to label by hand, or labels that a classifier is sure of."""

from __future__ import annotations

from typing import cast, get_args

from lora_lab.errors import ConfigError, nearest
from lora_lab.run import takes
from lora_lab.verbs.base import RUN, Told, Verb, Word, run_folder

_WAYS = ("uncertain", "diverse", "random")
_EXAMPLES = """\
  lora-lab label run=DIR pool=unlabelled.jsonl out=by_hand.jsonl count=100
  lora-lab label run=DIR pool=unlabelled.jsonl out=by_hand.jsonl choose=diverse count=100
  lora-lab label run=DIR pool=unlabelled.jsonl out=pseudo.jsonl accept=0.95 precision=0.9

The run is one of task=classification with one class for each row. choose= says which rows to label by hand: random (the default), uncertain
or diverse. No way of choosing is better than chance everywhere: docs/inspecting.md has figures. accept= writes the rows whose calibrated
probability reaches it, with the model's labels; it refuses where held-out rows do not show, with 95 % confidence, that a
share of precision=0.9 of such labels is right. What is written is for data.train=[gold.jsonl,pseudo.jsonl].
"""


def _run(told: Told) -> int:
    folder = run_folder(told)
    pools, out = told.words["pool"], told.word("out")
    if len(pools) != 1 or out is None:
        raise ConfigError("label: needs pool=FILE and out=FILE.jsonl. See lora-lab label --help")
    accepts = told.word("accept") is not None
    for name in ("choose", "count") if accepts else ("precision",):
        told.refuse(name, "no effect with accept=." if accepts else "no effect without accept=.")
    way = told.word("choose") or "random"
    if way not in _WAYS:
        raise ConfigError(f"choose={way}: must be one of {', '.join(_WAYS)}.{nearest(way, _WAYS)}")
    threshold, precision = told.number("accept", 0.95, 0, 1), told.number("precision", 0.9, 0, 1)
    count = told.count("count", 100, 1, 10_000_000)
    from lora_lab.run import labelling

    assert set(_WAYS) == set(get_args(labelling.Way))
    wish = labelling.Accept(threshold, precision) if accepts else labelling.Choose(cast("labelling.Way", way), count)
    labelling.label(folder, told.overrides, pools[0], out, wish)
    return 0


VERB = Verb(
    summary="choose rows to label, or accept sure labels",
    examples=_EXAMPLES,
    run=_run,
    takes=takes.LABEL,
    arguments=(RUN, *map(Word, ("pool", "out", "choose", "count", "accept", "precision"))),
    output_is_all=True,
    others=("annotate", "pseudo-label", "active-learning"),
)
