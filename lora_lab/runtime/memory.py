"""A lack of memory, told from other errors; how much was used; and a block that is tried again in a way that needs less."""

from __future__ import annotations

import errno
import re
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from safetensors import SafetensorError

from lora_lab.errors import ProcessError
from lora_lab.runtime import ranks

# What torch, CUDA and ROCm, their libraries, the C++ runtime and the kernel call a failed allocation. Each of them comes as a plain
# RuntimeError somewhere; `tests/training/test_oom.py` has whole messages.
_FAILED_ALLOCATION = re.compile(
    # the caching allocator, 'CUDA error: out of memory' of pinned memory and of contexts, the driver's name of it, HIP, MPS, NCCL
    r"out[ _]of[ _]memory"
    r"|(can't|cannot|could not|failed to|unable to) allocate"  # torch's allocator on a CPU, mmap, host buffers
    r"|not enough memory"  # the same allocator on Windows
    r"|cudaErrorMemoryAllocation|hipErrorOutOfMemory"
    r"|_ALLOC_FAILED|_STATUS_MEMORY_ERROR|_(DEVICE|HOST)_ALLOCATION_FAILED"  # cuBLAS, cuDNN, cuFFT, cuSPARSE, cuSOLVER, rocBLAS
    r"|CUSPARSE_STATUS_INSUFFICIENT_RESOURCES|miopenStatusAllocFailed"
    # a library begins when it is first used, and finds no room for itself on a card that is full
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `?cublasCreate|CUDNN_STATUS_NOT_INITIALIZED"
    r"|CUSOLVER_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR),? when calling `?cusolverDnCreate"
    # the caching allocator, where NVML does not say who else is on the card: in containers, parts of cards, Jetson
    r"|NVML_SUCCESS == .*INTERNAL ASSERT FAILED at .*CUDACachingAllocator"
    r"|std::bad_alloc",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or the CPU, pinned memory and mapped files included."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | SafetensorError) and _FAILED_ALLOCATION.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """What a failed allocation says of itself, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Attempt:
    """A block that a lack of memory ends quietly; what was said is in `lacked`."""

    fitted = False
    lacked = ""
    told: Any = None  # what the block has for the other processes
    heard: list[Any]  # that of each process, once it fitted everywhere

    def __init__(self, together: bool = False):
        self._together = together

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> bool:
        lacks = error is not None and is_out_of_memory(error)
        if error is not None and lacks:
            self.lacked = first_line(error)
            error.__traceback__ = None  # it holds the activations that did not fit
            if ranks.in_step():
                raise ranks.give_up(self.lacked) from None
        if self._together:
            self._settle(error, lacks)
        self.fitted = error is None and not self.lacked
        return lacks

    def _settle(self, error: BaseException | None, lacks: bool) -> None:
        """Hear how it went in the other processes: where it did not fit in one, it did not fit."""
        if error is not None and (not isinstance(error, Exception) or isinstance(error, ProcessError)):
            return
        own = ranks.Report.of(error) if error is not None and not lacks else ranks.Report(self.told, self.lacked)
        found = ranks.exchange(own)
        self.heard = [one.told for one in found]
        if not lacks:
            self.lacked = next((f"{ranks.title(n)}: {one.lacked}" for n, one in enumerate(found) if one.lacked), "")


def attempts(need_less: Callable[[str], None], together: bool = False) -> Iterator[Attempt]:
    """Attempts at a block, one after another until it fits into memory: `for attempt in attempts(...): with attempt: ...`.

    Args:
        need_less: called between two of them with what the failed allocation said; raises if nothing is left to do.
        together: whether all processes of the run make it at the same time: it fits once it fits in each of them.
    """
    while True:
        attempt = Attempt(together)
        yield attempt
        if attempt.fitted:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        need_less(attempt.lacked)


# -- how much -----------------------------------------------------------------------------------------------------------


_caps: dict[int, int] = {}  # bytes of a card that torch may take, by its number


def cap(index: int, nbytes: int) -> None:
    """Let torch take so much of a card and no more."""
    torch.cuda.set_per_process_memory_fraction(nbytes / torch.cuda.mem_get_info(index)[1], index)
    _caps[index] = nbytes


def free_bytes(device: torch.device) -> int:
    """Memory that is free now; of a card that is capped, no more than the cap leaves."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free: int = torch.cuda.mem_get_info(device)[0]
    most = _caps.get(device.index or 0)
    return free if most is None else max(0, min(free, most - torch.cuda.memory_reserved(device)))


def forget_peaks(device: torch.device) -> None:
    """Let the peaks of a GPU begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Most memory that was in use: on a GPU by tensors since `forget_peaks`, on a CPU by the process since its start."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_reserved_gib(device: torch.device) -> float | None:
    """Most memory of a GPU that torch held since `forget_peaks`, with the holes between tensors; None: on a CPU nobody holds it apart."""
    return float(torch.cuda.max_memory_reserved(device)) / 2**30 if device.type == "cuda" else None
