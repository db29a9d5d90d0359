"""Results that are asked for until they are there: each request that takes long is answered with a number, and its result by long polls."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from lora_lab.serve.wishes import RequestError

HOLD = 25.0  # seconds of a poll; the SDK gives one up after 45
_MOST, _MOST_BYTES = 4096, 2**28  # results that are kept for whoever asks again
_LOOKS = 0.5  # seconds between two looks whether the server stops


@dataclasses.dataclass(eq=False)
class Promise:
    """A result that is there, or will be."""

    request_id: str
    owner: str  # the key's name
    outcome: Future[bytes | dict[str, Any] | RequestError] = dataclasses.field(default_factory=Future)
    cancel: Callable[[], None] | None = None
    told: dict[str, Any] = dataclasses.field(default_factory=dict)  # what is answered at once

    def set(self, found: bytes | dict[str, Any] | RequestError) -> None:
        """Fulfil it, unless it is fulfilled."""
        if not self.outcome.done():
            self.outcome.set_result(found)

    @property
    def size(self) -> int:
        """Bytes of a result that is there."""
        found = self.outcome.result() if self.outcome.done() else None
        return len(found) if isinstance(found, bytes) else 0


class Promises:
    """All that are open, and the last that were kept. Used by the loop's thread alone."""

    def __init__(self) -> None:
        self._known: collections.OrderedDict[str, Promise] = collections.OrderedDict()
        self._by_number: collections.OrderedDict[tuple[Any, ...], Promise] = collections.OrderedDict()

    def once(self, kind: str, owner: str, number: tuple[Any, ...], begin: Callable[[Promise], None]) -> Promise:
        """The promise for a request; one that is repeated has the first one's.

        Args:
            kind: train or sample.
            number: what a repeated request has in common with the first.
            begin: called for a new one; what it raises refuses the request.
        """
        key = (owner, kind, *number)
        found = self._by_number.get(key)
        if found is None:
            found = Promise(f"{kind}-{secrets.token_hex(12)}", owner)
            begin(found)
            self._known[found.request_id] = self._by_number[key] = found
            self._drop()
        return found

    def get(self, request_id: str, owner: str) -> Promise:
        """
        Raises:
            RequestError: nobody knows it (any more). The SDK asks again for samples where it is told 410.
        """
        found = self._known.get(request_id)
        if found is None or found.owner != owner:
            status = 410 if request_id.startswith("sample-") else 404
            raise RequestError(
                status, f"request_id={request_id[:64]!r}: not known here. The server may have been restarted."
            )
        return found

    async def wait(self, promise: Promise, stopping: Callable[[], bool], seconds: float = HOLD) -> bool:
        """Wait until it is fulfilled, for so long; whether it is.

        Raises:
            RequestError: the server stops.
        """
        left = seconds
        while not promise.outcome.done() and left > 0:
            if stopping():
                raise RequestError(503, "The server is stopping.", "server_error")
            await asyncio.wait([asyncio.wrap_future(promise.outcome)], timeout=min(_LOOKS, left))
            left -= _LOOKS
        return promise.outcome.done()

    def _drop(self) -> None:
        """Let the oldest results go beyond what is kept."""
        done = [one for one in self._known.values() if one.outcome.done()]
        size = sum(one.size for one in done)
        for one in done[: max(0, len(done) - _MOST)]:
            size -= one.size
            del self._known[one.request_id]
        for one in [one for one in done if one.request_id in self._known][:-1]:
            if size <= _MOST_BYTES:
                break
            size -= one.size
            del self._known[one.request_id]
        for key in [key for key, one in self._by_number.items() if one.request_id not in self._known][:-_MOST]:
            del self._by_number[key]
