"""Learn what a teacher says: for each supervised token its distribution over the vocabulary, beside the row's own token.

The teacher's distributions are columns of the rows (`run/teacher.py`): it is not in memory while the student learns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lora_lab.config.run import RunConfig
from lora_lab.data.collate import PackedBatch, join, pack
from lora_lab.data.dataset import Dataset, first_examples
from lora_lab.data.encode import Encoder, Example
from lora_lab.tasks import metrics
from lora_lab.tasks.base import EvalResult, Predictions, StepBatches
from lora_lab.tasks.causal_lm.task import CausalLM
from lora_lab.tasks.distillation import losses
from lora_lab.tasks.distillation.config import DistillationConfig
from lora_lab.tasks.metrics import reports

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig

_TOKENS, _LOGPROBS, _LOSSES = "teacher_tokens", "teacher_logprobs", "teacher_losses"
_ALL = slice(None)


@dataclasses.dataclass(frozen=True, eq=False)
class TaughtBatch(PackedBatch):
    """Packed rows with what a teacher says of each supervised token."""

    teacher_tokens: torch.Tensor  # [S, k] int64, the likeliest first
    teacher_logprobs: (
        torch.Tensor
    )  # [S, k + 1] float32, the last of all other tokens together; [S, k] if there are none


class Distillation(CausalLM):
    """`task=distillation`."""

    config: DistillationConfig
    teacher_options = ("temperature", "top_k")

    def __init__(self, config: RunConfig, encoder: Encoder, learned: dict[str, Any], model: PretrainedConfig):
        super().__init__(config, encoder, learned, model)
        # Rows of the output layer beyond the vocabulary are no tokens; models of one family have more or fewer of them.
        size = max(encoder.tokenizer.get_vocab().values()) + 1
        self.vocabulary = size if encoder.vocab_size is None else min(size, encoder.vocab_size)
        self.kept = min(self.config.top_k or self.vocabulary, self.vocabulary)
        self.soft_numbers = 2 * self.kept + 2

    # -- what the teacher says --------------------------------------------------------------------------------------------

    def soft_targets(self, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
        own = logits[:, : self.vocabulary].float()
        tempered = own / self.config.temperature
        tokens = tempered.topk(self.kept, dim=1).indices
        return {
            _TOKENS: tokens.int().cpu().numpy(),
            _LOGPROBS: losses.classes(tempered, tokens).cpu().numpy(),
            _LOSSES: cross_entropy(own, targets, reduction="none").cpu().numpy(),
        }

    def of_soft_targets(self, data: Dataset) -> str:
        if self.kept == self.vocabulary:
            return "the whole vocabulary is kept"
        chunks = (chunk.flatten().to_numpy() for chunk in data.table.column(_LOGPROBS).chunks)
        others = [np.exp(chunk[self.kept :: self.kept + 1]) for chunk in chunks]
        return f"of its probability {np.concatenate(others).mean():.2%} are of other tokens than the {self.kept} that are kept"

    def collate(self, examples: list[Example], rng: np.random.Generator) -> PackedBatch:
        """Examples without a teacher's word, on which a model is only tried, become a batch without one."""
        packed = pack(examples)
        if any(_TOKENS not in example.own for example in examples):
            return packed
        tokens, logprobs = (
            np.concatenate([example[name].reshape(int(example.supervised.sum()), -1) for example in examples])
            for name in (_TOKENS, _LOGPROBS)
        )
        return _taught(packed, torch.from_numpy(tokens), torch.from_numpy(logprobs))

    def shortened(self, example: Example) -> Example:
        """With the teacher's word on those of its tokens that are left; if none is, on the last what it said of another."""
        short = super().shortened(example)
        if _TOKENS not in example.own:
            return short
        places = np.flatnonzero(example.supervised) - (len(example.input_ids) - len(short.input_ids))
        left, weights = np.flatnonzero(places > 0), np.zeros_like(short.weights)
        weights[places[left]] = 1
        if not len(left):
            left, weights[-1] = np.array([len(places) - 1]), 1
        own = {name: example[name].reshape(len(places), -1)[left].reshape(-1) for name in (_TOKENS, _LOGPROBS, _LOSSES)}
        return dataclasses.replace(short, weights=weights, own=own)

    def step(
        self, model: PeftModel, parts: Iterable[list[Example]], rng: np.random.Generator
    ) -> StepBatches[PackedBatch]:
        found = super().step(model, parts, rng)
        assert all(isinstance(batch, TaughtBatch) for batch in found.batches), "no teacher has read these rows"
        return found

    # -- the loss -----------------------------------------------------------------------------------------------------------

    @property
    def shares_passes(self) -> bool:
        """Its `step` needs no model."""
        return self.forward.together

    def joined(self, batches: Sequence[PackedBatch]) -> PackedBatch:
        taught = [self._as_taught(batch) for batch in batches]
        return _taught(
            join(batches),
            torch.cat([batch.teacher_tokens for batch in taught]),
            torch.cat([batch.teacher_logprobs for batch in taught]),
        )

    def item_losses(self, logits: torch.Tensor, batch: PackedBatch, smoothing: float) -> torch.Tensor:
        return self._compared(logits, self._as_taught(batch), smoothing)[0]

    def token_losses(
        self, model: PeftModel, batch: PackedBatch, smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each supervised token [S], and what `observed` keeps of it [S, 4]."""
        taught = self._as_taught(batch)
        if not self.forward.chunked_head:
            return self._compared(self.logits(model, batch), taught, smoothing)
        return self.forward.other_losses_in_chunks(
            model, batch, lambda logits, part: self._compared(logits, taught, smoothing, part)
        )

    def _compared(
        self, logits: torch.Tensor, batch: TaughtBatch, smoothing: float, part: slice = _ALL
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `token_losses`, of the logits [s, V] of a part of a batch's supervised tokens. The divergence is multiplied by the
        temperature's square, so that its gradients keep their size (Hinton et al., arXiv:1503.02531, section 2)."""
        config, tokens = self.config, batch.teacher_tokens[part]
        student = losses.classes(logits[:, : self.vocabulary] / config.temperature, tokens)
        apart = self._divergence(batch.teacher_logprobs[part], student)
        hard = cross_entropy(logits, batch.targets[part], reduction="none", label_smoothing=smoothing)
        loss = config.kd_ratio * config.temperature**2 * apart + (1 - config.kd_ratio) * hard
        said = (logits.argmax(1), tokens[:, 0], apart.detach(), hard.detach())
        return loss, torch.stack([one.float() for one in said], 1)

    def _divergence(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """[S, C] logarithms of probabilities each -> [S]."""
        if self.config.divergence == "jensen_shannon":
            return losses.jensen_shannon(teacher, student, self.config.beta)
        return (losses.forward_kl if self.config.divergence == "forward_kl" else losses.reverse_kl)(teacher, student)

    def _as_taught(self, batch: PackedBatch) -> TaughtBatch:
        """The batch; one that no teacher has read, on which a model is only tried, as if its teacher held all tokens equally likely."""
        if isinstance(batch, TaughtBatch):
            return batch
        tokens = torch.arange(self.kept, device=batch.targets.device).expand(len(batch.targets), -1)
        return _taught(batch, tokens, losses.classes(tokens.new_zeros(len(tokens), self.vocabulary).float(), tokens))

    # -- measuring --------------------------------------------------------------------------------------------------------

    def observed(self, examples: list[Example], logits: torch.Tensor, batch: PackedBatch) -> Predictions:
        said = logits.cpu()
        weights = torch.ones(len(said)) if batch.weights is None else batch.weights.cpu()
        kept = torch.cat([said[:, 1:], weights[:, None]], 1)
        return Predictions(examples, kept, said[:, 0].long().numpy(), batch.targets.cpu().numpy())

    @reports(metrics.perplexity, lower=("loss", "divergence"), higher=("token_accuracy", "teacher_agreement"))
    def metrics(self, loss: float, seen: list[Predictions]) -> EvalResult:
        """`loss`: what is learned. `divergence`: from the teacher, at the temperature. `perplexity`: of the rows' own tokens, as of
        task=causal_lm. `teacher_agreement`: share of places where student and teacher hold the same token likeliest."""
        teacher, apart, hard, weights = np.concatenate([one.logits.numpy() for one in seen]).astype(np.float64).T
        predicted, targets = (np.concatenate([getattr(one, name) for one in seen]) for name in ("predicted", "targets"))
        found = {
            "loss": loss,
            "divergence": float(np.average(apart, weights=weights)),
            "perplexity": metrics.perplexity(float(np.average(hard, weights=weights))),
            "token_accuracy": float((predicted == targets).mean()),
            "teacher_agreement": float((predicted == teacher).mean()),
        }
        return EvalResult(found)

    def baselines(self, data: Dataset) -> dict[str, EvalResult]:
        """The teacher itself."""
        examples = first_examples(data, len(data))
        weights = np.concatenate([one.weights[one.supervised] for one in examples])
        hard = np.concatenate([one[_LOSSES] for one in examples])
        likeliest = np.concatenate([one[_TOKENS].reshape(-1, self.kept)[:, 0] for one in examples])
        targets = np.concatenate([one.input_ids[one.supervised] for one in examples])
        found = {
            "perplexity": metrics.perplexity(float(np.average(hard, weights=weights))),
            "token_accuracy": float((likeliest == targets).mean()),
        }
        return {"teacher": EvalResult(found)}


def _taught(batch: PackedBatch, tokens: torch.Tensor, logprobs: torch.Tensor) -> TaughtBatch:
    own = {field.name: getattr(batch, field.name) for field in dataclasses.fields(PackedBatch)}
    return TaughtBatch(**own, teacher_tokens=tokens, teacher_logprobs=logprobs)
