"""`lora-lab inspect`: why a trained model says what it says."""

from __future__ import annotations

from lora_lab.errors import ConfigError
from lora_lab.run import takes
from lora_lab.verbs.base import RUN, Told, Verb, Word, run_folder

_EXAMPLES = """\
  lora-lab inspect run=DIR                                  the 4 held-out rows with the highest loss
  lora-lab inspect run=DIR row=17 row=23                    these, by their numbers in the file
  lora-lab inspect run=DIR text="You won a prize, call now"
  lora-lab inspect run=DIR data.eval=other.jsonl rows=10 among=3000

For each row: what each token contributes, for the base and the tuned model (integrated gradients, and gradient x input, with the error
of the sum), and which training rows taught this (among=1000 of them are looked through; 0: none). For the adapter: how large its
update of each layer is, of which effective rank, and how far the held-out loss rises without it. Into inspect.json and inspect.html
of the run's folder. docs/inspecting.md says what can be read from it, and what not.
"""


def _run(told: Told) -> int:
    folder = run_folder(told)
    rows, texts = told.words["row"], told.words["text"]
    if rows or texts:
        told.refuse("rows", "row= or text= say which rows already.")
    if not all(texts):
        raise ConfigError("text=: is empty, so there is nothing to explain.")
    count, among = told.count("rows", 4, 1, 100), told.count("among", 1000, 0, 5000)
    from lora_lab.run import inspection

    inspection.inspect(folder, told.overrides, inspection.Asked(rows, texts, count, among))
    return 0


VERB = Verb(
    summary="explain rows, layers, and which training rows taught it",
    examples=_EXAMPLES,
    run=_run,
    takes=takes.INSPECT,
    arguments=(RUN, Word("row", each=True), Word("rows"), Word("text", each=True), Word("among")),
    output_is_all=True,
    others=("explain", "interpret", "attribute"),
)
