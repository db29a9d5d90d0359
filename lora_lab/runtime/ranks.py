"""The processes that train one run together, and everything that they say to each other. A process that trains alone is the only one:
nothing here waits for anybody then.

All of them walk through the same steps. Where one may have met what the others have not (too little memory, a signal, an error), they
`exchange` it before anybody goes on, so that they never part ways. What the ranks say goes over gloo; gradients of cards over NCCL. A
process that comes to an exchange says so in a store first; of one that is waited for in vain it is known then who did not come.

Several members share one exchange. Everybody sees the same answers in the same order.
"""

from __future__ import annotations

import dataclasses
import datetime
import io
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lora_lab import errors
from lora_lab.errors import ProcessError, TrainingError

if TYPE_CHECKING:
    import torch

    from lora_lab.runtime.launch import Place

T = TypeVar("T")
Said = TypeVar("Said", bound=type)

_NUMBERS = ("bool", "int32", "int64", "float32", "float64")  # of arrays
_GRACE = 1.0  # seconds in which a process that was killed is seen to be gone


@dataclasses.dataclass
class _Group:
    """The processes, as one of them sees them."""

    rank: int
    size: int
    local: int  # number on its machine
    store: Any  # torch's
    timeout: float  # seconds
    where: list[tuple[str, int]] = dataclasses.field(default_factory=list)  # machine and process number of each
    count: int = 0  # of the exchanges that it came to
    lost: ProcessError | None = None
    in_step: bool = False  # see `keep_step`


_group: _Group | None = None
_said: list[type] = []  # what processes say to each other beside plain values and tensors
_number = (
    0  # of this process; it keeps it when it has parted from the others, and so never writes what process 0 writes
)
_said_by_main = False  # whether process 0 told of an error, when this one met one


def size() -> int:
    """How many processes there are."""
    return 1 if _group is None else _group.size


def rank() -> int:
    """The number of this one, from 0."""
    return _number


def local() -> int:
    """Its number among those of its machine, from 0."""
    return 0 if _group is None else _group.local


def main() -> bool:
    """Whether this process writes the run's files."""
    return rank() == 0


def title(number: int) -> str:
    """A process as messages name it."""
    if _group is None or number >= len(_group.where):
        return f"process {number}"
    machine, own = _group.where[number]
    return f"process {number} ({machine}, number {own})"


# -- beginning and end --------------------------------------------------------------------------------------------------


def start(place: Place, timeout: float, backend: str) -> None:
    """Meet the other processes.

    Args:
        timeout: seconds that one waits for another.
        backend: torch's, "gloo" or "cpu:gloo,cuda:nccl".

    Raises:
        ProcessError: they do not all come.
    """
    global _group, _number
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    patience = datetime.timedelta(seconds=timeout)
    try:
        address = f"env://?rank={place.rank}&world_size={place.size}"
        store, _, _ = next(dist.rendezvous(address, timeout=patience))
        store.set_timeout(patience)
        dist.init_process_group(
            backend, store=dist.PrefixStore("lora_lab", store), rank=place.rank, world_size=place.size, timeout=patience
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ProcessError(
            f"process {place.rank} of {place.size}: did not meet the others at {place.address}:{place.port} within "
            f"hardware.timeout={timeout:g} s ({_first_line(error)}). Start all of them; MASTER_ADDR and MASTER_PORT must name a port of "
            "the machine of process 0 that the others reach."
        ) from error
    _number = place.rank
    _group = _Group(place.rank, place.size, place.local, store, timeout)
    _group.where = gather((socket.gethostname(), os.getpid()))


def stop() -> None:
    """Part from the others, when everything is said."""
    if _group is not None and _group.lost is None:
        gather(None)
    leave()


def lost() -> bool:
    """Whether another process was waited for in vain."""
    return _group is not None and _group.lost is not None


def leave() -> None:
    """Part from the others without a word: whoever goes on does so alone."""
    global _group
    if _group is None:
        return
    import torch.distributed as dist

    complete, _group = _group.lost is None, None
    if complete:  # else it would wait for those that are gone
        dist.destroy_process_group()


def last_words(text: str) -> None:
    """Say with what error this process ends. Where all meet the same one, process 0 tells of it, and nobody else."""
    global _said_by_main
    if _group is None:
        return
    try:
        _group.store.set(f"words/{_group.rank}", text)
        begun = time.monotonic()
        while not main() and not _said_by_main and time.monotonic() - begun < 2 * _GRACE:
            _said_by_main = _group.store.check(["words/0"])
            time.sleep(_GRACE / 20)
    except (RuntimeError, OSError):  # the store has gone
        return


def said_by_main() -> bool:
    """Whether process 0 tells of the error that this one ends with."""
    return _said_by_main


# -- what they say ------------------------------------------------------------------------------------------------------


def said(kind: Said) -> Said:
    """Declare a class of plain fields as one that processes say to each other. Others are refused: nothing that comes from another process
    names code."""
    _said.append(kind)
    return kind


def _written(value: Any) -> torch.Tensor:
    """[bytes] uint8"""
    import torch

    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _read(content: torch.Tensor) -> Any:
    import numpy as np
    import torch

    arrays: list[Any] = [
        np.ndarray,
        np.dtype,
        np.empty(0).__reduce__()[0],
        *(type(np.dtype(kind)) for kind in _NUMBERS),
    ]
    with torch.serialization.safe_globals([*_said, *arrays, bytes]):  # which pickle names where there are none
        return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)


def gather(value: T) -> list[T]:
    """What each process has, by number."""
    if _group is None:
        return [value]
    import torch
    import torch.distributed as dist

    own = _written(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_group.size)]
    meet(lambda: dist.all_gather(sizes, torch.tensor([len(own)])))
    longest = max(int(one) for one in sizes)
    found = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    meet(lambda: dist.all_gather(found, torch.nn.functional.pad(own, (0, longest - len(own)))))
    return [_read(one[: int(length)]) for one, length in zip(found, sizes, strict=True)]


def from_main(value: T) -> T:
    """What process 0 has; what the others give is not looked at."""
    if _group is None:
        return value
    import torch
    import torch.distributed as dist

    found = _written(value if main() else None)
    size = torch.tensor([len(found)])
    meet(lambda: dist.broadcast(size, src=0))
    found = found if main() else torch.empty(int(size), dtype=torch.uint8)
    meet(lambda: dist.broadcast(found, src=0))
    told: T = _read(found)
    return told


def any_of(flag: bool) -> bool:
    """Whether it holds in any process."""
    return any(gather(flag))


@said
@dataclasses.dataclass(frozen=True)
class Report:
    """How a piece of work went in one process."""

    told: Any = None  # what it gives the others
    lacked: str = ""  # what a failed allocation said
    failed: tuple[str, str] | None = None  # any other error: its kind, of `errors`, and what it says

    @classmethod
    def of(cls, error: BaseException) -> Report:
        """Of a piece of work that ended with an error."""
        text = str(error) or type(error).__name__
        known = (one.__name__ for one in type(error).__mro__ if getattr(errors, one.__name__, None) is one)
        return cls(failed=(next(known, TrainingError.__name__), text))


def exchange(report: Report) -> list[Report]:
    """How a piece of work went in each process.

    Raises:
        LoraLabError: it failed in another one, and did not here.
        ProcessError: it failed here, and processes keep step.
    """
    if in_step() and (report.lacked or report.failed):
        raise give_up(report.failed[1] if report.failed else report.lacked)
    found = gather(report)
    if report.failed is None:
        for number, other in enumerate(found):
            if other.failed is not None:
                kind, text = other.failed
                raise getattr(errors, kind)(f"{title(number)}: {text}")
    return found


def together(action: Callable[[], T]) -> list[T]:
    """What an action gives in each process, by number.

    Raises:
        Exception: in every process, if it failed in any.
    """
    _, found = _agreed(action, lambda value: value)
    return [one.told for one in found]


def agreed(action: Callable[[], T]) -> T:
    """What an action gives here, once it went well in every process.

    Raises:
        Exception: in every process, if it failed in any.
    """
    return _agreed(action, lambda _: None)[0]


def _agreed(action: Callable[[], T], told: Callable[[T], Any]) -> tuple[T, list[Report]]:
    try:
        value = action()
    except ProcessError:
        raise
    except Exception as error:
        exchange(Report.of(error))
        raise
    return value, exchange(Report(told(value)))


def on_main(action: Callable[[], T]) -> T:
    """What an action gives in process 0, which alone does it.

    Raises:
        Exception: in every process, if it failed there.
    """
    return together(lambda: action() if main() else None)[0]  # type: ignore[return-value]


def prove(facts: Mapping[str, Any], way_out: str) -> None:
    """Prove that all processes have the same.

    Args:
        facts: plain values, by what they are called.
        way_out: a sentence.

    Raises:
        ProcessError: naming the first process that has something else, and what.
    """
    every = gather(dict(facts))
    for number, found in enumerate(every):
        for name in [*every[0], *found]:
            if found.get(name) != every[0].get(name):
                raise ProcessError(
                    f"{title(number)}: has another {name} than {title(0)}: {found.get(name)} and {every[0].get(name)}. {way_out}"
                )


def dealt(sizes: Sequence[float], processes: int) -> list[list[int]]:
    """For each process the places of the work that it does, in order: the largest piece goes to who has least so far, so that all are done
    at about the same time. One that is left without work has none.

    Args:
        sizes: of each piece of work.
    """
    found: list[list[int]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        who = loads.index(min(loads))
        found[who].append(place)
        loads[who] += sizes[place]
    return [sorted(places) for places in found]


def own(sizes: Sequence[float]) -> list[int]:
    """The places of the work that this process does, see `dealt`."""
    return dealt(sizes, size())[rank()]


# -- in step ------------------------------------------------------------------------------------------------------------


def keep_step() -> Any:
    """From now on every pass of the model is made by all processes at the same time, because each holds a part of it. What one process meets
    alone in a pass, nobody can be told of: it ends the run, to be resumed.

    Returns:
        torch's group for what is exchanged within passes, apart from all else that processes say to each other.
    """
    import torch.distributed as dist

    group = _group
    assert group is not None
    group.in_step = True
    found: list[Any] = []
    patience = datetime.timedelta(seconds=group.timeout)
    meet(lambda: found.append(dist.new_group(timeout=patience)))
    return found[0]


def in_step() -> bool:
    """Whether processes make all passes at the same time."""
    return _group is not None and _group.in_step


def own_and_others(sizes: Sequence[float]) -> tuple[list[int], list[int]]:
    """The places of the work that this process does, and those of work of others that it goes through before that, for nothing: where
    processes keep step, all make as many passes.

    Args:
        sizes: of each piece of work.
    """
    parts = dealt(sizes, size())
    mine = parts[rank()]
    if not in_step():
        return mine, []
    others = sorted(set(range(len(sizes))).difference(mine), key=lambda place: (sizes[place], place))
    return mine, others[: max(map(len, parts)) - len(mine)]


def give_up(reason: str) -> ProcessError:
    """The error of a process that cannot go on with a pass that all make together: it parts from them, which ends them too."""
    assert _group is not None
    _group.lost = ProcessError(
        f"{title(rank())}: {reason}. The base is sharded (hardware.shard=true), so nobody can go on alone. Where it was memory, a "
        "smaller train.micro_batch_size or data.max_tokens, or train.gradient_checkpointing=true, needs less."
    )
    return _group.lost


# -- gradients ----------------------------------------------------------------------------------------------------------


def flat(parameters: Sequence[torch.nn.Parameter], numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """[numbers + elements] float32: single numbers, and after them all gradients end to end; zeros where there are none."""
    import torch

    device = parameters[0].device
    pieces = [one.detach().to(device, torch.float32).reshape(1) for one in numbers]
    pieces += [
        torch.zeros(one.numel(), device=device) if one.grad is None else one.grad.detach().float().reshape(-1)
        for one in parameters
    ]
    return torch.cat(pieces)


def present(parameters: Iterable[torch.nn.Parameter]) -> bytes:
    """For each parameter whether it has a gradient here."""
    return bytes(one.grad is not None for one in parameters)


def sum_flat(buffer: torch.Tensor) -> None:
    """Give each process the sum of all buffers, in place: the same bits everywhere."""
    if _group is None:
        return
    import torch.distributed as dist

    meet(lambda: dist.all_reduce(buffer))


def unflatten(buffer: torch.Tensor, parameters: Sequence[torch.nn.Parameter], there: Sequence[bytes]) -> None:
    """Give the parameters the gradients of a buffer.

    Args:
        buffer: what `flat` gave, without the numbers.
        there: what `present` said in each process; a parameter without any gradient has none.
    """
    pieces = buffer.split([one.numel() for one in parameters])
    for one, piece, *has in zip(parameters, pieces, *there, strict=True):
        one.grad = piece.view_as(one).to(one.dtype) if any(has) else None


# -- those that do not come ---------------------------------------------------------------------------------------------


def meet(action: Callable[[], object]) -> None:
    """Do what all processes do at the same time.

    Raises:
        ProcessError: not all of them come, or one has gone; naming it.
    """
    group = _group
    assert group is not None
    if group.lost is not None:
        raise group.lost
    group.count += 1
    begun = time.monotonic()
    try:
        group.store.set(f"at/{group.rank}", str(group.count))
        action()
    except (RuntimeError, OSError, EOFError) as error:
        group.lost = _lost(group, error, time.monotonic() - begun)
        raise group.lost from error


def _lost(group: _Group, error: Exception, waited: float) -> ProcessError:
    """Who did not come."""
    time.sleep(_GRACE)
    hung = waited >= 0.9 * group.timeout
    try:
        group.store.set(f"left/{group.rank}", "1")
        others = [number for number in range(group.size) if number != group.rank]
        left = {number for number in others if group.store.check([f"left/{number}"])}
        behind = [number for number in others if number not in left and _at(group, number) < group.count]
    except (RuntimeError, OSError):  # the store has gone with process 0
        others = behind = [0]
        left = set()
    gone = [number for number in others if number not in left and not _lives(group, number)]
    named = gone or behind or [number for number in others if number not in left] or others
    who = ", ".join(title(number) for number in named)
    if gone or not hung:
        what = "has ended" if len(named) == 1 else "have ended, at least one of them"
    else:
        what = f"did not come within hardware.timeout={group.timeout:g} s"
    return ProcessError(
        f"{who}: {what}, so {title(group.rank)} ends too ({_first_line(error)}). What the lost one said is on its own output."
    )


def _at(group: _Group, number: int) -> int:
    """The exchange that a process came to last."""
    key = f"at/{number}"
    return int(group.store.get(key)) if group.store.check([key]) else 0


def _lives(group: _Group, number: int) -> bool:
    """Whether a process is there; of another machine it is not known, and believed."""
    import psutil

    if number >= len(group.where):
        return True
    machine, own = group.where[number]
    if machine != group.where[group.rank][0]:
        return True
    try:
        return psutil.Process(own).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
