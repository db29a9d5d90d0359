"""Training beside another program: python -m benchmarks.busy [--repeats 3] [--out RESULT.json]

The demo's first steps, on a machine that is quiet and on the same machine with one of its cores kept busy, with threads that wait
in each way: as lora-lab chooses, spinning, sleeping, and one thread, which waits for nobody. All of them take turns, again and
again; figures are medians of tokens a second. The machine must be quiet otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.sources import ROOT, commit, now
from benchmarks.tasks import _machine, _versions
from lora_lab.runtime.busy import SAID

_OUT = Path(__file__).parent / "results" / "busy.json"
WAYS: dict[str, dict[str, str]] = {
    "as lora-lab chooses": {},
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=_OUT)
    args = parser.parse_args()
    speeds: dict[str, dict[str, list[float]]] = {way: {"quiet": [], "busy": []} for way in WAYS}
    for repeat in range(-1, args.repeats):  # the first round fills the caches
        for machine, way in itertools.product(("quiet", "busy"), WAYS):
            with _taken_core() if machine == "busy" else contextlib.nullcontext():
                found = _tokens_per_second(WAYS[way])
            if repeat >= 0:
                speeds[way][machine].append(found)
                print(machine, way, round(found), flush=True)
            else:
                break
    result = {
        "machine": _machine(),
        "versions": _versions(),
        "commit": commit(),
        "when": now(),
        "tokens_per_second": speeds,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(result))
    print(table(result))


@contextlib.contextmanager
def _taken_core() -> Iterator[None]:
    """One core kept busy by another program, wherever the system puts it."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def _tokens_per_second(said: dict[str, str]) -> float:
    environment = {name: text for name, text in os.environ.items() if name not in (*SAID, "OMP_NUM_THREADS")}
    with tempfile.TemporaryDirectory(prefix="lora_lab_busy_") as folder:
        command = [
            *(
                sys.executable,
                "-m",
                "lora_lab",
                "train",
                "recipe=demo",
                "train.max_steps=8",
                "data.eval=null",
                "tracker=none",
            ),
            *("quant=none", "hardware=cpu", "export=adapter", f"run_dir={folder}/run"),
        ]
        subprocess.run(command, cwd=ROOT, env=environment | said, capture_output=True, check=True)
        return float(json.loads(Path(folder, "run", "result.json").read_text())["tokens_per_second"])


def table(result: dict[str, Any]) -> str:
    """Markdown: tokens a second in each way, and as shares of one thread and of spinning threads on a quiet machine."""
    medians = {
        way: {machine: statistics.median(found) for machine, found in of.items()}
        for way, of in result["tokens_per_second"].items()
    }
    one, most = medians["one thread"]["quiet"], medians["spinning"]["quiet"]
    lines = [
        "| threads wait | quiet | of spinning | one core busy | of one quiet thread |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {way} | {of['quiet']:.0f} | {of['quiet'] / most:.2f} | {of['busy']:.0f} | {of['busy'] / one:.2f} |"
        for way, of in medians.items()
    ]
    repeats = len(result["tokens_per_second"]["spinning"]["quiet"])
    head = (
        f"Tokens a second, medians of {repeats} turns, {result['machine']['cores']} cores, commit {result['commit']}."
    )
    return "\n".join([head, "", *lines, ""])


if __name__ == "__main__":
    main()
