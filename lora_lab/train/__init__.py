"""The one training loop, its members, and everything that makes it exact and resumable.

The room has the name of the function `lora_lab.train(config)`, so it can be called.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_lab.api import Run
    from lora_lab.config.run import RunConfig


class _Room(types.ModuleType):
    """Whoever imports a file of this room makes it `lora_lab.train`: the function must be found there all the same."""

    def __call__(self, config: RunConfig) -> Run:
        """See `lora_lab.api.train`."""
        from lora_lab.api import train

        return train(config)


sys.modules[__name__].__class__ = _Room
