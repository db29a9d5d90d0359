"""Steps that do not fit into memory: made smaller until they do, with the same result."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from lora_lab.runtime.memory import is_out_of_memory
from lora_lab.training import oom
from tests.conftest import make_rows, write_jsonl
from tests.training.test_invariants import member_of, prepared_and_model, relative_gap

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


def test_the_steps_down_and_what_they_leave_the_same(config_of):
    config = config_of("train.batch_size=8")
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    said = []
    while (line := oom.step_down(member)) is not None:
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
    assert oom.step_down(member).startswith("activations")
    assert all(layer.gradient_checkpointing for layer in layers)
    assert oom.step_down(member) is None


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
        oom.step_down(member)
    saved = checkpoint.save(member)
    again = member_of(prepared, model, config, member.run)
    checkpoint.restore(again, saved)
    oom.apply(again)
    assert again.plan.micro_batch_size == 1
    assert again.state.checkpointing


def test_what_is_and_is_not_a_lack_of_memory():
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not is_out_of_memory(other.value)


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
