"""Whose turn it is: requests of a model run in the order of their numbers; those of several models that wait share passes."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import itertools
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_lab.serve.tinker import wire
from lora_lab.serve.tinker.promises import Promise
from lora_lab.serve.tinker.wire import Learn
from lora_lab.serve.tinker.workshop import Learner, Task
from lora_lab.serve.wishes import RequestError

if TYPE_CHECKING:
    from lora_lab.serve.engine import Engine
    from lora_lab.serve.tinker.workshop import Workshop

_GAP_SECONDS = 10.0  # that an earlier number is waited for: it may have been refused before it was read
_COMPANY, _MOST_COMPANY = (
    0.2,
    0.5,
)  # how long a pass waits for clients that learned lately: of the last one's time; seconds


@dataclasses.dataclass(eq=False)
class Job:
    """A request to a model."""

    promise: Promise
    work: Learn | Callable[[Learner | None], dict[str, Any]]
    came: float
    task: Task | None = None


@dataclasses.dataclass(eq=False)
class Line:
    """The requests to one model."""

    model_id: str
    waiting: list[tuple[int, int, Job]] = dataclasses.field(default_factory=list)  # a heap by number
    next_number: int = 0
    learner: Learner | None = None
    learned_at: float = 0.0  # when its last request to learn was done
    closed: str = ""  # why it takes nothing more


class Trainer:
    """See above."""

    def __init__(self, engine: Engine, workshop: Workshop, most: int, clock: Callable[[], float] = time.monotonic):
        """`most`: requests that wait."""
        self._engine, self.workshop, self._most, self._clock = engine, workshop, most, clock
        self._lock = threading.Lock()  # of the lines
        self._lines: dict[str, Line] = {}
        self._order = itertools.count()
        self._woken = False
        self._last_seconds = 0.0  # of the last request to learn
        self.shared = 0  # passes of several clients

    # -- from the loop --------------------------------------------------------------------------------------------------

    def open(self, model_id: str) -> None:
        """A line for a new model."""
        with self._lock:
            self._lines[model_id] = Line(model_id)

    def add(
        self, model_id: str, number: int, promise: Promise, work: Learn | Callable[[Learner | None], dict[str, Any]]
    ) -> None:
        """Put a request into its model's line.

        Raises:
            RequestError: there is no such line, too many wait, or the server stops.
        """
        with self._lock:
            if sum(len(one.waiting) for one in self._lines.values()) >= self._most:
                raise RequestError(
                    429, "Too many requests wait already. Try again later.", headers={"retry-after": "1"}
                )
            line = self._lines.get(model_id)
            if line is None or line.closed:
                why = line.closed if line is not None else "it was not loaded since the server was started"
                raise RequestError(
                    404, f"model_id={model_id}: takes no requests: {why}. Load a checkpoint of it as a new model."
                )
            heapq.heappush(line.waiting, (number, next(self._order), Job(promise, work, self._clock())))
        self._wake()

    def pass_over(self, model_id: str, number: int) -> None:
        """A request was refused: nobody has to wait for its number."""
        if self.has(model_id):
            with contextlib.suppress(RequestError):  # then it is waited for, which harms little
                self.add(model_id, number, Promise("", ""), lambda _: {})

    def close(self, model_id: str, why: str) -> None:
        """End a line and let its adapter go."""
        with self._lock:
            line = self._lines.get(model_id)
            if line is None or line.closed:
                return
            line.closed = why
        self._engine.do(lambda: self._end(line))

    def models_of(self, session_id: str) -> list[str]:
        """A session's models that are in memory, or will be."""
        return [
            name for name, line in list(self._lines.items()) if name.startswith(f"{session_id}:") and not line.closed
        ]

    @property
    def open_models(self) -> int:
        """Models that are in memory, or will be."""
        return sum(not line.closed for line in list(self._lines.values()))

    # -- the thread that answers ----------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._lock:
            if self._woken:
                return
            self._woken = True
        self._engine.do(self._turn)

    def _later(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._wake_again)
        timer.daemon = True
        timer.start()

    def _wake_again(self) -> None:
        try:
            self._wake()
        except RequestError:  # it stops
            return

    def _turn(self) -> None:
        """Do what can be done now: all that takes little, and one pass."""
        with self._lock:
            self._woken = False
        try:
            left = self._work()
        except Exception as error:  # a fault of ours: nobody waits for ever
            told = self._engine.told(error)
            for line in list(self._lines.values()):
                self._fail_all(line, told)
            return
        if left == 0:
            self._wake_again()
        elif left is not None:
            self._later(left)

    def _work(self) -> float | None:
        """Seconds until there is more to do; None: nothing."""
        learns: list[tuple[Line, Job]] = []
        wait: float | None = None
        for line in list(self._lines.values()):
            while (job := self._head(line)) is not None and not isinstance(job.work, Learn):
                self._pop(line)
                self._call(line, job)
            if job is not None:
                learns.append((line, job))
            elif line.waiting:  # an earlier number is to come
                left = max(0.01, _GAP_SECONDS - (self._clock() - line.waiting[0][2].came))
                wait = left if wait is None else min(wait, left)
        if not learns:
            return wait
        company = self._company(learns)
        if company:
            return company
        self._learn(learns)
        return 0

    def _head(self, line: Line) -> Job | None:
        """The request of a line whose turn it is."""
        with self._lock:
            if not line.waiting:
                return None
            number, _, job = line.waiting[0]
            if number > line.next_number and self._clock() - job.came < _GAP_SECONDS:
                return None
            line.next_number = max(line.next_number, number)
            return job

    def _pop(self, line: Line) -> None:
        with self._lock:
            number, _, _ = heapq.heappop(line.waiting)
            line.next_number = max(line.next_number, number + 1)

    def _call(self, line: Line, job: Job) -> None:
        assert not isinstance(job.work, Learn), "told apart by whoever calls"
        try:
            job.promise.set(job.work(line.learner))
        except Exception as error:
            job.promise.set(self._engine.told(error))

    def _company(self, learns: list[tuple[Line, Job]]) -> float:
        """Seconds that a pass should wait for clients who learned just now and will ask again; 0: it should not."""
        if any(job.task is not None for _, job in learns) or not self.workshop.group.shares:
            return 0
        patience, now = min(_COMPANY * self._last_seconds, _MOST_COMPANY), self._clock()
        oldest = min(job.came for _, job in learns)
        asking = {id(line) for line, _ in learns}
        awaited = [
            line.learned_at + patience
            for line in list(self._lines.values())
            if line.learned_at and id(line) not in asking and not line.waiting and not line.closed
        ]
        until = min(max(awaited, default=0.0), oldest + patience)
        return max(0.0, until - now)

    def _learn(self, learns: list[tuple[Line, Job]]) -> None:
        """One pass, of those that have waited longest."""
        ready: list[tuple[Line, Job, Task]] = []
        for line, job in sorted(learns, key=lambda one: one[1].came):
            if job.task is None:
                assert isinstance(job.work, Learn), "told apart by whoever calls"
                if line.learner is None:
                    self._pop(line)
                    job.promise.set(
                        RequestError(
                            404, f"model_id={line.model_id}: has no weights. Look at the error of its creation."
                        )
                    )
                    continue
                job.task = self.workshop.task(line.learner, job.work)
            ready.append((line, job, job.task))
        if not ready:
            return
        tasks = self.workshop.chosen([task for *_, task in ready])
        chosen = [one for one in ready if one[2] in tasks]
        began = self._clock()
        failed = self.workshop.run(tasks)
        self.shared += len(tasks) > 1
        seconds = self._clock() - began
        for place, (line, job, task) in enumerate(chosen):
            task.seconds += seconds
            if place in failed:
                self._pop(line)
                job.promise.set(self._engine.told(failed[place]))
            elif task.finished:
                self._pop(line)
                self._finish(line, job, task)

    def _finish(self, line: Line, job: Job, task: Task) -> None:
        if task.gradients is not None:
            task.learner.add(task.gradients, task.asked)
        job.promise.set(wire.learned(*task.result()))
        line.learned_at, self._last_seconds = self._clock(), task.seconds

    def _end(self, line: Line) -> None:
        self._fail_all(line, RequestError(404, f"model_id={line.model_id}: {line.closed}."))
        if line.learner is not None:
            learner, line.learner = line.learner, None
            self.workshop.drop(learner)
        self._lines.pop(line.model_id, None)

    def _fail_all(self, line: Line, error: RequestError) -> None:
        with self._lock:
            jobs, line.waiting = [job for *_, job in line.waiting], []
        for job in jobs:
            job.promise.set(error)

    def has(self, model_id: str) -> bool:
        """Whether a model is in memory, or will be."""
        line = self._lines.get(model_id)
        return line is not None and not line.closed

    def give(self, model_id: str, learner: Learner) -> None:
        """A line's adapter, once it is there. By the thread that answers."""
        self._lines[model_id].learner = learner
