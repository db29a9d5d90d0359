"""What a run is, from top to bottom. Each stage is one call; each verb walks some of them.

find base -> build data -> load base -> attach adapter -> fit -> evaluate -> merge
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import TextStreamer

from lora_lab import compose, console, run_dir, storage, tracking
from lora_lab.adapters import files
from lora_lab.adapters.attach import attach, check_targets, coverage
from lora_lab.base import load
from lora_lab.base.load import BaseFiles
from lora_lab.base.tokenizer import PLAIN_TEMPLATE, load_tokenizer
from lora_lab.config import RunConfig
from lora_lab.data import sources
from lora_lab.data.encode import Dataset, encode, render
from lora_lab.errors import ConfigError, Interrupted, MergeError
from lora_lab.merge import parity
from lora_lab.merge.merge import merge as merge_adapter
from lora_lab.run_dir import RunDir
from lora_lab.tasks import TASKS
from lora_lab.tasks.causal_lm import Answer, CausalLM
from lora_lab.train import checkpoint
from lora_lab.train.cohort import Member
from lora_lab.train.loop import fit, peak_memory_gib

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


# -- verbs ------------------------------------------------------------------------------------------------------------


def train(config: RunConfig) -> RunDir:
    """`lora-lab train`: the whole walk in a new run folder."""
    run_dir.check_free(config)
    prepared = prepare(config)
    load_adapted(prepared)
    run = run_dir.create(config)
    with run.locked():
        run_dir.write_manifest(run, prepared.base, _data_hashes(prepared))
        console.say("run", run.path)
        with _stoppable(run):
            _walk(run, prepared, resume_from=None)
    return run


def resume(path: str, overrides: list[str]) -> RunDir:
    """`lora-lab resume`: go on from the newest valid checkpoint, to the same bytes as an uninterrupted run."""
    if overrides:
        raise ConfigError(f"{overrides[0]}: resume takes no overrides, because it would not be the same run any more.")
    run = run_dir.open_existing(path)
    with run.locked():
        if run.result.exists():
            console.say("run", f"{run.path} is finished; nothing to do. See {run.result.name}.")
            return run
        prepared = prepare(_config_of(run))
        run_dir.check_manifest(run, prepared.base, _data_hashes(prepared))
        found, skipped = checkpoint.newest_valid(run.checkpoints)
        for line in skipped:
            console.say("skipped", line)
        console.say("resume", f"from {found}" if found else "no valid checkpoint: from the first step")
        with _stoppable(run):
            load_adapted(prepared)
            _walk(run, prepared, resume_from=found)
    return run


@contextmanager
def _stoppable(run: RunDir) -> Iterator[None]:
    """Tell whoever reports an interruption which run can be resumed."""
    try:
        yield
    except Interrupted as interruption:
        interruption.run = run.path
        raise


def _walk(run: RunDir, prepared: Prepared, resume_from: Path | None) -> None:
    """evaluate the base -> fit -> evaluate -> merge -> result.json"""
    config, held_out, stages = prepared.config, prepared.held_out, prepared.stages
    member = Member(ADAPTER, config, run, prepared.base, prepared.model, len(prepared.train))
    console.say("steps", _describe_steps(member, config))
    if resume_from is not None:
        checkpoint.restore(member, resume_from)
    member.log.rewind(member.state.step)
    before, base_answers, after, tuned_answers, merged, refused = None, [], None, [], None, None
    if held_out is not None:
        with stages("evaluate_base"):
            before, base_answers = _measure_base(prepared)
    with stages("train"):
        clock = fit([member], prepared.train, held_out, prepared.task, prepared.accelerator)
    train_peak_gib = peak_memory_gib()
    with storage.new_folder(run.adapter, {"step": member.state.step, "best_step": member.state.best_step}) as temporary:
        files.write(temporary, prepared.model, ADAPTER, config, prepared.base)
    if held_out is not None:
        with stages("evaluate"):
            after, tuned_answers = _measure(prepared, "tuned")
        console.metrics_table(f"{len(held_out)} held-out rows", {"base": before, "tuned": after})
    where = coverage(prepared.model, ADAPTER)
    if "hf" in config.export.targets:
        with stages("merge"):
            rows, trained_logits = _probe(prepared)
            prepared.model = member.model = member.optimizer = member.parameters = None  # room for the unquantized base
            try:
                merged = merge_adapter(
                    run, config, prepared.base, prepared.tokenizer, rows, trained_logits, prepared.device
                )
            except MergeError as error:  # told at the end: the training itself is complete
                refused, merged = error, {"refused": [str(error)]}
    losses = [line["loss"] for line in member.log.read() if "loss" in line]
    result = {
        "steps": member.state.step,
        "stopped_early": member.state.stopped_early,
        "best_step": member.state.best_step,
        "train_loss": losses[-1],
        "base": before,
        "tuned": after,
        "merge": merged,
        "tokens": member.state.tokens,
        "supervised_tokens": member.state.supervised_tokens,
        "tokens_per_second": clock.tokens_per_second,
        "peak_memory_gib": round(train_peak_gib, 3),
        "peak_memory_with_merge_gib": round(peak_memory_gib(), 3),
        "seconds": stages.seconds,
        "coverage": dataclasses.asdict(where),
        "versions": run_dir.versions(),
    }
    storage.write_text(run.result, storage.dump_json(result))
    _show_samples(base_answers, tuned_answers)
    _show_end(run, result)
    if refused is not None:
        raise refused


def evaluate(path: str, overrides: list[str]) -> dict[str, Any]:
    """`lora-lab evaluate`: the base and the trained adapter on held-out rows, into `evaluation.json`."""
    run = run_dir.open_existing(path)
    prepared = prepare(_config_of(run, overrides), need_train=False)
    if prepared.held_out is None:
        raise ConfigError(
            "data.eval: the run has no held-out rows. Name some: lora-lab evaluate run=DIR data.eval=FILE"
        )
    _load_trained(run, prepared)
    before, base_answers = _measure_base(prepared)
    after, tuned_answers = _measure(prepared, "tuned")
    console.metrics_table(f"{len(prepared.held_out)} held-out rows", {"base": before, "tuned": after})
    _show_samples(base_answers, tuned_answers)
    result = {"data": prepared.held_out.files, "rows": len(prepared.held_out), "base": before, "tuned": after}
    storage.write_text(run.path / "evaluation.json", storage.dump_json(result))
    return result


def merge(path: str, overrides: list[str]) -> dict[str, Any]:
    """`lora-lab merge`: a verified, deployable checkpoint in `merged/`."""
    run = run_dir.open_existing(path)
    config = _config_of(run, overrides)
    with run.locked():
        prepared = prepare(config, need_train=config.data.eval is None)
        _load_trained(run, prepared)
        rows, trained_logits = _probe(prepared)
        prepared.model = None  # room for the unquantized base
        report = merge_adapter(run, config, prepared.base, prepared.tokenizer, rows, trained_logits, prepared.device)
    console.say("merged", f"{run.merged}: AutoModelForCausalLM.from_pretrained({str(run.merged)!r})")
    return report


def chat(path: str, overrides: list[str]) -> None:
    """`lora-lab chat`: talk to the base with its trained adapter, in turns or with one `prompt=...`."""
    prompts = [text.partition("=")[2] for text in overrides if text.startswith("prompt=")]
    run = run_dir.open_existing(path)
    config = _config_of(run, [text for text in overrides if not text.startswith("prompt=")])
    prepared = prepare(dataclasses.replace(config, data=dataclasses.replace(config.data, eval=None)), need_train=False)
    model = _load_trained(run, prepared)
    streamer = TextStreamer(prepared.tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    for text in prompts or _typed():
        messages.append({"role": "user", "content": text})
        rendered = render(messages, prepared.tokenizer, "prompt", add_generation_prompt=True)
        with prepared.accelerator.autocast():
            answer = prepared.task.generate(model, [rendered], streamer=streamer)[0]
        messages.append({"role": "assistant", "content": answer})


def _typed() -> Iterator[str]:
    console.say("chat", "type a message; an empty line or Ctrl-D ends")
    while True:
        try:
            text = console.out.input("[bold green]> [/]")
        except EOFError:
            return
        if not text.strip():
            return
        yield text


# -- pieces -----------------------------------------------------------------------------------------------------------


def _config_of(run: RunDir, overrides: list[str] = ()) -> RunConfig:
    return compose.load(run.config, overrides)


def _data_hashes(prepared: Prepared) -> dict[str, dict[str, str]]:
    sets = {"data.train": prepared.train, "data.eval": prepared.held_out}
    return {key: data.files for key, data in sets.items() if data is not None}


def _describe_steps(member: Member, config: RunConfig) -> str:
    plan, train = member.plan, config.train
    text = f"{member.total_steps} steps of {plan.batch_size} rows ({train.epochs} epoch{'s' * (train.epochs > 1)} of {plan.num_examples} rows"
    if train.max_steps is not None:
        ends = "ends it" if train.max_steps == member.total_steps else "is not reached"
        text += f"; train.max_steps={train.max_steps} {ends}"
    return text + ")"


def _load_trained(run: RunDir, prepared: Prepared) -> PeftModel:
    """The run's base with its trained adapter, checked to belong together."""
    files.check_base(run.adapter, prepared.base)
    model = load_adapted(prepared).eval()
    files.read_into(run.adapter, model, ADAPTER)
    return model


def _measure_base(prepared: Prepared) -> tuple[dict[str, float], list[Answer]]:
    with prepared.model.disable_adapter():
        return _measure(prepared, "base")


def _measure(prepared: Prepared, title: str) -> tuple[dict[str, float], list[Answer]]:
    model = prepared.model.eval()
    with prepared.accelerator.autocast():
        metrics = prepared.task.measure(model, prepared.held_out, prepared.config.train.packing)
        answers = prepared.task.answers(model, prepared.held_out, title)
    return {**metrics, **prepared.task.score(answers)}, answers


def _probe(prepared: Prepared) -> tuple[parity.Probe, torch.Tensor]:
    """The rows that a merge is judged on, and the trained model's logits there."""
    data = prepared.held_out or prepared.train
    rows = parity.probe(data.examples, prepared.config.merge.parity_rows)
    with prepared.accelerator.autocast():
        return rows, parity.logits(prepared.model.eval(), rows)


def _show_samples(base: list[Answer], tuned: list[Answer], count: int = 3) -> None:
    if not base:
        return
    rows = [
        [_shorten(before.question), before.reference, _shorten(before.text), _shorten(after.text)]
        for before, after in list(zip(base, tuned, strict=True))[:count]
    ]
    console.show_table("held-out answers", ["question", "expected", "base", "tuned"], rows, numbers_from=9)


def _shorten(text: str, limit: int = 240) -> str:
    """One line, so that a rambling answer does not fill the screen."""
    line = " ⏎ ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= limit else f"{line[:limit]} ..."


def _show_end(run: RunDir, result: dict[str, Any]) -> None:
    speed = result["tokens_per_second"]
    console.say(
        "done",
        f"{result['steps']} steps, train loss {result['train_loss']:.4f}"
        + (f", {speed:.0f} tokens/s" if speed else "")
        + f", peak memory {result['peak_memory_gib']:.1f} GiB, {sum(result['seconds'].values()):.0f} s",
    )
    console.say("adapter", run.adapter)
    if run.merged.exists():
        console.say("merged", run.merged)
    console.say("next", f"lora-lab chat run={run.path}   lora-lab evaluate run={run.path}")
