"""lora_lab: fine-tune a frozen, quantized base model with small adapters, and merge them back with proof.

From Python (docs/python.md):

    import lora_lab

    config = lora_lab.load_config("recipe=demo", "train.max_steps=20")
    run = lora_lab.train(config)
    run.result["tuned"]["loss"]
    run.generate(["Order R-2041 for Graz: two oak tables. Name on the invoice is Maria Keller."])
    run.merge()

These names are loaded when they are first used: `import lora_lab` loads neither torch nor Hydra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lab.api import Run, load_config, open_run, train
    from lora_lab.config.run import RunConfig
    from lora_lab.errors import LoraLabError

__version__ = "0.1.0"
__all__ = ["LoraLabError", "Run", "RunConfig", "load_config", "open_run", "train"]
_HOMES = {
    "LoraLabError": "lora_lab.errors",
    "Run": "lora_lab.api",
    "RunConfig": "lora_lab.config.run",
    "load_config": "lora_lab.api",
    "open_run": "lora_lab.api",
    "train": "lora_lab.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
