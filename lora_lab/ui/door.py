"""Who is let in: the browser that opened the link of the terminal, on this machine, to look, and to say something on one page.

The link's token counts once; the browser then has a cookie. A link that was used is followed by a new one, in the terminal alone.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response

from lora_lab.serve import hosts

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENTER = "/enter"
SAID = ("/chat",)  # where something is said, by POST; everywhere else pages are only looked at
_BITS = 256
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # without any, browsers do not say either which page a form is of
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Door:
    """An ASGI application around the pages."""

    def __init__(self, app: ASGIApp, refused: Callable[[int, str], Response], used: Callable[[str], None]):
        """
        Args:
            refused: a page for a status and a sentence.
            used: called with the next token when one was used.
        """
        self._app, self._refused, self._used = app, refused, used
        self.token = secrets.token_urlsafe(_BITS // 8)
        self._name = f"lora_lab_{secrets.token_hex(4)}"  # cookies know no ports, and several may listen
        self._secret = secrets.token_urlsafe(_BITS // 8)
        # in every form: a page of another program on this machine, which browsers send the cookie from, does not know it
        self.form = secrets.token_urlsafe(_BITS // 8)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        app = self._answer(scope) or self._app

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await app(scope, receive, sending)

    def _answer(self, scope: Scope) -> Response | None:
        """What stands against the request, or lets a browser in; None: it may look."""
        headers = Headers(scope=scope)
        if not hosts.is_local(headers.get("host", "")):
            return self._refused(403, "This page is for its own machine. Open it as localhost or 127.0.0.1.")
        said = scope["method"] == "POST" and scope["path"] in SAID
        if scope["method"] not in ("GET", "HEAD") and not said:
            return self._refused(405, "Pages are only looked at here.")
        if said and urlsplit(headers.get("origin", "")).netloc != headers.get("host", ""):
            return self._refused(403, "This was said by another page. Open the chat here.")
        if scope["path"] == ENTER and scope["method"] == "GET":
            return self._entered(QueryParams(scope["query_string"]).get("token", ""))
        cookie = cookie_parser(headers.get("cookie", "")).get(self._name, "")
        if not hmac.compare_digest(cookie.encode(), self._secret.encode()):
            return self._refused(401, "Open the link that lora-lab ui shows in the terminal.")
        return None

    def _entered(self, token: str) -> Response:
        if not hmac.compare_digest(token.encode(), self.token.encode()):
            return self._refused(
                403, "This link was used already, or is an older one. The terminal shows the one that counts."
            )
        self.token = secrets.token_urlsafe(_BITS // 8)
        self._used(self.token)
        answer = RedirectResponse("/", 303)
        # Lax, because a link that is clicked in a terminal of another page would otherwise arrive without it; a form needs `form` too
        answer.set_cookie(self._name, self._secret, httponly=True, samesite="lax")
        return answer
