"""`lora-lab mine`: hard negatives, found by a trained retriever."""

from __future__ import annotations

from lora_lab.errors import ConfigError
from lora_lab.run import takes
from lora_lab.verbs.base import RUN, Told, Verb, Word, run_folder

_COUNT, _MARGIN = 4, 0.05
_EXAMPLES = """\
  lora-lab mine run=DIR data=pairs.jsonl out=harder.jsonl
  lora-lab mine run=DIR data=pairs.jsonl out=harder.jsonl negatives=8 margin=0.1

The run is one of task=embedding, and the rows have query and positive. Each gets the documents of other rows that come nearest to its
query (negatives=4). Documents that are right for an equal query are left out, and those whose cosine is not margin=0.05 below that of
the row's own positive. What is written is for task=embedding again, or for task=reranker.
"""


def _run(told: Told) -> int:
    folder = run_folder(told)
    files, out = told.words["data"], told.word("out")
    if len(files) != 1 or out is None:
        raise ConfigError("mine: needs data=FILE and out=FILE.jsonl. See lora-lab mine --help")
    count, margin = told.count("negatives", _COUNT, 1, 1000), told.number("margin", _MARGIN, -2, 2)
    from lora_lab.run import mining

    mining.mine(folder, told.overrides, files[0], out, count, margin)
    return 0


VERB = Verb(
    summary="find hard negatives with a trained retriever",
    examples=_EXAMPLES,
    run=_run,
    takes=takes.MINE,
    arguments=(RUN, Word("data"), Word("out"), Word("negatives"), Word("margin")),
    output_is_all=True,
    others=("hard-negatives", "mine_hard_negatives"),
)
