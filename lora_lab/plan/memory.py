"""Predict the peak memory of a run without loading a weight.

The real model is built without storage, gets its real adapter, and takes one real training step on tensors that have a
shape and a type but no content. Every storage that the step makes and drops is counted, so autocast, checkpointing,
packing and bitsandbytes' own layers are counted as they are. What the C library and the checkpoint file add to that is
measured, not simulated; see the constants. Of a card: `on_card.py`.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lora_lab.adapters.attach import attach, trainable
from lora_lab.base import inspect, quantized
from lora_lab.base.layers import layers_of
from lora_lab.base.load import BaseFiles, ModelKind
from lora_lab.config.run import RunConfig
from lora_lab.config.train import HardwareConfig
from lora_lab.data.collate import Batch, PackedBatch
from lora_lab.export import targets
from lora_lab.fast import apply
from lora_lab.plan import skeletons
from lora_lab.runtime.memory import free_bytes
from lora_lab.training import oom
from lora_lab.verify import layers

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lora_lab.data.encode import Example
    from lora_lab.tasks.base import AnyTask

MIB = 2**20

# Process memory beyond imports that no tensor accounts for: tokenizer, rows, and the pages of torch's and oneDNN's code
# that are read at their first use. Measured in five runs: 65 to 69 MiB before the base is loaded, 24 to 34 MiB of code
# after training.
_LIBRARIES = 100 * MIB
# glibc maps blocks of this size one by one and returns them when freed; smaller ones share a heap that does not shrink.
_MAPPED = 32 * MIB
# Heap beyond what a step has in use at once, as a share of that: holes too small to use again, because torch asks for aligned
# blocks and small objects settle between them. Measured in NF4 0.39, with checkpointing 0.30, in float32 0.59, in bfloat16 0.83.
_HOLES = 0.5
# Heap that quantizing while loading leaves behind: 245 to 454 MiB in four 4-bit runs, 147 MiB in one of int8.
_LEFT_BY_QUANTIZING = {"none": 0, "nf4": 350 * MIB, "fp4": 350 * MIB, "int8": 150 * MIB, "torchao_int8": 150 * MIB}
# Quantizing to 4 bits on a CPU (bitsandbytes 0.50) holds the largest layer in float32, its scaled and its clamped values.
_QUANTIZE_4BIT = 3 * 4  # bytes for each weight
# Layers of a sharded base that are whole at once. torch gathers a layer into one buffer and copies its weights out of that; in the backward
# pass the one before is gathered while a layer computes (`FSDPParamGroup.wait_for_unshard` and `pre_backward`).
_GATHERED = 2
_MERGE_POSITIONS = 512  # as in verify/parity.py: logits of so many positions are compared


@dataclasses.dataclass(frozen=True)
class Shape:
    """One packed row: what a forward pass is given."""

    lengths: tuple[int, ...]  # tokens of each example
    supervised: int  # tokens that have a loss

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Predicted memory in bytes: what it is for, and how much is in use at most in each phase."""

    base: int  # weights as they are stored, quantized or not, without those that stay in the mapped file
    dequantized: int  # weights that are kept beside it: dequantized, or joined to be read together
    mapped_file: int  # the checkpoint's pages: in memory as long as one weight is a view of them (CPU)
    adapter: int  # with what its method remembers
    gradients: int
    optimizer: int
    activations: int  # most that is alive at once of a training step's blocks below 32 MiB, gradients among them
    large_blocks: int  # the same of larger blocks: logits and their gradients; with long rows activations as well
    holes: int  # heap that is neither in use nor given back (CPU)
    libraries: int
    gathered: int  # layers of a sharded base that are put together at once
    phases: dict[str, int]  # peak of: load, train, evaluation, merge (those that the run has)

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.__getitem__)


@dataclasses.dataclass(frozen=True)
class Shards:
    """What `hardware.shard` changes for each process, in bytes."""

    layers: int = 0  # weights that are spread, of all processes
    elsewhere: int = 0  # of these, what the others hold
    gathered: int = 0  # what is put together at once

    @classmethod
    def of(cls, hardware: HardwareConfig, model: nn.Module) -> Shards:
        """
        Args:
            model: the base as it is stored, without adapters.
        """
        sizes = skeletons.of_layers(model) if hardware.shard else []
        whole, parts = sum(sizes), hardware.processes or 1
        return cls(whole, whole - -(-whole // parts), _GATHERED * max(sizes, default=0))


def shape(examples: Sequence[Example]) -> Shape:
    """The shape of examples that are packed into one row."""
    return Shape(
        tuple(len(example.input_ids) for example in examples),
        sum(int(example.supervised.sum()) for example in examples),
    )


def largest(shapes: Sequence[Shape]) -> Shape:
    """The longest row, with the most supervised tokens that any row has: at least as large as each of them."""
    return Shape(max(shapes, key=lambda one: one.tokens).lengths, max(one.supervised for one in shapes))


def estimate(
    config: RunConfig,
    base: BaseFiles,
    kind: ModelKind,
    task: AnyTask,
    train: Batch,
    evaluation: Batch | None,
) -> Memory:
    """Predict the peak memory of a training run on a CPU: of the process beyond its imports. Of a card: see `on_card.py`.

    Only `config.json` is read from the base's folder, and the sizes of its weight files if there are any.

    Args:
        train: the largest batch of a forward pass; what it holds does not matter, see `blank`.
        evaluation: the same in evaluation; None without held-out rows.
    """
    stored, unquantized = skeletons.stored(config, base, kind)
    stored_as, file = _checkpoint(base, unquantized)
    views = stored_as == getattr(torch, config.model.dtype)

    def copied(tensors: Iterable[torch.Tensor]) -> int:
        return sum(skeletons.nbytes(t) for t in tensors if not (views and t.dtype == stored_as))

    shards = Shards.of(config.hardware, stored)
    copied_of_layers = copied(one for layer in layers_of(stored) for one in layer.parameters())
    model = _adapted(stored, config, kind)
    frozen = [tensor for tensor in skeletons.tensors(model) if not tensor.requires_grad]
    whole, loaded = sum(map(skeletons.nbytes, frozen)), copied(frozen)
    own, kept = loaded, file if views and loaded < whole else 0
    if config.hardware.shard:  # parts of layers are copies, and their pages of the file are given back
        own = loaded - copied_of_layers + shards.layers - shards.elsewhere
        kept = min(kept, whole - loaded - (shards.layers - copied_of_layers))
    gradients = sum(skeletons.nbytes(p) for p in trainable(model).values())
    adapter = gradients + remembered(config, model)
    optimizer = sum(optimizer_bytes(config.optim.name, p.numel()) for p in trainable(model).values())

    fake = FakeTensorMode()
    with fake:
        skeletons.give_storage(model, fake, torch.device("cpu"))
    dequantized = _accelerate(model, config, task, train, fake, mapped=views)
    step = _step(model, config, task, train, fake, learn=True)
    measure = _step(model, config, task, evaluation, fake, learn=False) if evaluation else _Usage(_MAPPED)
    kept_before = quantized.folder_of(base, kind, config.model.dtype, config.quant, "cpu")
    quantizes = base.published is None and (kept_before is None or not kept_before.exists())
    left = _LEFT_BY_QUANTIZING[base.stored(config.quant).method] if quantizes else 0
    holes = left + round(_HOLES * step.heap_peak)
    fixed = _LIBRARIES + kept + own + shards.gathered + dequantized + adapter
    phases = {
        "load": _LIBRARIES + file + loaded + adapter + max(left, _quantizing(model)),
        # a step's later micro-batches begin with the gradients of the earlier ones
        "train": fixed + optimizer + step.peak + holes + (gradients if several_passes(config, task) else 0),
    }
    if evaluation:
        # what the heap has once grown to stays, so evaluation after training begins from there
        heap = max(step.heap_peak + holes, measure.heap_peak)
        phases["evaluation"] = fixed + optimizer + heap + measure.large_peak
    if targets.needs_merged(config.export.targets):
        full, layered = skeletons.for_merging(
            model.get_base_model(), unquantized, getattr(torch, config.export.dtype).itemsize
        )
        full = full if layers.fits(full, 0) else layered
        head = model.get_base_model().get_output_embeddings()
        vocabulary = 0 if head is None else head.out_features
        logits = 3 * _MERGE_POSITIONS * vocabulary * 4
        # the trained model's heap is there to be used again
        heap = max(own + 2 * adapter + optimizer + step.heap_peak + holes, full)
        phases["merge"] = _LIBRARIES + file + heap + logits
    return Memory(
        own, dequantized, kept, adapter, gradients, optimizer, step.heap_peak, step.large_peak, holes, _LIBRARIES,
        shards.gathered, phases,
    )  # fmt: skip


def remembered(config: RunConfig, model: PeftModel, name: str = "default") -> int:
    """Bytes that an adapter's method keeps beside its weights, such as AdaLoRA's sums."""
    return sum(skeletons.nbytes(one) for one in config.adapter.kept(model, name).values())


def _checkpoint(base: BaseFiles, weights: dict[str, int]) -> tuple[torch.dtype, int]:
    """Type and bytes of the weights on disk; as `config.json` says where there are no files."""
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(base.folder).dtype or torch.float32
    files = inspect.weight_files(base.folder) if any(base.folder.glob("*.safetensors")) else []
    size = sum(file.stat().st_size for file in files)
    return dtype, size or sum(weights.values()) * dtype.itemsize


def several_passes(config: RunConfig, task: AnyTask) -> bool:
    """Whether a step has several micro-batches, so that the later ones begin with the gradients of the earlier ones. Where they are filled
    up with tokens, it is taken to."""
    batches = config.train
    if not task.forward.together or batches.micro_batch_tokens is not None:
        return True
    return (batches.micro_batch_size or batches.batch_size) < batches.batch_size


def optimizer_bytes(name: str, size: int) -> int:
    """AdamW's two moments; bitsandbytes keeps tensors below 4096 elements in float32, and a scale for each 256 bytes."""
    if name == "adamw" or size < 4096:
        return 2 * 4 * size
    return 2 * (size + 4 * -(-size // 256))


def _quantizing(model: nn.Module) -> int:
    """Bytes that quantizing the largest 4-bit layer takes for a moment."""
    return _QUANTIZE_4BIT * skeletons.largest_layer(model, Linear4bit)


def _adapted(model: PreTrainedModel, config: RunConfig, kind: ModelKind) -> PeftModel:
    """The model on the meta device with its adapter, as training would see it."""
    with torch.device("meta"):
        adapted = attach(model, config.adapter, "default", kind, config.seed)
    if config.train.gradient_checkpointing:
        oom.recompute(adapted, config.train.recompute_every, offload=False)
    return adapted


# -- a step without computing -----------------------------------------------------------------------------------------


class _Usage(TorchDispatchMode):
    """Follow every storage that is made inside the block until it is dropped. All figures are bytes."""

    def __init__(self, mapped: int):
        super().__init__()
        self.mapped = mapped  # blocks from this size on are not on the heap
        self.known: set[int] = set()
        self.heap = self.large = 0
        self.heap_peak = self.large_peak = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.ops.aten._fused_sdp_choice.default:
            return 1  # flash attention, as on a real CPU or GPU; it would not be chosen for tensors without content
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.bitsandbytes.gemm_4bit.default:  # dequantizes the layer inside
            rows, columns = args[2]
            self._count(rows * columns * args[0].element_size(), momentary=True)
        tree_map_only(torch.Tensor, self._follow, result)
        return result

    def ignore(self, tensors: Iterator[torch.Tensor]) -> None:
        self.known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self._count(storage.nbytes())
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _count(self, size: int, momentary: bool = False) -> None:
        if size >= self.mapped:
            self.large += size
        else:
            self.heap += size
        self.heap_peak, self.large_peak = max(self.heap_peak, self.heap), max(self.large_peak, self.large)
        self.peak = max(self.peak, self.heap_peak + self.large)  # the heap does not shrink
        if momentary:
            self._uncount(size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self._uncount(size)

    def _uncount(self, size: int) -> None:
        if size >= self.mapped:
            self.large -= size
        else:
            self.heap -= size


def _step(
    model: PeftModel, config: RunConfig, task: AnyTask, batch: Batch, mode: FakeTensorMode, learn: bool
) -> _Usage:
    """What one forward pass takes, and with `learn` a backward pass; gradients are counted, weights are not."""
    usage = _Usage(_MAPPED)
    _set_mode(model, learn)
    autocast = _autocast(config)
    batch = _without_content(batch, mode)
    with mode, usage, task.forward.segments(model), torch.set_grad_enabled(learn):
        usage.ignore(skeletons.tensors(model))
        with autocast:
            loss = task.loss(model, batch).loss
        if learn:
            loss.backward()
        del loss
    model.zero_grad()
    return usage


def _set_mode(model: PeftModel, learn: bool) -> None:
    model.train(learn)
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.train()  # the inference path looks for outliers, and a tensor without content has none


def _autocast(config: RunConfig) -> torch.autocast:
    dtype = config.model.dtype
    return torch.autocast(
        "cpu", torch.bfloat16 if dtype == "float32" else getattr(torch, dtype), enabled=dtype != "float32"
    )


def _accelerate(
    model: PeftModel, config: RunConfig, task: AnyTask, batch: Batch, mode: FakeTensorMode, mapped: bool
) -> int:
    """Replace the modules as a run would; bytes of the weights that it keeps dequantized or joined."""
    free = free_bytes(torch.device("cpu"))
    batch = _without_content(batch, mode)
    _set_mode(model, learn=False)
    with mode, _autocast(config):
        applied = apply.accelerate(
            model, task.forward, config.speed, lambda: task.logits(model, batch), free, prove=False
        )
        task.accelerate(model, batch, prove=False)
    # a layer's own weights are given back when they are joined, unless they are pages of the checkpoint
    return applied.kept_bytes + (sum(weight.joined_bytes for weight in applied.weights) if mapped else 0)


def _without_content(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The batch as tensors that have shapes only; its weights go, because their sum would need content."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)} | {"weights": None}
    return type(batch)(**tree_map_only(torch.Tensor, mode.from_tensor, fields))


def blank(shape: Shape) -> PackedBatch:
    """A packed row of a shape."""
    ids, places = torch.zeros(1, shape.tokens, dtype=torch.int64), torch.zeros(shape.supervised, dtype=torch.int64)
    return PackedBatch(ids, ids, list(shape.lengths), places, places, None, [])
