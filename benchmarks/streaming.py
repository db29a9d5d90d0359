"""Train on a generated JSONL file that is larger than the memory one wants to spend, and resume it.

    python -m benchmarks.streaming --gigabytes 2 --out result.json

Three runs with equal rows in a step: on a small stored file (the reference for memory), streamed from the large file, and
streamed but stopped by SIGTERM and resumed. Reported are the peaks of resident memory, and whether the two streamed
adapters are equal byte by byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lora_lab.runtime import console

_WORDS = "order table lamp window river music garden winter paper stone market letter copper ticket".split()
_ROWS_OF_A_BLOCK = 20_000


def write_rows(file: Path, size: int) -> int:
    """Write rows of 300 to 900 characters, all different, until the file has `size` bytes; returns how many."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(_WORDS, k=draw.randint(20, 60))) for _ in range(_ROWS_OF_A_BLOCK)]
    count = 0
    with open(file, "w", encoding="utf-8") as stream:
        while stream.tell() < size:
            for text in texts:
                stream.write(json.dumps({"prompt": f"Row {count}: {text}", "completion": text[::-1]}) + "\n")
                count += 1
    return count


def train(folder: Path, *overrides: str, stop_after: int | None = None) -> float:
    """Train in a process of its own; peak resident memory in MiB. `stop_after`: SIGTERM once so many steps are done."""
    command = [sys.executable, "-m", "lora_lab", *overrides]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    metrics = folder / "metrics.jsonl"
    while stop_after is not None and process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= stop_after:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.2)
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, 128 + signal.SIGTERM):
        raise SystemExit(f"{' '.join(command)}: exit code {code}")
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = write_rows(folder / "large.jsonl", int(arguments.gigabytes * 1e9))
        write_rows(folder / "small.jsonl", 1_000_000)
        common = [
            "train",
            "tracker=none",
            "train.batch_size=4",
            f"train.max_steps={arguments.steps}",
            "train.save_steps=100000",
        ]
        large = [*common, f"data.train={folder}/large.jsonl", "data.streaming=true"]
        stored = train(folder / "a", *common, f"data.train={folder}/small.jsonl", f"run_dir={folder}/a")
        streamed = train(folder / "b", *large, f"run_dir={folder}/b")
        train(folder / "c", *large, f"run_dir={folder}/c", stop_after=arguments.steps // 2)
        stopped_at = len((folder / "c/metrics.jsonl").read_text().splitlines())
        train(folder / "c", "resume", f"run={folder}/c")
        digests = [
            hashlib.sha256((folder / run / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()
            for run in "bc"
        ]
        result = {
            "file_mb": (folder / "large.jsonl").stat().st_size / 1e6,
            "rows": rows,
            "stored_peak_mib": stored,
            "streamed_peak_mib": streamed,
            "extra_mib": streamed - stored,
            "stopped_after_steps": stopped_at,
            "resumed_adapter_is_equal": digests[0] == digests[1],
        }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.show_table("streaming", ["", "value"], list(result.items()))


if __name__ == "__main__":
    main()
