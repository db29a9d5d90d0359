"""The pages: each is a GET, and reads what it shows from the folder when it is asked."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

# A page that a verb wrote may have come with a received folder: it runs nothing, loads nothing, and belongs to no origin
_FOREIGN = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"}

View = Callable[["Pages", Request], Response]


class Pages:
    """The routes."""

    def __init__(self, folder: Folder):
        self._folder = folder

    def routes(self) -> list[Route]:
        """A page for each question."""
        views = {
            "/": Pages._index,
            "/run": Pages._run,
            "/compare": Pages._compare,
            "/sweep": Pages._sweep,
            "/predictions": Pages._predictions,
            "/page": Pages._page,
        }
        return [Route(path, functools.partial(self._shown, view), methods=["GET"]) for path, view in views.items()]

    def _shown(self, view: View, request: Request) -> Response:
        """The view's answer; what stands against it is a page too."""
        try:
            return view(self, request)
        except Missing as error:
            return refused(404, error)
        except LoraLabError as error:
            return refused(409, error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            console.say("failed", f"{request.url.path}: {type(error).__name__} in {place.filename}:{place.lineno}")
            return refused(500, "This page failed, which is a bug in lora-lab. The terminal says where.")

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


def build(root: Path, entered: Callable[[str], None]) -> Door:
    """The pages of a folder, behind their door.

    Args:
        entered: called with the next path to enter by, when one was used.
    """
    app = Starlette(routes=Pages(Folder(root)).routes(), exception_handlers={404: _no_such_page})
    return Door(app, refused, lambda token: entered(f"{ENTER}?token={token}"))
