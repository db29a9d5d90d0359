"""How a step is dealt out and summed up, and who is who; in one process."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re

import numpy as np
import pytest
import torch

from lora_lab.base import shard
from lora_lab.errors import ConfigError, ProcessError, TrainingError
from lora_lab.run import parallel, pipeline, run_dir
from lora_lab.run.prepared import prepare
from lora_lab.runtime import launch, memory, ranks
from lora_lab.tasks.base import Measured, Predictions
from lora_lab.training import learned
from lora_lab.training.batches import pass_seed
from lora_lab.training.cohort import Counts, Member, learn, learning, share


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_piece_of_work_is_dealt_once_and_evenly(processes):
    sizes = [9, 1, 1, 5, 3, 3]
    parts = ranks.dealt(sizes, processes)
    assert len(parts) == processes
    assert sorted(place for part in parts for place in part) == list(range(len(sizes)))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(sizes[place] for place in part) for part in parts]
    assert max(loads) <= max(max(sizes), sum(sizes) / processes + 1)
    assert ranks.dealt([], processes) == [[]] * processes


def test_what_processes_say_is_plain_and_names_no_code():
    counts = Counts(1.5, 2, 3, 4, {"reward": 1.0})
    seen = Predictions([], torch.ones(2, 3), np.arange(3), np.zeros(2, dtype=np.float32))
    told = [
        learned.Told(True, [counts], b"\x01\x00"),
        Measured(0, 1.0, 2.0, seen),
        None,
        ("a", {"k": b"\xff", "empty": b""}),
    ]
    one, two, *others = ranks._read(ranks._written(told))
    assert (one, others) == (told[0], told[2:])
    assert (two.place, two.seen.predicted.tolist()) == (0, [0, 1, 2])
    assert torch.equal(two.seen.logits, seen.logits)

    class Named:
        def __reduce__(self):
            return os.system, ("true",)

    with pytest.raises(pickle.UnpicklingError, match="posix.system"):
        ranks._read(ranks._written(Named()))


def test_a_base_is_kept_whole_by_any_process(config_of, monkeypatch, tmp_path):
    """transformers writes nothing in a process that is not the first of its group."""
    from transformers.distributed import mixin

    monkeypatch.setenv("LORA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mixin, "_is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr(mixin, "_get_torch_distributed_rank", lambda: 1)
    config = config_of("quant=nf4")
    for _ in range(2):
        prepare(config).bases()
        [kept] = [one for one in (tmp_path / "cache/quantized").iterdir() if one.is_dir()]
        assert {"config.json", "model.safetensors"} <= {one.name for one in kept.iterdir()}


def test_one_process_does_all_in_order():
    assert ranks.dealt([1, 5, 2], 1) == [[0, 1, 2]]
    assert (ranks.size(), ranks.rank(), ranks.main()) == (1, 0, True)
    assert ranks.gather("a") == ["a"]
    assert ranks.together(lambda: 3) == [3]
    with pytest.raises(TrainingError, match="no"):
        ranks.agreed(lambda: (_ for _ in ()).throw(TrainingError("no")))


def test_what_is_drawn_in_a_pass_depends_on_the_pass_alone():
    assert pass_seed(17, 0) == 17  # a step with one pass draws what it always drew
    assert len({pass_seed(seed, place) for seed in (17, 18) for place in range(50)}) == 100


def a_member(config) -> Member:
    setup = prepare(config)
    model = setup.loaded().model
    torch.manual_seed(1)
    member = Member("default", config, run_dir.create(config), setup.base, model, setup.train, setup.task)
    for parameter in member.parameters.values():
        parameter.data.normal_(std=0.1)
    return member, setup


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_parts_of_a_step_sum_up_to_the_step(config_of, processes):
    """With dropout, on rows of unlike length; of more processes than micro-batches some have nothing."""
    member, setup = a_member(config_of("train.batch_size=5", "train.micro_batch_size=1", "adapter.lora_dropout=0.2"))
    parameters = list(member.parameters.values())
    parts = [[example for i in part for example in setup.train[int(i)]] for part in member.plan.step(0)]

    def flat(places) -> tuple[torch.Tensor, bytes]:
        member.optimizer.zero_grad()
        with learning([member]):
            one = share(member, parts, 11, setup.accelerator, alone=True)
            for place in places:
                learn([one], place, setup.accelerator)
        return ranks.flat(parameters, [learned._summed(one)]), ranks.present(parameters)

    whole, _ = flat(range(5))
    sizes = [sum(example.num_tokens for example in part) for part in parts]
    each = [flat(places) for places in ranks.dealt(sizes, processes)]
    summed = torch.stack([buffer for buffer, _ in each]).sum(0)
    assert whole.norm() > 0.1
    assert ((summed - whole).norm() / whole.norm()).item() < 2e-6
    ranks.unflatten(summed[1:], parameters, [there for _, there in each])
    assert torch.equal(torch.cat([one.grad.flatten() for one in parameters]), summed[1:])
    averaged = torch.stack([buffer / buffer[0].clamp_min(1) for buffer, _ in each]).mean(
        0
    )  # as means of means go wrong
    assert ((averaged - whole / whole[0]).norm() / (whole / whole[0]).norm()).item() > 1e-2


def test_parameters_that_nobody_learned_have_no_gradient():
    used, unused = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    used.grad = torch.full((2, 3), 2.0)
    buffer = ranks.flat([used, unused], [torch.tensor(5.0)])
    assert buffer.tolist() == [5.0, *[2.0] * 6, *[0.0] * 6]
    ranks.unflatten(buffer[1:] * 2, [used, unused], [b"\x00\x00", ranks.present([used, unused])])
    assert used.grad.tolist() == [[4.0] * 3] * 2
    assert unused.grad is None  # else weight decay would move it


def test_processes_that_put_other_steps_together_make_no_update():
    counts = [learned.Counts(weight, 4, 10, 5, {}) for weight in (5.0, 6.0)]
    told = [learned.Told(True, [one], b"") for one in counts]
    learned._same_step([told[0], told[0]])
    with pytest.raises(ProcessError, match=r"process 1: put another step together than process 0 .*6\.0, 4.*5\.0, 4"):
        learned._same_step(told)


def test_an_attempt_hears_how_it_went():
    for attempt in memory.attempts(lambda lacked: None, together=True):
        with attempt:
            attempt.told = 4
    assert attempt.heard == [4]
    lacked: list[str] = []
    for attempt in memory.attempts(lacked.append, together=True):
        with attempt:
            if not lacked:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    assert lacked == ["CUDA out of memory. Tried"]


# -- who is who ---------------------------------------------------------------------------------------------------------

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-05,9],login", "SLURM_JOB_ID": "7",
}  # fmt: skip


def test_each_launcher_says_who_is_who():
    assert launch.place({}) is None
    assert (
        launch.place({"WORLD_SIZE": "1", "RANK": "0", "SLURM_NTASKS": "4"}) is None
    )  # the script of a job, not a step of it
    assert launch.place(TORCHRUN) == launch.Place(3, 4, 1, "10.0.0.1", 4711, "WORLD_SIZE=4")
    found = launch.place(SRUN)
    assert (found.rank, found.size, found.local, found.address) == (3, 4, 1, "gpu03")
    assert found.port == launch.place({**SRUN, "SLURM_PROCID": "0"}).port
    assert launch.place({**SRUN, "MASTER_ADDR": "head"}).address == "head"


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("a[3-5],b", "a3"), ("n[007,9]-ib,m", "n007-ib"), ("x-1,x-2", "x-1")]
)
def test_the_first_machine_of_a_list(nodes, first):
    assert launch.first_node(nodes) == first


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"RANK": "x"}, "RANK=x: must be a number"),
        ({"RANK": "4"}, "RANK=4 must be below it"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP has no effect"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed has no effect"),
    ],
)
def test_a_launcher_that_says_something_else_is_refused(more, sentence):
    with pytest.raises(ConfigError, match=sentence):
        launch.place({**TORCHRUN, **more})
    with pytest.raises(ConfigError, match="RANK=None"):
        launch.place({name: value for name, value in TORCHRUN.items() if name != "RANK"})


def test_a_process_that_would_have_nothing_to_do_is_refused(config_of, monkeypatch):
    monkeypatch.setattr(ranks, "size", lambda: 3)
    with pytest.raises(
        ConfigError, match=r"micro_batch_size=null: a step of 4 rows has 1 micro-batch, .*micro_batch_size=1;"
    ):
        parallel.enough_passes(config_of())
    with pytest.raises(ConfigError, match=r"batch_size=2: 3 processes share each step"):
        parallel.enough_passes(config_of("train.batch_size=2"))
    parallel.enough_passes(config_of("train.micro_batch_size=1"))
    parallel.enough_passes(config_of("train.packing=false"))


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        (["hardware.processes=1"], "not with hardware.processes=1"),
        (["quant=int8"], "not with quant=int8"),
        (["quant=nf4", "speed.dequantize=once"], "not with speed.dequantize=once"),
        (["speed.prefix_cache=true"], "not with speed.prefix_cache=true"),
        (["sweep.execution=batched"], "not with sweep.execution=batched"),
        (
            ["adapter.init_lora_weights=pissa"],
            "not with adapter=lora: init_lora_weights=pissa is made of whole weights",
        ),
    ],
)
def test_what_a_sharded_base_cannot_do_is_refused(config_of, told, sentence):
    with pytest.raises(ConfigError, match=rf"hardware\.shard=true: {re.escape(sentence)}"):
        config_of("hardware.shard=true", *told)


def test_one_process_has_nothing_to_shard(config_of):
    with pytest.raises(ConfigError, match=r"hardware\.shard=true: one process holds the whole base\. Start several"):
        pipeline.train(config_of("hardware.shard=true"))


def test_processes_that_keep_step_make_as_many_passes(monkeypatch):
    sizes, group = [5, 1, 1, 1, 3], ranks._Group(0, 3, 0, None, 1.0)
    monkeypatch.setattr(ranks, "_group", group)
    parts = ranks.dealt(sizes, 3)
    for rank, part in enumerate(parts):
        monkeypatch.setattr(ranks, "_number", rank)
        group.in_step = False
        assert ranks.own_and_others(sizes) == (part, [])
        group.in_step = True
        own, others = ranks.own_and_others(sizes)
        assert own == part
        assert len(own) + len(others) == max(map(len, parts))
        assert not set(own) & set(others)


def test_layers_that_cannot_be_shared_out_are_refused(monkeypatch):
    layer = torch.nn.Linear(2, 2)

    def sharded(model: torch.nn.Module) -> None:
        shard.shard(model, list(model.parameters()), lambda: model[0][0](torch.ones(1, 2)), torch.device("cpu"))

    for model, sentence in (
        (torch.nn.Sequential(layer), "no stack of layers"),
        (
            torch.nn.Sequential(torch.nn.ModuleList([layer, torch.nn.Sequential(layer)])),
            "layers of this base share weights",
        ),
        (torch.nn.Sequential(torch.nn.ModuleList([layer, torch.nn.Linear(2, 2)])), "a Linear of this base has no part"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            sharded(model)


def test_processes_from_python_are_refused(config_of):
    import lora_lab

    config = config_of()
    config = dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, processes=2))
    with pytest.raises(ConfigError, match="hardware.processes=2: a Python program is one process"):
        lora_lab.train(config)


def test_every_acceleration_is_known_to_leave_layers_weights_alone_or_not():
    """A new one is to be told of, so that a sharded base does without it where it must."""
    from lora_lab.fast import apply

    free = set(apply._STEPS) - set(apply.OF_LAYERS_WEIGHTS)
    assert free == {"varlen_attention", "short_rows", "unpadded", "last_layer_rows"}
