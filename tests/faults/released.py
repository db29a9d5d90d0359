"""Make the golden run of a version that is about to be released: python -m tests.faults.released

Writes `tests/faults/golden/<version>/`: a small base, rows, a finished run without its checkpoints, and what it is worth. It is
committed with the release and never changed; `test_released.py` holds every later version against it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from lora_lab import __version__, cli

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = [
    "model=hub", "model.path=base", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu", "speed=plain",
    "data.train=rows.jsonl", "data.eval=held_out.jsonl", "optim.lr=0.01", "adapter.r=4", "train.batch_size=4",
    "train.epochs=2", "run_dir=run",
]  # fmt: skip
_KEPT = ("config.yaml", "manifest.json", "metrics.jsonl", "result.json", "adapter")  # of the run folder


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Names in a golden run are relative to its folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make(folder: Path) -> None:
    """Train the golden run in a new folder."""
    from tests.conftest import make_base, make_rows, write_jsonl

    folder.mkdir(parents=True)
    make_base(folder / "base", hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    write_jsonl(folder / "rows.jsonl", make_rows(20))
    write_jsonl(folder / "held_out.jsonl", make_rows(6, seed=1))
    with inside(folder):
        code = cli.main(["train", *SETTINGS])
    if code:
        sys.exit(code)
    for path in (folder / "run").iterdir():
        if path.name not in _KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    make(GOLDEN / __version__)
