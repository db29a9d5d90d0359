"""`lora-lab predict`: what a trained model says of rows that have no label."""

from __future__ import annotations

from lora_lab.errors import ConfigError
from lora_lab.run import takes
from lora_lab.verbs.base import RUN, Told, Verb, Word, run_folder

_EXAMPLES = """\
  lora-lab predict run=DIR text="You won a prize, call now"
  lora-lab predict run=DIR data=mail.csv out=sorted.csv
  lora-lab predict run=DIR data=orders.jsonl        into predictions/orders.jsonl of the run's folder

Rows have the columns of the training rows; a label or an answer is not needed. Every column is kept, and predicted_... is added:
label and score, value, tags and entities, answer or reward, as the task has it (docs/python.md). out= ends in .jsonl, .csv or .parquet.
Stopped, the same command goes on where it was. Exit code 1 if rows could not be used; the column predicted_error says why.
"""


def _run(told: Told) -> int:
    folder = run_folder(told)
    texts, files = told.words["text"], told.words["data"]
    if bool(texts) == bool(files) or len(files) > 1:
        raise ConfigError("predict: needs either data=FILE or text=TEXT. See lora-lab predict --help")
    if texts:
        told.refuse("out", "it is for data=FILE; what is said of a text is printed.")
    from lora_lab.run import predictions

    if texts:
        predictions.predict_texts(folder, told.overrides, texts)
        return 0
    return 1 if predictions.predict_file(folder, told.overrides, files[0], told.word("out")) else 0


VERB = Verb(
    summary="say what the model makes of rows without labels",
    examples=_EXAMPLES,
    run=_run,
    takes=takes.PREDICT,
    arguments=(RUN, Word("data"), Word("out"), Word("text", each=True)),
    output_is_all=True,
    exit_1="found rows that cannot be used",
    others=("classify", "apply", "score"),
)
