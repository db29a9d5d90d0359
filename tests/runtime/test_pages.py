"""Memory that is given back: pages of mapped files, and a base's own after it was quantized."""

from __future__ import annotations

import mmap
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.base import load
from lora_lab.base.load import ModelKind
from lora_lab.config.model import ModelConfig, QuantConfig
from lora_lab.runtime import pages
from lora_lab.verify import layers
from tests.conftest import make_base

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")

CPU = torch.device("cpu")


def resident(files) -> int:
    """Bytes of mapped files that are in memory."""
    names, found, inside = {str(file.resolve()) for file in files}, 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if (begins := pages._RANGE.match(line)) is not None:
                inside = begins[3] in names
            elif inside and line.startswith("Rss:"):
                found += int(line.split()[1]) * 1024
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """20 MB in float32, whose largest weight has 1.5."""
    return make_base(
        tmp_path_factory.mktemp("models") / "wide", hidden_size=384, intermediate_size=1024, num_hidden_layers=3
    )


def loaded(base, **quant):
    return load.load_model(load.find(ModelConfig(path=str(base))), ModelKind(), "float32", QuantConfig(**quant), CPU, 0)


def test_pages_are_given_back_and_what_was_written_stays(tmp_path):
    file = tmp_path / "numbers"
    file.write_bytes(b"a" * 2**20)
    with open(file, "rb") as opened:
        read = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        written = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    assert read[:] == written[:]
    assert resident([file]) >= 2 * 2**20
    written[5:6] = b"b"
    pages.give_back([file])
    assert resident([file]) == 2**20
    assert (written[4:7], read[4:7]) == (b"aba", b"aaa")


@pytest.mark.long
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_file_is_not_in_memory_as_a_whole_while_it_is_quantized(base, monkeypatch, method):
    """Its norms are used as they lie in the file, so the file stays mapped."""
    monkeypatch.setattr(pages, "READ", 2 * 2**20)
    monkeypatch.setattr(pages, "_LARGE", 2**16)
    seen, give_back, files = [], pages.give_back, [base / "model.safetensors"]

    def watched(given):
        seen.append(resident(files))
        give_back(given)

    monkeypatch.setattr(pages, "give_back", watched)
    model = loaded(base, method=method, cache=False)
    assert layers._Mapped().bytes_of(model.model.norm.weight)
    assert files[0].stat().st_size > 19 * 2**20
    assert len(seen) > 3
    assert max(seen) <= 6 * 2**20
    assert resident(files) == 0


def test_a_lack_of_memory_is_told_as_one(base):
    """transformers notes what fails while it converts a weight, goes on, and says at the end that something was wrong."""
    lack = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    class Full(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.bitsandbytes.quantize_4bit.default:
                raise lack
            return func(*args, **(kwargs or {}))

    with Full(), pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        loaded(base, method="nf4", cache=False)


def test_what_was_quantized_is_mapped_from_where_it_is_kept(base):
    """At once, not from the second load on, and with the same numbers."""
    model, plain = loaded(base, method="nf4"), loaded(base, method="nf4", cache=False)
    mapped = layers._Mapped()
    weights = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        assert mapped.bytes_of(weight) == weight.nbytes, name
        assert torch.equal(weight, weights[name]), name
    assert not any(mapped.bytes_of(weight) for name, weight in weights.items() if "proj" in name)
