"""The one thread that touches the model: it takes requests from a queue, and answers all of them a token at a time.

Whoever asks is told by callbacks, which only put things into queues of their own: a slow reader keeps nobody waiting.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lora_lab.data.encode import Example
from lora_lab.errors import LoraLabError
from lora_lab.run.answering import predicted
from lora_lab.runtime.memory import free_bytes, is_out_of_memory
from lora_lab.serve import logs
from lora_lab.serve.batch import Batch
from lora_lab.serve.group import Group
from lora_lab.serve.shelf import Served, Shelf
from lora_lab.serve.wishes import RequestError
from lora_lab.serve.words import Event, Row, Wish, processors_of

if TYPE_CHECKING:
    from lora_lab.serve.metrics import Metrics

T = TypeVar("T")
_PROMPT_TOKENS = 4096  # read between two tokens of the others, about and at most


class Engine:
    """See above."""

    def __init__(
        self,
        shelf: Shelf,
        max_rows: int,
        max_waiting: int,
        metrics: Metrics,
        cache_gib: float | None = None,
        processes: int = 1,
    ):
        """
        Args:
            cache_gib: for keys and values; None: half of what is free now, because they are copied when rows join.
            processes: that share what is free.
        """
        self.shelf, self._max_rows, self._max_waiting, self._metrics = shelf, max_rows, max_waiting, metrics
        self._cache = free_bytes(shelf.device) // 2 // processes if cache_gib is None else int(cache_gib * 2**30)
        self._cached = 0  # bytes that are reserved
        self._changed = threading.Condition()
        self._rows: collections.deque[tuple[Served, Row]] = collections.deque()  # these four under the condition
        self._asked: collections.deque[_Asked] = collections.deque()
        self._calls: collections.deque[tuple[Callable[[], Any], Future[Any]]] = collections.deque()
        self._stop_at: float | None = None
        self._leaving: list[tuple[Served, Future[None]]] = []
        self._lanes: dict[
            tuple[int, str], list[Batch]
        ] = {}  # by group and lane; several where rows do not lie side by side
        self._groups: dict[int, Group] = {}
        self._thread = threading.Thread(target=self._run, name="lora_lab engine", daemon=True)
        metrics.watch(
            lambda: self.waiting, lambda: self.writing, lambda: len(shelf.served) - 1, lambda: self._cached, self._cache
        )

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._rows) + len(self._asked)

    @property
    def writing(self) -> int:
        """Answers that are being written."""
        return sum(len(batch.rows) for lane in list(self._lanes.values()) for batch in list(lane))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def stopping(self) -> bool:
        """Whether it takes nothing new."""
        return self._stop_at is not None

    # -- from other threads ---------------------------------------------------------------------------------------------

    def at_once(self, served: Served, wish: Wish) -> bool:
        """Whether an answer comes as a whole, by transformers' `generate`."""
        group = served.group
        beams = getattr(served.setup.config.task, "num_beams", 1) > 1 and not wish.temperature
        return group is None or not group.writes or bool(group.against_steps) or beams

    def row(self, served: Served, ids: list[int], wish: Wish, send: Callable[[Event], None]) -> Row:
        """An answer to a prompt, for `write`."""
        group = served.group
        assert group is not None, "it was asked for what it can"
        processors = processors_of(group.base, served.settings, len(ids), wish.max_tokens)
        return Row(ids, wish, served.end_tokens, served.setup.encoder.tokenizer, send, served.key, processors)

    def write(self, served: Served, rows: Sequence[Row]) -> None:
        """Begin answers.

        Raises:
            RequestError: too many wait already, one would never fit into memory, or it is stopping.
        """
        self._check_memory(served, rows)
        with self._changed:
            self._check_room(served, len(rows))
            self._rows.extend((served, row) for row in rows)
            self._changed.notify()

    def predict(self, served: Served, examples: Sequence[Example]) -> Future[dict[str, dict[str, Any]]]:
        """What a model says of rows, by their origins.

        Raises:
            RequestError: too many wait already, or it is stopping.
        """
        one = _Asked(served, list(examples), Future())
        with self._changed:
            self._check_room(served, 1)
            self._asked.append(one)
            self._changed.notify()
        return one.found

    def do(self, call: Callable[[], T]) -> Future[T]:
        """Let the thread do something between two tokens."""
        future: Future[T] = Future()
        with self._changed:
            if self._stop_at is not None:
                raise _stopping()
            self._calls.append((call, future))
            self._changed.notify()
        return future

    def remove(self, served: Served) -> Future[None]:
        """Take an adapter away once it has answered what it was asked; it takes no further requests from now on."""
        served.leaving = True
        future: Future[None] = Future()
        self.do(lambda: self._leaving.append((served, future)))
        return future

    def stop(self, seconds: float) -> None:
        """Take nothing new; open answers may go on for so many seconds, and are told then."""
        with self._changed:
            self._stop_at = time.monotonic() + seconds
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait for the thread to end."""
        self._thread.join(seconds)

    def _check_room(self, served: Served, count: int) -> None:
        if self._stop_at is not None:
            raise _stopping()
        if served.leaving:
            raise RequestError(404, f"The model '{served.name}' is not served any more.", code="model_not_found")
        if self.waiting + count > self._max_waiting:
            raise RequestError(
                503, f"{self.waiting} requests wait already. Try again later.", "server_error", "overloaded"
            )

    def _check_memory(self, served: Served, rows: Sequence[Row]) -> None:
        group = served.group
        assert group is not None, "it was asked for what it can"
        most = max((row.most_tokens for row in rows), default=0)
        if most * group.bytes_per_token > self._cache:
            raise RequestError(
                400,
                f"The prompt and its answer may become {most} tokens, whose keys and values take {most * group.bytes_per_token / 2**30:.2f} "
                f"GiB, and there are {self._cache / 2**30:.2f} (serve.cache_gib). Ask for fewer tokens.",
                code="context_length_exceeded",
                param="max_tokens",
            )

    # -- the thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        going = True
        while going:
            try:
                going = self._turn()
            except Exception as error:  # a fault of ours: those who are asked now are told, and the others go on
                self._tell_all([], self._failed(error))

    def _turn(self) -> bool:
        """One token for everybody; False: there is nothing left to do, ever."""
        with self._changed:
            while not (self._rows or self._asked or self._calls or self._lanes or self._leaving):
                if self._stop_at is not None:
                    return False
                self._changed.wait()
            calls, asked = list(self._calls), list(self._asked)
            self._calls.clear()
            self._asked.clear()
            late = self._stop_at is not None and time.monotonic() >= self._stop_at
        if late:
            self._tell_all([*(one.found for one in asked), *(future for _, future in calls)])
            return False
        for call, future in calls:
            _fulfil(future, call)
        self._say(asked)
        self._admit()
        for key in list(self._lanes):
            for batch in self._lanes[key]:
                self._guarded(batch, batch.step)
            self._lanes[key] = [batch for batch in self._lanes[key] if batch.rows]
            if not self._lanes[key]:
                del self._lanes[key]
        if not self._lanes:
            self._cached = 0
        self._let_go()
        return True

    def _admit(self) -> None:
        """Let waiting rows join, as many as there is room for; those that came first go first."""
        open_rows = {key: [row for batch in lane for row in batch.rows] for key, lane in self._lanes.items()}
        self._cached = self._needed(open_rows)
        new: dict[tuple[int, str], list[Row]] = {}
        room, tokens = self._max_rows - self.writing, _PROMPT_TOKENS
        while room > 0 and tokens > 0:
            with self._changed:
                if not self._rows:
                    break
                served, row = self._rows.popleft()
            if row.cancelled:
                continue
            group = served.group
            assert group is not None, "it was asked for what it can"
            key = (id(group), group.lane(row))
            self._groups[id(group)] = group
            open_rows[key] = [*open_rows.get(key, []), row]
            needed = self._needed(open_rows)
            if needed > self._cache and self._cached:  # it waits until others have ended
                with self._changed:
                    self._rows.appendleft((served, row))
                break
            self._cached = needed
            new.setdefault(key, []).append(row)
            room, tokens = room - 1, tokens - len(row.prompt)
        for key, rows in new.items():
            group = self._groups[key[0]]
            lane = self._lanes.setdefault(key, [])
            for part in [[row] for row in rows] if group.against_beside else [rows]:
                if not lane or group.against_beside:
                    lane.append(group.batch())
                batch = lane[-1]
                self._guarded(batch, functools.partial(batch.join, part), part)

    def _needed(self, rows: Mapping[tuple[int, str], Sequence[Row]]) -> int:
        """Bytes of keys and values when all of these have become as long as they may; rows of a batch are kept as long as its longest."""
        total = 0
        for (group, _), own in rows.items():
            sizes = [row.most_tokens for row in own] or [0]
            tokens = sum(sizes) if self._groups[group].against_beside else len(own) * max(sizes)
            total += tokens * self._groups[group].bytes_per_token
        return total

    def _guarded(self, batch: Batch, work: Callable[[], None], joining: Sequence[Row] = ()) -> None:
        """Do something with a batch. What goes wrong is told to its rows, and ends nothing else."""
        try:
            work()
        except Exception as error:
            told = self._failed(error)
            for row in {id(row): row for row in (*batch.clear(), *joining)}.values():
                row.fail(told)
            return
        self._metrics.passes.inc()
        self._metrics.rows.observe(len(batch.rows))

    def told(self, error: Exception) -> RequestError:
        """What a client is told of an error of the thread's."""
        return self._failed(error)

    def _failed(self, error: Exception) -> RequestError:
        """What a client is told of an error here; the log has its kind and place, and no text."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, LoraLabError):
            return RequestError(400, str(error))
        kind = "memory" if is_out_of_memory(error) else type(error).__name__
        self._metrics.failures.labels(kind).inc()
        place = traceback.extract_tb(error.__traceback__)[-1]
        logs.say(self._metrics, "failed", f"{kind} in {place.filename}:{place.lineno}")  # what it says may hold a text
        if kind == "memory":
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return RequestError(
                503,
                "There is not enough memory for this now. Try again later, or ask for less.",
                "server_error",
                "memory",
            )
        return RequestError(500, "The server failed at this request.", "server_error")

    def _say(self, asked: Sequence[_Asked]) -> None:
        """Answer what was asked of rows, those of one adapter together."""
        by_adapter: dict[int, list[_Asked]] = {}
        for one in asked:
            by_adapter.setdefault(id(one.served), []).append(one)
        for those in by_adapter.values():
            try:
                found = self._said_of(those)
            except Exception:  # one of them may be at fault
                for one in those:
                    _fulfil(one.found, functools.partial(self._by_itself, one))
                continue
            for one, own in zip(those, found, strict=True):
                _fulfil(one.found, functools.partial(_same, own))

    def _by_itself(self, one: _Asked) -> dict[str, dict[str, Any]]:
        try:
            return self._said_of([one])[0]
        except Exception as error:
            raise self._failed(error) from error

    def _said_of(self, those: Sequence[_Asked]) -> list[dict[str, dict[str, Any]]]:
        served = those[0].served
        group = served.group
        assert group is not None, "it was asked for what it can"
        examples = [
            dataclasses.replace(example, origin=f"{place}\0{example.origin}")
            for place, one in enumerate(those)
            for example in one.examples
        ]
        with group.inside(served.key):
            model: Any = group.model
            found = predicted(served.setup, model, examples)
        parts: list[dict[str, dict[str, Any]]] = [{} for _ in those]
        for name, one_row in found.items():
            place, _, origin = name.partition("\0")
            parts[int(place)][origin] = one_row
        return parts

    def _let_go(self) -> None:
        """Take adapters away that have answered everything."""
        busy = {row.adapter for lane in self._lanes.values() for batch in lane for row in batch.rows}
        with self._changed:
            busy |= {row.adapter for _, row in self._rows} | {one.served.key for one in self._asked}
        for served, future in list(self._leaving):
            if served.key not in busy:
                self._leaving.remove((served, future))
                _fulfil(future, functools.partial(self.shelf.take, served))

    def _tell_all(self, taken: Sequence[Future[Any]], why: RequestError | None = None) -> None:
        """Say to everybody that there will be no answer; by default because it is stopping.

        Args:
            taken: of those that do not wait any more.
        """
        with self._changed:
            waiting, self._rows = list(self._rows), collections.deque()
        rows = [row for lane in self._lanes.values() for batch in lane for row in batch.clear()]
        for row in (*rows, *(row for _, row in waiting)):
            row.fail(why or _stopping())
        for future in [*taken, *(future for _, future in self._leaving)]:
            _fulfil(future, _refuse)
        self._lanes.clear()
        self._leaving.clear()


@dataclasses.dataclass(frozen=True)
class _Asked:
    """Rows that something is to be said of."""

    served: Served
    examples: list[Example]
    found: Future[dict[str, dict[str, Any]]]


def _stopping() -> RequestError:
    return RequestError(503, "The server is stopping.", "server_error", "stopping")


def _same(found: T) -> T:
    return found


def _refuse() -> None:
    raise _stopping()


def _fulfil(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)


def whole(served: Served, prompts: Sequence[str], wish: Wish) -> list[str]:
    """Answers that are not written token by token but by transformers' `generate`: those of encoder-decoders, by beams, or of models
    that keep something else than keys and values."""
    group = served.group
    assert group is not None, "it was asked for what it can"
    task: Any = served.setup.task
    options: dict[str, Any] = {"max_new_tokens": wish.max_tokens}
    if wish.temperature > 0:
        torch.manual_seed(torch.seed() if wish.seed is None else wish.seed)
        options |= {"do_sample": True, "num_beams": 1, "temperature": wish.temperature, "top_p": wish.top_p, "top_k": 0}
    with torch.no_grad(), group.inside(served.key):
        found: list[str] = task.generate(group.model, list(prompts), **options)
    for place, text in enumerate(found):
        cuts = [cut for stop in wish.stops if (cut := text.find(stop)) >= 0]
        found[place] = text[: min(cuts)] if cuts else text
    return found
