"""A run made ready: everything that can be checked is checked before any weight is loaded, then its model is loaded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lora_lab import console, tracking
from lora_lab.adapters import files
from lora_lab.adapters.attach import attach, check_targets, coverage, skeleton
from lora_lab.base import load
from lora_lab.base.load import BaseFiles
from lora_lab.base.tokenizer import PLAIN_TEMPLATE, load_tokenizer
from lora_lab.config import RunConfig
from lora_lab.data import build, check
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.data.encode import Encoder
from lora_lab.errors import DataError
from lora_lab.run_dir import RunDir
from lora_lab.tasks import TASKS
from lora_lab.tasks.causal_lm import Answer, CausalLM

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ADAPTER = "default"  # peft's name for the adapter of a single run


class Stages:
    """Seconds spent in each stage, for `result.json`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - started, 2)


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model's metrics on the held-out rows, and its answers to some of them."""

    metrics: dict[str, float]
    answers: list[Answer]


@dataclasses.dataclass
class Prepared:
    """A run after everything that can be checked without loading weights; then its model, as long as it is needed."""

    config: RunConfig
    base: BaseFiles
    encoder: Encoder
    task: CausalLM
    train: Dataset | Stream | None
    held_out: Dataset | None
    device: torch.device
    accelerator: Accelerator
    stages: Stages
    model: PeftModel | None = None

    def data_hashes(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every data file, by configuration key."""
        return {data.key: data.files for data in (self.train, self.held_out) if data is not None}

    def measure(self, title: str) -> Measured:
        """Measure the model with its adapter on the held-out rows; `title` is for the progress bar."""
        model = self.model.eval()
        with self.accelerator.autocast():
            metrics = self.task.measure(model, self.held_out, self.config.train.packing)
            answers = self.task.answers(model, self.held_out, title)
        return Measured({**metrics, **self.task.score(answers)}, answers)

    def measure_base(self) -> Measured:
        """The same with the adapter switched off."""
        with self.model.disable_adapter():
            return self.measure("base")


@dataclasses.dataclass(frozen=True)
class Found:
    """The base model as far as it is known without its weights, and what encodes rows for it."""

    base: BaseFiles
    model: PreTrainedModel  # on the meta device: shapes only
    targets: list[str]  # layers that will be adapted
    encoder: Encoder


def find_base(config: RunConfig) -> Found:
    """Find the base, check its files and the adapter's target names, and load its tokenizer."""
    base = load.find(config.model)
    model = skeleton(base.folder)
    targets = check_targets(model, config.adapter)
    _say_too_high_rank(model, targets, config.adapter.r)
    tokenizer = load_tokenizer(base.folder)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    encoder = Encoder(config.data, tokenizer, vocab_size)
    encoder.template.check_variables()
    return Found(base, model, targets, encoder)


def _say_too_high_rank(model: PreTrainedModel, targets: list[str], r: int) -> None:
    """A rank above a layer's smaller side costs memory and adds nothing that a lower one could not."""
    sides = {name: min(model.get_submodule(name).weight.shape) for name in targets}
    smaller = [name for name, side in sides.items() if side < r]
    if smaller:
        lowest = min(sides.values())
        console.say(
            "rank",
            f"adapter.r={r} is above the smaller side of {len(smaller)} layers ({smaller[0]}: {sides[smaller[0]]}); "
            f"{lowest} is all that the smallest of them can use",
        )


def build_data(config: RunConfig, found: Found, need_train: bool = True) -> build.Data:
    """Read, encode and check the rows of a run.

    Raises:
        DataError: rows that cannot be used, a failed check (`data.check=error`), or rows beyond the model's positions.
    """
    data = build.build(config.data, found.encoder, need_train)
    for part in (data.train, data.held_out):
        if part is not None:
            console.say(part.key.removeprefix("data."), part)
            _check_positions(part, found.model)
    if config.data.check == "off":
        return data
    findings = check.check(data, config.data, found.encoder)
    errors = [finding for finding in findings if finding.level == "error"]
    for finding in findings:
        if finding.level != "error" or config.data.check == "warn":
            console.say("check", finding)
    if errors and config.data.check == "error":
        more = f" ({len(errors) - 1} more errors: lora-lab data shows all.)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0].key}: {errors[0].sentence}{more} To train nevertheless: data.check=warn.")
    return data


def _check_positions(data: Dataset | Stream, model: PreTrainedModel) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = int(data.lengths.max()) if isinstance(data, Dataset) else data.encoder.config.max_tokens
    if positions is not None and longest > positions:
        raise DataError(
            f"{data.key}: a row has {longest} tokens, and the model has {positions} positions. Set data.max_tokens={positions} "
            "or less, and data.too_long."
        )


def prepare(config: RunConfig, need_train: bool = True) -> Prepared:
    """Find the base, read and encode the data, and check all of it against the configuration; loads no weights."""
    stages = Stages()
    tracking.tracker_name(config.tracker)
    device = load.torch_device(config.hardware)
    if config.hardware.threads:
        torch.set_num_threads(config.hardware.threads)
    with stages("find_base"):
        found = find_base(config)
    console.say("base", f"{found.base.name}, {config.model.dtype}, quant {config.quant.method}, on {device}")
    if found.encoder.tokenizer.chat_template == PLAIN_TEMPLATE:
        console.say("template", "the tokenizer has no chat template; using '### role:' headings, saved with the merge")
    with stages("data"):
        data = build_data(config, found, need_train)
    return assemble(config, found, data, device, stages)


def assemble(config: RunConfig, found: Found, data: build.Data, device: torch.device, stages: Stages) -> Prepared:
    """Put together what was found."""
    task = TASKS[config.task.name](config.task, found.encoder)
    AcceleratorState._reset_state()  # accelerate keeps the first run's precision for the whole process otherwise
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="bf16" if config.model.dtype == "bfloat16" else "no"
    )
    return Prepared(config, found.base, found.encoder, task, data.train, data.held_out, device, accelerator, stages)


def load_adapted(prepared: Prepared) -> PeftModel:
    """Load the (quantized) base and put a fresh adapter on it; `prepared.model` holds it."""
    config = prepared.config
    with prepared.stages("load_base"):
        model = load.load_model(prepared.base, config.model.dtype, config.quant, prepared.device)
        prepared.model = attach(model, config.adapter, ADAPTER, prepared.task.peft_task_type, config.seed)
    console.say("adapter", coverage(prepared.model, ADAPTER))
    return prepared.model


def load_trained(run: RunDir, prepared: Prepared) -> PeftModel:
    """The run's base with its trained adapter, checked to belong together."""
    files.check_base(run.adapter, prepared.base)
    model = load_adapted(prepared).eval()
    files.read_into(run.adapter, model, ADAPTER)
    return model
