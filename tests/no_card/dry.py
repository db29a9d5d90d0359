"""Runs on a card that does not exist (`lora_lab.plan.card`): everything is as on a card, except that tensors have no content.

For a single function:

    with card.pretended() as there:
        x = torch.randn(4, 8, device="cuda", requires_grad=True)
        with there.phase("mine"):
            my_function(x).sum().backward()
    there.peaks["mine"]   # bytes allocated at most, in blocks of 512
    there.waits           # each `.item()`, `equal`, and copy between host and card, with file:line
    # tensors of the host beside tensors of the card raise: MixedDevices, or FakeTensorDeviceMismatchError

For a run: `with loaded(config) as dry: dry.train(steps=2)`; see `Dry`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key

from lora_lab.adapters.attach import attach, without_adapter
from lora_lab.base import embeddings
from lora_lab.config.run import RunConfig
from lora_lab.merge import bases
from lora_lab.merge.merge import judged_on
from lora_lab.plan import card, skeletons
from lora_lab.plan.card import CARD, Card, Precision, Wait
from lora_lab.run import pipeline, prepared, run_dir
from lora_lab.run.setup import ADAPTER, Live, Setup, Stages
from lora_lab.training import checkpoint, cohort, loop
from lora_lab.training.cohort import Member, Share
from lora_lab.verify import parity

T = TypeVar("T")


@dataclasses.dataclass
class Dry:
    """A run whose model is on the card; `waits` and `peaks` of each phase."""

    card: Card
    live: Live = dataclasses.field(init=False)
    members: list[Member] = dataclasses.field(default_factory=list)
    waits: dict[str, list[Wait]] = dataclasses.field(default_factory=dict)
    passes: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # of the model, one for each micro-batch of a member

    @property
    def peaks(self) -> dict[str, int]:
        return self.card.peaks

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = len(self.card.waits)
        with self.card.phase(name):
            yield
        self.waits.setdefault(name, []).extend(self.card.waits[before:])

    def train(self, steps: int) -> None:
        """The first steps of all members, each a phase of its own: `step 1` allocates the optimizer, later ones have it."""
        for step in range(1, steps + 1):
            for member in self.members:
                member.stop_at = min(step, member.total_steps)
            self.passes[f"step {step}"] = 0
            with self.phase(f"step {step}"), self._counted(f"step {step}"):
                setup = self.live.setup
                loop.fit(self.members, setup.training_rows(), None, setup.accelerator)
                failed = [member.failure for member in self.members if member.failure]
                if failed:
                    raise failed[0]

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        def learn(shares: Sequence[Share], place: int, accelerator: Accelerator) -> None:
            self.passes[name] += sum(place < len(one.batches) for one in shares)
            cohort.learn(shares, place, accelerator)

        read = Share.read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "learn", learn)
            patch.setattr(
                Share, "read", lambda share, norm: read(share, norm) or 1.0
            )  # no content would be no gradient
            if name != "step 1":  # proved once in a run
                patch.setattr(loop.sharing, "check", lambda *_: None)
            yield

    def measure(self) -> None:
        """The base and the adapter on the held-out rows: `evaluation`, and `generation` of answers."""
        task: Any = self.live.setup.task
        with pytest.MonkeyPatch.context() as patch:
            for name, own in (("evaluation", task.measure), ("generation", task.examine)):
                patch.setattr(task, "measure" if name == "evaluation" else "examine", self._within(name, own))
            with without_adapter(self.live.model):  # numbers without content are not kept in the cache
                self.live.measure("base")
            self.live.measure("tuned")

    def _within(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        def called(*args: Any, **options: Any) -> T:
            with self.phase(name):
                return function(*args, **options)

        return called

    def merge(self) -> None:
        """What the trained model says of the rows that a merge is judged on, and the unquantized base with the adapter: as a whole where it
        fits on the card, else layer by layer; nothing of what was trained is there then."""
        setup = self.live.setup
        with self.phase("merge"):
            pipeline._as_trained(self.live)
        self.members.clear()
        self.live.close()
        gc.collect()
        rows = judged_on(setup)
        base = setup.skeleton()
        if bases.as_a_whole(setup):
            base = base.to(getattr(torch, setup.config.export.dtype))
            skeletons.give_storage(base, self.card.mode, CARD)
            self.card.hold(skeletons.tensors(base))
        else:
            with _disable_current_modes():
                skeletons.on_host(base, getattr(torch, setup.config.export.dtype))
        model = attach(base, setup.config.adapter, ADAPTER, setup.kind, 0).eval()
        with self.phase("merge"):
            parity.logits(model, rows, CARD)


def on_card(config: RunConfig) -> Setup:
    """The run made ready for the card, as a plan is: of a base whose weights need not be here, on a machine that has no card."""
    found = prepared.find_base(config, weights=False)
    data, found, task = prepared.build_data(config, found)
    setup = prepared.assemble(config, found, data, task, torch.device("cpu"), Stages())
    return dataclasses.replace(setup, device=CARD, accelerator=Precision(config.model.dtype))


@contextlib.contextmanager
def loaded(config: RunConfig, *others: RunConfig) -> Iterator[Dry]:
    """A run with its model on the card: the base as it is stored, its adapter, what is proved of packing, and the accelerations. The phase
    `load` is of a load of its own.

    Args:
        others: of other members of its cohort.
    """
    setup = on_card(config).taught()  # a teacher reads on the host, with its weights
    base, _ = skeletons.stored(config, setup.base, setup.kind)
    configs = [config, *others]
    names = [ADAPTER] if not others else [f"member{place}" for place in range(len(configs))]
    with pytest.MonkeyPatch.context() as patch, card.pretended() as there:
        patch.setattr(checkpoint, "save", lambda member: Path(member.run.checkpoints))
        patch.setattr(torch, "Generator", _Generator)
        dry = Dry(there)
        with dry.phase("load"):
            _load(setup, base)
        skeletons.give_storage(base, there.mode, CARD)
        there.hold(skeletons.tensors(base))
        if config.hardware.offload_embeddings:
            embeddings.offload(base)
        with dry.phase("trial"):
            dry.live = live = setup.on(base, dict(zip(names, configs, strict=True)))
        del base
        dry.members = [_member(name, one, live) for name, one in zip(names, configs, strict=True)]
        try:
            yield dry
        finally:
            dry.members.clear()
            live.close()


def _load(setup: Setup, stored: PreTrainedModel) -> None:
    """What is on the card while weights come there one after another, in transformers' order, and are quantized there by bitsandbytes.

    Args:
        stored: where each will lie.
    """
    config, held = setup.config, []
    quant = setup.base.stored(config.quant)
    for name, weight in sorted(setup.skeleton().named_parameters(), key=lambda one: dot_natural_key(one[0])):
        module = stored.get_submodule(name.rpartition(".")[0])
        came = torch.empty(weight.shape, dtype=getattr(torch, config.model.dtype), device=CARD)
        if isinstance(module, Linear4bit) and name.endswith("weight"):
            held.append(
                functional.quantize_4bit(
                    came, blocksize=64, compress_statistics=quant.double_quant, quant_type=quant.method
                )
            )
        elif isinstance(module, Linear8bitLt) and name.endswith("weight"):
            held.append(functional.int8_vectorwise_quant(came.half()))
        else:
            held.append(came)


def _member(name: str, config: RunConfig, live: Live) -> Member:
    live.model.set_adapter(name)
    setup = live.setup
    return Member(name, config, run_dir.create(config), setup.base, live.model, setup.training_rows(), setup.task)


class _Generator(torch._C.Generator):
    """A build without CUDA makes none for it."""

    def __new__(cls, device: torch.device | str = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


def assert_few_waits(dry: Dry, copies: int = 4) -> None:
    """In a step: a copy to the card for each tensor of a micro-batch, and for each member one read of all its losses and its gradients'
    norm, which decides whether the update is made.

    Args:
        copies: for each micro-batch.
    """
    waits, passes = dry.waits["step 2"], dry.passes["step 2"]
    named = ", ".join(map(str, waits))
    assert sum(wait.kind == "copy" for wait in waits) <= copies * passes, named
    assert sum(wait.kind == "read" for wait in waits) <= len(dry.members), named


def assert_peaks_in_order(dry: Dry) -> None:
    """A step takes the most: what fits into it has no other part that does not."""
    peaks = dry.peaks
    assert peaks["trial"] <= 1.01 * peaks["step 2"], peaks  # rows of several lengths
    assert peaks["step 1"] <= peaks["step 2"], peaks
    assert max(peaks.get("evaluation", 0), peaks.get("generation", 0)) <= peaks["step 2"], peaks
