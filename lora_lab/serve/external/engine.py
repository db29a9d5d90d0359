"""What stands in the place of the thread with the model where another program answers.

Everything before and after it stays as it is: keys, limits, masks, the template and the tokens of the run, streams, the log. The
program is asked in token ids, so that no template of its own has a part in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from lora_lab.base.positions import usable_positions
from lora_lab.errors import BaseModelError, ConfigError, ExportError, RunError
from lora_lab.runtime import console, storage
from lora_lab.serve import logs
from lora_lab.serve.external import proof
from lora_lab.serve.external.dialects import DIALECTS, Dialect
from lora_lab.serve.external.program import Program, Refused, free_port
from lora_lab.serve.group import BASE
from lora_lab.serve.shelf import BASE_NAME, Opened, Served, Shelf
from lora_lab.serve.wishes import RequestError
from lora_lab.serve.words import End, Event, Piece, Wish, generation_settings, processors_of

if TYPE_CHECKING:
    from lora_lab.data.encode import Example
    from lora_lab.serve.config import ServeConfig
    from lora_lab.serve.embeddings import Embedder
    from lora_lab.serve.metrics import Metrics

T = TypeVar("T")


@dataclasses.dataclass(eq=False)
class Elsewhere(Served):
    """Something that another program answers."""

    room: int | None = None  # tokens of a prompt and its answer
    by: str = ""

    @property
    def completes(self) -> bool:
        return True

    @property
    def predicts(self) -> str:
        return ""

    @property
    def positions(self) -> int | None:
        return self.room

    @property
    def exactness(self) -> str:
        return f"answered by {self.by}"


@dataclasses.dataclass(eq=False)
class Line:
    """One answer."""

    prompt: list[int]
    wish: Wish
    send: Callable[[Event], None]
    cancelled: bool = False


class ElsewhereShelf(Shelf):
    """What another program answers; of the base no weights are loaded here."""

    def __init__(self, base: Opened, name: str):
        super().__init__(base)
        self._name = name

    def embedder(self) -> Embedder:
        raise BaseModelError(f"Vectors are not served with serve.engine={self._name}. Serve the base without it.")


class ExternalEngine:
    """Asks the program for one answer with each of its threads."""

    def __init__(
        self, program: Program, dialect: Dialect, penalties: dict[str, float], config: ServeConfig, metrics: Metrics
    ):
        """
        Args:
            penalties: of tokens that were there before, by the adapters' keys.
        """
        self._program, self._dialect, self._penalties = program, dialect, penalties
        self._max_waiting, self._metrics = config.max_waiting, metrics
        self._threads = ThreadPoolExecutor(config.max_rows, thread_name_prefix="lora_lab engine")
        self._lock = threading.Lock()
        self._waiting = self._writing = 0
        self._stop_at: float | None = None
        metrics.watch(lambda: self._waiting, lambda: self._writing, lambda: len(penalties) - 1, lambda: 0, 0)

    @property
    def alive(self) -> bool:
        return self._program.alive

    @property
    def stopping(self) -> bool:
        """Whether it takes nothing new."""
        return self._stop_at is not None

    def at_once(self, served: Served, wish: Wish) -> bool:
        """Never."""
        return False

    def row(self, served: Served, ids: list[int], wish: Wish, send: Callable[[Event], None]) -> Line:
        """An answer to a prompt, for `write`.

        Raises:
            RequestError: it asks for what the program does not tell exactly.
        """
        if wish.top_logprobs is not None:
            raise RequestError(400, "logprobs: not with serve.engine. Ask without.", param="logprobs")
        return Line(ids, wish, send)

    def write(self, served: Served, rows: Sequence[Line]) -> None:
        """Begin answers.

        Raises:
            RequestError: too many wait already, it is stopping, or the program has ended.
        """
        with self._lock:
            if self._stop_at is not None:
                raise _stopping()
            if not self.alive:
                raise _ended()
            if self._waiting + len(rows) > self._max_waiting:
                raise RequestError(
                    503, f"{self._waiting} requests wait already. Try again later.", "server_error", "overloaded"
                )
            self._waiting += len(rows)
        for row in rows:
            self._threads.submit(self._written, served, row)

    def predict(self, served: Served, examples: Sequence[Example]) -> Future[dict[str, dict[str, Any]]]:
        """Nothing here says anything of rows."""
        raise AssertionError("no adapter that is served so is asked at such a route")

    def do(self, call: Callable[[], T]) -> Future[T]:
        """
        Raises:
            RequestError: always; the program's adapters are those that it was started with.
        """
        raise _fixed()

    def remove(self, served: Served) -> Future[None]:
        """
        Raises:
            RequestError: as `do`.
        """
        raise _fixed()

    def stop(self, seconds: float) -> None:
        """Take nothing new; open answers may go on for so many seconds, and are told then."""
        self._stop_at = time.monotonic() + seconds

    def join(self, seconds: float) -> None:
        """End the program."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._program.stop()

    def _written(self, served: Served, row: Line) -> None:
        with self._lock:
            self._waiting, self._writing = self._waiting - 1, self._writing + 1
        try:
            self._write(served, row)
        except RequestError as error:
            row.send(error)
        except Refused as error:
            row.send(self._failed(f"engine {error.status}"))
        except (OSError, http.client.HTTPException) as error:
            row.send(self._failed(type(error).__name__) if self.alive else _ended())
        except Exception as error:
            row.send(self._failed(type(error).__name__))
        finally:
            with self._lock:
                self._writing -= 1

    def _write(self, served: Served, row: Line) -> None:
        adapter = None if served.key == BASE else int(served.key)
        path, body = self._dialect.question(
            row.prompt, row.wish, adapter, served.end_tokens, self._penalties[served.key]
        )
        reason, tokens, pieces = "stop", None, 0
        if row.cancelled:
            return
        with contextlib.closing(self._program.stream(path, body)) as events:
            for event in events:
                if row.cancelled:
                    return
                if self._stop_at is not None and time.monotonic() >= self._stop_at:
                    raise _stopping()
                told = self._dialect.told(event)
                if told.text:
                    pieces += 1
                    row.send(Piece(told.text, ()))
                reason = told.reason or reason
                tokens = told.tokens if told.tokens is not None else tokens
        row.send(End(reason, len(row.prompt), pieces if tokens is None else tokens))

    def _failed(self, kind: str) -> RequestError:
        """What a client is told of a failure; the log has its kind, and no text."""
        self._metrics.failures.labels(kind).inc()
        logs.say(self._metrics, "failed", f"the other program: {kind}")
        return RequestError(502, "The program behind this server failed at this request.", "server_error")


def _stopping() -> RequestError:
    return RequestError(503, "The server is stopping.", "server_error", "stopping")


def _ended() -> RequestError:
    return RequestError(503, "The program behind this server has ended.", "server_error", "stopping")


def _fixed() -> RequestError:
    return RequestError(400, "Adapters neither come nor go with serve.engine: name all of them at the start.")


# -- from runs to a program that answers as they do ---------------------------------------------------------------------------


def started(
    runs: Sequence[Opened], base: Opened, config: ServeConfig, metrics: Metrics
) -> tuple[Shelf, ExternalEngine]:
    """The program with the runs' adapters, once it is certain that it answers as each of them does.

    Raises:
        LoraLabError: whatever stands against it; the program has ended then.
    """
    assert config.engine is not None, "somebody asked for it"
    dialect = DIALECTS[config.engine]()
    shelf = ElsewhereShelf(base, config.engine)
    for one in runs:
        shelf.check(one)
    _refuse(runs, config.engine)
    exports = [_exported(one, dialect, config.engine) for one in runs]
    penalties = {BASE: _penalty(base), **{str(place): _penalty(one) for place, one in enumerate(runs)}}
    command = config.engine_command or dialect.default_command()
    weights, port = dialect.base(runs[0].setup, config.engine_base), free_port()
    words = dialect.words(command, weights, exports, port)
    console.say("engine", f"{config.engine}: {' '.join(words)}")
    program = Program(words, port, dialect.key_variable)
    try:
        with _explained(config.engine):
            program.wait()
            _prove(shelf, [*runs, base], program, dialect, config.engine)
    except BaseException:
        program.stop()
        raise
    return shelf, ExternalEngine(program, dialect, penalties, config, metrics)


def _refuse(runs: Sequence[Opened], engine: str) -> None:
    """
    Raises:
        ConfigError: runs that no other program can answer for.
    """
    problems = []
    for one in runs:
        task = one.config.task
        if one.setup.kind.auto_class != "AutoModelForCausalLM":
            problems.append(f"serve.engine={engine}: {one.name} (task={task.name}) is not a language model's. Drop it.")
        elif getattr(task, "num_beams", 1) > 1:
            problems.append(
                f"serve.engine={engine}: {one.name} answers by task.num_beams={getattr(task, 'num_beams', 1)}. Drop one."
            )
    if problems:
        raise ConfigError(*problems)


def _exported(opened: Opened, dialect: Dialect, engine: str) -> Path:
    """The folder of a run's export, verified.

    Raises:
        ConfigError: there is none.
        LoraLabError: it is damaged, or of another base.
    """
    assert opened.run is not None, "an adapter has a run"
    folder = opened.run.path / "export" / dialect.target
    if not folder.is_dir():
        raise ConfigError(
            f"serve.engine={engine}: {opened.name} has no export for it ({folder}). Make it: "
            f"lora-lab export run={opened.run.path} export.targets=[{dialect.target}]"
        )
    found = storage.verify(folder).get("base")
    if found != opened.setup.base.fingerprint:
        raise ExportError(f"{folder}: was exported from another base than the run's. Export it anew.")
    return folder.resolve()


def _penalty(opened: Opened) -> float:
    """Of tokens that were there before, by the base's own generation settings; 1: none.

    Raises:
        ConfigError: they say something that the program does not do alike.
    """
    setup = opened.setup
    model = setup.skeleton()
    if (setup.base.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(setup.base.folder)
    found = 1.0
    settings = generation_settings(model, _ends(opened), setup.encoder.tokenizer.pad_token_id)
    for one in processors_of(model, settings, 1, 1):
        if not isinstance(one, RepetitionPenaltyLogitsProcessor):
            raise ConfigError(
                f"serve.engine: the base's generation settings ask for {type(one).__name__}, which other programs do not do alike. "
                "Serve it without serve.engine."
            )
        found = float(one.penalty)
    return found


def _ends(opened: Opened) -> list[int]:
    return Served(opened, BASE, None).end_tokens


@contextlib.contextmanager
def _explained(engine: str) -> Iterator[None]:
    """An error of the program's as one for a person."""
    try:
        yield
    except (Refused, OSError, http.client.HTTPException, KeyError, IndexError, TypeError, ValueError) as error:
        raise RunError(
            f"serve.engine={engine}: the program does not answer as its kind does ({type(error).__name__}: {error})."
        ) from error


def _prove(shelf: Shelf, every: Sequence[Opened], program: Program, dialect: Dialect, engine: str) -> None:
    """Put runs and base on the shelf, once the program has said of each what it must.

    Raises:
        LoraLabError: it says something else.
    """
    base = every[-1]
    told = dialect.positions(program)
    room = usable_positions(base.setup.skeleton())
    room = told if room is None else min(told, room)

    letter = next(iter(base.setup.encoder.tokenizer("a", add_special_tokens=False)["input_ids"]))

    def asked(prompt: Sequence[int], adapter: int | None) -> dict[int, float]:
        return dialect.probabilities(program, prompt, adapter, letter)

    for place, opened in enumerate(every):
        own = opened is not base
        said = str(proof.prove(opened, place, asked)) if own else ""
        served = Elsewhere(opened, str(place) if own else BASE, None, said, room=room, by=engine)
        if against := dialect.against_ends(program, served.end_tokens, letter):
            raise ExportError(f"{opened.name}: {against}. Name another file (serve.engine_base). Nothing is served.")
        if own:
            console.say("adapter", f"{opened.name}: {served.exactness}; probes: {said}")
        shelf.served[BASE_NAME if not own else opened.name] = served
