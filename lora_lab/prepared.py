"""A run made ready: everything that can be checked is checked before any weight is loaded, then its model is loaded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lora_lab import console, tracking
from lora_lab.adapters import files
from lora_lab.adapters.attach import attach, check_targets, coverage
from lora_lab.base import load
from lora_lab.base.load import BaseFiles
from lora_lab.base.tokenizer import PLAIN_TEMPLATE, load_tokenizer
from lora_lab.config import RunConfig
from lora_lab.data import sources
from lora_lab.data.encode import Dataset, encode
from lora_lab.run_dir import RunDir
from lora_lab.tasks import TASKS
from lora_lab.tasks.causal_lm import Answer, CausalLM

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

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
    tokenizer: PreTrainedTokenizerBase
    task: CausalLM
    train: Dataset | None
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


def prepare(config: RunConfig, need_train: bool = True) -> Prepared:
    """Find the base, read and encode the data, and check all of it against the configuration; loads no weights."""
    stages = Stages()
    tracking.tracker_name(config.tracker)
    device = load.torch_device(config.hardware)
    if config.hardware.threads:
        torch.set_num_threads(config.hardware.threads)
    with stages("find_base"):
        base = load.find(config.model)
        check_targets(base.folder, config.adapter)
        tokenizer = load_tokenizer(base.folder)
    console.say("base", f"{base.name}, {config.model.dtype}, quant {config.quant.method}, on {device}")
    if tokenizer.chat_template == PLAIN_TEMPLATE:
        console.say("template", "the tokenizer has no chat template; using '### role:' headings, saved with the merge")
    with stages("data"):
        train = (
            _dataset("data.train", config.data.train, config.data.max_train_rows, config, tokenizer)
            if need_train
            else None
        )
        held_out = None
        if config.data.eval is not None:
            held_out = _dataset("data.eval", config.data.eval, config.data.max_eval_rows, config, tokenizer)
    task = TASKS[config.task.name](config.task, tokenizer)
    AcceleratorState._reset_state()  # accelerate keeps the first run's precision for the whole process otherwise
    accelerator = Accelerator(
        cpu=device.type == "cpu", mixed_precision="bf16" if config.model.dtype == "bfloat16" else "no"
    )
    return Prepared(config, base, tokenizer, task, train, held_out, device, accelerator, stages)


def _dataset(key: str, names: Any, limit: int | None, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    data = encode(sources.read(key, names, limit), config.data, tokenizer)
    console.say(key.removeprefix("data."), data)
    return data


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
