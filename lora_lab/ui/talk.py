"""Chat side by side: a base and some runs on it, asked the same. The server's engine answers all of them in shared passes.

Models are loaded when something is said to them, and stay until other runs are asked. What was said lies in the page alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any

from lora_lab.errors import ConfigError, LoraLabError
from lora_lab.run import run_dir, takes
from lora_lab.run.trained import open_trained
from lora_lab.serve import server
from lora_lab.serve.config import ServeConfig

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message

    from lora_lab.serve.app import Service

MOST_RUNS = 3
MOST_TURNS = 50


@dataclasses.dataclass(frozen=True)
class Turn:
    """Something that was said to all of them, and what each answered, in their order."""

    said: str
    answers: list[str]


class Talk:
    """Who is asked now: a base and its runs, loaded once."""

    def __init__(self) -> None:
        self._paths: tuple[str, ...] = ()
        self._service: Service | None = None
        self._turn = asyncio.Lock()  # one after another; the engine takes the rows of one together
        self._loading: Future[None] = Future()

    async def answers(self, runs: Mapping[str, str], turns: Sequence[Turn], said: str) -> list[str]:
        """What the base and each run answer, in this order.

        Args:
            runs: folders by the names that they have here.
            turns: what was said before.

        Raises:
            LoraLabError: one cannot be loaded, or not asked in messages.
        """
        async with self._turn:
            paths = tuple(runs.values())
            if paths != self._paths or self._service is None:
                await self._loaded(paths)
            assert self._service is not None, "it was loaded"
            from lora_lab.serve.app import build

            app = build(self._service, None)
            names = ["base", *server.names(paths)]
            most = max(self._service.shelf.served[name].most_new for name in names[1:])  # the base gets no more either
            found = await asyncio.gather(
                *(_ask(app, name, _messages(turns, place, said), most) for place, name in enumerate(names)),
                return_exceptions=True,
            )
            for one in found:
                if isinstance(one, BaseException):
                    raise one
            return [str(one) for one in found]

    async def _loaded(self, paths: tuple[str, ...]) -> None:
        """Load them in a thread that the end of the process does not wait for, as it does for those of `asyncio.to_thread`."""
        loading = self._loading = Future()

        def load() -> None:
            error: BaseException | None = None
            try:
                self._load(paths)
            except BaseException as failed:
                error = failed
            with contextlib.suppress(InvalidStateError):  # it was stopped
                loading.set_exception(error) if error is not None else loading.set_result(None)

        threading.Thread(target=load, name="lora_lab load", daemon=True).start()
        await asyncio.wrap_future(loading)

    def _load(self, paths: tuple[str, ...]) -> None:
        self.close()
        server.check_extra("ui: a chat")
        for path in paths:
            run_dir.open_existing(path)
        config = open_trained(paths[0], takes.SERVE, [])[1]
        self._service = server.prepared(paths, config, [], ServeConfig())
        self._paths = paths
        for served in self._service.shelf.served.values():
            if not served.chats:
                self.close()
                raise ConfigError(
                    f"{served.name}: is not asked in messages (task={served.setup.config.task.name}). Choose runs of a chat model with a chat task; "
                    "lora-lab predict asks the others."
                )

    def stop(self, seconds: float) -> None:
        """Take nothing new; answers that are being written may go on for so many seconds, a base is no longer waited for."""
        with contextlib.suppress(InvalidStateError):
            self._loading.set_exception(LoraLabError("lora-lab ui ended while the base was being loaded."))
        if self._service is not None:
            self._service.engine.stop(seconds)

    def close(self) -> None:
        """Let the models go."""
        if self._service is not None:
            self._service.engine.stop(0)
            self._service.engine.join(10)
            self._service, self._paths = None, ()
            gc.collect()


def turns_of(text: str, models: int) -> list[Turn]:
    """The turns that a page holds.

    Raises:
        LoraLabError: it is none of ours.
    """
    with _told():
        tree = json.loads(text or "[]")
        turns = [Turn(str(said), [str(one) for one in answers]) for said, answers in tree]
        if len(turns) <= MOST_TURNS and all(len(turn.answers) == models for turn in turns):
            return turns
    raise LoraLabError(f"The conversation has more than {MOST_TURNS} turns, or other models. Begin a new one.")


def text_of(turns: Sequence[Turn]) -> str:
    """As the page holds them."""
    return json.dumps([(turn.said, turn.answers) for turn in turns], ensure_ascii=False)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RecursionError) as error:
        raise LoraLabError("The page holds no conversation. Begin a new one.") from error


def _messages(turns: Sequence[Turn], place: int, said: str) -> list[dict[str, str]]:
    """One model's own conversation so far."""
    found = []
    for turn in turns:
        found += [{"role": "user", "content": turn.said}, {"role": "assistant", "content": turn.answers[place]}]
    return [*found, {"role": "user", "content": said}]


async def _ask(app: ASGIApp, model: str, messages: list[dict[str, str]], most: int) -> str:
    """What a model answers, by the route that clients of the server use.

    Raises:
        LoraLabError: it refuses.
    """
    body = json.dumps({"model": model, "messages": messages, "max_tokens": most}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    path = "/v1/chat/completions"
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers, "client": None, "server": None,
    }  # fmt: skip
    status, parts = 0, list[bytes]()
    given = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Message:
        message = next(given, None)
        return message if message is not None else await asyncio.Event().wait()  # type: ignore[return-value]  # nobody leaves

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    await app(scope, receive, send)
    found: dict[str, Any] = json.loads(b"".join(parts))
    if status != 200:
        raise LoraLabError(f"{model}: {found['error']['message']}")
    return str(found["choices"][0]["message"]["content"]).replace("\0", "\ufffd")  # the next turn may hold no NUL
