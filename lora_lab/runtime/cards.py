"""The machine's graphics cards: whether torch can use those that are there, which of them a process sees, how much of one it takes."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import warnings
from pathlib import Path

from lora_lab.errors import ConfigError
from lora_lab.runtime import children, console

_DRIVER = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia"))
_ASKED = "nvidia-smi"
_SECONDS = 20  # that nvidia-smi may take; a card that hangs lets it wait for ever
_HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide every card
_BUILT = re.compile(r"(sm|compute)_(\d+)([a-z]?)")
_REPEATABLE = (":4096:8", ":16:8")  # workspaces with which cuBLAS sums in one order
BFLOAT16 = (8, 0)  # compute capability from which a card multiplies bfloat16
_BESIDE = 0.25  # GiB of a card that stay free beside what torch takes: workspaces of libraries, and the driver's own


def sign() -> str | None:
    """What shows that an NVIDIA card or its driver is here, whether torch can use it or not; None: nothing does.

    Cards that CUDA_VISIBLE_DEVICES hides on purpose count as none.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in _HIDDEN:
        return None
    for path in _DRIVER:
        if path.exists():
            return f"{path} is there"
    return f"{_ASKED} lists {name}" if (name := _listed()) else None


def _listed() -> str | None:
    """The first card that nvidia-smi lists: WSL has no device file."""
    if shutil.which(_ASKED) is None:
        return None
    try:
        said = children.run([_ASKED, "-L"], timeout=_SECONDS).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"GPU \d+: ([^(\n]*)", said)
    return found[1].strip() if found else None


def why_unusable() -> str:
    """Why torch sees no card."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return f"torch {torch.__version__}: {str(error).partition(chr(10))[0].rstrip('.')}"
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"torch {torch.__version__} sees none{'' if told is None else f' with CUDA_VISIBLE_DEVICES={told}'}"


def visible() -> list[str]:
    """The cards that this process sees, each as CUDA_VISIBLE_DEVICES names it: a number, or what a scheduler has set."""
    import torch

    count, told = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [str(number) for number in range(count)] if told is None else [one.strip() for one in told.split(",")]
    return named[:count]


def check_architecture(key: str, index: int) -> None:
    """Refuse a card that torch was not built for: it would fail at the first product.

    Args:
        key: what asked for the card, as the message names it.

    Raises:
        ConfigError: no machine code of this torch runs on the card, and none can be made for it.
    """
    import torch

    built, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(index)
    known = [found for one in built if (found := _BUILT.fullmatch(one))]
    if not known or any(
        _runs(kind, int(number), exact, capability) for kind, number, exact in (k.groups() for k in known)
    ):
        return
    major, minor = capability
    raise ConfigError(
        f"{key}: {torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and torch {torch.__version__} is built for "
        f"{', '.join(built)} only. Install a torch that has sm_{major}{minor}, or set hardware=cpu."
    )


def _runs(kind: str, number: int, letter: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture runs on a card. Machine code runs on later cards of one generation, PTX on all later ones,
    and code with the letter a on one card alone (CUDA C++ programming guide, compute capabilities)."""
    own = divmod(number, 10)
    if letter == "a":
        return own == capability
    if kind == "compute":
        return own <= capability
    return own[0] == capability[0] and own[1] <= capability[1]


def check_bfloat16(index: int, trains: bool) -> None:
    """Refuse to train in bfloat16 on a card that has no units for it: torch would compute it in another way, six to ten times as slowly,
    without a word.

    Raises:
        ConfigError: the card is of before 2020 (compute capability below 8.0).
    """
    import torch

    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None or capability >= BFLOAT16:
        return
    name = f"{torch.cuda.get_device_name(index)} (compute capability {capability[0]}.{capability[1]})"
    if trains:
        raise ConfigError(
            f"model.dtype=bfloat16: {name} has no units for it, so each step would take several times as long. Set "
            "model.dtype=float16, or float32."
        )
    console.say("slow", f"{name} has no units for bfloat16, in which this run was trained; hardware=cpu may be as fast")


def repeat_exactly() -> None:
    """Let CUDA compute the same bits each time; to be called before the first product on a card.

    Raises:
        ConfigError: the environment gives cuBLAS a workspace with which it does not.
    """
    import torch

    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _REPEATABLE[0])
    if workspace not in _REPEATABLE:
        raise ConfigError(
            f"CUBLAS_WORKSPACE_CONFIG={workspace}: hardware.deterministic=true needs {' or '.join(_REPEATABLE)}. Unset it, or set "
            "hardware.deterministic=false."
        )
    torch.use_deterministic_algorithms(True)
    # nothing here reads what was never written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def on_wsl() -> bool:
    """Whether this is Linux under Windows, where a full card spills into main memory instead of failing."""
    return "microsoft" in platform.release().lower()


def cap_memory(index: int, gib: float | None) -> float | None:
    """Let torch take so much of a card and no more; what was set, in GiB.

    Args:
        gib: None: all of it, but under WSL what is free now, less a little: a step that does not fit must fail there, so that it is made
            again with less.

    Raises:
        ConfigError: the card has less.
    """
    import torch

    from lora_lab.runtime import memory

    free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
    if gib is None:
        if not on_wsl():
            return None
        gib = max(free - _BESIDE, _BESIDE)
    if gib > total:
        raise ConfigError(
            f"hardware.memory_gib={gib:g}: {torch.cuda.get_device_name(index)} has {total:.1f} GiB. Lower it, or drop it."
        )
    memory.cap(index, round(gib * 2**30))
    return gib
