"""Whether another program answers as the run does: probe rows are asked of it with the adapter, and with the base alone.

A run keeps what its adapter said at the end of training (`verify/probes.py`): of a few places, the scores of the likeliest tokens. The
program tells log-probabilities. Both say the same if their distributions among those tokens are the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lora_lab.errors import AdapterError, ExportError
from lora_lab.verify import probes

if TYPE_CHECKING:
    from lora_lab.serve.shelf import Opened

Asked = Callable[[Sequence[int], int | None], dict[int, float]]  # prompt, adapter -> log-probabilities by token
_NEARER = 0.5  # of the base's distance from the probe rows: what the adapter's may be at most


@dataclasses.dataclass(frozen=True)
class Proof:
    """What was found."""

    places: int
    kl: float  # mean KL(run || program with the adapter), in nats, among the tokens that are kept
    base_kl: float  # the same of the program without the adapter

    def __str__(self) -> str:
        return (
            f"{self.places} places as at the end of training (KL {self.kl:.1e}; without the adapter {self.base_kl:.1e})"
        )


def prove(opened: Opened, place: int, asked: Asked) -> Proof:
    """
    Args:
        place: of the adapter among those that the program was started with.
        asked: asks the program.

    Raises:
        AdapterError: nothing is kept to compare with.
        ExportError: the program answers as the base does, or not as the run does.
    """
    assert opened.run is not None, "an adapter has a run"
    rows = probes.kept(opened.run.path, opened.run.adapter)
    if not rows:
        raise AdapterError(
            f"{opened.name}: no probe rows are kept with this run ({probes.FILE}), so whether another program answers as it does cannot be "
            "known. Serve it without serve.engine, or train it anew."
        )
    kl, base_kl, apart, count = 0.0, 0.0, 0.0, 0
    for prompt, tokens, scores in _places(rows):
        own, base = _among(asked(prompt, place), tokens), _among(asked(prompt, None), tokens)
        kl, base_kl, count = kl + _divergence(scores, own), base_kl + _divergence(scores, base), count + 1
        apart = max(apart, float((own - base).abs().max()))
    found = Proof(count, kl / count, base_kl / count)
    if apart == 0:
        raise ExportError(
            f"{opened.name}: the program says the same with the adapter and without it at all {count} places, so the adapter has no effect "
            "there. Nothing is served."
        )
    limit = math.inf if opened.config.quant.method != "none" else opened.config.merge.max_kl
    if not found.kl <= min(limit, _NEARER * found.base_kl):
        than = f"merge.max_kl={limit:g}" if found.kl > limit else f"{_NEARER:g} of the base's distance"
        raise ExportError(
            f"{opened.name}: the program does not say what the run said at the end of its training: KL {found.kl:.2e} over {count} places, "
            f"above {than} (the base alone: {found.base_kl:.2e}). Export the adapter anew, or start the program with more exact numbers "
            "(serve.engine_command, serve.engine_base). Nothing is served."
        )
    return found


def _places(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[list[int], list[int], torch.Tensor]]:
    """Prompts, the tokens that were likeliest after each, and their scores [8]."""
    for row in rows:
        [ids] = row["inputs"]["input_ids"]
        places = list(range(len(ids))) if row["positions"] is None else row["positions"]
        said = row["said"]["logits"]
        ends = places[len(places) - len(said["places"]) :]
        for end, tokens, values in zip(ends, said["places"], said["values"], strict=True):
            yield ids[: end + 1], tokens, torch.tensor(values, dtype=torch.float64)


def _among(told: dict[int, float], tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of some tokens; one that was not told of is at most as likely as the last that was."""
    least = min(told.values())
    return torch.tensor([told.get(token, least) for token in tokens], dtype=torch.float64)


def _divergence(scores: torch.Tensor, told: torch.Tensor) -> float:
    """KL of the distributions among these tokens, in nats."""
    p, q = scores.log_softmax(-1), told.log_softmax(-1)
    return float((p.exp() * (p - q)).sum())
