"""`lora-lab doctor`: what of this machine lora_lab stands on, and what would mend what is missing."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import InvalidRequirement, Requirement

import lora_lab
from lora_lab.base.resolve import cache_dir
from lora_lab.errors import ConfigError
from lora_lab.plan import bases
from lora_lab.runtime import cards, console
from lora_lab.runtime.environment import usable_cores

State = Literal["ok", "note", "problem"]

_DISTRIBUTION = "lora-lab"
_SHOWN = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
)  # versions that a report of a bug needs
_PYTHON = (3, 11)
_SECONDS = 3.0  # that the hub may take to answer
_LITTLE_GIB, _LITTLE_DISK_GIB = 2.0, 5.0
# What each extra brings; `dev` and `docs` are for those who change lora_lab itself.
EXTRAS = {
    "tensorboard": "curves in TensorBoard (tracker=tensorboard)",
    "hpo": "searches by Optuna (hydra/sweeper=optuna_cohort)",
    "slurm": "sweeps on a Slurm cluster (hydra/launcher=cohort_slurm)",
    "ray": "sweeps on a Ray cluster (hydra/launcher=cohort_ray)",
    "gguf": "exports to GGUF and Ollama (export=gguf)",
    "torchao": "torchao's int8 weights (quant=torchao_int8)",
    "liger": "faster kernels on CUDA cards",
    "serve": "an HTTP server (lora-lab serve), and runs in a browser (lora-lab ui)",
    "presidio": "names and places masked before a served model (serve.presidio)",
    "sentences": "a proof that merged embedding models load in sentence-transformers",
    "lm-eval": "published benchmarks by lm-eval (evaluate.suite)",
    "docs": "the documents as a site (make docs)",
    "text": "cleaning by stop words, stems and personal data (data.clean)",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    topic: str  # of at most 9 letters
    state: State
    says: str
    remedy: str = ""


def examine() -> list[Line]:
    """Everything, in the order in which one thing needs another."""
    found: list[Line] = []
    for look in _LOOKS:
        try:
            found += look()
        except Exception as error:  # what is broken must not keep the rest from being looked at
            reason = str(error).strip().partition("\n")[0]
            name = look.__name__.strip("_")
            found.append(Line(name[:9], "problem", f"cannot be looked at ({type(error).__name__}: {reason})"))
    return found


def show(lines: Iterable[Line]) -> None:
    """A line for each, and its remedy behind it."""
    for line in lines:
        mark = {"ok": "", "note": "note: ", "problem": "PROBLEM: "}[line.state]
        console.say(line.topic, f"{mark}{line.says}{f' -> {line.remedy}' if line.remedy else ''}")


# -- what is installed ------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Line]:
    python = platform.python_version()
    if sys.version_info < _PYTHON:
        yield Line("python", "problem", python, "install Python {}.{} or newer".format(*_PYTHON))
    else:
        yield Line("python", "ok", f"{python}, {platform.system()} {platform.machine()}")
    yield Line("lora_lab", "ok", f"{lora_lab.__version__}, in {Path(lora_lab.__file__).parent}")


def _libraries() -> Iterator[Line]:
    needed = [one for one, extra in requirements() if not extra]
    if not needed:
        yield Line("libraries", "note", "lora_lab is not installed, so what it needs is not known", "pip install -e .")
    lacking = [(one, sentence) for one in needed if (sentence := lacks(one))]
    for one, sentence in lacking:
        yield Line("libraries", "problem", sentence, f"pip install '{one}'")
    versions = ", ".join(f"{name} {version}" for name in _SHOWN if (version := _version(name)))
    if not lacking:
        yield Line("libraries", "ok", f"all {len(needed)} are here: {versions}")


def requirements() -> Iterator[tuple[Requirement, str]]:
    """What lora_lab needs, each with the extra that it belongs to."""
    try:
        told = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for text in told:
        try:
            one = Requirement(text)
        except InvalidRequirement:  # of a packaging that is newer than ours
            continue
        extra = next((name for name in (*EXTRAS, "dev") if one.marker and _is_for(one, name)), "")
        if one.marker is None or extra or one.marker.evaluate({"extra": ""}):
            one.marker = None
            yield one, extra


def _is_for(one: Requirement, extra: str) -> bool:
    return one.marker is not None and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""})


def lacks(one: Requirement) -> str:
    """A sentence if a library is missing or too old; '' otherwise."""
    version = _version(one.name)
    if version is None:
        return f"{one.name} is missing"
    return "" if one.specifier.contains(version, prereleases=True) else f"{one.name} {version} is not {one.specifier}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- the machine ------------------------------------------------------------------------------------------------------


def _devices() -> Iterator[Line]:
    import torch

    yield Line("cpu", "ok", f"{usable_cores()} cores, of which torch uses {torch.get_num_threads()}")
    for index in range(torch.cuda.device_count()):
        name, free = torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)
        says = f"cuda:{index}: {name}, {free[0] / 2**30:.1f} of {free[1] / 2**30:.1f} GiB free"
        try:
            cards.check_architecture(f"cuda:{index}", index)
        except ConfigError as error:
            yield Line("card", "problem", f"{says}. {error}", "install a torch that is built for it")
        else:
            bfloat16 = torch.cuda.get_device_capability(index) >= cards.BFLOAT16
            yield Line("card", "ok", says if bfloat16 else f"{says}; without bfloat16, so take model.dtype=float16")
    if not torch.cuda.device_count():
        sign = cards.sign()
        if sign is None:
            yield Line("card", "note", "no CUDA card, so runs are on the CPU")
        else:
            why = cards.why_unusable()
            yield Line(
                "card",
                "problem",
                f"{sign}, but cannot be used ({why})",
                "install a torch and a driver that fit each other",
            )


def _memory() -> Iterator[Line]:
    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    says = f"{free:.1f} of {total:.1f} GiB are free"
    limit = _limit()
    if limit is not None and limit < memory.total:
        says += f"; this container may take {limit / 2**30:.1f} GiB"
        free = min(free, limit / 2**30)
    if free < _LITTLE_GIB:
        yield Line("memory", "problem", says, f"end other programs; the smallest recipes need {_LITTLE_GIB:.0f} GiB")
    else:
        yield Line("memory", "ok", says)


def _limit() -> int | None:
    """The container's limit in bytes."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            told = Path(file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        return int(told) if told.isdecimal() else None
    return None


def _disk() -> Iterator[Line]:
    from huggingface_hub import constants

    for topic, path, what in (
        ("runs", Path("runs"), "run folders go below this folder"),
        ("cache", cache_dir(), "converted bases and encoded rows; LORA_LAB_CACHE names another place"),
        ("hub cache", Path(constants.HF_HUB_CACHE), "models of the hub; HF_HOME names another place"),
    ):
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(there).free / 2**30
        says = f"{path.absolute()}: {free:.1f} GiB of disk free ({what})"
        if not os.access(there, os.W_OK | os.X_OK):
            yield Line(
                topic, "problem", f"{says}; {there} cannot be written", f"chmod u+rwx {there}, or choose another place"
            )
        elif free < _LITTLE_DISK_GIB:
            yield Line(topic, "note", says, "make room: an unquantized base and its merge take twice its size")
        else:
            yield Line(topic, "ok", says)


def _hub() -> Iterator[Line]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Line(
            "hub",
            "note",
            "switched off by HF_HUB_OFFLINE, so models come from this machine alone",
            "unset HF_HUB_OFFLINE",
        )
        return
    place = urllib.parse.urlsplit(constants.ENDPOINT)
    proxied = urllib.request.getproxies().get(place.scheme)
    if proxied:
        place = urllib.parse.urlsplit(proxied)
    name = place.hostname or constants.ENDPOINT
    through = f" through the proxy {name}" if proxied else ""
    token = (
        "with a token" if os.environ.get("HF_TOKEN") or Path(constants.HF_TOKEN_PATH).is_file() else "without a token"
    )
    try:
        socket.create_connection((name, place.port or (443 if place.scheme == "https" else 80)), _SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        yield Line(
            "hub", "note", f"{constants.ENDPOINT} does not answer{through} ({reason}); recipes on bases that are here work all the same",
            "check the connection and HTTPS_PROXY; HF_ENDPOINT names a mirror"
        )  # fmt: skip
    else:
        yield Line("hub", "ok", f"{constants.ENDPOINT} can be reached{through}, {token}")


def _bases() -> Iterator[Line]:
    there = [base.name for base in bases.shipped() if bases.is_here(base)]
    absent = [base for base in bases.shipped() if base.name not in there]
    if there:
        yield Line("bases", "ok", f"here: {', '.join(f'model={name}' for name in there)}")
    for base in absent:
        yield Line("bases", "note", f"model={base.name} is not here ({base.what})", bases.way_to(base))


def _terminal() -> Iterator[Line]:
    encoding = console.stdout.encoding
    if encoding.lower().replace("-", "") == "utf8":
        yield Line("terminal", "ok", encoding)
    else:
        yield Line(
            "terminal",
            "note",
            f"{encoding}, which has not every letter of your data",
            "set PYTHONUTF8=1 or LC_ALL=C.UTF-8",
        )


def _extras() -> Iterator[Line]:
    asked = list(requirements())
    for extra, brings in EXTRAS.items():
        lacking = [sentence for one, name in asked if name == extra and (sentence := lacks(one))]
        if asked and extra not in {name for _, name in asked}:
            yield Line(
                "extra",
                "note",
                f"{extra}: {brings}; the lora_lab that is installed knows no such extra",
                "pip install -e .",
            )
        elif lacking:
            yield Line("extra", "note", f"{extra}: {brings}; {', '.join(lacking)}", f"pip install 'lora-lab[{extra}]'")
        else:
            yield Line("extra", "ok", f"{extra}: {brings}")


_LOOKS: tuple[Callable[[], Iterator[Line]], ...] = (
    _versions, _libraries, _devices, _memory, _disk, _hub, _bases, _extras, _terminal
)  # fmt: skip
