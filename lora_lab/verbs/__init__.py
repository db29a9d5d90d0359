"""What `lora-lab` can do, a file for each verb. A new one is a file here and a line in `VERBS`. Imports nothing heavy."""

from __future__ import annotations

from lora_lab.verbs import (
    chat,
    config,
    data,
    doctor,
    evaluate,
    export,
    init,
    inspect,
    label,
    merge,
    methods,
    mine,
    plan,
    predict,
    resume,
    runs,
    serve,
    shrink,
    train,
    trim,
    ui,
)
from lora_lab.verbs.base import Verb

VERBS: dict[str, Verb] = {  # in the order of --help
    "init": init.VERB,
    "train": train.VERB,
    "data": data.VERB,
    "plan": plan.VERB,
    "resume": resume.VERB,
    "evaluate": evaluate.VERB,
    "predict": predict.VERB,
    "inspect": inspect.VERB,
    "label": label.VERB,
    "mine": mine.VERB,
    "merge": merge.VERB,
    "shrink": shrink.VERB,
    "export": export.VERB,
    "trim": trim.VERB,
    "chat": chat.VERB,
    "serve": serve.VERB,
    "runs": runs.VERB,
    "ui": ui.VERB,
    "methods": methods.VERB,
    "doctor": doctor.VERB,
    "config": config.VERB,
}
