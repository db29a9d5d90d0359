"""Keys: who may ask, what for, and how much. A file holds names, scopes and hashes; a key itself is seen once, when it is made."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_lab.errors import ConfigError
from lora_lab.runtime import storage
from lora_lab.runtime.reading import read_json

SCOPES = ("use", "train", "admin")  # admin: adapters come and go by it; each scope stands for itself
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BEGINNING = "ll-"  # of every key, so that scanners for secrets can know one
_RANDOM_BYTES = 32  # too many to guess, so that a plain hash hides them


@dataclasses.dataclass(frozen=True)
class Key:
    """Somebody who may ask."""

    name: str
    scopes: frozenset[str]
    sha256: str = ""


LOCAL = Key("local", frozenset(SCOPES))  # who asks a server on loopback that has no keys


class Keys:
    """All keys of a file."""

    def __init__(self, known: Sequence[Key]):
        self.known = known

    @classmethod
    def read(cls, file: Path) -> Keys:
        """
        Raises:
            ConfigError: the file is missing, or not what `add` writes.
        """
        entries = read_json(file, ConfigError).get("keys")
        found = [_entry(file, one) for one in entries] if isinstance(entries, list) else []
        if not found:
            raise ConfigError(
                f"serve.keys={file}: holds no keys. Make one: lora-lab serve add_key=NAME serve.keys={file}"
            )
        return cls(found)

    def find(self, presented: str) -> Key | None:
        """The key that was presented. The time that it takes does not tell how near a wrong one is."""
        digest, found = _digest(presented), None
        for key in self.known:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def _entry(file: Path, one: Any) -> Key:
    told = one if isinstance(one, dict) else {}
    name, scopes, digest = str(told.get("name")), told.get("scopes"), str(told.get("sha256"))
    known = isinstance(scopes, list) and all(scope in SCOPES for scope in scopes)
    if not (known and _NAME.fullmatch(name) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise ConfigError(
            f"serve.keys={file}: an entry is not what lora-lab wrote. Make the file again with add_key=NAME."
        )
    return Key(name, frozenset(told["scopes"]), digest)


def add(file: Path, name: str, scopes: Sequence[str]) -> str:
    """Add a key to a file, which is made if it is not there; a key of this name is replaced. The key, which nobody can read again.

    Raises:
        ConfigError: a name or scope that there is not, or a file of something else.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"add_key={name}: at most 64 letters, digits, dots, lines and underscores name a key.")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise ConfigError(f"scopes={','.join(scopes)}: must be of {', '.join(SCOPES)}.")
    before = Keys.read(file).known if file.exists() else []
    text = _BEGINNING + secrets.token_urlsafe(_RANDOM_BYTES)
    known = [one for one in before if one.name != name] + [Key(name, frozenset(scopes), _digest(text))]
    entries = [{"name": one.name, "scopes": sorted(one.scopes), "sha256": one.sha256} for one in known]
    storage.write_text(file, storage.dump_json({"keys": entries}))
    file.chmod(0o600)
    return text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Allowance:
    """So much in a minute, of which what is not used is kept for a minute."""

    def __init__(self, per_minute: float, now: Callable[[], float] = time.monotonic):
        self.per_minute, self._now = per_minute, now
        self._left, self._seen = float(per_minute), now()

    def _refill(self) -> None:
        now = self._now()
        self._left = min(self.per_minute, self._left + (now - self._seen) * self.per_minute / 60)
        self._seen = now

    def wait(self, amount: float = 1) -> float:
        """Seconds until so much is there; 0: it is. What is asked for beyond a whole minute's waits for that."""
        self._refill()
        lacking = min(amount, self.per_minute) - self._left
        return max(0.0, lacking * 60 / self.per_minute)

    def take(self, amount: float = 1) -> None:
        """It may become less than nothing: what an answer takes is known at its end."""
        self._refill()
        self._left -= amount


@dataclasses.dataclass
class Account:
    """What one key has used."""

    requests: Allowance | None
    tokens: Allowance | None
    most_open: int | None
    open: int = 0

    def refusal(self) -> tuple[str, float]:
        """Why its next request is refused, and after how many seconds it may be tried again; ('', 0): it is not."""
        if self.most_open is not None and self.open >= self.most_open:
            return "concurrency", 1.0
        if self.requests is not None and (wait := self.requests.wait()):
            return "requests", wait
        if self.tokens is not None and (wait := self.tokens.wait()):
            return "tokens", wait
        return "", 0.0
