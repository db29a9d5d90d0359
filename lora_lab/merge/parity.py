"""Compare two models' next-token distributions on the same held-out rows, and judge a merge by it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lora_lab.config import MergeConfig
from lora_lab.data.collate import pack
from lora_lab.data.encode import Example
from lora_lab.errors import MergeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_POSITIONS = 512  # logits of so many positions are held at once: 100 MB for a vocabulary of 50,000
_CHUNK = 64  # positions that are compared at once


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far a model's logits [S, V] are from a reference's, on the same positions."""

    max_logit_diff: float
    kl: float  # mean over positions of KL(reference || model), in nats
    top1_agreement: float  # share of positions with the same most likely token
    reference_loss: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Probe:
    """The rows that models are compared on."""

    examples: list[Example]
    targets: torch.Tensor  # [S] int64


def probe(examples: Iterable[Example], rows: int) -> Probe:
    """The first `rows` examples, as long as their supervised positions stay few."""
    chosen, positions = [], 0
    for example in itertools.islice(examples, rows):
        positions += int(example.supervised.sum())
        if chosen and positions > _MAX_POSITIONS:
            break
        chosen.append(example)
    return Probe(chosen, torch.cat([pack([example]).targets for example in chosen]))


@torch.no_grad()
def logits(model: PreTrainedModel, rows: Probe) -> torch.Tensor:
    """Logits [S, V] float32 on the CPU at the probe's positions, one plain forward pass per row."""
    pieces = []
    for example in rows.examples:
        batch = pack([example], model.device)
        pieces.append(model(input_ids=batch.input_ids, use_cache=False).logits[0, batch.logit_positions].float().cpu())
    return torch.cat(pieces)


def reloaded_logits(folder: Path, rows: Probe, device: torch.device) -> torch.Tensor:
    """As `logits`, of a saved checkpoint, by plain transformers in a fresh process.

    Raises:
        MergeError: the checkpoint does not load there.
    """
    with tempfile.TemporaryDirectory(prefix="lora_lab_") as scratch:
        rows_file, logits_file = f"{scratch}/rows.safetensors", f"{scratch}/logits.safetensors"
        batches = [pack([example]) for example in rows.examples]
        tensors = {f"ids.{i}": batch.input_ids[0].contiguous() for i, batch in enumerate(batches)}
        tensors |= {f"positions.{i}": batch.logit_positions for i, batch in enumerate(batches)}
        save_file(tensors, rows_file)
        script = str(Path(__file__).with_name("reload.py"))
        # -P: the script's own folder is not searched for modules, so nothing of lora_lab can be imported by accident
        command = [sys.executable, "-P", script, str(folder), rows_file, logits_file, str(device)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MergeError(f"{folder}: plain transformers cannot load the merged checkpoint ({reason}).")
        return load_file(logits_file)["logits"]


def compare(reference: torch.Tensor, other: torch.Tensor, rows: Probe) -> Gap:
    """Measure `other` against `reference`; both [S, V] float32."""
    difference, kl = 0.0, 0.0
    for p, q in zip(reference.split(_CHUNK), other.split(_CHUNK), strict=True):  # copies of a few rows, not of all
        difference = max(difference, (p - q).abs().max().item(), key=lambda x: math.inf if math.isnan(x) else x)
        kl += kl_div(log_softmax(q, -1), log_softmax(p, -1), reduction="sum", log_target=True).item()
    return Gap(
        max_logit_diff=difference,
        kl=kl / len(rows.targets),
        top1_agreement=(reference.argmax(-1) == other.argmax(-1)).float().mean().item(),
        reference_loss=cross_entropy(reference, rows.targets).item(),
        loss=cross_entropy(other, rows.targets).item(),
    )


def judge(arithmetic: Gap, trained: Gap, limits: MergeConfig, dtype: str) -> list[str]:
    """Why the merged checkpoint must be refused; empty when it may be kept.

    Args:
        arithmetic: merged against unquantized base + adapter: what the merge itself changed (rounding to `dtype`).
        trained: merged against the model as trained, on its quantized base.
    """
    found = []
    if dtype == "float32" and not arithmetic.max_logit_diff <= limits.max_logit_diff:
        found.append(
            f"max |logit difference| {arithmetic.max_logit_diff:.2e} > merge.max_logit_diff={limits.max_logit_diff:g}"
        )
    if not arithmetic.kl <= limits.max_kl:
        found.append(f"KL {arithmetic.kl:.2e} > merge.max_kl={limits.max_kl:g}")
    if not arithmetic.top1_agreement >= limits.min_top1_agreement:
        found.append(
            f"top-1 agreement {arithmetic.top1_agreement:.4f} < merge.min_top1_agreement={limits.min_top1_agreement:g}"
        )
    increase = trained.loss - trained.reference_loss
    if not increase <= limits.max_loss_increase:
        found.append(
            f"loss {increase:+.4f} against the model as trained > merge.max_loss_increase={limits.max_loss_increase:g}"
        )
    return found
