"""`lora-lab trim`: a smaller base, of which needless tokens and layers are gone."""

from __future__ import annotations

from lora_lab.errors import ConfigError
from lora_lab.verbs.base import Told, Verb, Word, before_libraries

_EXAMPLES = """\
  lora-lab trim model=smollm2_135m task=completion trim.vocabulary=texts.txt data.train=texts.txt out=small
  lora-lab trim model=smollm2_135m task=completion data.train=texts.txt data.eval=held_out.txt trim.layers=4 out=small
  lora-lab trim recipe=demo trim.layers=auto trim.max_loss_increase=0.2 out=small

Tokens that the texts of trim.vocabulary do not use go, with their rows of the embedding. Every text whose tokens stay becomes the same
tokens, and the base says the same of it; both are proved before the folder appears. Layers go one after another, each time the one whose
loss on rows of data.train is least (of trim.vocabulary, if nothing is said of data). What is lost is measured on held-out rows in bits
per byte. The folder is a base as any other; trim_report.json in it says all.
"""
_NOT_TOLD = (
    "serve", "adapter", "quant", "optim", "train", "speed", "tracker", "export", "merge", "shrink", "sweep", "name", "run_dir",
)  # fmt: skip


def _run(told: Told) -> int:
    from lora_lab.config import compose

    config, out = compose.compose(_with_rows(told.overrides), told.options.config_dir), told.word("out")
    if not out:
        raise ConfigError("trim: needs out=FOLDER, which must not exist yet. See lora-lab trim --help")
    before_libraries()
    from lora_lab.trim import trim

    trim.trim(config, out)
    return 0


def _with_rows(overrides: list[str]) -> list[str]:
    """With the texts of the vocabulary as rows, where nothing else is said of rows."""
    names = {text.partition("=")[0] for text in overrides}
    texts = [text.partition("=")[2] for text in overrides if text.startswith("trim.vocabulary=")]
    if not texts or texts[-1] == "null" or names & {"data", "data.train", "recipe"}:
        return overrides
    return [*overrides, f"data.train={texts[-1]}"]


VERB = Verb(
    summary="make a base smaller: drop tokens and layers",
    examples=_EXAMPLES,
    run=_run,
    arguments=(Word("out"),),
    foreign=_NOT_TOLD,
    others=("compress", "slim", "distill-vocabulary", "vocabulary"),
)
