"""The pages: each is a GET, and reads what it shows from the folder when it is asked. One takes what is said to models, by POST."""

from __future__ import annotations

import functools
import hmac
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from lora_lab.errors import LoraLabError
from lora_lab.report import pages
from lora_lab.runtime import console
from lora_lab.ui import views
from lora_lab.ui.door import ENTER, Door
from lora_lab.ui.folder import Folder, Missing
from lora_lab.ui.talk import Talk, Turn, turns_of

# A page that a verb wrote may have come with a received folder: it runs nothing, loads nothing, and belongs to no origin
_FOREIGN = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"}
_FORM_BYTES = 2**20

View = Callable[["Pages", Request], Response]


class Pages:
    """The routes."""

    def __init__(self, folder: Folder, talk: Talk):
        self._folder, self._talk = folder, talk
        self.form = ""  # the door's, which is built around the pages

    def routes(self) -> list[Route]:
        """A page for each question."""
        views = {
            "/": Pages._index,
            "/run": Pages._run,
            "/compare": Pages._compare,
            "/sweep": Pages._sweep,
            "/predictions": Pages._predictions,
            "/page": Pages._page,
            "/chat": Pages._chat,
        }
        looked_at = [Route(path, functools.partial(self._shown, view), methods=["GET"]) for path, view in views.items()]
        return [*looked_at, Route("/chat", self._say, methods=["POST"])]

    def _shown(self, view: View, request: Request) -> Response:
        """The view's answer; what stands against it is a page too."""
        try:
            return view(self, request)
        except Exception as error:
            return _told(request, error)

    def _page_of(self, template: str, values: dict[str, Any]) -> Response:
        return HTMLResponse(pages.render(f"ui/{template}.html.jinja", root=str(self._folder.root), **values))

    def _index(self, request: Request) -> Response:
        query = request.query_params
        values = views.index(self._folder.look(), query.get("only", ""), query.get("sort", ""), _number(request))
        return self._page_of("index", values)

    def _run(self, request: Request) -> Response:
        return self._page_of("run", views.run(self._folder, self._folder.look(), _name(request)))

    def _compare(self, request: Request) -> Response:
        return self._page_of("compare", views.compare(self._folder.look(), request.query_params.getlist("run")))

    def _sweep(self, request: Request) -> Response:
        return self._page_of("sweep", views.sweep(self._folder, self._folder.look(), _name(request)))

    def _predictions(self, request: Request) -> Response:
        query = request.query_params
        only = query.get("only", "") if query.get("only", "") in views.ONLY else ""
        found = self._folder.look()
        values = views.predictions(self._folder, found, _name(request), only, query.get("text", ""), _number(request))
        return self._page_of("predictions", values)

    def _page(self, request: Request) -> Response:
        file = request.query_params.get("file", "")
        return HTMLResponse(self._folder.page(_name(request), file, self._folder.look()), headers=_FOREIGN)

    def _chat(self, request: Request) -> Response:
        return self._page_of(
            "chat", views.chat(self._folder.look(), request.query_params.getlist("run"), [], self.form)
        )

    async def _say(self, request: Request) -> Response:
        try:
            return await self._said(request)
        except Exception as error:
            return _told(request, error)

    async def _said(self, request: Request) -> Response:
        told = await _form(request)
        names, text = told.get("run", []), told.get("said", [""])[0].strip()
        if not hmac.compare_digest(told.get("form", [""])[0].encode(), self.form.encode()):
            return refused(403, "This form is none of ours, or of a page from before the start. Load the page anew.")
        found = self._folder.look()
        turns = turns_of(told.get("turns", [""])[0], 1 + len(names))
        values = views.chat(found, names, turns, self.form)
        if not text:
            return self._page_of("chat", values)
        try:
            answers = await self._talk.answers({name: found.runs[name].path for name in names}, turns, text)
        except LoraLabError as error:
            return self._page_of("chat", {**values, "problem": str(error), "text": text})
        return self._page_of("chat", views.chat(found, names, [*turns, Turn(text, answers)], self.form))


def _told(request: Request, error: Exception) -> Response:
    """A page about an error."""
    if isinstance(error, Missing):
        return refused(404, error)
    if isinstance(error, LoraLabError):
        return refused(409, error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    console.say("failed", f"{request.url.path}: {type(error).__name__} in {place.filename}:{place.lineno}")
    return refused(500, "This page failed, which is a bug in lora-lab. The terminal says where.")


async def _form(request: Request) -> dict[str, list[str]]:
    """What a form says.

    Raises:
        LoraLabError: it is too long, or none.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _FORM_BYTES:
            raise LoraLabError("What was said is too long. Begin a new conversation.")
    try:
        return parse_qs(body.decode("ascii"), keep_blank_values=True, max_num_fields=20)
    except ValueError as error:
        raise LoraLabError("What was sent is no form of this page.") from error


def _name(request: Request) -> str:
    return request.query_params.get("name", "")


def _number(request: Request) -> int:
    text = request.query_params.get("page", "1")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 1


def refused(status: int, error: LoraLabError | str) -> Response:
    """A page that says why there is no other."""
    values = views.problem(status, error)
    return HTMLResponse(pages.render("ui/problem.html.jinja", root="", **values), status)


async def _no_such_page(_: Request, error: Exception) -> Response:
    return refused(404, "There is no such page.")


def build(root: Path, entered: Callable[[str], None], talk: Talk | None = None) -> Door:
    """The pages of a folder, behind their door.

    Args:
        entered: called with the next path to enter by, when one was used.
        talk: the models that are asked; whoever made it closes it.
    """
    pages = Pages(Folder(root), talk or Talk())
    app = Starlette(routes=pages.routes(), exception_handlers={404: _no_such_page})
    door = Door(app, refused, lambda token: entered(f"{ENTER}?token={token}"))
    pages.form = door.form
    return door
