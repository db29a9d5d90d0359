"""The routes. Before any of them stand the checks of `Guard`: the key, its scope and limits, and the size of the body."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import math
import struct
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lora_lab.data import personal
from lora_lab.errors import LoraLabError, nearest
from lora_lab.run.answering import given, origin, unlabelled
from lora_lab.schema.sections import shown
from lora_lab.serve import replies, wishes
from lora_lab.serve.engine import whole
from lora_lab.serve.guard import TOLD, Guard, note
from lora_lab.serve.shelf import BASE_NAME, Opened, Served, open_run
from lora_lab.serve.wishes import RequestError
from lora_lab.serve.words import End, Event, Piece, Wish

if TYPE_CHECKING:
    from lora_lab.data.encode import Example
    from lora_lab.serve.config import ServeConfig
    from lora_lab.serve.keys import Keys
    from lora_lab.serve.metrics import Metrics
    from lora_lab.serve.shelf import Shelf
    from lora_lab.serve.tinker.routes import Training

T = TypeVar("T")
PREDICTING = ("classify", "tokens", "answer", "rewards")  # routes of rows, see `asked_at` of the tasks' sections
_BEATS = 0.25  # seconds between two looks whether a client is still there


class Answers(Protocol):
    """Who answers: the thread with the model (`Engine`), or another program (`external.engine`)."""

    @property
    def alive(self) -> bool: ...
    @property
    def stopping(self) -> bool: ...
    def at_once(self, served: Served, wish: Wish) -> bool: ...
    def row(self, served: Served, ids: list[int], wish: Wish, send: Callable[[Event], None]) -> Any: ...
    def write(self, served: Served, rows: Sequence[Any]) -> None: ...
    def predict(self, served: Served, examples: Sequence[Example]) -> Future[dict[str, dict[str, Any]]]: ...
    def do(self, call: Callable[[], T]) -> Future[T]: ...
    def remove(self, served: Served) -> Future[None]: ...
    def stop(self, seconds: float) -> None: ...
    def join(self, seconds: float) -> None: ...


class Service:
    """What the routes are asked of."""

    def __init__(
        self,
        shelf: Shelf,
        engine: Answers,
        config: ServeConfig,
        metrics: Metrics,
        overrides: Sequence[str] = (),
        finders: Mapping[str, personal.Finder] | None = None,
    ):
        """
        Args:
            overrides: with which runs are opened that come later.
            finders: of what is masked beside `config.mask`.
        """
        self.shelf, self.engine, self.config, self.metrics = shelf, engine, config, metrics
        self.training: Training | None = None
        self._overrides, self._finders = list(overrides), finders or {}
        self._loading = asyncio.Lock()  # one adapter after another

    def routes(self) -> list[Route]:
        """Every route; the scope that each needs is in `guard.SCOPE`."""
        rows = [
            Route(f"/v1/{name}", functools.partial(self._rows, name), methods=["POST"], name=name)
            for name in PREDICTING
        ]
        return [
            Route("/healthz", self._health, methods=["GET"], name="healthz"),
            Route("/metrics", self._metrics, methods=["GET"], name="metrics"),
            Route("/v1/models", self._models, methods=["GET"], name="models"),
            Route("/v1/models/{name}", self._model, methods=["GET"], name="model"),
            Route("/v1/chat/completions", self._chat, methods=["POST"], name="chat"),
            Route("/v1/completions", self._complete, methods=["POST"], name="completions"),
            Route("/v1/embeddings", self._embed, methods=["POST"], name="embeddings"),
            *rows,
            Route("/v1/rerank", self._rerank, methods=["POST"], name="rerank"),
            Route("/v1/adapters", self._load, methods=["POST"], name="load"),
            Route("/v1/adapters/{name}", self._unload, methods=["DELETE"], name="unload"),
            *([] if self.training is None else self.training.routes()),
        ]

    # -- what is there --------------------------------------------------------------------------------------------------

    async def _health(self, request: Request) -> Response:
        alive = self.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        found = [one.described() for one in list(self.shelf.served.values()) if not one.leaving]
        return JSONResponse({"object": "list", "data": found})

    async def _model(self, request: Request) -> Response:
        served = self._named(request.path_params["name"])
        return JSONResponse(served.described(), headers=self._headers(served))

    def _named(self, name: str, route: str = "") -> Served:
        """
        Raises:
            RequestError: nothing is called so, or it is not asked there.
        """
        served = self.shelf.served.get(name)
        if served is None or served.leaving:
            near = nearest(name, self.shelf.served)
            raise RequestError(
                404,
                f"model={shown(name)}: not served here.{near} GET /v1/models lists what is.",
                code="model_not_found",
                param="model",
            )
        if route and route not in served.routes:
            where = ", ".join(f"/v1/{one}" for one in served.routes) or "nowhere"
            raise RequestError(400, f"model={name}: is not asked at /v1/{route} but at {where}.", param="model")
        return served

    def _headers(self, served: Served) -> dict[str, str]:
        return {"x-lora-lab-model": served.name, "x-lora-lab-adapter": served.opened.digest or "none"}

    def _who(self, served: Served) -> dict[str, Any]:
        return {"model": served.name, "adapter": served.opened.digest, "base": self.shelf.base.fingerprint}

    # -- texts ----------------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        asked = wishes.parse(wishes.ChatRequest, await body_of(request))
        served = self._named(asked.model, "chat/completions")
        messages = await self._masked(request, asked.messages)
        text = await _prepared(given, served.setup, messages)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.top_logprobs and not asked.logprobs:
            raise RequestError(400, "top_logprobs: no effect without logprobs=true.", param="top_logprobs")
        if asked.max_tokens is not None and asked.max_completion_tokens is not None:
            raise RequestError(
                400, "max_tokens: max_completion_tokens says it already. Drop one of the two.", param="max_tokens"
            )
        most = asked.max_completion_tokens or asked.max_tokens
        ids = await asyncio.to_thread(served.setup.encoder.tokenizer, text, add_special_tokens=False, verbose=False)
        wish = self._wish(served, asked, most, top, len(ids["input_ids"]))
        reply = replies.Chat(self._who(served), served.setup.encoder.tokenizer, top is not None)
        return await self._answer(request, served, [(text, list(ids["input_ids"]))], wish, reply, asked.stream_options)

    async def _complete(self, request: Request) -> Response:
        asked = wishes.parse(wishes.CompletionRequest, await body_of(request))
        served = self._named(asked.model, "completions")
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else list(asked.prompt)
        self._check_count("prompt", len(prompts))
        prompts = await self._masked(request, prompts)
        found = [await _prepared(_continued, served, prompt) for prompt in prompts]
        longest = max(len(ids) for _, ids in found)
        wish = self._wish(served, asked, asked.max_tokens, asked.logprobs, longest)
        reply = replies.Completion(self._who(served), served.setup.encoder.tokenizer, asked.logprobs is not None)
        return await self._answer(request, served, found, wish, reply, asked.stream_options)

    async def _masked(self, request: Request, said: T) -> T:
        """What the model is given of it (`serve.mask`)."""
        if not (self.config.mask or self._finders):
            return said
        found, counts = await asyncio.to_thread(personal.masked_within, said, self.config.mask, self._finders)
        self.metrics.count_masked("model", counts)
        note(request, masked=counts.total())
        return cast("T", found)

    def _check_count(self, name: str, count: int) -> None:
        if count > self.config.max_texts:
            raise RequestError(400, f"{name}: {count}, and one request may have {self.config.max_texts}.", param=name)

    def _wish(self, served: Served, asked: Any, most: int | None, top: int | None, prompt_tokens: int) -> Wish:
        """
        Raises:
            RequestError: more tokens than there is room for.
        """
        if asked.stream_options is not None and not asked.stream:
            raise RequestError(400, "stream_options: no effect without stream=true.", param="stream_options")
        if most is not None and most > self.config.max_tokens:
            raise RequestError(400, f"max_tokens={most}: at most {self.config.max_tokens} here.", param="max_tokens")
        positions = served.positions
        room = None if positions is None or served.setup.config.task.encoder_decoder else positions - prompt_tokens
        wanted = min(served.most_new, self.config.max_tokens) if most is None else most
        if room is not None and (room < 1 or (most is not None and most > room)):
            raise RequestError(
                400,
                f"The prompt has {prompt_tokens} tokens{f' and max_tokens={most}' if most else ''}, and the model has {positions} positions.",
                code="context_length_exceeded",
                param="messages",
            )
        return Wish(
            wanted if room is None else min(wanted, room),
            asked.temperature or 0.0,
            1.0 if asked.top_p is None else asked.top_p,
            asked.seed,
            wishes.stops(asked.stop),
            top,
            bool(asked.stream),
        )

    async def _answer(
        self,
        request: Request,
        served: Served,
        prompts: list[tuple[str, list[int]]],
        wish: Wish,
        reply: replies.Reply,
        options: wishes.StreamOptions | None,
    ) -> Response:
        for _, ids in prompts:
            if not ids:
                raise RequestError(400, "prompt: nothing is left of it as tokens.", param="prompt")
        note(request, model=served.name)
        if self.engine.at_once(served, wish):
            return await self._whole(served, prompts, wish, reply, request, options)
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        rows = [
            self.engine.row(served, ids, wish, _sender(loop, queue, place)) for place, (_, ids) in enumerate(prompts)
        ]
        self.engine.write(served, rows)
        events = self._events(request, served, rows, queue)
        headers = self._headers(served)
        if wish.streams:
            usage = options is not None and options.include_usage
            first = await _begun(events)  # what goes wrong before the first token has a status of its own
            return StreamingResponse(
                reply.stream(first, usage),
                media_type="text/event-stream",
                headers={**headers, "cache-control": "no-store"},
            )
        try:
            return JSONResponse(await reply.whole(events, len(prompts)), headers=headers)
        finally:
            await events.aclose()

    async def _events(
        self, request: Request, served: Served, rows: list[Any], queue: asyncio.Queue[tuple[int, Event]]
    ) -> AsyncGenerator[tuple[int, Event], None]:
        """What the rows say until all have ended; they are given up when whoever asked has gone."""
        left, began = len(rows), time.monotonic()
        try:
            while left:
                try:
                    place, event = await asyncio.wait_for(queue.get(), _BEATS)
                except TimeoutError:  # a stream watches by itself
                    if not rows[0].wish.streams and await request.is_disconnected():
                        raise ClientDisconnect from None
                    continue
                if began:
                    self.metrics.first_token.observe(time.monotonic() - began)
                    began = 0.0
                if isinstance(event, RequestError):
                    raise event
                if isinstance(event, End):
                    left -= 1
                    self._count(request, served, event.prompt_tokens, event.tokens)
                yield place, event
        finally:
            for row in rows:
                row.cancelled = True

    def _count(self, request: Request, served: Served, prompt: int, answer: int) -> None:
        self.metrics.tokens.labels(served.name, "prompt").inc(prompt)
        self.metrics.tokens.labels(served.name, "answer").inc(answer)
        note(request, prompt_tokens=prompt, answer_tokens=answer)

    async def _whole(
        self,
        served: Served,
        prompts: list[tuple[str, list[int]]],
        wish: Wish,
        reply: replies.Reply,
        request: Request,
        options: wishes.StreamOptions | None,
    ) -> Response:
        if wish.top_logprobs is not None:
            raise RequestError(
                400, f"logprobs: not for model={served.name}, whose answers come as a whole.", param="logprobs"
            )
        texts = [text for text, _ in prompts]
        found = await asyncio.wrap_future(self.engine.do(functools.partial(whole, served, texts, wish)))
        tokenizer = served.setup.encoder.tokenizer

        async def events() -> AsyncGenerator[tuple[int, Event], None]:
            for place, text in enumerate(found):
                count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
                self._count(request, served, len(prompts[place][1]), count)
                yield place, Piece(text, ())
                yield place, End("length" if count >= wish.max_tokens else "stop", len(prompts[place][1]), count)

        if wish.streams:
            usage = options is not None and options.include_usage
            return StreamingResponse(
                reply.stream(events(), usage), media_type="text/event-stream", headers=self._headers(served)
            )
        return JSONResponse(await reply.whole(events(), len(prompts)), headers=self._headers(served))

    # -- rows and vectors -----------------------------------------------------------------------------------------------

    async def _rows(self, route: str, request: Request) -> Response:
        asked = wishes.parse(wishes.RowsRequest, await body_of(request))
        served = self._named(asked.model, route)
        self._check_count("rows", len(asked.rows))
        note(request, model=served.name)
        given_rows = await self._masked(request, asked.rows)
        rows, usage = await self._predicted(request, served, given_rows)
        said = {"object": "list", "data": rows, "usage": usage}
        return JSONResponse(
            {**said, "model": served.name, "lora_lab": self._who(served)}, headers=self._headers(served)
        )

    async def _predicted(
        self, request: Request, served: Served, rows: Sequence[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """What a run says of rows without labels, and the tokens that it read."""
        examples = await _prepared(_examples, served, rows)
        found = await asyncio.wrap_future(self.engine.predict(served, examples))
        tokens = sum(example.num_tokens for example in examples)
        self._count(request, served, tokens, 0)
        of_row = served.setup.task.of_row
        said = [of_row(found[origin(number)], row) for number, row in enumerate(rows, start=1)]
        return said, {"prompt_tokens": tokens, "total_tokens": tokens}

    async def _rerank(self, request: Request) -> Response:
        asked = wishes.parse(wishes.RerankRequest, await body_of(request))
        served = self._named(asked.model, "rerank")
        self._check_count("documents", len(asked.documents))
        note(request, model=served.name)
        texts = [one if isinstance(one, str) else one["text"] for one in asked.documents]
        query, texts = await self._masked(request, (asked.query, texts))
        rows = [{"query": query, "document": text} for text in texts]
        said, usage = await self._predicted(request, served, rows)
        scores = [_share(row["score"]) for row in said]
        best = sorted(range(len(scores)), key=lambda place: -scores[place])[: asked.top_n]
        shown_too = [{"document": {"text": texts[place]}} if asked.return_documents else {} for place in best]
        results = [
            {"index": place, "relevance_score": scores[place], **more}
            for place, more in zip(best, shown_too, strict=True)
        ]
        found = {"object": "list", "results": results, "usage": usage}
        return JSONResponse(
            {**found, "model": served.name, "lora_lab": self._who(served)}, headers=self._headers(served)
        )

    async def _embed(self, request: Request) -> Response:
        asked = wishes.parse(wishes.EmbeddingRequest, await body_of(request))
        served = self._named(asked.model)
        if served.name != BASE_NAME:
            raise RequestError(
                400, f"model={served.name}: vectors are the base's alone. Ask model=base.", param="model"
            )
        texts = [asked.input] if isinstance(asked.input, str) else list(asked.input)
        self._check_count("input", len(texts))
        texts = await self._masked(request, texts)
        note(request, model=served.name)
        async with self._loading:
            embedder = await _prepared(self.shelf.embedder)
        rows = [await asyncio.to_thread(embedder.ids, text) for text in texts]
        vectors = await asyncio.wrap_future(self.engine.do(lambda: embedder.vectors(rows)))
        tokens = sum(map(len, rows))
        self._count(request, served, tokens, 0)
        data = [
            {"object": "embedding", "index": place, "embedding": _encoded(one, asked.encoding_format)}
            for place, one in enumerate(vectors)
        ]
        said = {"object": "list", "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
        return JSONResponse(
            {**said, "model": served.name, "lora_lab": self._who(served)}, headers=self._headers(served)
        )

    # -- adapters -------------------------------------------------------------------------------------------------------

    async def _load(self, request: Request) -> Response:
        asked = wishes.parse(wishes.AdapterRequest, await body_of(request))
        path = self._below_root(asked.path)
        async with self._loading:
            opened: Opened = await _prepared(open_run, str(path), self._overrides, asked.name)
            if opened.name in self.shelf.served:
                raise RequestError(409, f"name={opened.name}: is served already. Choose another.", param="name")
            put = await _prepared(self.shelf.ready, opened)
            served = await asyncio.wrap_future(self.engine.do(put))
        return JSONResponse(served.described(), 201, headers=self._headers(served))

    def _below_root(self, said: str) -> Path:
        """
        Raises:
            RequestError: no adapter may be loaded from there.
        """
        if self.config.root is None:
            raise RequestError(403, "No adapter may be loaded here: serve.root is not set.", "permission_error")
        root = Path(self.config.root).expanduser().resolve()
        try:
            path = (root / said).resolve()
            inside = path.is_relative_to(root) and path != root
        except (OSError, ValueError, RuntimeError):  # a NUL, too long, links in a circle
            inside = False
        if not inside:
            raise RequestError(403, f"path={shown(said)}: not below serve.root.", "permission_error", param="path")
        return path

    async def _unload(self, request: Request) -> Response:
        served = self._named(request.path_params["name"])
        if served.name == BASE_NAME:
            raise RequestError(400, "The base cannot be taken away.")
        if self.config.replicas > 1:  # it would go from this process alone
            raise RequestError(400, "Adapters neither come nor go with serve.replicas: name all of them at the start.")
        await asyncio.wrap_future(self.engine.remove(served))
        return JSONResponse({"id": served.name, "object": "model", "deleted": True}, headers=self._headers(served))


def build(service: Service, keys: Keys | None) -> Guard:
    """The application, behind its checks.

    Args:
        keys: None: whoever reaches it may do everything.
    """
    inner = Starlette(routes=service.routes(), exception_handlers=TOLD)
    headers = {"x-lora-lab-base": service.shelf.base.fingerprint}
    return Guard(inner, service.config, keys, service.metrics, headers)


async def body_of(request: Request) -> bytes:
    """The body, which `Guard` has bounded."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, "The body must be JSON: content-type: application/json.")
    return await request.body()


async def _prepared(call: Callable[..., Any], *given: Any) -> Any:
    """Something that takes a moment and may refuse, beside the loop."""
    try:
        return await asyncio.to_thread(call, *given)
    except LoraLabError as error:
        raise RequestError(400, str(error)) from error


def _continued(served: Served, prompt: str) -> tuple[str, list[int]]:
    """A text that is gone on with, and its tokens."""
    encoder: Any = served.setup.encoder
    if served.setup.config.task.encoder_decoder:
        text = given(served.setup, prompt)
        return text, list(encoder.source_ids(text))
    ids = list(encoder.tokenizer(prompt, verbose=False)["input_ids"])
    ended = (
        len(ids) > 1 and ids[-1] == encoder.tokenizer.eos_token_id and not prompt.endswith(encoder.tokenizer.eos_token)
    )
    return prompt, ids[:-1] if ended else ids


def _examples(served: Served, rows: Sequence[dict[str, Any]]) -> list[Any]:
    return [one for number, row in enumerate(rows, start=1) for one in unlabelled(served.setup, row, number)]


def _share(score: float) -> float:
    """A score between 0 and 1, in the same order: its logistic function, as is usual at this route."""
    return 1 / (1 + math.exp(-score)) if score >= 0 else 1 - 1 / (1 + math.exp(score))


def _encoded(vector: list[float], how: str | None) -> list[float] | str:
    if how != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


def _sender(
    loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[tuple[int, Event]], place: int
) -> Callable[[Event], None]:
    def send(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody reads
            loop.call_soon_threadsafe(queue.put_nowait, (place, event))

    return send


async def _begun(events: AsyncGenerator[tuple[int, Event], None]) -> AsyncGenerator[tuple[int, Event], None]:
    """The same events, once the first is there."""
    first = await anext(events)

    async def all_of_them() -> AsyncGenerator[tuple[int, Event], None]:
        try:
            yield first
            async for event in events:
                yield event
        finally:
            await events.aclose()

    return all_of_them()
