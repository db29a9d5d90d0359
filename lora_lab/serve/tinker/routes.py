"""The Tinker API's routes. They stand behind the same checks as all others (`guard.py`), and need the scope `train`.

What takes long is answered with a promise at once (`promises.py`). An error of the client's is 400 or 404, never 409 or 5xx: the SDK
would ask again for minutes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lora_lab.errors import ConfigError, LoraLabError
from lora_lab.runtime import console
from lora_lab.serve.guard import note, who
from lora_lab.serve.shelf import BASE_NAME, Served
from lora_lab.serve.tinker import losses, told, wire
from lora_lab.serve.tinker.keeping import Checkpoint, Keeping, Model, Session, now
from lora_lab.serve.tinker.promises import Promise, Promises
from lora_lab.serve.tinker.sampling import Drawing, Drawn, drawing, scores
from lora_lab.serve.tinker.trainer import Trainer
from lora_lab.serve.tinker.wire import Learn
from lora_lab.serve.tinker.workshop import Learner, Workshop, own_head, section_of
from lora_lab.serve.wishes import RequestError
from lora_lab.serve.words import End, Event

if TYPE_CHECKING:
    from lora_lab.serve.config import ServeConfig
    from lora_lab.serve.engine import Engine
    from lora_lab.serve.metrics import Metrics
    from lora_lab.serve.shelf import Opened, Shelf

PREFIX = "/api/v1"
_STALE_SECONDS = 300.0  # without a sign of life; clients give one every 10
_KEPT_UNNAMED = 16  # snapshots of a model that have no name; older ones are removed
_MOST_DATA = 1024  # of one request, as the SDK cuts them
_ROOM = 0.8  # of a body, for what stands around the data
Call = Callable[[Request, str], Awaitable[Response]]


class Training:
    """What the routes are asked of."""

    def __init__(self, shelf: Shelf, engine: Engine, config: ServeConfig, metrics: Metrics):
        """
        Raises:
            ConfigError: the base cannot be trained so.
            RunError: another server works in `serve.root`.
        """
        self.shelf, self.engine, self.config, self.metrics = shelf, engine, config, metrics
        self._served = shelf.served[BASE_NAME]
        self._opened: Opened = self._served.opened
        assert config.root is not None, "see `server.check_training`"
        group = self._served.group
        if group is None or not group.writes or group.against_steps:
            raise ConfigError("serve.training=true: only a decoder is trained so, and this base is none. Drop it.")
        if self._opened.config.model.dtype == "float16":
            raise ConfigError("serve.training=true: not in float16. Set model.dtype=bfloat16 or float32.")
        self.keeping = Keeping(Path(config.root).expanduser(), self._opened)
        self._unembeds = own_head(self._opened.setup.skeleton()) is not None
        if not self._unembeds:
            console.say(
                "training", "the output layer is the input embeddings too, so no client adapts it (train_unembed)"
            )
        self.workshop = Workshop(self._opened, shelf.another_group(), shelf.inside)
        self.trainer = Trainer(engine, self.workshop, config.max_waiting)
        self.promises = Promises()
        self.clock: Callable[[], float] = time.monotonic
        self._seen: dict[str, float] = {}  # sessions, and when they gave a sign of life
        self._finished: set[str] = set()

    def close(self) -> None:
        """Let another server work in its folder."""
        self.keeping.close()

    def routes(self) -> list[Route]:
        """Every route."""
        run, name = "/training_runs/{run}", "{kind}/{name}"
        found: list[tuple[str, str, Call]] = [
            ("GET", "/healthz", self._health),
            ("POST", "/client/config", self._client_config),
            ("POST", "/client/dynamic_config", self._nothing),
            ("POST", "/telemetry", self._telemetry),
            ("GET", "/get_server_capabilities", self._capabilities),
            ("POST", "/create_session", self._create_session),
            ("POST", "/session_heartbeat", self._heartbeat),
            ("POST", "/sessions/{session}/finish", self._finish),
            ("GET", "/sessions", self._sessions),
            ("GET", "/sessions/{session}", self._session),
            ("POST", "/create_model", self._create_model),
            ("POST", "/get_info", self._info),
            ("POST", "/forward_backward", self._learn),
            ("POST", "/forward", self._forward),
            ("POST", "/optim_step", self._optim_step),
            ("POST", "/save_weights", self._save),
            ("POST", "/load_weights", self._load),
            ("POST", "/save_weights_for_sampler", self._save_for_sampler),
            ("POST", "/create_sampling_session", self._create_sampler),
            ("GET", "/samplers/{sampler}", self._sampler),
            ("POST", "/asample", self._sample),
            ("POST", "/retrieve_future", self._retrieve),
            ("POST", "/cancel_future", self._cancel),
            ("POST", "/weights_info", self._weights_info),
            ("GET", "/training_runs", self._runs),
            ("GET", "/checkpoints", self._checkpoints),
            ("GET", f"{run}/checkpoints", self._checkpoints),
            ("DELETE", f"{run}/checkpoints/{name}", self._remove),
            ("PUT", f"{run}/checkpoints/{name}/ttl", self._expire),
            ("GET", run, self._run),
        ]
        return [
            Route(PREFIX + path, _Told(call, self.refused), methods=[method], name=f"tinker {path} {method}")
            for method, path, call in found
        ]

    # -- what is there --------------------------------------------------------------------------------------------------

    async def _health(self, request: Request, owner: str) -> Response:
        return JSONResponse({"status": "ok" if self.engine.alive else "stopped"}, 200 if self.engine.alive else 503)

    async def _client_config(self, request: Request, owner: str) -> Response:
        """Flags stay as the SDK has them, but for the size of a request."""
        return JSONResponse(
            {
                "fwdbwd_max_chunk_bytes_count": min(5_000_000, int(_ROOM * self.config.max_body_bytes)),
                "sample_cancel_enabled": True,
            }
        )

    async def _nothing(self, request: Request, owner: str) -> Response:
        return JSONResponse({})

    async def _telemetry(self, request: Request, owner: str) -> Response:
        """Taken, and written nowhere."""
        return JSONResponse({"status": "accepted"})

    async def _capabilities(self, request: Request, owner: str) -> Response:
        facts = {"max_context_length": self.workshop.positions, "trainable": True, "sampleable": True}
        return JSONResponse({"supported_models": [{"model_name": name, **facts} for name in self.names]})

    @functools.cached_property
    def names(self) -> list[str]:
        """What clients may call the base: by what it was named when the server was started, by its folder, or `base`."""
        base = self._opened.setup.base
        told = self._opened.config.model.path
        return list(
            dict.fromkeys([told, base.name, str(base.folder), str(base.folder.resolve()), base.folder.name, BASE_NAME])
        )

    def _check_base(self, name: str | None) -> None:
        if name is not None and name.removeprefix("./") not in [one.removeprefix("./") for one in self.names]:
            raise RequestError(
                400, f"base_model={name[:200]!r}: not served here. It is called {', '.join(self.names)}."
            )

    # -- sessions -------------------------------------------------------------------------------------------------------

    async def _create_session(self, request: Request, owner: str) -> Response:
        asked = told.parse(told.Session, await request.body())
        self._free_stale()
        session = await _aside(self.keeping.put_session, owner, asked.user_metadata)
        self._seen[session.session_id] = self.clock()
        return JSONResponse({"type": "create_session", "session_id": session.session_id})

    async def _heartbeat(self, request: Request, owner: str) -> Response:
        asked = told.parse(told.OfSession, await request.body())
        self._alive(asked.session_id, owner)
        self._free_stale()
        return JSONResponse({"type": "session_heartbeat"})

    def _alive(self, session_id: str, owner: str) -> Session:
        session = self.keeping.session(session_id, owner)
        self._seen[session_id] = self.clock()
        return session

    async def _finish(self, request: Request, owner: str) -> Response:
        session = self.keeping.session(request.path_params["session"], owner)
        self._free(session.session_id, "its session is finished")
        return Response(status_code=204)

    def _free_stale(self) -> None:
        """Free what clients hold who give no sign of life."""
        limit = self.clock() - _STALE_SECONDS
        for session_id in [one for one, seen in self._seen.items() if seen < limit]:
            self._free(session_id, f"its session gave no sign of life for {_STALE_SECONDS:.0f} s")

    def _free(self, session_id: str, why: str) -> None:
        self._seen.pop(session_id, None)
        for model_id in self.trainer.models_of(session_id):
            self.trainer.close(model_id, why)
        for model_id in self._models_of(session_id):
            for folder in self.keeping.drop_unnamed(model_id):
                self.engine.do(functools.partial(self.workshop.forget, folder / "adapter"))

    def _models_of(self, session_id: str) -> list[str]:
        return [one for one in self.keeping.models if one.startswith(f"{session_id}:")]

    async def _sessions(self, request: Request, owner: str) -> Response:
        own = [one.session_id for one in self.keeping.sessions.values() if one.owner == owner]
        return JSONResponse({"sessions": own})

    async def _session(self, request: Request, owner: str) -> Response:
        session = self.keeping.session(request.path_params["session"], owner)
        facts = {"training_run_ids": self._models_of(session.session_id), "sampler_ids": list(session.samplers)}
        return JSONResponse({**facts, "user_metadata": session.user_metadata})

    # -- models ---------------------------------------------------------------------------------------------------------

    async def _create_model(self, request: Request, owner: str) -> Response:
        asked = told.parse(told.CreateModel, await request.body())
        self._alive(asked.session_id, owner)
        self._check_base(asked.base_model)
        _check_optimizer(asked.optimizer_config)
        lora = asked.lora_config or told.Lora()
        wanted = lora.train_attn, lora.train_mlp, lora.train_unembed
        section = await _aside(section_of, self._opened.setup.skeleton(), lora.rank, *wanted)
        seed = secrets.randbits(32) if lora.seed is None else lora.seed
        model_id = f"{asked.session_id}:train:{asked.model_seq_id}"
        unembed = lora.train_unembed and self._unembeds
        model = Model(
            model_id,
            owner,
            now(),
            lora.rank,
            lora.train_attn,
            lora.train_mlp,
            asked.user_metadata,
            train_unembed=unembed,
        )

        def begin(promise: Promise) -> None:
            self._open(model, 0, promise, lambda: self.workshop.begin(section, seed), {"type": "create_model"})

        return self._promised(self.promises.once("train", owner, ("model", model_id), begin), model_id)

    def _open(
        self, model: Model, number: int, promise: Promise, make: Callable[[], Learner], facts: dict[str, Any]
    ) -> None:
        """A line for a new model, whose first request makes its adapter."""
        self._free_stale()
        model_id = model.model_id
        if self.trainer.open_models >= self.config.max_models:
            raise RequestError(
                400,
                f"{self.config.max_models} models are being trained (serve.max_models). Try again when one is finished.",
            )
        if model_id in self.keeping.models:
            raise RequestError(400, f"model_id={model_id}: is there already. Count model_seq_id up.")

        def made(_: Learner | None) -> dict[str, Any]:
            try:
                self.trainer.give(model_id, make())
                self.keeping.put_model(model)
            except Exception:
                self.trainer.close(model_id, "it could not be made")
                raise
            return {**facts, "model_id": model_id}

        self.trainer.open(model_id)
        self.trainer.add(model_id, number, promise, made)

    async def _info(self, request: Request, owner: str) -> Response:
        model = self.keeping.model(told.parse(told.OfModel, await request.body()).model_id, owner)
        base = self._opened.setup.base
        own = {"model_name": self.names[0], "tokenizer_id": str(base.folder)}
        return JSONResponse(
            {
                "type": "get_info",
                "model_data": own,
                "model_id": model.model_id,
                "model_name": self.names[0],
                "is_lora": True,
                "lora_rank": model.rank,
            }
        )

    # -- training -------------------------------------------------------------------------------------------------------

    async def refused(self, request: Request, owner: str) -> None:
        """A request was refused: whoever waits behind its number goes on."""
        if request.headers.get("content-type", "").startswith("application/json"):
            found = told.numbered(await request.body())
            if found is not None and found[0] in self.keeping.models and self.keeping.models[found[0]].owner == owner:
                self.trainer.pass_over(*found)

    async def _forward(self, request: Request, owner: str) -> Response:
        return await self._learned(request, owner, backward=False)

    async def _learn(self, request: Request, owner: str) -> Response:
        return await self._learned(request, owner, backward=True)

    async def _learned(self, request: Request, owner: str, backward: bool) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != wire.PROTOBUF:
            raise RequestError(400, f"The body must be protobuf: content-type: {wire.PROTOBUF}.")
        asked = await _aside(wire.read_learn, await request.body())
        model = self._busy(asked.model_id, owner)
        try:
            asked = await _aside(losses.check, asked, self.workshop.vocabulary, self.workshop.positions, _MOST_DATA)
        except RequestError:
            self.trainer.pass_over(model.model_id, asked.seq_id)
            raise
        asked = dataclasses.replace(asked, backward=backward and asked.backward)
        note(request, model=model.model_id, prompt_tokens=sum(len(one.tokens) for one in asked.data))
        return self._numbered(owner, model.model_id, asked.seq_id, asked)

    def _busy(self, model_id: str, owner: str) -> Model:
        """A model of this key that somebody works with."""
        model = self.keeping.model(model_id, owner)
        model.last_request = now()
        self._seen[model_id.partition(":")[0]] = self.clock()
        return model

    def _numbered(
        self, owner: str, model_id: str, number: int, work: Learn | Callable[[Learner | None], dict[str, Any]]
    ) -> Response:
        """A request in its model's line; one that is repeated is done once."""

        def begin(promise: Promise) -> None:
            self.trainer.add(model_id, number, promise, work)

        return self._promised(self.promises.once("train", owner, (model_id, number), begin), model_id)

    @staticmethod
    def _promised(promise: Promise, model_id: str | None = None) -> Response:
        facts = {} if model_id is None else {"model_id": model_id}
        return JSONResponse({"request_id": promise.request_id, **facts, **promise.told})

    async def _optim_step(self, request: Request, owner: str) -> Response:
        asked = told.parse(told.OptimStep, await request.body())
        model = self._busy(asked.model_id, owner)
        _check_optimizer(asked.optimizer_params)
        params = asked.adam_params or told.Adam()

        def step(learner: Learner | None) -> dict[str, Any]:
            return {"type": "optim_step", "metrics": _there(learner).step(params)}

        return self._numbered(owner, model.model_id, asked.seq_id, step)

    async def _save(self, request: Request, owner: str) -> Response:
        asked = told.parse(told.SaveWeights, await request.body())
        model = self._busy(asked.model_id, owner)

        def save(learner: Learner | None) -> dict[str, Any]:
            name = self.keeping.check_name(model.model_id, "weights", asked.path, asked.overwrite)
            saved = self._written(learner, model, "weights", name, True, asked.ttl_seconds, asked.user_metadata)
            return {"type": "save_weights", "path": saved.path}

        return self._numbered(owner, model.model_id, asked.seq_id, save)

    def _written(
        self, learner: Learner | None, model: Model, kind: str, name: str, named: bool, *how: Any
    ) -> Checkpoint:
        saved = self.keeping.write(self.workshop, _there(learner), model, kind, name, named, *how)
        gone = [saved.folder] if named else self.keeping.drop_unnamed(model.model_id, _KEPT_UNNAMED)
        for folder in gone:
            self.workshop.forget(folder / "adapter")
        return saved

    async def _save_for_sampler(self, request: Request, owner: str) -> Response:
        asked = told.parse(told.SaveForSampler, await request.body())
        model = self._busy(asked.model_id, owner)
        session = self.keeping.session(model.model_id.partition(":")[0], owner)

        def save(learner: Learner | None) -> dict[str, Any]:
            name = self.keeping.check_name(model.model_id, "sampler_weights", asked.path, False)
            named = asked.path is not None
            saved = self._written(
                learner, model, "sampler_weights", name, named, asked.ttl_seconds, asked.user_metadata
            )
            found: dict[str, Any] = {"type": "save_weights_for_sampler", "path": saved.path}
            if asked.sampling_session_seq_id is not None:
                sampler = f"{session.session_id}:sample:{asked.sampling_session_seq_id}"
                self.keeping.put_sampler(session, sampler, saved.path)
                found |= {"path": None, "sampling_session_id": sampler}
            return found

        return self._numbered(owner, model.model_id, asked.seq_id, save)

    async def _load(self, request: Request, owner: str) -> Response:
        asked = told.parse(told.LoadWeights, await request.body())
        checkpoint = self.keeping.find(asked.path, owner)
        self._check_base(asked.base_model)
        _check_optimizer(asked.optimizer_config)
        if asked.model_id is not None and asked.seq_id is not None:
            return self._load_into(self._busy(asked.model_id, owner), asked.seq_id, asked.optimizer, checkpoint)
        if asked.session_id is None or asked.model_seq_id is None:
            raise RequestError(400, "load_weights: needs session_id and model_seq_id, or model_id and seq_id.")
        self._alive(asked.session_id, owner)
        section, seed = await _aside(self.keeping.section, checkpoint)
        model_id = f"{asked.session_id}:train:{asked.model_seq_id}"
        origin = self.keeping.model(checkpoint.model_id, owner)
        facts = asked.user_metadata if asked.user_metadata is not None else origin.user_metadata
        flags = origin.train_attn, origin.train_mlp
        model = Model(model_id, owner, now(), section.r, *flags, facts, train_unembed=origin.train_unembed)

        def make() -> Learner:
            learner = self.workshop.load(checkpoint.folder / "adapter", section, seed)
            if asked.optimizer:
                try:
                    self.keeping.restore_optimizer(checkpoint, learner)
                except Exception:
                    self.workshop.drop(learner)
                    raise
            return learner

        def begin(promise: Promise) -> None:
            self._open(model, 0, promise, make, {"type": "load_weights", "path": checkpoint.path})

        return self._promised(self.promises.once("train", owner, ("model", model_id), begin), model_id)

    def _load_into(self, model: Model, number: int, optimizer: bool, checkpoint: Checkpoint) -> Response:
        def load(learner: Learner | None) -> dict[str, Any]:
            self.workshop.read_into(checkpoint.folder / "adapter", _there(learner))
            if optimizer:
                self.keeping.restore_optimizer(checkpoint, _there(learner))
            return {"type": "load_weights", "path": checkpoint.path, "model_id": model.model_id}

        return self._numbered(model.owner, model.model_id, number, load)

    # -- sampling -------------------------------------------------------------------------------------------------------

    async def _create_sampler(self, request: Request, owner: str) -> Response:
        asked = told.parse(told.SamplingSession, await request.body())
        session = self._alive(asked.session_id, owner)
        self._check_base(asked.base_model)
        if asked.model_path is not None:
            self.keeping.find(asked.model_path, owner)
        elif asked.base_model is None:
            raise RequestError(400, "create_sampling_session: needs model_path or base_model.")
        sampler = f"{session.session_id}:sample:{asked.sampling_session_seq_id}"
        if session.samplers.get(sampler, asked.model_path) != asked.model_path:
            raise RequestError(
                400, f"{sampler}: is there already, for other weights. Count sampling_session_seq_id up."
            )
        await _aside(self.keeping.put_sampler, session, sampler, asked.model_path)
        return JSONResponse({"type": "create_sampling_session", "sampling_session_id": sampler})

    async def _sampler(self, request: Request, owner: str) -> Response:
        sampler = request.path_params["sampler"]
        facts = {"sampler_id": sampler, "base_model": self.names[0], "model_path": self._path_of(sampler, owner)}
        return JSONResponse(facts)

    def _path_of(self, sampler: str, owner: str) -> str | None:
        """The weights that a sampling session asks; None: the base.

        Raises:
            RequestError: this key has no such session.
        """
        session = self.keeping.session(sampler.partition(":")[0], owner)
        if sampler not in session.samplers:
            raise RequestError(404, f"sampling_session_id={sampler[:200]!r}: there is none.")
        return session.samplers[sampler]

    async def _sample(self, request: Request, owner: str) -> Response:
        asked = told.parse(told.Sample, await request.body())
        self._check_sample(asked)
        tokens = told.prompt_tokens(asked.prompt)
        path = self._path_of(asked.sampling_session_id, owner)
        self._alive(asked.sampling_session_id.partition(":")[0], owner)
        room = self._room(tokens, asked.sampling_params.max_tokens)
        eos = self._opened.setup.encoder.tokenizer.eos_token_id
        how = drawing(asked.sampling_params, room, asked.topk_sample_logprobs, [] if eos is None else [eos])
        checkpoint = None if path is None else self.keeping.find(path, owner)
        note(request, model=path or BASE_NAME, prompt_tokens=len(tokens))

        def begin(promise: Promise) -> None:
            if self.engine.waiting + asked.num_samples > self.config.max_waiting:
                raise RequestError(
                    429, "Too many requests wait already. Try again later.", headers={"retry-after": "1"}
                )
            work = _Sampling(self, asked, tokens, how, checkpoint, promise)
            promise.told = {
                "sample_sequence_ids": [f"{promise.request_id}:{place}" for place in range(asked.num_samples)]
            }
            promise.cancel = work.cancel
            self.engine.do(work.begin)

        number = (asked.sampling_session_id, asked.seq_id)
        return self._promised(self.promises.once("sample", owner, number, begin))

    def _check_sample(self, asked: told.Sample) -> None:
        unknown = {
            "target_prompt_logprobs": asked.target_prompt_logprobs is not None,
            "prompt_alt_tokens_k": bool(asked.prompt_alt_tokens_k),
            "prompt_logprobs_last_n": asked.prompt_logprobs_last_n is not None and not asked.prompt_logprobs,
        }
        wrong = next((name for name, holds in unknown.items() if holds), None)
        if wrong is not None:
            raise RequestError(400, f"{wrong}: is not there, or has no effect without prompt_logprobs. Drop it.")
        if asked.num_samples > self.config.max_texts:
            raise RequestError(
                400, f"num_samples={asked.num_samples}: at most {self.config.max_texts} here (serve.max_texts)."
            )

    def _room(self, tokens: list[int], most: int | None) -> int:
        """Tokens that an answer may have."""
        wrong = next((token for token in tokens if not 0 <= token < self.workshop.vocabulary), None)
        if wrong is not None:
            raise RequestError(
                400, f"prompt: token {wrong}: the model's tokens are 0 to {self.workshop.vocabulary - 1}."
            )
        positions = self.workshop.positions
        room = self.config.max_tokens if positions is None else min(self.config.max_tokens, positions - len(tokens))
        if room < 1 or (most is not None and most > room):
            raise RequestError(
                400,
                f"The prompt has {len(tokens)} tokens and max_tokens={most}; there is room for {max(room, 0)} more.",
            )
        return room

    # -- promises -------------------------------------------------------------------------------------------------------

    async def _retrieve(self, request: Request, owner: str) -> Response:
        asked = told.parse(told.OfFuture, await request.body())
        promise = self.promises.get(asked.request_id, owner)
        if not await self.promises.wait(promise, lambda: self.engine.stopping or not self.engine.alive):
            waiting = {"type": "try_again", "request_id": promise.request_id, "queue_state": "active"}
            return JSONResponse(waiting, 408)
        found = promise.outcome.result()
        if isinstance(found, RequestError):
            if found.status == 503:
                raise found
            category = "server" if found.status >= 500 else "user"
            return JSONResponse({"error": found.message, "category": category})
        if isinstance(found, bytes):
            return Response(found, media_type=wire.PROTOBUF)
        return JSONResponse(found)

    async def _cancel(self, request: Request, owner: str) -> Response:
        promise = self.promises.get(told.parse(told.OfFuture, await request.body()).request_id, owner)
        if promise.cancel is not None:
            promise.cancel()
        return Response(status_code=204)

    # -- runs and checkpoints -------------------------------------------------------------------------------------------

    async def _weights_info(self, request: Request, owner: str) -> Response:
        checkpoint = self.keeping.find(told.parse(told.OfPath, await request.body()).tinker_path, owner)
        model = self.keeping.model(checkpoint.model_id, owner)
        facts = {"is_lora": True, "lora_rank": model.rank, "train_unembed": model.train_unembed}
        facts |= {"train_attn": model.train_attn, "train_mlp": model.train_mlp}
        return JSONResponse({"base_model": self.names[0], **facts})

    async def _runs(self, request: Request, owner: str) -> Response:
        own = [one for one in self.keeping.models.values() if one.owner == owner]
        part, cursor = _page(request, sorted(own, key=lambda one: one.created, reverse=True))
        return JSONResponse({"training_runs": [await _aside(self._described, one) for one in part], "cursor": cursor})

    async def _run(self, request: Request, owner: str) -> Response:
        return JSONResponse(await _aside(self._described, self.keeping.model(request.path_params["run"], owner)))

    def _described(self, model: Model) -> dict[str, Any]:
        last: dict[str, dict[str, Any]] = {}
        for one in self.keeping.checkpoints(model.model_id):
            last[one.kind] = one.described()
        return {
            "training_run_id": model.model_id,
            "base_model": self.names[0],
            "model_owner": model.owner,
            "is_lora": True,
            "corrupted": False,
            "lora_rank": model.rank,
            "last_request_time": model.last_request,
            "last_checkpoint": last.get("weights"),
            "last_sampler_checkpoint": last.get("sampler_weights"),
            "user_metadata": model.user_metadata,
        }

    async def _checkpoints(self, request: Request, owner: str) -> Response:
        run = request.path_params.get("run")
        models = [one.model_id for one in self.keeping.models.values() if one.owner == owner]
        if run is not None:
            models = [self.keeping.model(run, owner).model_id]

        def found() -> list[dict[str, Any]]:
            return [one.described() for model_id in models for one in self.keeping.checkpoints(model_id)]

        part, cursor = _page(request, await _aside(found))
        return JSONResponse({"checkpoints": part, "cursor": cursor})

    def _named(self, request: Request, owner: str) -> Checkpoint:
        own = request.path_params
        return self.keeping.find(f"tinker://{own['run']}/{own['kind']}/{own['name']}", owner)

    async def _remove(self, request: Request, owner: str) -> Response:
        checkpoint = self._named(request, owner)

        def remove() -> None:
            self.keeping.remove(checkpoint)
            self.workshop.forget(checkpoint.folder / "adapter")

        await asyncio.wrap_future(self.engine.do(remove))
        return Response(status_code=204)

    async def _expire(self, request: Request, owner: str) -> Response:
        asked = told.parse(told.Ttl, await request.body() or b"{}")
        await _aside(self.keeping.expire, self._named(request, owner), asked.ttl_seconds)
        return Response(status_code=204)


class _Sampling:
    """Answers to one prompt under way."""

    def __init__(
        self,
        own: Training,
        asked: told.Sample,
        tokens: list[int],
        how: Drawing,
        checkpoint: Checkpoint | None,
        promise: Promise,
    ):
        self._own, self._asked, self._tokens, self._how = own, asked, tokens, how
        self._checkpoint, self._promise = checkpoint, promise
        self._rows: list[Drawn] = []
        self._left = asked.num_samples
        self._scores: list[tuple[float, list[tuple[int, float]]]] = []

    def begin(self) -> None:
        """By the thread that answers: take the weights up, look at the prompt, and write."""
        if self._promise.outcome.done():
            return
        try:
            self._begin()
        except Exception as error:
            self._promise.set(self._own.engine.told(error))
            self.cancel()

    def _begin(self) -> None:
        own, served = self._own, self._own._served
        tokenizer = own._opened.setup.encoder.tokenizer
        if self._checkpoint is not None:
            snapshot = own.workshop.snapshot(self._checkpoint.folder / "adapter")
            served = Served(own._opened, snapshot.key, own.workshop.group)
        if self._asked.prompt_logprobs or self._asked.topk_prompt_logprobs:
            group = served.group
            assert group is not None, "it writes"
            self._scores = scores(group, served.key, self._tokens, self._places, self._asked.topk_prompt_logprobs)
        self._rows = [
            Drawn(self._tokens, self._how, tokenizer, self._told, served.key, place)
            for place in range(self._asked.num_samples)
        ]
        if self._checkpoint is not None:
            snapshot.rows += self._rows
        own.engine.write(served, self._rows)

    @property
    def _places(self) -> list[int]:
        """Tokens of the prompt that are looked at."""
        count = len(self._tokens)
        first = 1 if self._asked.prompt_logprobs_last_n is None else max(1, count - self._asked.prompt_logprobs_last_n)
        return list(range(first, count))

    def cancel(self) -> None:
        """Nobody wants them any more."""
        for row in self._rows:
            row.cancelled = True
        self._promise.set(RequestError(400, "It was cancelled."))

    def _told(self, event: Event) -> None:
        """By the thread that answers."""
        if isinstance(event, RequestError):
            for row in self._rows:
                row.cancelled = True
            self._promise.set(event)
        elif isinstance(event, End):
            self._left -= 1
            if not self._left:
                self._promise.set(self._result())

    def _result(self) -> bytes:
        count, places = len(self._tokens), self._places
        logprobs = likeliest = None
        if self._asked.prompt_logprobs:
            logprobs = wire.blank(count)
            for place, (value, _) in zip(places, self._scores, strict=True):
                logprobs[place] = value
        if self._asked.topk_prompt_logprobs:
            rows: list[Sequence[tuple[int, float]] | None] = [None] * count
            for place, (_, best) in zip(places, self._scores, strict=True):
                rows[place] = best
            likeliest = rows
        own = self._own
        own.metrics.tokens.labels("tinker", "answer").inc(sum(len(row.ids) for row in self._rows))
        return wire.sampled([row.answered for row in self._rows], logprobs, likeliest)


class _Told:
    """A route's endpoint: errors are told as the SDK reads them."""

    def __init__(self, call: Call, refused: Callable[[Request, str], Awaitable[None]]):
        self._call, self._refused = call, refused
        functools.update_wrapper(self, call)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive, send)
        try:
            response = await self._call(request, who(request))
        except (RequestError, LoraLabError) as error:
            status = error.status if isinstance(error, RequestError) else 400
            if status < 500 and status not in (408, 429):  # the SDK asks again by the same number then
                await self._refused(request, who(request))
            headers = error.headers if isinstance(error, RequestError) else {}
            response = JSONResponse({"detail": str(error)}, 400 if status == 409 else status, headers=headers)
        await response(scope, receive, send)


def _there(learner: Learner | None) -> Learner:
    if learner is None:
        raise RequestError(404, "The model has no weights. Look at the error of its creation.")
    return learner


def _check_optimizer(told_of: dict[str, Any] | None) -> None:
    kind = None if told_of is None else told_of.get("type", "adamw")
    if kind not in (None, "adamw"):
        raise RequestError(400, f"optimizer: type={str(kind)[:50]!r}: there is adamw alone.")


async def _aside(call: Callable[..., Any], *given: Any) -> Any:
    """Something that takes a moment, beside the loop."""
    return await asyncio.to_thread(call, *given)


def _page(request: Request, rows: list[Any]) -> tuple[list[Any], dict[str, int]]:
    """The part of a list that is asked for, and where it lies."""
    numbers = {name: request.query_params.get(name, default) for name, default in (("offset", "0"), ("limit", "100"))}
    wrong = next((name for name, value in numbers.items() if not re.fullmatch(r"\d{1,9}", value)), None)
    if wrong is not None:
        raise RequestError(400, f"{wrong}: must be a whole number.")
    offset, limit = int(numbers["offset"]), int(numbers["limit"])
    return rows[offset : offset + limit], {"offset": offset, "limit": limit, "total_count": len(rows)}
