"""What the machine's cards are found to be, from what torch and the system answer about cards that are not here."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from lora_lab import cli
from lora_lab.base import load
from lora_lab.config.train import HardwareConfig
from lora_lab.errors import ConfigError
from lora_lab.runtime import cards, environment, memory
from lora_lab.verify import layers


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", *environment._ALLOCATOR):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cards, "_DRIVER", ())
    monkeypatch.setattr(cards, "_ASKED", "nvidia-smi-that-is-not-here")
    monkeypatch.setattr(memory, "_caps", {})


@pytest.fixture
def a_driver(monkeypatch, tmp_path):
    """A device file of the driver, and a torch that sees no card."""
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(cards, "_DRIVER", (tmp_path / "nvidiactl",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "nvidiactl"


def _pretend(monkeypatch, count=1, capability=(8, 6), built=("sm_80", "sm_90"), free=11.0, total=12.0):
    """torch's answers about cards; what it is told about their memory."""
    told = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(built))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int(free * 2**30), int(total * 2**30)))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, index: told.update({index: share * total})
    )
    return told


def _start(hardware, dtype="bfloat16", trains=True):
    return load.start_device(hardware, dtype, trains)


# -- a card that torch cannot use -------------------------------------------------------------------------------------------


def test_auto_refuses_a_card_that_torch_cannot_use(a_driver, overrides, capsys):
    assert cli.main(["train", *overrides, "hardware=auto"]) == 2
    said = capsys.readouterr().err
    assert f"hardware.device=auto: {a_driver} is there, but no card can be used (torch {torch.__version__}" in said
    assert "hardware=cpu" in said


def test_insisting_on_the_cpu_is_heard(a_driver):
    assert load.torch_device(HardwareConfig(device="cpu")).type == "cpu"


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_cards_that_are_hidden_on_purpose_are_none(a_driver, monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert load.torch_device(HardwareConfig()).type == "cpu"


def test_auto_is_the_cpu_where_there_is_no_card():
    assert cards.sign() is None
    assert load.torch_device(HardwareConfig()).type == "cpu"


@pytest.mark.parametrize(
    ("answer", "sign"),
    [
        ("echo 'GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-1)'", "lists NVIDIA GeForce RTX 4090"),
        ("echo 'No devices were found'", None),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9", None),
    ],
)
def test_nvidia_smi_is_asked_for_cards(tmp_path, monkeypatch, answer, sign):
    program = tmp_path / "smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setattr(cards, "_ASKED", str(program))
    assert cards.sign() == (sign and f"{program} {sign}")


def test_a_card_of_cuda_that_is_asked_for_and_not_there():
    with pytest.raises(ConfigError, match=r"hardware\.device=cuda: no CUDA device can be used \(torch .*hardware=cpu"):
        load.torch_device(HardwareConfig(device="cuda"))


def test_a_number_beyond_the_cards(monkeypatch):
    _pretend(monkeypatch, count=2)
    with pytest.raises(ConfigError, match=r"cuda:2: torch .* sees 2 CUDA devices.*hardware\.device=cuda:1"):
        load.torch_device(HardwareConfig(device="cuda:2"))


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),  # later in one generation
        ((8, 9), ["sm_75", "sm_80", "sm_86"], True),
        ((12, 0), ["sm_90", "sm_120"], True),
        ((12, 0), ["sm_80", "sm_90"], False),  # a generation that came later
        ((12, 0), ["sm_80", "compute_90"], True),  # PTX is compiled for it
        ((7, 0), ["sm_75", "sm_80"], False),  # a generation that was dropped
        ((6, 1), ["sm_75", "compute_90"], False),
        ((8, 0), ["sm_86"], False),  # earlier in one generation
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a"], False),  # for one card alone
        ((10, 3), ["sm_100f"], True),  # for a family
        ((9, 4), ["gfx942"], True),  # not NVIDIA's
        ((8, 0), [], True),
    ],
)
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_card_that_torch_was_not_built_for(monkeypatch, device, capability, built, runs):
    _pretend(monkeypatch, capability=capability, built=built)
    if runs:
        assert load.torch_device(HardwareConfig(device=device)) == torch.device("cuda:0")
        return
    major, minor = capability
    with pytest.raises(
        ConfigError, match=rf"{device}: Card has .*{major}\.{minor}, .*sm_{major}{minor}, .*hardware=cpu"
    ):
        load.torch_device(HardwareConfig(device=device))


# -- which cards, how exactly, how much of one ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "count", "seen"),
    [
        (None, 2, ["0", "1"]),
        ("3, 1", 2, ["3", "1"]),
        ("GPU-8f2e,MIG-77aa", 2, ["GPU-8f2e", "MIG-77aa"]),
        ("0,9,1", 1, ["0"]),  # CUDA stops at a card that is not there
        (None, 0, []),
    ],
)
def test_visible_cards(monkeypatch, told, count, seen):
    if told is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert cards.visible() == seen


@pytest.fixture
def _as_before():
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize("deterministic", [True, False])
def test_kernels_repeat_exactly_on_a_card(monkeypatch, deterministic):
    _pretend(monkeypatch)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is as before afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    _start(HardwareConfig(device="cuda", deterministic=deterministic))
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)


@pytest.mark.usefixtures("_as_before")
@pytest.mark.parametrize(("told", "refused"), [(":16:8", False), (":4096:8", False), (":8192:4", True)])
def test_a_workspace_that_the_user_chose(monkeypatch, told, refused):
    _pretend(monkeypatch)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", told)
    if refused:
        with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:8192:4: .*hardware\.deterministic=false"):
            _start(HardwareConfig(device="cuda"))
        return
    _start(HardwareConfig(device="cuda"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == told


def test_nothing_is_set_on_the_cpu():
    _start(HardwareConfig(device="cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.parametrize(
    ("release", "asked", "taken"),
    [
        ("6.8.0-generic", None, None),
        ("6.8.0-generic", 8, 8.0),
        ("5.15.167.4-microsoft-standard-WSL2", None, 10.75),
        ("4.4.0-19041-Microsoft", None, 10.75),
        ("5.15.167.4-microsoft-standard-WSL2", 6, 6.0),
    ],
)
def test_memory_of_a_card_that_is_taken(monkeypatch, capsys, release, asked, taken):
    told = _pretend(monkeypatch)
    monkeypatch.setattr("platform.release", lambda: release)
    _start(HardwareConfig(device="cuda", deterministic=False, memory_gib=asked))
    assert told == ({} if taken is None else {0: pytest.approx(taken)})
    assert ("of the card" in capsys.readouterr().out) is (taken is not None)


@pytest.mark.parametrize(
    ("asked", "held", "left"), [(None, 0, 11.0), (8, 0, 8.0), (8, 6, 2.0), (8, 9, 0.0), (12, 0, 11.0)]
)
def test_what_is_free_of_a_capped_card_is_what_the_cap_leaves(monkeypatch, asked, held, left):
    """Else a run keeps weights, and generates as many rows at once, as the whole card has room for."""
    _pretend(monkeypatch)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held * 2**30)
    _start(HardwareConfig(device="cuda", deterministic=False, memory_gib=asked))
    card = torch.device("cuda", 0)
    assert memory.free_bytes(card) / 2**30 == pytest.approx(left)
    assert layers.free_on(card) == memory.free_bytes(card)


def test_peaks_are_those_of_the_runs_own_card(monkeypatch):
    """Of a run on cuda:1 while another card is the current one."""
    allocated, reserved, forgotten = {0: 9.0, 1: 2.0}, {0: 10.0, 1: 2.5}, []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda card=None: allocated[card.index] * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda card=None: reserved[card.index] * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda card=None: forgotten.append(card.index))
    card = torch.device("cuda", 1)
    memory.forget_peaks(card)
    assert (memory.peak_gib(card), memory.peak_reserved_gib(card), forgotten) == (2.0, 2.5, [1])
    assert memory.peak_reserved_gib(torch.device("cpu")) is None


def test_more_memory_than_the_card_has(monkeypatch):
    _pretend(monkeypatch)
    with pytest.raises(ConfigError, match=r"hardware\.memory_gib=24: Card has 12\.0 GiB"):
        _start(HardwareConfig(device="cuda", deterministic=False, memory_gib=24))


def test_memory_of_a_card_means_nothing_on_the_cpu():
    with pytest.raises(ConfigError, match=r"hardware\.memory_gib=8: no effect on the CPU"):
        _start(HardwareConfig(memory_gib=8))


@pytest.mark.parametrize("told", ["hardware.deterministic=false", "hardware.memory_gib=8"])
def test_settings_of_a_card_are_refused_on_the_cpu(config_of, told):
    with pytest.raises(ConfigError, match=rf"{told}(\.0)?: no effect with hardware\.device=cpu"):
        config_of(told)


@pytest.mark.parametrize(
    ("capability", "dtype", "trains", "refused"),
    [
        ((7, 5), "bfloat16", True, True),
        ((7, 0), "bfloat16", True, True),
        ((7, 5), "bfloat16", False, False),  # a trained run is what it is
        ((7, 5), "float16", True, False),
        ((7, 5), "float32", True, False),
        ((8, 0), "bfloat16", True, False),
        ((12, 0), "bfloat16", True, False),
    ],
)
def test_bfloat16_is_not_trained_on_a_card_that_emulates_it(monkeypatch, capsys, capability, dtype, trains, refused):
    _pretend(monkeypatch, capability=capability, built=())
    hardware = HardwareConfig(device="cuda", deterministic=False)
    if refused:
        with pytest.raises(
            ConfigError, match=r"model\.dtype=bfloat16: Card \(.* 7\.\d\) .*model\.dtype=float16, or float32"
        ):
            _start(hardware, dtype, trains)
        return
    _start(hardware, dtype, trains)
    assert ("no units for bfloat16" in capsys.readouterr().out) is (not trains)


# -- what torch is told before it starts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [None, *environment._ALLOCATOR])
def test_segments_expand_unless_the_user_said_otherwise(monkeypatch, told, capsys):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is as before afterwards
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    if told is not None:
        monkeypatch.setenv(told, "max_split_size_mb:128")
    assert cli.main(["methods"]) == 0
    set_ = {name: os.environ[name] for name in environment._ALLOCATOR if name in os.environ}
    assert set_ == (
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if told is None else {told: "max_split_size_mb:128"}
    )


def test_few_kernels_are_kept_unless_the_user_said_otherwise(monkeypatch, capsys):
    one, other = environment._KERNELS
    for name in environment._KERNELS:
        monkeypatch.setenv(name, "7")
    monkeypatch.delenv(other)
    assert cli.main(["methods"]) == 0
    assert (os.environ[one], os.environ[other]) == ("7", environment._KEPT_KERNELS)


_LENGTHS = """
import ctypes, os, re, sys
from lora_lab.runtime import environment
sys.argv[1:] and environment.before_torch()
import torch
from torch.nn.functional import linear

def held() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    return int(re.search(r"Anonymous:\\s+(\\d+)", open("/proc/self/smaps_rollup").read())[1])

rows, weight = (torch.ones(size, 576, dtype=torch.bfloat16) for size in (400, 1536))
for length in range(4, 400):
    linear(rows[:length], weight)
    if length == 180:
        before = held()
print(held() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is free cannot be told from what is kept")
def test_a_process_does_not_grow_with_each_length_of_rows():
    """KiB that 220 further lengths take, with what torch is told and without."""
    others = {name: value for name, value in os.environ.items() if name not in environment._KERNELS}
    told, untold = (
        int(subprocess.run([sys.executable, "-c", _LENGTHS, *more], env=others, capture_output=True, check=True).stdout)
        for more in (["told"], [])
    )
    if untold < 50_000:
        pytest.skip("this CPU keeps no large kernels for bfloat16")
    assert told < untold / 10
