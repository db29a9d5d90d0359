"""What a model said of a few rows when its training ended, kept with the run: whoever loads the adapter later can prove that it still
says the same, on whatever machine, with whatever versions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_lab.data.dataset import Dataset, Stream, first_examples
from lora_lab.errors import AdapterError
from lora_lab.fast.isolation import allowed_gap
from lora_lab.runtime import storage
from lora_lab.runtime.reading import read_json
from lora_lab.verify.reload import OUTPUTS, at

if TYPE_CHECKING:
    from peft import PeftModel

    from lora_lab.tasks.base import AnyTask, Pass

FILE = "probes.json"
_ROWS, _POSITIONS, _TOP = 4, 4, 8


def adapter_digest(folder: Path) -> str:
    """Hex SHA-256 of all that an adapter's folder holds, which is verified.

    Raises:
        CheckpointError: the folder does not match its manifest.
    """
    return storage.digest(storage.verify(folder)["files"])


def write(run: Path, adapter: Path, model: PeftModel, task: AnyTask, data: Dataset | Stream) -> None:
    """Keep what the model says of the ends of the first rows. Nothing is kept of a model whose outputs are not finite.

    Args:
        adapter: the folder of the adapter that is active.
        data: held-out rows where there are any, else training rows.
    """
    keep(run, adapter, model, (task.passes(task.shortened(one))[0] for one in first_examples(data, _ROWS)))


@torch.no_grad()
def keep(run: Path, adapter: Path, model: PeftModel, passes: Iterable[Pass]) -> None:
    """As `write`, of given rows: the first of them."""
    rows = []
    for inputs, positions in itertools.islice(passes, _ROWS):
        outputs = _outputs(model, inputs, positions)
        if not all(one.isfinite().all() for one in outputs.values()):
            return
        rows.append(
            {
                "inputs": {name: one.tolist() for name, one in inputs.items()},
                "positions": None if positions is None else positions.tolist(),
                "said": {name: _likeliest(one) for name, one in outputs.items()},
            }
        )
    content = {"adapter": adapter_digest(adapter), "rows": rows}
    storage.write_text(run / FILE, storage.dump_json(content | {"sha256": storage.digest(content)}))


def _outputs(
    model: PeftModel, inputs: dict[str, torch.Tensor], positions: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """[P, C] float32 of each output, at the last positions."""
    result = model(**{name: one.to(model.device) for name, one in inputs.items()})
    found = {name: at(result[name][0], positions, inputs) for name in OUTPUTS if name in result}
    return {name: one.reshape(-1, one.shape[-1])[-_POSITIONS:] for name, one in found.items()}


def _likeliest(said: torch.Tensor) -> dict[str, Any]:
    best = said.topk(min(_TOP, said.shape[-1]))
    return {"places": best.indices.tolist(), "values": best.values.tolist()}


def kept(run: Path, adapter: Path) -> list[dict[str, Any]] | None:
    """The rows that are kept with a run: `inputs`, `positions`, and of each output `places` and `values`, the largest at the last
    positions; None where there are none.

    Raises:
        AdapterError: the file is not what was written, or is of another adapter.
    """
    file = run / FILE
    if not file.exists():
        return None
    content: dict[str, Any] = read_json(file, AdapterError)
    if content.pop("sha256", None) != storage.digest(content):
        raise AdapterError(f"{file}: was changed or damaged. Restore it, or remove it: nothing is compared then.")
    if content["adapter"] != adapter_digest(adapter):
        raise AdapterError(f"{file}: is of another adapter than {adapter}. Restore the one that was exchanged.")
    rows: list[dict[str, Any]] = content["rows"]
    return rows


@torch.no_grad()
def check(run: Path, adapter: Path, model: PeftModel) -> str:
    """Let the active adapter say again what it said at the end of its training; a clause about what was found.

    Raises:
        AdapterError: it says something else, or the file is not what was written.
    """
    rows = kept(run, adapter)
    if rows is None:
        return "none are kept with this run, so what it says was not compared"
    worst = max((_gap(model, row) for row in rows), default=0.0)
    limit = allowed_gap(model)
    if not worst <= limit:
        raise AdapterError(
            f"{run}: its adapter does not say what it said at the end of its training: probe rows differ by {worst:.1e} of their size "
            f"(allowed: {limit:.0e}). The base, the adapter or how the base is stored is another than then."
        )
    return f"{len(rows)} rows as at the end of training (largest difference {worst:.1e} of their size)"


def _gap(model: PeftModel, row: dict[str, Any]) -> float:
    """The largest difference of a row's scores, as a share of the largest."""
    inputs = {name: torch.tensor(one) for name, one in row["inputs"].items()}
    positions = None if row["positions"] is None else torch.tensor(row["positions"])
    now = _outputs(model, inputs, positions)
    worst = 0.0
    for name, then in row["said"].items():
        places, values = torch.tensor(then["places"]), torch.tensor(then["values"])
        if name not in now or len(places) != len(now[name]) or int(places.max()) >= now[name].shape[-1]:
            return float("inf")
        gap = (now[name].gather(-1, places) - values).abs().max() / values.abs().max().clamp_min(1e-6)
        worst = max(worst, float(gap))
    return worst
