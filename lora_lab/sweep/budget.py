"""What a sweep may spend: optimizer steps, tokens or minutes, of all its runs together."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_lab.train.cohort import Member


@dataclasses.dataclass
class Budget:
    """An amount of something; what members had spent before they were interrupted counts, time does not."""

    amount: float
    unit: str
    began: float = dataclasses.field(default_factory=time.monotonic)

    @classmethod
    def of(cls, text: str | None) -> Budget:
        """Of '2000steps', '1000000tokens' or '30minutes'; None is without end."""
        if text is None:
            return cls(float("inf"), "steps")
        number, unit = re.fullmatch(r"(\d+)(\w+)", text).groups()
        return cls(float(number), unit)

    def used_up(self, members: Sequence[Member]) -> bool:
        """Whether it is spent."""
        spent = {
            "steps": lambda: sum(member.state.step for member in members),
            "tokens": lambda: sum(member.state.tokens for member in members),
            "minutes": lambda: (time.monotonic() - self.began) / 60,
        }
        return spent[self.unit]() >= self.amount
