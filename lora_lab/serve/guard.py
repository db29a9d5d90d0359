"""What stands before every route: a key, its scope, what it may use, and the size of the body. And what is written down of a request.

A route that is added is guarded by standing behind this; one that needs another scope than `use` is named in `SCOPE`.
"""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lora_lab.errors import LoraLabError
from lora_lab.serve import hosts, logs, tracing
from lora_lab.serve.keys import LOCAL, Account, Allowance, Key, Keys
from lora_lab.serve.wishes import RequestError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import Message, Receive, Scope, Send

    from lora_lab.serve.config import ServeConfig
    from lora_lab.serve.metrics import Metrics

OPEN = frozenset(("/healthz",))  # paths that need no key
SCOPE = {"/v1/adapters": "admin", "/api/v1/": "train"}  # by the beginning of the path
_NOTES = "lora_lab_notes"
_SDK = "tml-"  # stands before every key that the Tinker SDK sends


def note(request: Request, **facts: Any) -> None:
    """Remember something of a request for the log and the limits; numbers of the same name add up. Never a text."""
    notes = request.scope[_NOTES]
    for name, value in facts.items():
        notes[name] = notes.get(name, 0) + value if isinstance(value, int) else value


def who(request: Request) -> str:
    """The name of the key that a request came with."""
    return str(request.scope[_NOTES].get("key", ""))


class Guard:
    """An ASGI application around the routes."""

    def __init__(
        self, app: Starlette, config: ServeConfig, keys: Keys | None, metrics: Metrics, headers: dict[str, str]
    ):
        """
        Args:
            keys: None: whoever reaches it may do everything.
            headers: of every response to who may ask.
        """
        self.app, self._config, self._keys, self._metrics, self._headers = app, config, keys, metrics, headers
        self._accounts: dict[str, Account] = {}
        self._paths = {id(route.endpoint): route.path for route in app.routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        asked = _Asked(scope, receive, send)
        with tracing.span(None if asked.path in OPEN else asked.texts()) as span:
            await self._answered(asked, span)

    async def _answered(self, asked: _Asked, span: tracing.Span) -> None:
        try:
            await self._admitted(asked)
        except RequestError as error:
            await asked.refuse(error)
        except Exception as error:
            self._metrics.failures.labels(type(error).__name__).inc()
            place = traceback.extract_tb(error.__traceback__)[-1]
            asked.notes["error"] = f"{type(error).__name__} in {place.filename}:{place.lineno}"
            await asked.refuse(RequestError(500, "The server failed at this request.", "server_error"))
        finally:
            self._written(asked, span)

    async def _admitted(self, asked: _Asked) -> None:
        key = self._key(asked)
        if key is None:
            await self.app(asked.scope, asked.bounded(self._config.max_body_bytes), asked.send)
            return
        asked.notes["key"] = key.name
        asked.headers = self._headers
        try:
            self._check_scope(asked, key)
            asked.check_size(self._config.max_body_bytes)
        except RequestError:
            self._refused(asked, "scope" if asked.path.startswith(tuple(SCOPE)) else "body", key.name)
            raise
        account = self._account(key)
        reason, wait = account.refusal()
        if reason:
            self._refused(asked, reason, key.name)
            seconds = max(1, math.ceil(wait))
            raise RequestError(
                429,
                f"Too many {reason} for this key. Try again in {seconds} s.",
                "rate_limit_error",
                reason,
                headers={"retry-after": str(seconds)},
            )
        account.open += 1
        if account.requests is not None:
            account.requests.take()
        try:
            await self.app(asked.scope, asked.bounded(self._config.max_body_bytes), asked.send)
        finally:
            account.open -= 1
            if account.tokens is not None:
                account.tokens.take(asked.notes.get("prompt_tokens", 0) + asked.notes.get("answer_tokens", 0))

    def _key(self, asked: _Asked) -> Key | None:
        """Who asks; None: the path needs nobody.

        Raises:
            RequestError: no key, or a wrong one.
        """
        if self._keys is None:
            self._check_host(asked)
            return None if asked.path in OPEN else LOCAL
        if asked.path in OPEN:
            return None
        presented = asked.presented()
        key = None if presented is None else self._keys.find(presented)
        if key is None:
            self._refused(asked, "no key" if presented is None else "wrong key", "none")
            raise RequestError(
                401,
                "A key is needed: authorization: Bearer KEY, or x-api-key: KEY.",
                "authentication_error",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return key

    def _check_host(self, asked: _Asked) -> None:
        """A server without keys is for this machine."""
        if not hosts.is_local(asked.header(b"host"), self._config.host):
            raise RequestError(403, "This server is for its own machine: it is called localhost.", "permission_error")

    def _check_scope(self, asked: _Asked, key: Key) -> None:
        needed = next((scope for beginning, scope in SCOPE.items() if asked.path.startswith(beginning)), "use")
        if needed not in key.scopes:
            raise RequestError(403, f"This key is not for that: it lacks the scope '{needed}'.", "permission_error")

    def _account(self, key: Key) -> Account:
        if key.name not in self._accounts:
            config = self._config
            requests, tokens = (
                None if limit is None else Allowance(limit)
                for limit in (config.requests_per_minute, config.tokens_per_minute)
            )
            self._accounts[key.name] = Account(requests, tokens, config.concurrent_requests)
        return self._accounts[key.name]

    def _refused(self, asked: _Asked, reason: str, key: str) -> None:
        asked.notes["refused"] = reason
        self._metrics.refusals.labels(reason, key).inc()

    def _written(self, asked: _Asked, span: tracing.Span) -> None:
        """A line of the log, a span, and what is counted."""
        route = self._paths.get(id(asked.scope.get("endpoint")), "none")
        seconds = time.monotonic() - asked.began
        self._metrics.requests.labels(route, str(asked.status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if route == "/healthz":
            return
        line = {"method": asked.scope["method"], "route": route, "status": asked.status, "seconds": round(seconds, 4)}
        if self._config.replicas > 1:
            line["process"] = os.getpid()
        span.end(line | asked.notes)
        logs.say(self._metrics, "request", json.dumps(line | asked.notes))


class _Asked:
    """A request, as far as it is known before its route."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.scope, self._receive, self._send = scope, receive, send
        self.began, self.status, self.notes = time.monotonic(), 0, dict[str, Any]()
        self.headers: dict[str, str] = {}  # of every response that it may see
        scope[_NOTES] = self.notes

    @property
    def path(self) -> str:
        path: str = self.scope["path"]
        return path

    def header(self, name: bytes) -> str:
        found = next((value for key, value in self.scope["headers"] if key.lower() == name), b"")
        return str(found.decode("latin-1"))

    def texts(self) -> dict[str, str]:
        """All headers."""
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.scope["headers"]}

    def presented(self) -> str | None:
        """The key that came with it."""
        kind, _, key = self.header(b"authorization").partition(" ")
        if kind.lower() == "bearer" and key.strip():
            return key.strip()
        return self.header(b"x-api-key").strip().removeprefix(_SDK) or None

    def check_size(self, most: int) -> None:
        """
        Raises:
            RequestError: the body will be too large; nothing of it is read.
        """
        length = self.header(b"content-length")
        if length and (not length.isdecimal() or int(length) > most):
            raise _too_large(most)

    def bounded(self, most: int) -> Receive:
        """What is received, as long as it is no more than so many bytes."""
        self.check_size(most)
        seen = 0

        async def receive() -> Message:
            nonlocal seen
            message = await self._receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise _too_large(most)
            return message

        return receive

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(name.encode(), value.encode("latin-1")) for name, value in self.headers.items()]
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await self._send(message)

    async def refuse(self, error: RequestError) -> None:
        """Answer with an error, unless an answer has begun."""
        if not self.status:
            await told(error)(self.scope, self._receive, self.send)


def _too_large(most: int) -> RequestError:
    return RequestError(
        413,
        f"The body may have {most} bytes (serve.max_body_bytes).",
        code="body_too_large",
        headers={"connection": "close"},
    )


def told(error: RequestError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _refused(_: Request, error: Exception) -> Response:
    if isinstance(error, RequestError):
        return told(error)
    if isinstance(error, HTTPException):  # Starlette's own: no such route, or not by this method
        return told(RequestError(error.status_code, str(error.detail), headers=dict(error.headers or {})))
    if isinstance(error, LoraLabError):  # the thread that answers has refused what was asked
        return told(RequestError(400, str(error)))
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    return told(RequestError(500, "The server failed at this request.", "server_error"))


# what routes raise, and what is told of it
TOLD = dict.fromkeys((RequestError, LoraLabError, HTTPException, ClientDisconnect, Exception), _refused)
