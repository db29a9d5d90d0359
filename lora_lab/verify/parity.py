"""Compare what two models say of the same held-out rows, and judge a merge by it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax

from lora_lab.adapters import files
from lora_lab.config.merge import MergeConfig
from lora_lab.data.encode import Example
from lora_lab.errors import MergeError
from lora_lab.runtime import children, storage
from lora_lab.verify import layers
from lora_lab.verify.reload import OUTPUTS, at

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_lab.export.gguf import TopGap
    from lora_lab.tasks.base import Pass, Task

_MAX_POSITIONS = 512  # logits of so many positions are held at once: 100 MB for a vocabulary of 50,000
ROUNDING = 1e-3  # by which two logits that are the same may differ, however small they are
_CHUNK = 64  # positions that are compared at once


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far a model's logits are from a reference's, on the same positions.

    Of vectors (embeddings), `kl` and `loss` are the mean of 1 - cosine, and `top1_agreement` is the share of texts whose nearest other
    text is the same. Where a row has a single number (regression), `kl` is the mean squared difference as a share of the targets' variance, and
    `top1_agreement` the share of pairs of rows, among those told apart by 1 % of its root, that come in the same order.
    """

    max_logit_diff: float
    kl: float  # mean over positions of KL(reference || model), in nats
    top1_agreement: (
        float  # share of positions with the same most likely token or class, near ties included (`as_likely`)
    )
    reference_loss: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Probe:
    """The rows that models are compared on."""

    examples: list[Example]
    passes: list[list[Pass]]  # of each row
    task: Task

    @property
    def num_items(self) -> int:
        return sum(len(self.task.compared_targets(example)) for example in self.examples)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a model says of the rows that another is compared with it on."""

    rows: Probe
    logits: list[torch.Tensor]  # [S, C] float32 of each row


def probe(examples: Iterable[Example], rows: int, task: Task, most: int = _MAX_POSITIONS) -> Probe:
    """The first `rows` examples, as long as their supervised positions are at most `most` (but for a single row)."""
    chosen, positions = [], 0
    for example in itertools.islice(examples, rows):
        positions += example.num_items
        if chosen and positions > most:
            break
        chosen.append(example)
    return Probe(chosen, [task.passes(example) for example in chosen], task)


def logits(
    model: PreTrainedModel | PeftModel,
    rows: Probe,
    device: torch.device | None = None,
    inside: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> list[torch.Tensor]:
    """Logits [S, C] float32 of each row on the CPU, one plain forward pass per sequence; see `layers.run`.

    Args:
        device: to compute on; None: where the model is.
        inside: what each row's passes run in, such as autocast.
    """
    there = torch.device(model.device) if device is None else device

    def said(place: int) -> torch.Tensor:
        outputs = []
        with inside():
            for inputs, positions in rows.passes[place]:
                result = model(**{name: tensor.to(there) for name, tensor in inputs.items()})
                outputs.append({name: at(result[name][0], positions, inputs) for name in OUTPUTS if name in result})
        return rows.task.compared(outputs, rows.examples[place])

    return layers.run(model, [functools.partial(said, place) for place in range(len(rows.examples))], there)


def reloaded_logits(
    folder: Path, auto_class: str, rows: Probe, device: torch.device, dtype: str = "auto", adapter: Path | None = None
) -> list[torch.Tensor]:
    """As `logits`, of a saved checkpoint, by plain transformers in a fresh process.

    Args:
        dtype: that it computes in; auto: the checkpoint's own.
        adapter: a peft folder to be put on it by peft.

    Raises:
        MergeError: the checkpoint does not load there.
    """
    passes = list(itertools.chain.from_iterable(rows.passes))
    return outputs_of_rows(rows, reloaded_outputs(folder, auto_class, passes, device, dtype, adapter))


def reloaded_outputs(
    folder: Path,
    auto_class: str,
    passes: list[Pass],
    device: torch.device,
    dtype: str = "auto",
    adapter: Path | None = None,
) -> list[dict[str, torch.Tensor]]:
    """The outputs of each forward pass, as `reloaded_logits`."""
    with storage.scratch() as scratch:
        rows_file, outputs_file = f"{scratch}/rows.safetensors", f"{scratch}/outputs.safetensors"
        tensors = {}
        for number, (inputs, positions) in enumerate(passes):
            tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in inputs.items()}
            if positions is not None:
                tensors[f"{number}.positions"] = positions.contiguous()
        save_file(tensors, rows_file)
        script = str(Path(__file__).with_name("reload.py"))
        # -P: the script's own folder is not searched for modules, so nothing of lora_lab can be imported by accident
        command = [sys.executable, "-P", script, str(folder), auto_class, rows_file, outputs_file, str(device), dtype]
        command += [] if adapter is None else [str(adapter), *_registration(adapter)]
        done = children.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            storage.check_scratch(scratch, reason)
            raise MergeError(f"{folder}: plain transformers cannot load the merged checkpoint ({reason}).")
        saved = load_file(outputs_file)
    return [{name: saved[f"{n}.{name}"] for name in OUTPUTS if f"{n}.{name}" in saved} for n in range(len(passes))]


def _registration(adapter: Path) -> list[str]:
    """The module that plain peft needs to know the method of an adapter folder, if there is one."""
    module = files.method_of(files.settings(adapter)).registered_by
    return [module] if module else []


def outputs_of_rows(rows: Probe, outputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Logits [S, C] of each row, from the outputs of all their passes."""
    left = iter(outputs)
    return [
        rows.task.compared([next(left) for _ in passes], example)
        for example, passes in zip(rows.examples, rows.passes, strict=True)
    ]


def compare(reference: list[torch.Tensor], other: list[torch.Tensor], rows: Probe) -> Gap:
    """Measure `other` against `reference`; [S, C] float32 for each row."""
    if rows.task.config.vectors:
        return _compare_vectors(torch.cat(reference), torch.cat(other))
    targets = [rows.task.compared_targets(example) for example in rows.examples]
    if reference[0].shape[-1] == 1:
        return _compare_numbers(torch.cat(reference)[:, 0], torch.cat(other)[:, 0], torch.cat(targets))
    difference, kl, agreed, losses = 0.0, 0.0, 0, [0.0, 0.0]
    for one, two, goal in zip(reference, other, targets, strict=True):
        for p, q in zip(one.split(_CHUNK), two.split(_CHUNK), strict=True):  # copies of a few positions, not of all
            difference = max(difference, (p - q).abs().max().item(), key=lambda x: math.inf if math.isnan(x) else x)
            kl += kl_div(log_softmax(q, -1), log_softmax(p, -1), reduction="sum", log_target=True).item()
        agreed += int(as_likely(one, two.argmax(-1)).sum())
        losses = [
            total + cross_entropy(side, goal, reduction="sum").item()
            for total, side in zip(losses, (one, two), strict=True)
        ]
    count = sum(map(len, targets))
    return Gap(difference, kl / count, agreed / count, losses[0] / count, losses[1] / count)


def as_likely(reference: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Whether a reference finds a chosen token or class the likeliest, or as likely as that within the comparison's tolerance.

    Where the two best logits are closer than rounding moves them, which of them comes first tells nothing: a choice between
    such counts as the same. Rounding is that of 16 bits (float16's spacing at the position's largest logit, on both sides), and
    `ROUNDING` at least; where a checkpoint computes something else it shows in the divergence and the loss all the same.

    Args:
        reference: logits [S, C].
        chosen: [S] int64.

    Returns:
        [S] bool.
    """
    best = reference.max(-1).values
    tolerance = (2 * torch.finfo(torch.float16).eps * reference.abs().amax(-1)).clamp_min(ROUNDING)
    return best - reference.gather(-1, chosen[:, None])[:, 0] <= tolerance


def _compare_numbers(reference: torch.Tensor, other: torch.Tensor, targets: torch.Tensor) -> Gap:
    spread = targets.var(unbiased=False).clamp_min(1e-12)
    gaps = [numbers[:, None] - numbers[None] for numbers in (reference, other)]
    apart = gaps[0].abs() > 0.01 * spread.sqrt()  # pairs that the reference tells apart
    same = (torch.sign(gaps[0]) == torch.sign(gaps[1]))[apart]
    return Gap(
        max_logit_diff=(reference - other).abs().max().item(),
        kl=((reference - other).square().mean() / spread).item(),
        top1_agreement=same.float().mean().item() if len(same) else 1.0,
        reference_loss=(reference - targets).square().mean().item(),
        loss=(other - targets).square().mean().item(),
    )


def _compare_vectors(reference: torch.Tensor, other: torch.Tensor) -> Gap:
    """Of vectors [S, D] of length 1."""
    apart = (1 - cosine_similarity(reference, other, dim=-1)).mean().item()
    near, found = (
        (side @ side.T).fill_diagonal_(-2) if len(side) > 1 else torch.zeros(1, 1) for side in (reference, other)
    )
    agreed = as_likely(near, found.argmax(-1)).float().mean().item()
    return Gap((reference - other).abs().max().item(), max(apart, 0.0), agreed, 0.0, max(apart, 0.0))


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
    found += disagreements(arithmetic, limits)
    found += loss_increase(trained, limits, "against the model as trained")
    return found


def disagreements(gap: Gap | TopGap, limits: MergeConfig) -> list[str]:
    """Why two distributions that should be the same are not."""
    found = []
    if not gap.kl <= limits.max_kl:
        found.append(f"KL {gap.kl:.2e} > merge.max_kl={limits.max_kl:g}")
    if not gap.top1_agreement >= limits.min_top1_agreement:
        found.append(
            f"top-1 agreement {gap.top1_agreement:.4f} < merge.min_top1_agreement={limits.min_top1_agreement:g}"
        )
    return found


def loss_increase(gap: Gap | TopGap, limits: MergeConfig, against: str) -> list[str]:
    """Why a loss is too far above the reference's."""
    increase = gap.loss - gap.reference_loss
    if increase <= limits.max_loss_increase:
        return []
    return [f"loss {increase:+.4f} {against} > merge.max_loss_increase={limits.max_loss_increase:g}"]
