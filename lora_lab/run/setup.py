"""A run that is made ready, and its model for as long as a `with` block needs it.

`prepared.py` makes a `Setup`, from which nothing is missing and which never changes; `Setup.loaded` loads the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from lora_lab.adapters.attach import attach, attach_trained, beside, coverage, fresh_settings, without_adapter
from lora_lab.adapters.beginnings import Given
from lora_lab.base import embeddings, inspect, load, quantized, shard
from lora_lab.base.load import BaseFiles, ModelKind
from lora_lab.config.model import QuantConfig
from lora_lab.config.run import RunConfig
from lora_lab.config.train import SpeedConfig
from lora_lab.data import build
from lora_lab.data.dataset import Dataset, Stream, first_examples
from lora_lab.data.encode import Encoder, Example
from lora_lab.errors import ConfigError, NoRoomError
from lora_lab.fast import apply, isolation
from lora_lab.run import base_scores, teacher
from lora_lab.runtime import console, memory, pages, ranks
from lora_lab.runtime.memory import attempts
from lora_lab.tasks.base import AnyTask, EvalResult
from lora_lab.training.batches import plan_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_lab.run.teacher import Teacher
    from lora_lab.tasks.base import PaddedTask

_PADDED_ROWS = 32  # of which some are padded to see what it changes
ADAPTER = "default"  # peft's name for the adapter of a single run


class Stages:
    """Seconds spent in each stage, for `result.json`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - started, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A run after everything that can be checked without loading weights."""

    config: RunConfig
    base: BaseFiles
    kind: ModelKind
    encoder: Encoder
    task: AnyTask
    data: build.Data
    device: torch.device
    accelerator: Accelerator
    stages: Stages
    teacher: Teacher | None = None

    @property
    def train(self) -> Dataset | Stream | None:
        """The training rows; None where none were wanted."""
        return self.data.train

    @property
    def held_out(self) -> Dataset | None:
        """The held-out rows; None where the configuration names none."""
        return self.data.held_out

    @property
    def rows(self) -> Dataset | Stream | None:
        """Rows to try the model on: held-out ones where there are any, else training rows."""
        return self.data.held_out or self.data.train

    def some_rows(self) -> Dataset | Stream:
        """As `rows`, of a setup that has some."""
        assert self.rows is not None, "made with need_train=False and without data.eval"
        return self.rows

    def training_rows(self) -> Dataset | Stream:
        """As `train`, of a setup that has them."""
        assert self.train is not None, "made with need_train=False"
        return self.train

    def held_out_rows(self) -> Dataset:
        """As `held_out`, of a setup that has some."""
        assert self.held_out is not None, "made without data.eval"
        return self.held_out

    def data_hashes(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every data file, by configuration key; a teacher's word is data too."""
        found = {data.key: data.files for data in (self.train, self.held_out) if data is not None}
        return found if self.teacher is None else {**found, teacher.KEY: self.teacher.hashes}

    def taught(self) -> Setup:
        """With what the teacher says of the rows, if there is one; before the base is loaded, because it is loaded for that."""
        rows = [data for data in (self.train, self.held_out) if isinstance(data, Dataset)]
        if self.teacher is None or not rows:
            return self
        with self.stages("teacher"):
            said = {data.key: data for data in self.teacher.teach(rows, self.task)}
        return dataclasses.replace(self, data=build.Data(said.get("data.train"), said.get("data.eval")))

    def skeleton(self) -> PreTrainedModel:
        """The base without weights, anew."""
        return load.skeleton(self.base.folder, self.kind)

    @functools.cached_property
    def experts(self) -> bool:
        """Whether the adapter reaches into the experts of a mixture, whose updates are no single matrices."""
        settings = fresh_settings(self.skeleton(), self.config.adapter, self.kind)
        return bool(getattr(settings, "target_parameters", None))

    @property
    def sharded(self) -> bool:
        """Whether the base is spread over the processes; for one that is alone, after training, it is whole."""
        return self.config.hardware.shard and ranks.size() > 1

    def loaded(self, members: Mapping[str, RunConfig | Path] | None = None) -> Live:
        """Load the (quantized) base and put adapters on it, of which the last is active, once the teacher has read the rows, if there is
        one. The model goes with the block:

            with setup.loaded() as live:
                live.measure("tuned")

        Args:
            members: for each adapter the configuration that a fresh one is made by, or the folder of a trained one, verified; None:
                the run's own fresh adapter alone.
        """
        setup = self.taught()
        [base] = setup.bases()
        live = setup.on(base, members or {ADAPTER: self.config})
        for title, names in (("head", self.kind.new_modules), ("modules", self.kind.retrained)):
            if names:
                console.say(title, f"{', '.join(names)}: trained whole, in float32")
        return live

    def bases(self, count: int = 1) -> list[PreTrainedModel]:
        """The base as often as adapters that cannot lie on the same modules need it, with the weights there once."""
        config = self.config
        if self.sharded and count > 1:
            raise ConfigError(
                "hardware.shard=true: these adapters cannot lie on the same modules, and a sharded base has its modules once. Train them in "
                "sweeps of their own, or set it false."
            )
        device = (
            torch.device("cpu") if self.sharded else self.device
        )  # what is sharded comes to a card a layer at a time
        with self.stages("load_base"):
            first = load.load_model(self.base, self.kind, config.model.dtype, config.quant, device, config.seed)
            if config.hardware.offload_embeddings:
                embeddings.offload(first)
            return [first, *(beside(first) for _ in range(count - 1))]

    def for_other(self, config: RunConfig) -> Setup:
        """The same base and rows for a run that differs in its adapter, with a task of its own: that knows how batches go through its
        model."""
        task = type(self.task)(config, self.encoder, self.task.learned, self.skeleton().config)
        return dataclasses.replace(self, config=config, task=task)

    def on(self, base: PreTrainedModel, members: Mapping[str, RunConfig | Path]) -> Live:
        """Put adapters on one of `bases`; `members` as of `loaded`."""
        model: PreTrainedModel | PeftModel = base
        frozen = list(base.parameters())
        with self.stages("load_base"):
            for name, own in members.items():
                if isinstance(own, Path):
                    model = attach_trained(model, own, name)
                else:
                    model = attach(model, own.adapter, name, self.kind, own.seed)
        live = Live(self, cast("PeftModel", model))
        more = f"; and {len(members) - 1} other adapters" if len(members) > 1 else ""
        console.say("adapter", f"{coverage(live.model, name)}{more}")
        if self.sharded:
            live.shard(frozen)
        del frozen
        live.decide_packing()
        for name, own in members.items():
            if not isinstance(own, Path):
                live.begin(name, own)
        live.accelerate()
        memory.forget_peaks(live.model.device)  # of loading, so that what is reported is the work's
        return live


class Live:
    """The model of a setup. At the end of its `with` block it lets the model go and gives the memory back.

    What was made of the model inside the block (a `Member`, its optimizer) must end with it too: it belongs into a function that the
    block calls.
    """

    def __init__(self, setup: Setup, model: PeftModel):
        self.setup = setup
        self._held = [model]  # shared by all that `seen_by` gave

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the model go, and give its memory back."""
        self._held.clear()
        clear_device_cache(
            garbage_collection=True
        )  # modules refer to each other, so they stay until Python looks for circles
        pages.trim()

    @property
    def model(self) -> PeftModel:
        """
        Raises:
            RuntimeError: the block has ended.
        """
        if not self._held:
            raise RuntimeError("the model was let go when its block ended")
        return self._held[0]

    def seen_by(self, setup: Setup) -> Live:
        """The same model for the rows and the task of another setup; it goes when this one goes."""
        other = Live(setup, self.model)
        other._held = self._held
        return other

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The precision that the run computes in."""
        block: contextlib.AbstractContextManager[None] = self.setup.accelerator.autocast()
        return block

    def measure(self, title: str, known: EvalResult | None = None, **options: Any) -> EvalResult:
        """Measure the model with its active adapter on the held-out rows.

        Args:
            title: for the progress bar.
            known: what the task's `measure` has just said of it.
            options: of the task's `examine`.
        """
        model, task, rows = self.model.eval(), self.setup.task, self.setup.held_out_rows()
        with self.autocast():
            found = known or task.measure(model, rows)
            return found.with_also(task.examine(model, rows, title, **options))

    def measure_base(self) -> EvalResult:
        """The same with the adapter switched off, or what was measured so before."""

        def measured() -> EvalResult:
            with without_adapter(self.model):
                return self.measure("base")

        return base_scores.kept_or(self.setup, measured)

    def measure_few_shot(self) -> EvalResult:
        """The base again, with `task.few_shot` training rows in each prompt; only what is generated."""
        setup, rows = self.setup, self.setup.training_rows()
        places = np.random.default_rng(setup.config.seed).permutation(len(rows))[: setup.config.task.shots]
        task: Any = setup.task  # one whose section has shots
        shots = task.shots(rows, [int(place) for place in places])
        with without_adapter(self.model), self.autocast():
            found: EvalResult = task.examine(self.model.eval(), setup.held_out_rows(), "few-shot", shots=shots)
        return found

    def shard(self, frozen: list[torch.nn.Parameter]) -> None:
        """Spread the base's layers over the processes.

        Args:
            frozen: the base's own parameters.
        """
        setup, task, model = self.setup, self.setup.task, self.model.eval()
        examples = [task.shortened(example) for example in first_examples(setup.some_rows(), 1)]
        with setup.stages("load_base"), self.autocast():
            batch = task.collate(examples, np.random.default_rng(0)).to(setup.device)
            count, whole = shard.shard(model, frozen, functools.partial(task.logits, model, batch), setup.device)
        self._give_back_whole_weights()
        console.say(
            "shard",
            f"{count} layers of {whole / 2**20:.1f} MiB in {ranks.size()} parts; each was compared with what it gave as a whole",
        )

    def _give_back_whole_weights(self) -> None:
        """Of layers whose parts are copies: what was read of the files that the base is mapped from stays else as long as one of its tensors
        lies there."""
        setup, config = self.setup, self.setup.config
        kept = quantized.folder_of(setup.base, setup.kind, config.model.dtype, config.quant, "cpu")
        folders = [setup.base.folder, *([kept] if kept is not None and kept.is_dir() else [])]
        pages.give_back(itertools.chain.from_iterable(map(inspect.weight_files, folders)))
        pages.trim()

    def decide_packing(self) -> None:
        """Let rows share a pass, end to end or padded, only where two of them prove that it changes nothing for this model; decided
        before anything is measured.

        Raises:
            ConfigError: it does, and the rows must lie so (`train.packing=true`, or a task that compares the rows of one pass).
        """
        task, data = self.setup.task, self.setup.rows
        adapter = self.setup.config.adapter
        if adapter.against_packing:
            console.say("packing", f"rows one by one: {adapter.label}: {adapter.against_packing}")
        if data is None or not task.forward.together:
            return
        with self.autocast():
            reason = isolation.reason_against(lambda: self._check_packing(data))
        if not reason:
            return
        shard.reset(self.model)
        if self.setup.config.train.packing or task.config.compares_rows:
            way_out = "Choose another base" if task.config.compares_rows else "Set train.packing=false"
            raise ConfigError(f"train.packing: {reason} {way_out}.")
        task.forward.part_rows()
        console.say("packing", f"rows one by one: {reason}")

    def _check_packing(self, data: Dataset | Stream) -> None:
        task, model = self.setup.task, self.model.eval()
        if task.config.packed:
            isolation.check_isolation(model, first_examples(data, 2))
        else:
            isolation.check_padding(cast("PaddedTask[Any, Any]", task), model, first_examples(data, _PADDED_ROWS))

    def begin(self, name: str, config: RunConfig) -> None:
        """Give a fresh adapter what it begins with, where that is made of the base or of rows.

        Args:
            config: that it was made by.
        """
        setup = self.setup

        def published() -> PreTrainedModel:
            return load.load_model(
                setup.base, setup.kind, config.model.dtype, QuantConfig(), torch.device("cpu"), config.seed
            )

        torch.manual_seed(config.seed)
        config.adapter.begin(self.model, name, Given(published, functools.partial(self._pass_rows, name, config)))

    def _pass_rows(self, name: str, config: RunConfig, count: int, backward: bool) -> None:
        """Let the first rows of a run's training go through the model with a fresh adapter, one at a time, forward or backward too; in
        evaluation, so that nothing is dropped. No gradient is left behind."""
        rows, task, model = self.setup.training_rows(), self.setup.task, self.model.eval()
        plan = plan_of(config, rows)
        places = itertools.chain.from_iterable(
            itertools.chain.from_iterable(plan.step(step)) for step in range(plan.steps_per_epoch)
        )
        active = model.active_adapter
        model.set_adapter(name)
        for place in itertools.islice(places, count):
            with torch.set_grad_enabled(backward), self.autocast():
                parts = [[example] for example in rows[int(place)]]
                for batch in task.step(model, parts, np.random.default_rng(config.seed)).batches:
                    loss = task.loss(model, batch.to(model.device)).loss
                    if backward:
                        loss.backward()
        model.zero_grad()
        model.set_adapter(active)

    def _tried(self, rows: Dataset | Stream) -> list[Example]:
        """The examples that accelerations are tried on: one, or a short and a long one where rows are padded."""
        if self.setup.task.config.packed or not self.setup.task.forward.together:
            return first_examples(rows, 1)
        ordered = sorted(first_examples(rows, _PADDED_ROWS), key=lambda example: example.num_tokens)
        return [ordered[0], ordered[-1]]

    def accelerate(self) -> None:
        """Replace what the configuration allows, and say what was replaced."""
        setup, task, model = self.setup, self.setup.task, self.model.eval()
        if setup.rows is None:  # nothing to try them on, and little to gain
            task.forward.unshareable = "there are no rows to verify it on"
            return
        examples = [task.shortened(example) for example in self._tried(setup.rows)]
        padded = len({example.num_tokens for example in examples}) > 1
        speeds = [of_layers(setup.config.speed) if setup.sharded else setup.config.speed]  # the last one holds
        for attempt in attempts(functools.partial(_keep_no_weights, speeds)):
            with attempt, self.autocast():
                batch = task.collate(examples, np.random.default_rng(0)).to(model.device)
                free = memory.free_bytes(model.device)
                applied = apply.accelerate(
                    model, task.forward, speeds[-1], functools.partial(task.logits, model, batch), free, padded=padded
                )
                own = task.accelerate(model, batch)
        console.say("speed", "; ".join(filter(None, [*applied.lines, own])) or "plain")


def of_layers(speed: SpeedConfig) -> SpeedConfig:
    """What is left for a sharded base."""
    without: dict[str, Any] = dict.fromkeys(apply.OF_LAYERS_WEIGHTS, False)
    return dataclasses.replace(speed, **without)


def _keep_no_weights(speeds: list[SpeedConfig], lacked: str) -> None:
    """After a failed allocation while accelerations were tried: dequantize in every pass, in place.

    Raises:
        NoRoomError: that was done before.
    """
    if speeds[-1].dequantize == "always":
        raise NoRoomError(
            f"model.path: beside its weights there is no room for a pass over the end of one row ({lacked}). Set quant=nf4, or take a "
            "smaller base; lora-lab plan shows what needs how much."
        )
    speeds.append(dataclasses.replace(speeds[-1], dequantize="always"))
    console.say("memory", "accelerations are tried again without weights that are kept dequantized")
