"""`lora-lab init`: a recipe for a data file."""

from __future__ import annotations

from lora_lab.errors import ConfigError
from lora_lab.verbs.base import Told, Verb, Word, before_libraries

_EXAMPLES = """\
  lora-lab init reviews.csv                         mine/recipe/reviews.yaml, ready to train
  lora-lab init chats.jsonl out=work/recipe/chats.yaml

The columns, the labels, the language and the lengths of the rows decide on task, base, split, epochs and limits; the file says why. What is
said more stands in the recipe as well, such as task=regression, model=gemma3_270m or optim.lr=1e-4. The rows are read with the base
before the recipe is written, so that it trains as it is: lora-lab train --config-dir mine recipe=reviews
"""


def _run(told: Told) -> int:
    for text in told.overrides:
        if text.partition("=")[0] in ("recipe", "data.train", "data"):
            raise ConfigError(f"{text}: a recipe is written of a file. Write lora-lab init FILE")
    file = told.word("file")
    if not file:
        raise ConfigError("init: needs a data file. Write lora-lab init FILE, such as lora-lab init reviews.csv")
    from lora_lab.data import sources

    if not file.startswith(sources.HUB):
        sources.find("data.train", file)  # a wrong name is told at once
    before_libraries()
    from lora_lab.plan import recipe

    recipe.init(file, told.word("out"), told.overrides)
    return 0


VERB = Verb(
    summary="write a recipe for a data file",
    examples=_EXAMPLES,
    run=_run,
    arguments=(Word("file"), Word("out")),
    bare="file",
    filters=True,
    output_is_all=True,
    others=("new", "create", "start", "recipe"),
)
