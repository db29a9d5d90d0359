"""How a section of the configuration is declared: a frozen, strict pydantic dataclass.

Strict: an unknown key, a wrong type (also "3" for 3, or true for 1) or a value out of range is an error.
"""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

section = dataclass(config=ConfigDict(extra="forbid", strict=True), frozen=True, kw_only=True)
