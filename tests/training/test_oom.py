"""Steps that do not fit into memory: made smaller until they do, with the same result."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.errors import ConfigError, NoRoomError
from lora_lab.runtime.memory import is_out_of_memory
from lora_lab.training import oom
from lora_lab.training.batches import filled
from lora_lab.training.cohort import learn, learning, share
from lora_lab.training.loop import _parts
from tests.conftest import make_rows, write_jsonl
from tests.training.test_invariants import member_of, prepared_and_model, relative_gap, train_once

# Trains after the process has been forbidden to take more address space than it has and so many bytes.
_LIMITED = """
import json, resource, sys
import torch
from lora_lab.training.loop import fit
from tests.training.test_invariants import member_of, prepared_and_model
from lora_lab.config import compose
from safetensors.torch import save_file
from tests.training.test_invariants import adapter_of

overrides, limit, out = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
prepared, model = prepared_and_model(compose.compose(overrides))
member = member_of(prepared, model, compose.compose(overrides))
model(torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()  # threads and code are there
member.optimizer.zero_grad()
if limit:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
fit([member], prepared.train, None, prepared.accelerator)
save_file(adapter_of(model), out)
print(json.dumps([member.state.micro_batch_size, member.state.checkpointing]))
"""


def _train(overrides: list[str], limit: int, out) -> tuple[str, list | None]:
    environment = {
        "OMP_NUM_THREADS": "1",
        "PATH": "",
        "HF_HUB_OFFLINE": "1",
        "MALLOC_ARENA_MAX": "1",
        "PYTHONPATH": ".",
    }
    command = [sys.executable, "-c", _LIMITED, json.dumps(overrides), str(limit), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        return done.stdout + done.stderr, None
    return done.stdout, json.loads(lines[-1])


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_a_step_that_does_not_fit_is_made_smaller(overrides, tmp_path):
    from safetensors.torch import load_file

    rows = write_jsonl(tmp_path / "many.jsonl", make_rows(256))
    given = [*overrides, f"data.train={rows}", "train.batch_size=256", "train.max_steps=2", "data.duplicates=keep"]
    _, state = _train([*given, f"run_dir={tmp_path}/free"], 0, tmp_path / "free.safetensors")
    assert state == [None, False]
    told, state = _train([*given, f"run_dir={tmp_path}/tight"], 100 * 2**20, tmp_path / "tight.safetensors")
    assert state is not None, told
    assert state[0] in (8, 16, 32, 64, 128)
    assert "does not fit: micro-batches of 128 instead of 256 rows; the step itself stays the same" in told
    gap = relative_gap(load_file(tmp_path / "tight.safetensors"), load_file(tmp_path / "free.safetensors"))
    assert gap <= 1e-5  # two steps of Adam on gradients that are equal but for rounding


def step_down(member, prepared, on_gpu: bool = False) -> str | None:
    """After a step of the member that did not fit."""
    return oom.step_down(member, _parts(member, prepared.train), on_gpu)


def test_the_steps_down_and_what_they_leave_the_same(config_of):
    config = config_of("train.batch_size=8")
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    said = []
    while (line := step_down(member, prepared)) is not None:
        said.append(line)
    assert [line.split(" ")[0] for line in said] == ["micro-batches"] * 3 + ["activations"]
    assert member.plan.micro_batch_size == member.state.micro_batch_size == 1
    assert member.plan.batch_size == 8
    assert member.model.get_base_model().is_activation_checkpointing


def test_selective_checkpointing_gives_way_to_full(config_of):
    config = config_of("train.batch_size=1", "train.gradient_checkpointing=true", "train.recompute_every=2")
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    layers = model.get_base_model().model.layers
    oom.apply(member)
    assert [layer.gradient_checkpointing for layer in layers] == [i % 2 == 0 for i in range(len(layers))]
    assert step_down(member, prepared).startswith("activations")
    assert all(layer.gradient_checkpointing for layer in layers)
    assert step_down(member, prepared) is None


def test_backward_ends_at_the_lowest_adapted_layer(config_of):
    config = config_of("train.gradient_checkpointing=true", "adapter.layers_to_transform=[1]")
    prepared, model = prepared_and_model(config)
    oom.apply(member_of(prepared, model, config))
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    model.train()
    prepared.task.loss(model, prepared.task.collate(prepared.train[0], None)).loss.backward()
    assert seen[0] is False
    assert seen[1] is True


def test_a_resumed_member_keeps_what_was_changed(config_of, tmp_path):
    from lora_lab.training import checkpoint

    config = config_of("train.batch_size=8")
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    for _ in range(4):
        step_down(member, prepared)
    saved = checkpoint.save(member)
    again = member_of(prepared, model, config, member.run)
    checkpoint.restore(again, saved)
    oom.apply(again)
    assert again.plan.micro_batch_size == 1
    assert again.state.checkpointing


# What the libraries say, first lines as they are raised: on CUDA and ROCm, on a CPU, on other devices.
LACKS = {
    "the caching allocator": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.79 GiB of which 12.31 MiB is free."
    ),
    "the same before torch 2.5": RuntimeError(
        "CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 7.79 GiB total capacity)"
    ),
    "pinned memory, WSL": RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
    ),
    "a context": torch.AcceleratorError(
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com", 2
    ),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuBLAS without a handle": RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "cuDNN 8": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cuSPARSE": RuntimeError("CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`"),
    "cuSOLVER": RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    "rocBLAS": RuntimeError("CUDA error: rocblas_status_memory_error when calling `rocblas_create_handle(handle)`"),
    "cuFFT": RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    "cuSPARSE's own": RuntimeError(
        "CUDA error: insufficient resources when calling `cusparseSpMM(handle)` (CUSPARSE_STATUS_INSUFFICIENT_RESOURCES)"
    ),
    "cuSOLVER without a handle": RuntimeError(
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`. If you keep seeing this error"
    ),
    "cuDNN without a handle": RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    "the driver": RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "the caching allocator without NVML": RuntimeError(
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":995, please report a bug to PyTorch.'
    ),
    "the same in a container": RuntimeError(
        'NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":813'
    ),
    "MIOpen": RuntimeError("miopenStatusAllocFailed"),
    "HIP": RuntimeError("HIP error: out of memory"),
    "NCCL": RuntimeError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
    "Metal": RuntimeError(
        "MPS backend out of memory (MPS allocated: 9.01 GB, other allocations: 53.00 MB, max allowed: 9.07 GB)"
    ),
    "torch on a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 268435456 "
        "bytes. Error code 12 (Cannot allocate memory)"
    ),
    "torch on Windows": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to"
    ),
    "a mapped file": RuntimeError(
        "unable to mmap 134217728 bytes from file </base/model.safetensors>: Cannot allocate memory (12)"
    ),
    "safetensors": MemoryError("Cannot allocate memory (os error 12)"),
    "safetensors while it writes": SafetensorError(
        'Error while serializing: IoError(Os { code: 12, kind: OutOfMemory, message: "Cannot allocate memory" })'
    ),
    "mmap": OSError(12, "Cannot allocate memory"),
    "numpy": np._core._exceptions._ArrayMemoryError((2**26,), np.dtype(float)),
    "Python": MemoryError(),
    "C++": RuntimeError("std::bad_alloc"),
}
NOT_LACKS = {
    "a wrong address": torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700),
    "an assertion": RuntimeError("CUDA error: device-side assert triggered"),
    "shared memory of a kernel": RuntimeError(
        "out of resource: shared memory, Required: 114688, Hardware limit: 101376."
    ),
    "registers": RuntimeError("CUDA error: too many resources requested for launch"),
    "cuSOLVER at work": RuntimeError(
        "cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnSgetrf(handle)`"
    ),
    "a damaged file": SafetensorError("Error while deserializing header: HeaderTooLarge"),
    "an assertion of torch": RuntimeError(
        'false INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":88, please report a bug to PyTorch.'
    ),
    "a product": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"),
    "a full disk": OSError(28, "No space left on device"),
    "a text": ValueError("the row says: out of memory"),
    "what was told already": NoRoomError("Step 3 does not fit into memory (CUDA out of memory)."),
}


@pytest.mark.parametrize("name", LACKS)
def test_every_form_of_a_failed_allocation_is_known(name):
    assert is_out_of_memory(LACKS[name])


@pytest.mark.parametrize("name", NOT_LACKS)
def test_other_errors_are_no_lack_of_memory(name):
    assert not is_out_of_memory(NOT_LACKS[name])


def test_what_is_and_is_not_a_lack_of_memory():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(other.value)


# -- the order, with kept weights and on a GPU ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "on_gpu", "order"),
    [
        (4, False, ["micro-batches", "micro-batches", "activations"]),
        (4, True, ["activations", "micro-batches", "micro-batches", "kept"]),
        (400, True, ["micro-batches"] * 3 + ["activations"] + ["micro-batches"] * 5 + ["kept"]),
    ],
)
def test_a_gpu_checkpoints_before_its_passes_become_small(config_of, rows, on_gpu, order, tmp_path):
    """Rows of about 45 tokens: 400 are 18,000, 50 are 2,250, of which half would be too few."""
    file = write_jsonl(tmp_path / "many.jsonl", make_rows(400))
    config = config_of(f"train.batch_size={rows}", f"data.train={file}", "data.duplicates=keep")
    prepared, model = prepared_and_model(config)
    member, said = member_of(prepared, model, config), []
    while (line := step_down(member, prepared, on_gpu)) is not None:
        said.append(line.split(" ")[0])
    assert said == order
    assert member.state.offloading is on_gpu


def test_kept_weights_go_first_and_stay_away(config_of):
    from lora_lab.training import checkpoint

    config = config_of("quant=nf4", "speed.dequantize=once", "train.batch_size=2")
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    batch = prepared.task.collate(prepared.train[0], None)
    kept = [weight for weight in prepared.task.forward.weights if weight.keep]
    before = prepared.task.loss(model, batch).loss
    assert kept
    assert step_down(member, prepared).startswith("weights are dequantized in every pass")
    assert not any(weight.keep or weight._dense is not None for weight in kept)
    assert torch.equal(prepared.task.loss(model, batch).loss, before)
    assert step_down(member, prepared).startswith("micro-batches of 1")
    saved = checkpoint.save(member)
    prepared, model = prepared_and_model(config)
    again = member_of(prepared, model, config, member.run)
    checkpoint.restore(again, saved)
    oom.apply(again)
    assert not any(weight.keep for weight in prepared.task.forward.weights)


# -- passes by tokens -----------------------------------------------------------------------------------------------------


def test_passes_are_filled_up_to_so_many_tokens():
    assert [(cut.start, cut.stop) for cut in filled([5, 5, 5, 30, 2, 2], 8, 10)] == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert [(cut.start, cut.stop) for cut in filled([2, 2, 2, 2], 3, 100)] == [(0, 3), (3, 4)]
    assert [(cut.start, cut.stop) for cut in filled([2, 4, 8], 8, 12, padded=True)] == [(0, 2), (2, 3)]
    assert filled([], 8, 10) == []


def test_a_step_is_the_same_by_tokens(config_of, tmp_path):
    """Its loss and what is learned, and to the byte where the passes are the same; the split follows from the rows alone."""
    whole, losses = train_once(config_of("train.max_steps=2", "train.batch_size=8"), tmp_path / "a")
    by_tokens = config_of("train.max_steps=2", "train.batch_size=8", "train.micro_batch_tokens=60")
    split, others = train_once(by_tokens, tmp_path / "b")
    assert others == pytest.approx(losses, rel=1e-6)
    assert relative_gap(split, whole) <= 1e-4  # two steps of Adam on gradients that are equal but for rounding
    large, same = train_once(
        config_of("train.max_steps=2", "train.batch_size=8", "train.micro_batch_tokens=100000"), tmp_path / "c"
    )
    assert same == losses
    assert all(torch.equal(large[name], whole[name]) for name in whole)
    prepared, model = prepared_and_model(by_tokens)
    parts = _parts(member_of(prepared, model, by_tokens), prepared.train)
    sizes = [sum(example.num_tokens for example in part) for part in parts]
    assert len(parts) > 1
    assert all(size <= 60 or len(part) == 1 for size, part in zip(sizes, parts, strict=True))


def test_passes_by_tokens_are_halved_and_resumed(config_of):
    from lora_lab.training import checkpoint

    config = config_of("train.batch_size=8", "train.micro_batch_tokens=1000")
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    tokens = sum(example.num_tokens for example in _parts(member, prepared.train)[0])
    assert step_down(member, prepared) == f"micro-batches of {tokens // 2} instead of {tokens} tokens"
    again = member_of(prepared, model, config, member.run)
    checkpoint.restore(again, checkpoint.save(member))
    oom.apply(again)
    split = [[[example.origin for example in part] for part in _parts(one, prepared.train)] for one in (again, member)]
    assert split[0] == split[1]
    assert len(split[0]) > 1


def test_tokens_of_a_pass_have_no_effect_where_each_row_has_its_own(config_of):
    with pytest.raises(ConfigError, match=r"train.micro_batch_tokens=100: no effect with train.packing=false"):
        config_of("train.micro_batch_tokens=100", "train.packing=false")


# -- waiting for the device -----------------------------------------------------------------------------------------------


class _Reads(TorchDispatchMode):
    """Numbers that are read one by one from where they were computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_micro_batch_waits_for_nothing(config_of):
    config = config_of(
        "train.batch_size=8", "train.micro_batch_size=2", "train.max_steps=1", "speed.block_attention=false"
    )
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    with learning([member]):
        one = share(member, _parts(member, prepared.train), 0, prepared.accelerator, alone=True)
        with _Reads() as reads:
            for place in range(4):
                learn([one], place, prepared.accelerator)
    assert reads.count == 0
    found = [value.item() for value in one.losses]
    assert one.read(torch.tensor(3.0)) == 3.0
    assert one.loss == sum(found)


def test_saved_tensors_can_live_elsewhere(config_of):
    """The same gradients with what is saved moved out and back, as on a GPU."""
    import numpy as np

    from lora_lab.adapters.attach import trainable
    from lora_lab.data.dataset import first_examples

    config = config_of()
    prepared, model = prepared_and_model(config)
    batch = prepared.task.collate(first_examples(prepared.train, 3), np.random.default_rng(0))
    found = []
    for hooks in (torch.autograd.graph.save_on_cpu(), torch.enable_grad()):
        with hooks:
            loss = prepared.task.loss(model, batch).loss
        loss.backward()
        found.append({name: p.grad.clone() for name, p in trainable(model).items()})
        model.zero_grad()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


@pytest.mark.parametrize("more", [[], ["train.micro_batch_tokens=200"]])
def test_items_of_several_short_texts_end_the_ladder(config_of, tmp_path, more):
    """Texts that are put together stay together, so there is an end although a pass of one item has several rows."""
    rows = write_jsonl(tmp_path / "texts.jsonl", [{"text": row["completion"]} for row in make_rows(24)])
    given = (
        f"data.train={rows}",
        "task=completion",
        "data.max_tokens=64",
        "train.batch_size=4",
        "data.duplicates=keep",
    )
    config = config_of(*given, *more)
    prepared, model = prepared_and_model(config)
    member, said = member_of(prepared, model, config), []
    while (line := step_down(member, prepared)) is not None:
        said.append(line.split(" ")[0])
    assert said[-1] == "activations"
    assert len(said) < 12
    assert len(_parts(member, prepared.train)) == 4
