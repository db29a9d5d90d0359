"""What a sweep may spend: optimizer steps, tokens or minutes, of all its runs together."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_lab.training.cohort import Member


@dataclasses.dataclass
class Budget:
    """An amount of something; what members had spent before they were interrupted counts, time does not."""

    amount: float
    unit: str
    began: float = dataclasses.field(default_factory=time.monotonic)
    members: list[Member] = dataclasses.field(default_factory=list)  # that spend it now
    before: dict[str, int] = dataclasses.field(default_factory=lambda: {"steps": 0, "tokens": 0})  # of earlier members

    @classmethod
    def of(cls, text: str | None) -> Budget:
        """Of '2000steps', '1000000tokens' or '30minutes'; None is without end."""
        if text is None:
            return cls(float("inf"), "steps")
        parts = re.fullmatch(r"(\d+)(\w+)", text)
        assert parts is not None, text  # the schema has looked at it
        number, unit = parts.groups()
        return cls(float(number), unit)

    def spent(self) -> dict[str, float]:
        """So far, in each unit."""
        return {
            "steps": self.before["steps"] + sum(member.state.step for member in self.members),
            "tokens": self.before["tokens"] + sum(member.state.tokens for member in self.members),
            "minutes": (time.monotonic() - self.began) / 60,
        }

    def used_up(self) -> bool:
        """Whether it is spent."""
        return self.spent()[self.unit] >= self.amount

    def settle(self) -> None:
        """Forget the members, which hold their model, but not what they spent."""
        spent = self.spent()
        self.before, self.members = {unit: int(spent[unit]) for unit in self.before}, []
