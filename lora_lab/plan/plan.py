"""`lora-lab plan`: what a run would train, how long, and in how much memory and disk, before any weight is loaded."""

from __future__ import annotations

import collections
import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lora_lab.adapters import files
from lora_lab.adapters.attach import attach, coverage
from lora_lab.adapters.layers import linear_layers
from lora_lab.base import inspect, load, quantized
from lora_lab.config.run import RunConfig
from lora_lab.data.collate import Batch
from lora_lab.data.dataset import Dataset, Stream
from lora_lab.data.encode import Example
from lora_lab.errors import ConfigError
from lora_lab.export import targets
from lora_lab.plan import memory, on_card, skeletons
from lora_lab.plan.memory import Memory, Shape
from lora_lab.run import prepared, run_dir
from lora_lab.run.prepared import ResolvedBase
from lora_lab.run.setup import ADAPTER, Live, Setup, Stages, of_layers
from lora_lab.run.teacher import TOKENS
from lora_lab.runtime import console
from lora_lab.runtime.memory import free_bytes, peak_gib
from lora_lab.tasks.base import Task, eval_batches
from lora_lab.training.batches import BatchPlan, filled, plan_of
from lora_lab.training.cohort import Member
from lora_lab.training.loop import Clock, fit

_CARDS_GIB = (8, 12, 16, 24)
_MEANINGS = {
    "base": "base, as it is stored",
    "dequantized": "base, dequantized or joined",
    "mapped_file": "base, mapped from its file",
    "adapter": "adapter",
    "gradients": "gradients (within activations)",
    "optimizer": "optimizer",
    "activations": "activations",
    "large_blocks": "logits and other large tensors",
    "holes": "allocator: freed but kept",
    "libraries": "libraries",
    "gathered": "layers put together (hardware.shard)",
}
_CUDA_CONTEXT_GIB = 0.6  # what the driver and its libraries keep on the card, whatever runs
_STREAM_STEPS = 200  # of a stream, the rows of so many steps are looked at
_PROBE_STEPS = 6
_GGUF_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.07}  # a number; K types less than one


@dataclasses.dataclass(frozen=True)
class Work:
    """The training that lies ahead."""

    steps: int
    steps_per_epoch: int
    tokens: int  # of all steps; of a stream an extrapolation
    largest: Batch  # of all forward passes of all steps
    evaluation: Batch | None  # the same in evaluation


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that `lora-lab plan` finds out."""

    matched: dict[str, int]  # ending of a layer's name -> adapted layers
    unmatched: dict[str, int]  # the same of linear layers that are left alone
    trainable_parameters: int
    base_parameters: int
    rows: dict[str, dict[str, int]]  # data key -> rows read, used, truncated, and dropped by kind
    work: Work
    memory: Memory | None  # None: it cannot be estimated for this model
    disk: dict[str, int]  # bytes by what they hold
    free_disk: int


def plan(config: RunConfig, probe: bool = False) -> Plan:
    """Find everything out and show it; with `probe`, load the model and time some steps.

    Raises:
        ConfigError: a sharded base in a number of parts that is not known, or one that this process would have to load; or what a run of it
            would be refused for.
    """
    if config.hardware.shard:
        config = _sharded(config, probe)
    run_dir.check_free(config)
    device = load.torch_device(config.hardware)
    found = prepared.find_base(config, weights=probe)
    prepared.say_base(config, found.base, device)
    if inspect.without_weights(found.base.folder):
        console.say("base", "its weights are not here: planned from config.json")
    data, found, task = prepared.build_data(config, found)
    setup = prepared.assemble(config, found, data, task, device, Stages())
    targets.check(setup)
    work = foresee(config, task, data.train, data.held_out)
    estimated, on_cuda = (_with_teacher(one, setup) for one in _memory(setup, work))
    matched, unmatched, trainable, base, saved, kept = _modules(config, found)
    rows = {part.key: _rows(part) for part in (data.train, data.held_out) if isinstance(part, Dataset)}
    folder = _existing(Path(config.run_dir))
    disk = _disk(config, trainable, saved, kept, base, evaluated=data.held_out is not None)
    cached = quantized.folder_of(found.base, found.kind, config.model.dtype, config.quant, device.type)
    if on_cuda is not None and cached is not None and not cached.exists():
        disk["quantized base (cache folder)"] = (
            on_cuda.base
        )  # all of it, while some of a CPU's stays in the mapped file
    if setup.teacher is not None:
        items = sum(int(data.supervised.sum()) for data in (data.train, data.held_out) if isinstance(data, Dataset))
        disk["teacher's word (cache folder)"] = 4 * task.soft_numbers * items
    result = Plan(matched, unmatched, trainable, base, rows, work, estimated, disk, shutil.disk_usage(folder).free)
    show(result, config, device.type, on_cuda)
    if probe:
        _probe(setup, work)
    return result


def _sharded(config: RunConfig, probe: bool) -> RunConfig:
    """A run with the accelerations that a sharded base leaves.

    Raises:
        ConfigError: see `plan`.
    """
    if probe:
        raise ConfigError(
            "probe=true: trains in one process, and hardware.shard=true needs several. Drop one of the two."
        )
    if config.hardware.processes is None:
        raise ConfigError(
            "hardware.shard=true: how many processes share the base is not known. Set hardware.processes=N."
        )
    return dataclasses.replace(config, speed=of_layers(config.speed))


def _memory(setup: Setup, work: Work) -> tuple[Memory, Memory] | tuple[None, None]:
    """What training needs on this device and on a card; None, aloud, for models that cannot be run on tensors without content."""
    try:
        here = needed(setup, work)
        if setup.device.type != "cpu":
            return here, here
        return here, on_card.of_setup(setup, work.largest, work.evaluation, 0)
    except Exception as error:  # of whatever torch or a model of another make does with such tensors
        reason = str(error).strip().partition("\n")[0][:160]
        console.say(
            "memory", f"cannot be estimated for this model ({type(error).__name__}: {reason}); probe=true measures it"
        )
        return None, None


def _with_teacher(memory: Memory | None, setup: Setup) -> Memory | None:
    """With what a teacher needs that reads the rows first: its weights, and the logits of a pass whose tokens are all supervised."""
    if memory is None or setup.teacher is None:
        return memory
    found, config = setup.teacher.found, setup.config
    own = dataclasses.replace(config, quant=found.quant, model=dataclasses.replace(config.model, dtype=found.dtype))
    model, _ = skeletons.stored(own, found.base, found.kind)
    weights = sum(map(skeletons.nbytes, skeletons.tensors(model)))
    logits = TOKENS * setup.task.vocabulary * getattr(torch, found.dtype).itemsize
    return dataclasses.replace(memory, phases={"teacher": weights + logits, **memory.phases})


def needed(setup: Setup, work: Work) -> Memory:
    """What training needs on this device.

    Raises:
        Exception: the model cannot be run on tensors without content.
    """
    if setup.device.type != "cpu":
        return on_card.of_setup(setup, work.largest, work.evaluation, free_bytes(setup.device))
    return memory.estimate(setup.config, setup.base, setup.kind, setup.task, work.largest, work.evaluation)


# -- steps --------------------------------------------------------------------------------------------------------------


def foresee(config: RunConfig, task: Task, train: Dataset | Stream, held_out: Dataset | None) -> Work:
    """The steps of the run, the tokens they hold, and the largest forward passes among them."""
    batches = plan_of(config, train)
    steps = batches.total_steps(config.train.epochs, config.train.max_steps)
    if isinstance(train, Stream):
        largest, tokens = _streamed(task, train, batches, steps)
    else:
        largest, tokens = _stored(task, train, batches, steps)
    evaluation = None
    if held_out is not None:
        evaluation = _largest(task, held_out, eval_batches(held_out.lengths, task.forward.together))
    return Work(steps, batches.steps_per_epoch, tokens, largest, evaluation)


def _stored(task: Task, train: Dataset, batches: BatchPlan, steps: int) -> tuple[Batch, int]:
    """The largest forward pass, and the tokens of all steps."""
    lengths = train.lengths
    packed = task.config.packed
    parts = [part for step in range(steps) for part in _passes(batches, batches.step(step), lengths, packed)]
    tokens = sum(int(lengths[part].sum()) for part in parts)
    passes = parts if task.forward.together else [[place] for part in parts for place in part]
    return _largest(task, train, passes), tokens


def _passes(
    batches: BatchPlan, parts: list[np.ndarray], lengths: np.ndarray | Mapping[int, int], packed: bool
) -> list[np.ndarray]:
    """The items of each of a step's passes, as the loop fills them.

    Args:
        parts: the step's items, as the plan parts them.
        lengths: tokens of each item.
    """
    if batches.micro_batch_tokens is None:
        return parts
    chosen = np.concatenate(parts)
    sizes = [int(lengths[int(item)]) for item in chosen]
    if not packed:
        order = np.argsort(sizes, kind="stable")
        chosen, sizes = chosen[order], [sizes[place] for place in order]
    return [
        chosen[cut] for cut in filled(sizes, batches.micro_batch_size, batches.micro_batch_tokens, padded=not packed)
    ]


def _largest(task: Task, data: Dataset, passes: Sequence[Sequence[int]]) -> Batch:
    """Of packed rows the longest, with the most supervised tokens that any has: at least as large as each; of padded rows the
    batch with the most tokens, padding among them."""
    lengths, supervised = data.lengths, data.supervised
    if task.config.packed and not task.config.compares_rows:
        shapes = [Shape(tuple(int(lengths[i]) for i in part), int(supervised[list(part)].sum())) for part in passes]
        return memory.blank(memory.largest(shapes))
    largest = max(passes, key=lambda part: len(part) * int(lengths[list(part)].max()))
    return _batch(task, [example for i in largest for example in data[int(i)]])


def _batch(task: Task, examples: list[Example]) -> Batch:
    return task.collate(examples, np.random.default_rng(0))


def _streamed(task: Task, train: Stream, batches: BatchPlan, steps: int) -> tuple[Batch, int]:
    """The same from some of the steps, evenly spread."""
    seen = np.unique(np.linspace(0, steps - 1, num=min(steps, _STREAM_STEPS)).astype(int))
    passes: list[list[Example]] = []
    tokens = 0
    for step in seen:
        parts = batches.step(int(step))
        items = {int(i): train[int(i)] for part in parts for i in part}
        lengths = {i: sum(example.num_tokens for example in examples) for i, examples in items.items()}
        for chosen in _passes(batches, parts, lengths, task.config.packed):
            examples = [example for i in chosen for example in items[int(i)]]
            tokens += sum(example.num_tokens for example in examples)
            passes += [examples] if task.forward.together else [[example] for example in examples]
    if task.config.packed and not task.config.compares_rows:
        largest = memory.blank(memory.largest([memory.shape(examples) for examples in passes]))
    else:
        largest = _batch(task, max(passes, key=lambda part: len(part) * max(one.num_tokens for one in part)))
    return largest, tokens * steps // len(seen)


# -- modules, rows, disk ------------------------------------------------------------------------------------------------


def _modules(config: RunConfig, found: ResolvedBase) -> tuple[dict[str, int], dict[str, int], int, int, int, int]:
    names = linear_layers(found.model)
    endings = [collections.Counter(name.rpartition(".")[2] for name in part) for part in (
        found.targets, [name for name in names if name not in set(found.targets)],
    )]  # fmt: skip
    with torch.device("meta"):
        adapted = attach(found.model, config.adapter, ADAPTER, found.kind, config.seed)
    sits = coverage(adapted, ADAPTER)
    saved = sum(tensor.numel() for tensor in files.tensors_of(adapted, ADAPTER).values())
    kept = sum(tensor.nbytes for tensor in config.adapter.kept(adapted, ADAPTER).values())
    return dict(endings[0]), dict(endings[1]), sits.trainable_parameters, sits.base_parameters, saved, kept


def _rows(data: Dataset) -> dict[str, int]:
    truncated = sum(report.truncated for report in data.reports)
    return {"read": data.rows_read, "used": data.rows_used, "prompts truncated": truncated, **data.rows_dropped}


def _disk(config: RunConfig, trainable: int, saved: int, kept: int, base: int, evaluated: bool) -> dict[str, int]:
    """Bytes that the run folder will hold: adapters in float32 with AdamW's two moments beside them, and the merge.

    Args:
        saved: numbers of the adapter that are saved, some of which may not be trained.
        kept: bytes that its method keeps beside them.
    """
    moments = 8 if config.optim.name == "adamw" else 2
    checkpoints = config.train.keep_checkpoints + 1 + (config.train.keep_best and evaluated)  # one more while saving
    disk = {"checkpoints": checkpoints * (saved * 4 + trainable * moments + kept), "adapter": saved * 4}
    export = config.export
    if targets.needs_merged(export.targets):
        disk["merged"] = base * getattr(torch, export.dtype).itemsize
    sizes = {"gguf": _GGUF_BYTES.get(export.gguf_type, 0.8), "quantized": 1.1 if "int8" in export.quantization else 0.7}
    sizes["ollama"] = sizes["gguf"]
    made = {
        name: saved * 4 if name in ("adapter", "vllm", "gguf_lora") else base * sizes[name]
        for name in export.targets
        if name != "hf"
    }
    return disk | {f"export/{name}": round(size) for name, size in made.items()}


def _existing(folder: Path) -> Path:
    return next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())


# -- time ---------------------------------------------------------------------------------------------------------------


def _probe(setup: Setup, work: Work) -> None:
    """Train some steps of the run in a temporary folder, and say how long all of them would take."""
    config = setup.config
    if config.hardware.threads:
        torch.set_num_threads(config.hardware.threads)
    with tempfile.TemporaryDirectory(prefix="lora_lab_") as folder:
        short = dataclasses.replace(
            config,
            run_dir=folder,
            train=dataclasses.replace(config.train, max_steps=min(work.steps, _PROBE_STEPS)),
            optim=dataclasses.replace(config.optim, schedule="constant", warmup_steps=0),
            tracker=dataclasses.replace(config.tracker, name="none"),
        )
        rows = dataclasses.replace(setup.data, held_out=None)
        with dataclasses.replace(setup, config=short, data=rows, stages=Stages()).loaded() as live:
            clock = _timed(live)
    if clock.tokens_per_second is None:
        console.say("probe", f"only {work.steps} steps: train them")
        return
    seconds = work.tokens / clock.tokens_per_second
    console.say(
        "probe", f"{clock.tokens_per_second:.0f} tokens/s: about {_duration(seconds)} for the {work.steps} steps"
    )
    console.say("probe", f"peak memory {peak_gib(setup.device):.2f} GiB, imports included")


def _timed(live: Live) -> Clock:
    """Train a run of a few steps."""
    setup = live.setup
    run, rows = run_dir.create(setup.config), setup.training_rows()
    member = Member(ADAPTER, setup.config, run, setup.base, live.model, rows, setup.task)
    return fit([member], rows, None, setup.accelerator)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = seconds / 60
    return f"{minutes:.1f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


# -- showing ------------------------------------------------------------------------------------------------------------


def show(found: Plan, config: RunConfig, device: str, on_cuda: Memory | None) -> None:
    """Print a plan."""
    endings = [
        [name, found.matched.get(name, 0), found.unmatched.get(name, 0)]
        for name in dict.fromkeys([*found.matched, *found.unmatched])
    ]
    share = 100 * found.trainable_parameters / found.base_parameters
    console.show_table(
        f"linear layers ({found.trainable_parameters:,} trainable parameters, {share:.2f} % of the base's "
        f"{found.base_parameters:,})",
        ["", "adapted", "left alone"],
        endings,
    )
    for key, rows in found.rows.items():
        console.show_table(f"{key}", list(rows), [list(rows.values())], numbers=slice(0, None))
    work = found.work
    console.say("steps", f"{work.steps} ({work.steps_per_epoch} an epoch), {work.tokens:,} tokens in all")
    console.say(
        "largest",
        f"{work.largest.num_tokens} tokens in one forward pass of {len(work.largest.lengths)} rows, "
        f"{len(work.largest.targets)} things to learn",
    )
    if found.memory is not None and on_cuda is not None:
        _show_memory(found.memory, device, on_cuda)
    free = _gib(found.free_disk)
    console.show_table(
        f"disk ({free:.1f} GiB free)", ["", "GiB"], [[name, f"{_gib(size):.2f}"] for name, size in found.disk.items()]
    )
    if sum(found.disk.values()) > found.free_disk:
        console.say("disk", f"too little: {_gib(sum(found.disk.values())):.1f} GiB needed. Choose another run_dir.")


def _show_memory(estimated: Memory, device: str, on_cuda: Memory) -> None:
    parts = {field.name: getattr(estimated, field.name) for field in dataclasses.fields(estimated)}
    phases = parts.pop("phases")
    where = "of the process beyond its imports" if device == "cpu" else "on the card"
    rows = [[_MEANINGS[name], f"{_gib(size):.2f}"] for name, size in parts.items() if size]
    console.show_table(f"memory while training, {where} (estimated)", ["", "GiB"], rows)
    peaks = [f"{_gib(size):.2f}" for size in phases.values()]
    title = f"peak of each phase (estimated, GiB); highest: {estimated.peak_phase}"
    console.show_table(title, list(phases), [peaks], slice(0, None))
    need = _gib(on_cuda.peak) + _CUDA_CONTEXT_GIB
    fits = [f"{card} GiB {'yes' if need <= card else 'no'}" for card in _CARDS_GIB]
    console.say(
        "fits",
        f"on a GPU about {need:.1f} GiB ({on_cuda.peak_phase}), {_CUDA_CONTEXT_GIB} of them CUDA's own: {', '.join(fits)}",
    )


def _gib(size: int) -> float:
    return size / 2**30
