"""The fault programme's own tools: counts, runs to harm, what they must end with, and what is told of it.

Counts are constants that an environment variable of the same name with `FAULTS_` before it overrules:
FAULTS_KILLS=20 FAULTS_CORRUPTIONS=50 make test-faults.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import make_base, make_rows, write_jsonl


def count(name: str, default: int) -> int:
    """How many tries the programme makes."""
    return int(os.environ.get(f"FAULTS_{name}", default))


KILLS = count("KILLS", 260)  # some are too late: the process has ended
CORRUPTIONS = count("CORRUPTIONS", 1100)
FULL_DISKS = count("FULL_DISKS", 110)
SIGNALS = count("SIGNALS", 36)
HANG_SECONDS = count("HANG_SECONDS", 90)
SHARES = 4  # each programme's kinds are split into so many tests, for several workers

STEPS, SAVE_STEPS = 8, 2
SETTINGS = [
    "model.dtype=float32",
    "quant=none",
    "tracker=none",
    "hardware=cpu",
    "optim.lr=0.01",
    "adapter.r=4",
    "adapter.lora_dropout=0.2",
    "train.batch_size=4",
    "train.micro_batch_size=2",
    "train.epochs=3",
    f"train.max_steps={STEPS}",
    f"train.save_steps={SAVE_STEPS}",
    "train.eval_steps=4",
]


# -- what is told -----------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What one test of a programme tried and found; `problems` says what and where."""

    programme: str
    tried: int = 0
    recovered: int = 0
    lost: int = 0
    silent: int = 0
    traces: int = 0
    problems: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def add(self, outcome: str, problem: str = "") -> None:
        """Count one try.

        Args:
            outcome: recovered, lost, silent or traces.
        """
        self.tried += 1
        setattr(self, outcome, getattr(self, outcome) + 1)
        if outcome != "recovered":
            self.problems.append(f"{outcome}: {problem}")

    def note(self, what: str) -> None:
        """Count something worth knowing that is no fault."""
        self.notes[what] = self.notes.get(what, 0) + 1

    def record(self) -> dict[str, Any]:
        return asdict(self)


# -- processes --------------------------------------------------------------------------------------------------------


_ERROR = re.compile(r"[A-Za-z_.]+(Error|Exception)\b")


@dataclass(frozen=True)
class Done:
    """How a forked command line ended (see `tests.faults.zygote`)."""

    rc: int
    out: str
    err: str
    hang: bool
    seconds: float
    orphans: int

    @property
    def said(self) -> str:
        return self.out + self.err

    @property
    def trace(self) -> bool:
        """A stack trace, or a death that nobody asked for."""
        return "Traceback (most recent call last)" in self.said or (self.rc < 0 and not self.hang) or self.rc == 1

    @property
    def last_line(self) -> str:
        """What it ended with: the error of a stack trace, or the last line."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        errors = [line for line in lines if _ERROR.match(line)]
        return (errors or lines or [f"(silent, exit {self.rc})"])[-1][:300]


class Zygote:
    """The warm process, and one try at a time in it."""

    def __init__(self, cache: Path):
        self.cache = cache
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "LORA_LAB_CACHE": str(cache),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the zygote died with {self.process.wait()}"
        return json.loads(line)

    def run(self, *argv: str, **plan: Any) -> Done:
        """Run `lora-lab ARGV` in a forked child, under a plan for what goes wrong (see `tests.faults.launcher`)."""
        return Done(**self.ask(argv=list(argv), timeout=plan.pop("timeout", HANG_SECONDS), **plan))

    def warm_up(self, *argv: str, **plan: Any) -> Done:
        """Run something once, and import in the zygote what it imported."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "modules.json"
            done = self.run(*argv, modules=str(file), timeout=300, **plan)
            if file.exists():
                self.ask(**{"import": json.loads(file.read_text(encoding="utf-8"))})
        return done

    def events(self, *argv: str, roots: Sequence[Path], **plan: Any) -> tuple[Done, list[tuple[str, str, str]]]:
        """Run something unharmed; every event below `roots`, in order (number 1 is the first)."""
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "events.jsonl"
            done = self.run(*argv, roots=[str(root) for root in roots], record=str(file), **plan)
            return done, [tuple(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        with self.process:  # closes its pipes, and waits
            self.process.stdin.close()


# -- runs to harm -----------------------------------------------------------------------------------------------------


class World:
    """A folder with a base, rows, a cache and runs, that can be brought back to how it was, in its place."""

    def __init__(self, root: Path, zygote: Zygote):
        self.root, self.zygote = root / "world", zygote
        self.kept = root / "kept"
        self.root.mkdir(parents=True)
        self.base = make_small_base(self.root / "base")
        self.rows = write_jsonl(self.root / "rows.jsonl", make_rows(20))
        self.held_out = write_jsonl(self.root / "held_out.jsonl", make_rows(6, seed=1))
        self.cache = self.root / "cache"

    def settings(self, name: str, *more: str) -> list[str]:
        """The command line of a run in `<root>/<name>`."""
        return [
            "model=hub",
            f"model.path={self.base}",
            f"data.train={self.rows}",
            f"data.eval={self.held_out}",
            *SETTINGS,
            *more,
            f"run_dir={self.root}/{name}",
        ]

    def run(self, *argv: str, **plan: Any) -> Done:
        return self.zygote.run(*argv, cwd=str(self.root), env=self.environment(), **plan)

    def must(self, *argv: str, **plan: Any) -> Done:
        """Run something that has to go well."""
        done = self.run(*argv, **plan)
        assert done.rc == 0, f"lora-lab {' '.join(argv)}: exit {done.rc}\n{done.said}"
        return done

    def environment(self) -> dict[str, str]:
        return {"LORA_LAB_CACHE": str(self.cache)}

    def keep(self) -> None:
        """Remember how everything is now."""
        shutil.rmtree(self.kept, ignore_errors=True)
        shutil.copytree(self.root, self.kept, symlinks=True)

    def restore(self) -> None:
        """Bring everything back to how it was, times of change included."""
        shutil.rmtree(self.root)
        shutil.copytree(self.kept, self.root, symlinks=True)


def make_small_base(folder: Path, seed: int = 0) -> Path:
    return make_base(folder, seed=seed, hidden_size=32, intermediate_size=64, num_hidden_layers=2)


# -- what it must end with ------------------------------------------------------------------------------------------


def sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def folder_digests(folder: Path, leave_out: Iterable[str] = ("README.md", "manifest.json")) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in leave_out)
    return {str(file.relative_to(folder)): sha(file) for file in files}


def run_digests(run: Path) -> dict[str, str]:
    """What a finished run is: its adapter, the state behind its last step, every logged number."""
    last = run / f"checkpoints/step-{STEPS}"
    found = {f"adapter/{name}": digest for name, digest in folder_digests(run / "adapter").items()}
    for file in (last / "optimizer.safetensors", last / "state.json", run / "metrics.jsonl"):
        found[str(file.relative_to(run))] = sha(file) if file.exists() else "missing"
    return found


def differences(one: dict[str, str], two: dict[str, str]) -> str:
    """Names of files that two sets of digests do not share."""
    return ", ".join(sorted(name for name in {*one, *two} if one.get(name) != two.get(name)))


_LITTER = re.compile(r"\.(tmp|old)$")


def litter(folder: Path) -> list[str]:
    """What interrupted writes left below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*") if _LITTER.search(path.name))


def last_logged(run: Path) -> int:
    """The last step with a whole line in metrics.jsonl."""
    file, last = run / "metrics.jsonl", 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            last = max(last, json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return last


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint that matches its manifest; 0 for none."""
    from lora_lab.training import checkpoint

    found, _ = checkpoint.newest_valid(run / "checkpoints")
    return int(found.name.removeprefix("step-")) if found else 0


def share(items: Sequence[Any], part: int, parts: int = SHARES) -> list[Any]:
    """One of several equal parts."""
    return list(items[part::parts])


def spread(items: Sequence[Any], wanted: int) -> list[Any]:
    """At most so many of the items, evenly spread."""
    if len(items) <= wanted:
        return list(items)
    return [items[int(i * len(items) / wanted)] for i in range(wanted)]
