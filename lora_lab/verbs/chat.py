"""`lora-lab chat`: talk to a trained model."""

from __future__ import annotations

from lora_lab.run import takes
from lora_lab.verbs.base import RUN, Told, Verb, Word, run_folder

_EXAMPLES = """\
  lora-lab chat run=DIR
  lora-lab chat run=DIR prompt="Extract the order as JSON with the keys customer, city, item, quantity, reference.

  Order R-2041 for Graz: two oak tables. Name on the invoice is Maria Keller."

The prompt is rendered by the chat template that the model was trained with; data.train shows how prompts were worded.
"""


def _run(told: Told) -> int:
    folder = run_folder(told)
    from lora_lab.run import chat

    chat.chat(folder, told.overrides, told.words["prompt"])
    return 0


VERB = Verb(
    summary="talk to a trained model",
    examples=_EXAMPLES,
    run=_run,
    takes=takes.CHAT,
    arguments=(RUN, Word("prompt", each=True)),
    output_is_all=True,
    others=("infer", "generate", "inference"),
)
