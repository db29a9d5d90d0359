"""Adapters that lie on the same modules over the base's weights, and how their rows go through them.

Rows of unlike adapters share a pass where each layer can be told whose rows it sees (`fast/routing.py`), and rows lie beside one another
where that changes nothing. Both are tried out on this very model each time an adapter comes; else rows are answered adapter by
adapter, or one by one, which is the same answer later.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel

from lora_lab.adapters.attach import attach_trained, base_of, without_adapter
from lora_lab.adapters.prompts import generating, is_prompt
from lora_lab.config.train import SpeedConfig
from lora_lab.fast import apply
from lora_lab.fast.forward import Forward
from lora_lab.fast.isolation import allowed_gap
from lora_lab.runtime.memory import free_bytes, is_out_of_memory
from lora_lab.serve.batch import Batch
from lora_lab.serve.words import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Apart(Exception):
    """An adapter that needs modules of its own."""


BASE = ""  # the base's name among adapters
_OFF: dict[str, Any] = {field.name: False for field in dataclasses.fields(SpeedConfig) if field.type in (bool, "bool")}


class Group:
    """Modules of their own over the base's weights, and the adapters on them. Only the thread that answers touches them."""

    def __init__(
        self,
        base: PreTrainedModel,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        writes: bool,
        trial: Sequence[Sequence[int]],
    ):
        """
        Args:
            base: without adapters.
            writes: whether it is a language model, which answers a token at a time.
            trial: two or more prompts of unlike length, to try passes on.
        """
        self.names: list[str] = []
        self.writes = writes
        self.against_steps = self.against_beside = self.against_sharing = ""  # each '' where it is done
        self.bytes_per_token = 0  # of keys and values; 0: it keeps something else, which does not grow so
        self._model: PreTrainedModel | PeftModel = base
        self._autocast, self._trial = autocast, [list(one) for one in trial]
        self._forward = Forward()
        self._applied: apply.Applied | None = None
        self._try()

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        return self._model

    @property
    def forward(self) -> Forward:
        """How packed rows go through the modules as they are now."""
        return self._forward

    @property
    def trial(self) -> list[list[int]]:
        """Prompts that passes are tried on."""
        return self._trial

    @property
    def base(self) -> PreTrainedModel:
        """The model that adapters lie on, which answers for them too."""
        return base_of(self._model) if isinstance(self._model, PeftModel) else self._model

    @property
    def virtual(self) -> bool:
        """Whether its adapters put virtual tokens before each prompt, and change nothing else."""
        return bool(self.names) and is_prompt(cast("PeftModel", self._model), self.names[0])

    # -- adapters come and go --

    def put(self, folder: Path, name: str, shares: str, speed: SpeedConfig) -> None:
        """Add the adapter in a verified folder.

        Args:
            shares: why rows of its method cannot be told apart; '': they can.
            speed: what its run allows.

        Raises:
            Apart: beside it the others could not share passes as they do; they are as they were.
            AdapterError: it does not fit; the others are as they were.
        """
        self.add(lambda model: attach_trained(model, folder, name), name, shares, speed)

    def add(
        self,
        attached: Callable[[PreTrainedModel | PeftModel], PeftModel],
        name: str,
        shares: str,
        speed: SpeedConfig,
        alike: bool = False,
    ) -> None:
        """As `put`, of an adapter that `attached` puts on the model under its name.

        Args:
            alike: it sits where one does that is there, so that what was tried for that one holds.
        """
        if alike and self.shares and self._applied is not None:
            self._add_alike(attached, name)
            return
        before = bool(self.names) and self.writes and self.shares
        try:
            self._plain()
            self._model = attached(self._model)
            self._model.eval()
            self.names.append(name)
            self._share(shares, speed)
            self._try()
            if before and not self.shares:
                raise Apart(self.against_sharing or self.against_beside)
        except Exception:
            if isinstance(self._model, PeftModel) and name in self._model.peft_config:
                self.take(name)
            if self.names and self.writes:
                self._plain()
                self._share("" if before else self.against_sharing, speed)
                self._try()
            raise

    def _add_alike(self, attached: Callable[[PreTrainedModel | PeftModel], PeftModel], name: str) -> None:
        self.names.append(name)
        try:
            self._model = attached(self._model)
        except Exception:
            if name in cast("PeftModel", self._model).peft_config:
                self.take(name)
            else:
                self.names.remove(name)
            raise
        self._model.eval()

    def take(self, name: str) -> None:
        """Remove an adapter."""
        if name in self.names:
            self.names.remove(name)
        model = cast("PeftModel", self._model)
        if self.names:
            model.set_adapter(self.names[0])  # peft looks the active one up wherever it is asked for its base
            model.delete_adapter(name)
            return
        self._plain()
        # what peft put around the modules is gone with the last adapter
        self._model = base_of(model) if is_prompt(model, name) else cast("Any", model).unload()
        self.against_sharing = ""

    def _plain(self) -> None:
        if self._applied is not None:
            self._applied.undo()
            self._applied = None

    def _share(self, shares: str, speed: SpeedConfig) -> None:
        """Let layers know whose rows they see, where all of them can."""
        self.against_sharing = shares
        if shares or not self.writes or self.virtual:
            return
        kept: dict[str, Any] = {"fused_projections": speed.fused_projections, "fused_mlp": speed.fused_mlp}
        wanted = dataclasses.replace(speed, **{**_OFF, **kept})
        ids = torch.tensor([self._trial[0]], device=self.base.device)
        model = cast("PeftModel", self._model)

        def run() -> torch.Tensor:
            with self._autocast():
                scores: torch.Tensor = model(input_ids=ids, use_cache=False).logits
            return scores

        self._applied = apply.accelerate(model, self._forward, wanted, run, free_bytes(self.base.device))
        self.against_sharing = self._forward.unshareable

    # -- how rows go through --

    @property
    def shares(self) -> bool:
        """Whether rows of unlike adapters go through one pass."""
        return not self.against_sharing and not self.against_beside

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Inside the block the model is of this adapter alone, in the precision of its run."""
        model = self._model
        with self._autocast():
            if not isinstance(model, PeftModel):
                yield
            elif name == BASE:
                with without_adapter(model):
                    yield
            else:
                if model.active_adapter != name:
                    model.set_adapter(name)
                yield

    @contextlib.contextmanager
    def _told_apart(self, _: str) -> Iterator[None]:
        if not self.shares:  # rows would silently be answered by another adapter
            raise RuntimeError("layers do not know any more whose rows they see")
        with self._autocast():
            yield

    @contextlib.contextmanager
    def _alike(self, _: str) -> Iterator[None]:
        with self._autocast():
            yield

    def batch(self) -> Batch:
        """A new batch: of all adapters where they share passes, else of one."""
        beside = not self.against_beside
        if self.virtual:  # behind its virtual tokens a row is the base's
            return Batch(self.base, self._alike, grows=beside, read=self._behind_virtual)
        if not isinstance(self._model, PeftModel):
            return Batch(self.base, self._alike, grows=beside)
        if self.shares:
            return Batch(self.base, self._told_apart, self._forward.routing)
        return Batch(self.base, self.inside, grows=beside)

    def lane(self, row: Row) -> str:
        """Rows of one lane can be in one batch."""
        return "" if self.shares or self.virtual else row.adapter

    def _behind_virtual(self, row: Row) -> tuple[torch.Tensor, Any]:
        ids = torch.tensor([row.prompt], device=self.base.device)
        with self.inside(row.adapter), generating():
            out = cast("PeftModel", self._model)(input_ids=ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float(), out.past_key_values

    # -- trials --

    def _try(self) -> None:
        """Find out how rows can go through this model, by rows that do."""
        if not self.writes:
            return
        names = [self.names[-1], *self.names[:1]] if self.names else [BASE, BASE]
        self.against_steps = ""
        self.against_beside = self._against(lambda: self._gap(names, beside=True))
        if self.against_beside and self._against(lambda: self._gap(names, beside=False)):
            self.against_steps = self.against_beside = "its answers cannot be written token by token"

    def _against(self, gap: Callable[[], float]) -> str:
        limit = allowed_gap(self._model)
        try:
            found = gap()
        except Exception as error:  # whatever a model of another make raises of what it is given
            if is_out_of_memory(error):
                raise
            return f"it keeps something else than keys and values, or reads them otherwise ({type(error).__name__})"
        return "" if found <= limit else f"rows beside one another would change its scores by {found:.1e} of their size"

    @torch.no_grad()
    def _gap(self, names: Sequence[str], beside: bool) -> float:
        """How far the scores of rows, token by token, are from those of whole passes of each alone."""
        before, self.against_beside = self.against_beside, "" if beside else "not tried yet"
        try:
            return self._gap_of(names, beside)
        finally:
            self.against_beside = before

    def _gap_of(self, names: Sequence[str], beside: bool) -> float:
        rows = [_Tried(prompt, name) for prompt, name in zip(self._trial, [*names, BASE], strict=False)]
        lanes: dict[str, Batch] = {}
        for place, row in enumerate(rows):  # each comes when the ones before have said something already
            batch = lanes.setdefault(self.lane(row) if beside else str(place), self.batch())
            batch.join([row])
            for one in lanes.values():
                one.step()
        self.bytes_per_token = max(one.bytes_per_token for one in lanes.values())
        worst = 0.0
        for row in rows:
            for steps in {0, len(row.seen) - 1}:
                alone = self._alone(row, row.prompt + row.ids[:steps])
                worst = max(worst, float((row.seen[steps] - alone).norm() / alone.norm()))
        return worst

    def _alone(self, row: _Tried, ids: list[int]) -> torch.Tensor:
        with self.inside(row.adapter), generating():
            told = torch.tensor([ids], device=self.base.device)
            scores: torch.Tensor = self._model(input_ids=told, use_cache=False).logits[0, -1]
        return scores.float()


class _Tried(Row):
    """A row of the trial: it keeps the scores that it saw, and goes on with its prompt's own tokens."""

    def __init__(self, prompt: list[int], adapter: str):
        self.prompt, self.adapter, self.ids = prompt, adapter, []
        self.done = self.cancelled = False
        self.seen: list[torch.Tensor] = []

    def go_on(self, logits: torch.Tensor) -> None:
        self.seen.append(logits)
        self.ids.append(self.prompt[len(self.ids) % len(self.prompt)])
