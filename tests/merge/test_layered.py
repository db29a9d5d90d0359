"""A merge that has one layer in memory at a time makes and says what one does that has the whole base."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_lab.adapters import files
from lora_lab.adapters.attach import trainable
from lora_lab.base.layers import layers_of
from lora_lab.base.weights import Weights
from lora_lab.config import compose
from lora_lab.merge import bases, merge
from lora_lab.run import prepared, run_dir
from lora_lab.run.prepared import Trained
from lora_lab.runtime import storage
from lora_lab.verify import layers, reload
from tests.tasks.test_tasks import CASES, models, start

__all__ = ["models", "start"]  # fixtures

CPU = torch.device("cpu")
KINDS = ("causal_lm",)  # of a decoder; the others are in the long tier
LOOSE = ("merge.max_loss_increase=9", "merge.max_kl=9", "merge.min_top1_agreement=0.01", "merge.max_logit_diff=9")


WITHOUT_RANK = {"adapter=ia3", "adapter=oft"}


@pytest.fixture
def in_layers(monkeypatch):
    """However small a base is."""

    def begin() -> None:
        monkeypatch.setattr(layers, "SMALL", 0)
        monkeypatch.setattr(bases, "_WORTH_A_FILE", 0)
        monkeypatch.setattr(reload, "_layers", lambda: layers)

    return begin


def as_if_trained(overrides: list[str]) -> Trained:
    """A run with an adapter of random numbers."""
    setup = prepared.prepare(compose.compose(overrides))
    with run_dir.created(setup.config) as run, setup.loaded() as live, storage.new_folder(run.adapter) as folder:
        run_dir.write_manifest(run, setup.config, setup.base, setup.data_hashes())
        torch.manual_seed(1)
        for name, parameter in trainable(live.model).items():
            if ".modules_to_save." not in name:
                nn.init.normal_(parameter, mean=float("magnitude" in name), std=0.05)
        files.write(folder, live.model, "default", setup.config, setup.base, setup.task.learned)
    return Trained(run, setup)


def merged(trained: Trained) -> tuple[dict, dict[str, torch.Tensor]]:
    report = merge.merge(trained, merge.reference(trained))
    weights = Weights(trained.run.merged)
    return report, {name: weights[name].clone() for name in weights}


def check_same(trained: Trained, in_layers, written: str) -> None:
    """Both ways, one after the other: the same figures and the same weights."""
    whole, weights = merged(trained)
    in_layers()
    layered, own = merged(trained)
    assert whole["compared"] == "as a whole"
    assert re.fullmatch(r"[1-9]\d* layers, one after another", layered["compared"])
    assert layered["written"] == whole["written"]
    assert layered["written"].startswith(written)
    assert own.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-6)
    for gap in ("merged_vs_base_and_adapter", "merged_vs_model_as_trained"):
        assert layered[gap] == pytest.approx(whole[gap], abs=1e-5), gap
    assert layered["bases"].keys() == whole["bases"].keys()
    for name, gap in whole["bases"].items():
        assert layered["bases"][name] == pytest.approx(gap, abs=1e-5), name
    assert {key: layered[key] for key in ("base", "refused", "answers", "positions")} == {
        key: whole[key] for key in ("base", "refused", "answers", "positions")
    }
    assert not [path for path in trained.run.path.iterdir() if storage.is_temporary(path.name)]


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize(
    "case", [case if case in KINDS else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_a_task_merges_the_same_layer_by_layer(case, start, in_layers):
    trained = as_if_trained(start(case, "quant=nf4", "export.dtype=float32", *LOOSE, rows=8))
    check_same(trained, in_layers, "")


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize(
    ("given", "written"),
    [
        pytest.param(given, written, marks=[pytest.mark.long] * later, id=" ".join(given))
        for given, written, later in [
            (["quant=nf4", "merge.base=corrected", "merge.correction_rank=8"], "tensor by tensor: merge.base=corrected", True),
            (["quant=int8", "merge.base=dequantized"], "tensor by tensor: merge.base=dequantized", True),
            (["export.dtype=bfloat16"], "file by file", True),  # of files in float32
            (["adapter=dora"], "file by file", True),
            (["adapter=ia3"], "from memory", False),
            (["adapter=oft", "adapter.oft_block_size=8"], "from memory", True),
            (["adapter=vera", "adapter.r=8"], "", True),
        ]
    ],
)  # fmt: skip
def test_a_base_or_a_method_merges_the_same_layer_by_layer(given, written, start, in_layers):
    dtype = [] if any("dtype" in word for word in given) else ["export.dtype=float32"]
    words = [word for word in start("causal_lm", rows=8) if word != "adapter.r=4" or not {*given} & WITHOUT_RANK]
    trained = as_if_trained([*words, *dtype, *given, *LOOSE])
    check_same(trained, in_layers, written)


class Stack(nn.Module):
    """Layers, and parts around them."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(4, 4) for _ in range(count))})

    def forward(self, x: torch.Tensor, times: int = 1) -> torch.Tensor:
        for _ in range(times):
            for layer in self.inner["layers"]:
                x = layer(x).tanh()
        return self.last(x)


def test_calls_go_through_each_layer_together():
    model, order = Stack(), []
    assert layers_of(model) == list(model.inner["layers"])
    for place, layer in enumerate(layers_of(model)):
        layer.register_forward_hook(lambda *_, place=place: order.append(place))
    rows = torch.randn(3, 4)
    calls = [lambda row=row, times=times: model(row, times) for row, times in zip(rows, (1, 2, 1), strict=True)]
    found = layers.in_step(model, calls, CPU)
    assert order == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 1, 2]
    assert not any(one.requires_grad for one in found)
    for one, call in zip(found, calls, strict=True):
        assert torch.equal(one, call())


def test_each_layer_is_on_the_device_while_it_is_used():
    """Parts outside of layers all the time; afterwards all are where they were."""
    model, seen, device = Stack(), [], torch.device("meta")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

    def note(*_) -> None:
        seen.append("".join(layer.weight.device.type[0] for layer in (*layers_of(model), model.last)))

    for layer in layers_of(model):
        layer.register_forward_hook(note)
    calls = [lambda: model(torch.zeros(1, 4, device=device))] * 2
    found = layers.run(model, calls, device)
    assert [one.device for one in found] == [device] * 2
    assert seen == ["mccm"] * 2 + ["cmcm"] * 2 + ["ccmm"] * 2
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == places[name]
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_one_call_ends_them_all(error):
    model, threads = Stack(), threading.active_count()

    def fails() -> torch.Tensor:
        model(torch.zeros(4))
        raise error("told")

    with pytest.raises(error, match="told"):
        layers.in_step(model, [lambda: model(torch.zeros(4), 5), fails, lambda: model(torch.zeros(4), 5)], CPU)
    assert threading.active_count() == threads
    assert not any(layer._forward_pre_hooks for layer in layers_of(model))


def test_of_a_base_in_files_one_layer_is_in_memory(tmp_path, monkeypatch):
    """As the kernel counts the pages; of a file behind a link, as the hub's cache has them."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    blob = (tmp_path / "model.safetensors").rename(tmp_path / "blob_of_weights")
    (tmp_path / "model.safetensors").symlink_to(blob)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    one = layers.size(layers_of(model)[0])
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = [model(ids).logits, model(ids[:, :3]).logits]
    assert mapped_bytes() > 5.9 * one
    layers._Mapped().forget(model.parameters())
    seen = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda *_: seen.append(mapped_bytes()))
    calls = [lambda: model(ids).logits, lambda: model(ids[:, :3]).logits]
    found = layers.in_step(model, calls, CPU)
    assert len(seen) == 12
    assert 0.9 * one < max(seen) < 1.5 * one  # the kernel reads a little ahead
    assert all(map(torch.equal, found, expected))
    monkeypatch.setattr(layers, "SLICE", 2**13)  # of the output layer, 16 of 64 rows
    for sliced, own in zip(layers.in_step(model, calls, CPU), expected, strict=True):
        torch.testing.assert_close(sliced, own, rtol=0, atol=2e-2)  # bfloat16's spacing at the largest is 1.6e-2
    assert "forward" not in vars(model.lm_head)


def mapped_bytes() -> int:
    """Resident bytes of the file."""
    found, own = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            own = "blob_of_weights" in line
        elif own and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("beginning", [pytest.param(one, marks=pytest.mark.long) for one in ("loftq", "pissa")])
def test_what_begins_with_the_base_merges_into_both_bases(beginning, config_of, eval_file):
    """LoftQ's factors make up for what quantizing took, and PiSSA's are the base's own: on the published base and on the one that training saw, the merged checkpoint is base + adapter, and on the latter the model as trained."""
    from lora_lab.run import pipeline

    config = config_of(
        f"adapter={beginning}", "adapter.r=8", "quant=nf4", f"data.eval={eval_file}", "train.max_steps=4", "export.dtype=float32", *LOOSE
    )  # fmt: skip
    folder = pipeline.train(config).path
    for policy in ("full_precision", "dequantized"):
        report = pipeline.merge(str(folder), [f"merge.base={policy}"])
        assert report["base"] == policy
        assert report["refused"] == []
        assert report["merged_vs_base_and_adapter"]["max_logit_diff"] < 2e-4
        assert report["merged_vs_base_and_adapter"]["top1_agreement"] == 1
        same = report["merged_vs_model_as_trained"]["max_logit_diff"] < 1e-3
        assert same is (policy == "dequantized")


def test_what_a_merge_that_died_left_of_its_base_is_removed(tmp_path):
    import os

    with storage.scratch(tmp_path) as folder:
        assert storage.is_temporary(folder.name)
        assert storage.recover(tmp_path) == []
        assert folder.exists()  # its owner lives
        left = folder.rename(tmp_path / folder.name.replace(f".{os.getpid()}-", ".1-"))
    (left / "0.safetensors").write_bytes(b"weights")
    storage.recover(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_base_in_4_bits_is_kept_in_small_files(base, config_of, monkeypatch):
    """So that writing it from a GPU needs little main memory; and it loads again."""
    from lora_lab.base import load, quantized

    monkeypatch.setattr(quantized, "SHARD", "50KB")
    config = config_of("quant=nf4", "quant.skip_modules=[lm_head,o_proj]")  # kept by no other test
    setup = prepared.prepare(config)
    told = (setup.base, setup.kind, config.model.dtype, config.quant)
    folder = quantized.folder_of(*told, "cpu")
    first = load.load_model(*told, CPU, 0)
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(shards.values())) > 2
    again = load.load_model(*told, CPU, 0)
    ids = torch.arange(9)[None]
    assert torch.equal(first(ids).logits, again(ids).logits)
