"""Let several calls of a model go through it layer by layer: all of them through one layer, then through the next.

A base whose weights are mapped from files need then never be in memory as a whole, and each of its layers is read, or copied to a
GPU, once for all rows. Numbers are those of whole calls, one after another: the same products of the same tensors.

Imports hardly anything of lora_lab: `reload.py` uses it too.
"""

import contextlib
import ctypes
import functools
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lora_lab.base.layers import layers_of
from lora_lab.runtime.memory import free_bytes

T = TypeVar("T")

SMALL = 2**28  # bytes of a model below which nothing is gained
SLICE = 2**26  # bytes of a weight that are read at once where it is no layer's
_ROOM = 2**30  # that passes need on a GPU, beside the weights
_DONTNEED = 4  # of madvise(2)
_NO_FILES = ("/dev/", "/memfd:", "/SYSV")  # though they have names in /proc/self/maps


def fits(nbytes: int, free: int) -> bool:
    """Whether a model of so many bytes is better held on its device as a whole: it is small, or a GPU has room for it.

    Args:
        free: bytes on the GPU; 0 on a CPU.
    """
    return nbytes < SMALL or 1.25 * nbytes + _ROOM < free


def free_on(device: torch.device) -> int:
    """Bytes that are free on a GPU; 0 on a CPU, where nothing is gained by whole models."""
    return free_bytes(device) if device.type == "cuda" else 0


def size(model: nn.Module) -> int:
    """Bytes of its weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def run(model: nn.Module, calls: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """What calls of the model give, without gradients; layer by layer where its weights lie in files or on another device than
    theirs.

    Args:
        model: nothing writes to its weights meanwhile.
        calls: of the model with tensors on `device`.
    """
    if device.type == "cpu":
        layered = sum(map(_Mapped().bytes_of, model.parameters())) >= max(SMALL, 1)
    else:
        layered = all(parameter.device != device for parameter in model.parameters())
    if layered:
        return in_step(model, calls, device)
    with torch.no_grad():
        return [call() for call in calls]


def forget(tensors: Iterable[torch.Tensor]) -> None:
    """Give back the pages of tensors that are mapped from files and were only read; others stay as they are."""
    _Mapped().forget(tensors)


def in_step(model: nn.Module, calls: Sequence[Callable[[], T]], device: torch.device) -> list[T]:
    """As `run`, always layer by layer. Each call has a thread of its own, of which one runs at a time: it stops before each layer until
    all that wait for that layer can go through it."""
    layers = list(dict.fromkeys(layers_of(model)))
    inside = {id(one) for layer in layers for one in layer.modules()}
    outside = [one for one in model.modules() if id(one) not in inside]
    handles = [layer.register_forward_pre_hook(_stop) for layer in layers]
    passes: list[_Pass] = []
    try:
        with _brought(outside, device), _sliced(outside, device):
            for call in calls:
                passes.append(_Pass(call))
                passes[-1].go_on()
            while waiting := [one for one in passes if one.before is not None]:
                layer = min(waiting, key=lambda one: one.passed).before
                assert layer is not None
                with _brought(layer.modules(), device):
                    for one in waiting:
                        if one.before is layer:
                            one.go_on()
    finally:
        for one in passes:
            one.give_up()
        for handle in handles:
            handle.remove()
        trim()
    return [one.result for one in passes]


def trim() -> None:
    """Give memory back to the system that is free inside this process (glibc; elsewhere nothing)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


class _GivenUp(BaseException):
    """Ends a call of which nothing is wanted any more."""


class _Pass(threading.Thread):
    """A call in a thread of its own, which runs only inside `go_on`."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call, self._go, self._stopped = call, threading.Semaphore(0), threading.Semaphore(0)
        self.before: nn.Module | None = None  # the layer that it waits for
        self.passed = 0  # layers
        self.result: Any = None
        self._error: BaseException | None = None
        self._given_up = False
        self.start()

    def go_on(self) -> None:
        """Let it run to the next layer, or to its end.

        Raises:
            Exception: that the call has raised.
        """
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def stop(self, layer: nn.Module) -> None:
        """Wait before a layer; called by the thread itself."""
        self.before, self.passed = layer, self.passed + 1
        self._stopped.release()
        self._go.acquire()
        self.before = None
        if self._given_up:
            raise _GivenUp

    def give_up(self) -> None:
        """End it, wherever it is."""
        self._given_up = True
        self._go.release()
        self.join()

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self._given_up:
                with torch.no_grad():
                    self.result = self._call()
        except BaseException as error:  # it is raised by `go_on`
            self._error = error
        self._stopped.release()


def _stop(layer: nn.Module, _: Any) -> None:
    current = threading.current_thread()
    if isinstance(current, _Pass):
        current.stop(layer)


@contextlib.contextmanager
def _brought(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the block the own tensors of modules are on a device. What they occupy for that is given back after it."""
    stores = [store for module in modules for store in (module._parameters, module._buffers)]
    there: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (store, name, tensor) for store in stores for name, tensor in store.items() if tensor is not None
    ]
    if device.type == "cpu":
        try:
            yield
        finally:
            forget(tensor for _, _, tensor in there)
        return
    brought: dict[int, torch.Tensor] = {}  # modules may share them
    try:
        for store, name, tensor in there:
            if id(tensor) not in brought:
                own = tensor.detach().to(device)
                brought[id(tensor)] = (
                    nn.Parameter(own, requires_grad=False) if isinstance(tensor, nn.Parameter) else own
                )
            store[name] = brought[id(tensor)]
        yield
    finally:
        for store, name, tensor in there:
            store[name] = tensor


@contextlib.contextmanager
def _sliced(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside the block large linear layers on the CPU, such as a language model's output layer, read their weights a slice at a time: a
    product in 16 bits may copy the whole weight."""
    wide = [one for one in modules if type(one) is nn.Linear and one.weight.nbytes > SLICE and device.type == "cpu"]
    for module in wide:
        vars(module)["forward"] = functools.partial(_by_slices, module)
    try:
        yield
    finally:
        for module in wide:
            del vars(module)["forward"]


def _by_slices(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    rows = max(1, SLICE // (module.weight.nbytes // module.out_features))
    found = []
    for start in range(0, module.out_features, rows):
        weight = module.weight[start : start + rows]
        bias = None if module.bias is None else module.bias[start : start + rows]
        found.append(nn.functional.linear(x, weight, bias))
        forget([weight])
    return torch.cat(found, -1)


class _Mapped:
    """Where this process has mapped tensors from files (Linux; elsewhere nowhere)."""

    def __init__(self) -> None:
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
        except OSError:
            lines = []
        parts = [line.split(maxsplit=5) for line in lines]
        files = [one for one in parts if len(one) == 6 and one[5].startswith("/") and not one[5].startswith(_NO_FILES)]
        self._ranges = [[int(end, 16) for end in one[0].split("-")] for one in files]

    def bytes_of(self, tensor: torch.Tensor) -> int:
        """How much of it is mapped: all, or nothing."""
        if tensor.device.type != "cpu":
            return 0
        try:
            start = tensor.data_ptr()
        except RuntimeError:  # it is made of others, as torchao's
            return 0
        return tensor.nbytes if any(low <= start and start + tensor.nbytes <= high for low, high in self._ranges) else 0

    def forget(self, tensors: Iterable[torch.Tensor]) -> None:
        """As the function: they are read from the file again when they are needed."""
        library = ctypes.CDLL(None)
        for tensor in tensors:
            if not self.bytes_of(tensor):
                continue
            first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of it alone
            last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONTNEED)
