"""How batches go through the model that is loaded: every answer that `apply.py` found about it, in one object."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from lora_lab.adapters.attach import base_of
from lora_lab.adapters.prompts import positions_before
from lora_lab.data.collate import PackedBatch
from lora_lab.errors import TrainingError
from lora_lab.fast import prefix, segments, varlen
from lora_lab.fast.frozen import FrozenWeight
from lora_lab.fast.loss import LossesInChunks, TokenLosses, plain_head, without_head
from lora_lab.fast.modules import computed_in
from lora_lab.fast.routing import Routing
from lora_lab.runtime.memory import is_out_of_memory

if TYPE_CHECKING:
    from peft import PeftModel

# how much the loss of a token may move where it is computed in chunks; elsewhere 1e-3
_ROUNDING = {torch.float32: 1e-5}


@dataclasses.dataclass
class Forward:
    """A model's forward pass as a task calls it. A fresh one calls the model as it is; `apply.accelerate` sets the rest.

    It holds no module, so it keeps no model in memory.
    """

    packed: bool = False  # rows lie end to end
    one_place: bool = False  # each row is read at one place
    together: bool = True  # rows share a pass; else each row has one of its own
    block_attention: bool = False  # see `attention.py`
    varlen_attention: bool = False  # all rows in one call, see `varlen.py`
    wanted_rows: bool = False  # the last layer can be told which positions are wanted, see `rows.py`
    kept_prefix: bool = False  # the first layer can be told which rows it sees, see `prefix.py`
    unpadded: bool = False  # padding costs almost nothing, see `unpadded.py`
    chunked_head: bool = False  # losses come from hidden states, see `loss.py`
    routing: Routing = dataclasses.field(default_factory=Routing)  # whose rows are whose, where members share a pass
    # weights that may be kept dequantized
    weights: weakref.WeakSet[FrozenWeight] = dataclasses.field(default_factory=weakref.WeakSet)
    members: int = 1  # how many share a pass, at most; 1: they take turns
    unshareable: str = "no model is loaded"  # why several members cannot share a pass; empty if they can
    _own_attention: str | None = None  # the model's, while `segments` has put another in its place

    def reset(self, unshareable: str) -> None:
        """Say that no module is replaced, and so why members cannot share a pass."""
        self.wanted_rows = self.kept_prefix = self.unpadded = self.chunked_head = self.varlen_attention = False
        self.weights.clear()
        self.unshareable = unshareable

    def share_model(self, other: Forward) -> None:
        """Take over what is true of the model's modules from another task's, which goes through the same model."""
        self.wanted_rows, self.kept_prefix, self.routing = other.wanted_rows, other.kept_prefix, other.routing
        self.varlen_attention = other.varlen_attention and self.packed and self.together
        self.weights = other.weights
        self.unpadded, self.unshareable = other.unpadded, other.unshareable

    def drop_kept_weights(self) -> int:
        """Dequantize all weights in every pass from now on, which is the same numbers; the bytes that this gives back."""
        return sum(weight.drop() for weight in self.weights)

    def part_rows(self) -> None:
        """Give each row a forward pass of its own."""
        self.together = self.block_attention = self.varlen_attention = False

    @contextlib.contextmanager
    def segments(self, model: PeftModel) -> Iterator[None]:
        """Set the attention that packed rows need once for all passes inside the block, rather than for each."""
        if not (self.packed and self.together):
            yield
            return
        self._own_attention = segments.implementation(model)
        with segments.attending(model):
            yield

    @contextlib.contextmanager
    def generating(self, model: PeftModel) -> Iterator[None]:
        """Inside the block the model generates as it would anywhere: in evaluation, without gradients, and with its own attention,
        because the one for packed rows takes neither a key cache nor a mask. Nothing is learned there, so what is made of the adapters'
        matrices is kept."""
        training = model.training
        own: str | None = segments.implementation(model)
        if own == segments.IMPLEMENTATION:
            own = self._own_attention
        model.eval()
        try:
            with torch.no_grad(), segments.attending(model, own), self.routing.keeping_factors():
                yield
        finally:
            model.train(training)

    @contextlib.contextmanager
    def plain(self, model: PeftModel) -> Iterator[None]:
        """Inside the block every module computes by itself."""
        flags = self.wanted_rows, self.kept_prefix, self.varlen_attention
        forwards = [(part, part.__dict__.pop("forward")) for part in model.modules() if "forward" in part.__dict__]
        self.wanted_rows = self.kept_prefix = self.varlen_attention = False
        try:
            yield
        finally:
            self.wanted_rows, self.kept_prefix, self.varlen_attention = flags
            for module, forward in forwards:
                module.forward = forward

    def logits(self, model: PeftModel, batch: PackedBatch) -> torch.Tensor:
        """Logits [S, V] at the supervised positions of a packed batch, all other positions skipped in the output head.

        Raises:
            TrainingError: the model cannot be given several rows at once.
        """
        segmented = len(batch.lengths) > 1 or self.block_attention or self.varlen_attention
        extra: dict[str, Any] = {}  # of a row alone the model counts positions itself: some begin elsewhere than at 0
        if segmented:
            extra = {
                "segment_lengths": batch.lengths,
                "block_attention": self.block_attention,
                "position_ids": batch.position_ids,
            }
        if self.varlen_attention:
            extra["segment_starts"] = varlen.starts(batch.position_ids, len(batch.lengths))
        if segmented and self.kept_prefix:
            extra["row_keys"] = prefix.row_keys(batch.input_ids, batch.lengths)
        before = positions_before(model)
        wanted = batch.logit_positions + before
        extra["wanted_positions" if self.wanted_rows else "logits_to_keep"] = wanted
        try:
            with segments.attending(model) if segmented else contextlib.nullcontext():
                found = model(input_ids=batch.input_ids, use_cache=False, **extra).logits[0]
        except TypeError as error:  # a forward that passes nothing on to its attention
            if segmented and "unexpected keyword argument" in str(error):
                raise TrainingError(f"this model cannot be packed ({error}).") from error
            raise
        # A first token is never predicted, so that there are fewer wanted positions than tokens: some models give all of them.
        return found[wanted] if len(found) == batch.num_tokens + before else found

    def losses_in_chunks(
        self, model: PeftModel, batch: PackedBatch, smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each supervised token [S], and the likeliest token there [S, 1]; their logits never exist at once."""
        losses, likeliest = TokenLosses.apply(*self._before_head(model, batch), batch.targets, smoothing)
        return losses, likeliest[:, None]

    def other_losses_in_chunks(
        self,
        model: PeftModel,
        batch: PackedBatch,
        losses_of: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a loss other than cross-entropy, and what is kept of the logits; see `LossesInChunks`."""
        found: tuple[torch.Tensor, torch.Tensor] = LossesInChunks.apply(*self._before_head(model, batch), losses_of)
        return found

    def _before_head(
        self, model: PeftModel, batch: PackedBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The hidden states [S, D] that the output layer would read, its weight [V, D] and its bias [V]."""
        base = base_of(model)
        with without_head(base):
            hidden = computed_in(self.logits(model, batch))
        head = base.get_output_embeddings()
        return hidden, head.weight.to(hidden.dtype), None if head.bias is None else head.bias.to(hidden.dtype)

    def try_chunks(self, model: PeftModel, losses: Callable[[], torch.Tensor], prove: bool) -> str:
        """Let losses come in chunks if that changes nothing for this model; says what was done.

        Args:
            losses: the losses of some tokens [S], as they come now.
            prove: whether results are compared; False for a model whose tensors have no content.
        """
        base = base_of(model)
        if plain_head(base) is None:
            return "whole logits (the output layer is adapted)"
        if getattr(base.config.get_text_config(), "final_logit_softcapping", None):
            return "whole logits (the model caps them after its output layer)"  # small ones would not show it
        if not prove:
            self.chunked_head = True
            return "loss in chunks"
        before = losses()
        self.chunked_head = True
        try:
            limit = _ROUNDING.get(base.dtype, 1e-3)
            self.chunked_head = torch.allclose(before, losses(), rtol=limit, atol=limit)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            self.chunked_head = False
            return f"whole logits ({type(error).__name__}: {str(error).partition(chr(10))[0][:120]})"
        return "loss in chunks" if self.chunked_head else "whole logits (the model changes them after its output layer)"
