"""Input embeddings in main memory: the same numbers, found on whichever device the tokens are."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_lab import cli
from lora_lab.base import embeddings, load
from lora_lab.config import compose
from lora_lab.errors import ConfigError
from lora_lab.run import pipeline, prepared
from tests.conftest import make_base
from tests.training.test_invariants import train_once

OFFLOADED = ("hardware=cuda", "hardware.offload_embeddings=true")


@pytest.fixture
def _cpu_as_card(monkeypatch):
    """Runs that are told to use a card are made on the CPU."""
    monkeypatch.setattr(load, "start_device", lambda *told, **more: torch.device("cpu"))


def _llama(folder, **settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(make_base(folder, **settings)).requires_grad_(False)


def test_rows_are_found_in_main_memory_and_given_on_the_device(tmp_path):
    """On tensors without content, of which some are on a card: torch refuses to mix devices there too."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        table = mode.from_tensor(torch.empty(100, 64))
        module = embeddings.HostEmbedding.__new__(embeddings.HostEmbedding)
        torch.nn.Module.__init__(module)
        module.held = embeddings._Held(table)
        rows = module(torch.zeros(1, 7, dtype=torch.int64, device="cuda"))
        assert (rows.device.type, tuple(rows.shape)) == ("cuda", (1, 7, 64))
        with pytest.raises(Exception, match="device"):
            torch.nn.functional.embedding(torch.zeros(1, 7, dtype=torch.int64, device="cuda"), table)


def test_no_module_moves_them_and_no_copy_copies_them(tmp_path):
    model = _llama(tmp_path)
    weight = model.get_input_embeddings().weight
    ids = torch.arange(9)[None]
    expected = model(input_ids=ids).logits
    embeddings.offload(model)
    table = model.get_input_embeddings()
    assert torch.equal(table.weight, weight)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert "model.embed_tokens.weight" not in dict(model.named_parameters())
    assert next(model.parameters()).dtype == weight.dtype
    assert copy.deepcopy(model).get_input_embeddings().weight is table.weight
    model.to("meta")
    assert (model.device.type, table.weight.device.type) == ("meta", "cpu")


def _tables(model) -> list[torch.nn.Module]:
    found = [module for module in model.modules() if isinstance(module, embeddings.HostEmbedding)]
    assert len(found) >= 2
    return found


def test_all_tables_of_an_encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 50}
    model = T5ForConditionalGeneration(T5Config(**shape, tie_word_embeddings=False)).eval()
    told = {"input_ids": torch.arange(5)[None], "decoder_input_ids": torch.arange(4)[None]}
    expected = model(**told).logits
    embeddings.offload(model)
    assert {sum(one.numel() for one in table.parameters()) for table in _tables(model)} == {0}
    assert torch.equal(model(**told).logits, expected)


@pytest.mark.usefixtures("_cpu_as_card")
@pytest.mark.parametrize(
    "told",
    [
        ("train.neftune_alpha=5", "train.gradient_checkpointing=true"),
        pytest.param(("quant=nf4", "model.dtype=bfloat16"), marks=pytest.mark.long),
        pytest.param(("train.fgm_epsilon=0.5", "adapter=dora"), marks=pytest.mark.long),
    ],
)
def test_a_run_learns_the_same(config_of, tmp_path, told):
    plain, losses = train_once(config_of("train.max_steps=3", *told), tmp_path / "a")
    found, same = train_once(config_of("train.max_steps=3", *told, *OFFLOADED), tmp_path / "b")
    assert same == losses
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.long
@pytest.mark.usefixtures("_cpu_as_card", "reload_here")
def test_it_is_merged_resumed_and_shared_by_members(overrides, config_of, tmp_path, eval_file, capsys):
    told = [*overrides, *OFFLOADED, f"data.eval={eval_file}", "train.max_steps=3", "export.dtype=float32"]
    assert cli.main(["train", *told]) == 0
    assert cli.main(["merge", f"run={tmp_path}/run"]) == 0, capsys.readouterr().err
    assert cli.main(["evaluate", f"run={tmp_path}/run", "hardware=cpu"]) == 0
    points = [text for text in told if not text.startswith("run_dir=")]
    assert cli.main(["train", "-m", *points, "adapter.r=4,8", f"hydra.sweep.dir={tmp_path}/sweep"]) == 0
    alone, member = (
        [
            line["loss"]
            for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for folder in (tmp_path / "run", tmp_path / "sweep/0")
    )
    assert member == pytest.approx(alone, rel=1e-5)


@pytest.mark.usefixtures("_cpu_as_card")
@pytest.mark.parametrize(
    ("told", "tied", "refused"),
    [
        ((), True, r"the output layer of this base \(lm_head\) has the same weight"),
        (
            ("adapter=prompt_tuning",),
            False,
            r"this adapter trains or reads the input embeddings \(model\.embed_tokens\)",
        ),
        (("adapter=trainable_tokens", "adapter.token_indices=[3]"), False, r"this adapter trains or reads"),
        (("adapter.trainable_token_indices=[3]",), False, r"this adapter trains or reads"),
        (("adapter.modules_to_save=[embed_tokens]",), False, r"this adapter trains or reads"),
    ],
)
def test_embeddings_that_are_needed_on_the_card_are_refused(overrides, tmp_path, told, tied, refused):
    base = make_base(tmp_path / "base", tied=tied)
    with pytest.raises(ConfigError, match=rf"hardware\.offload_embeddings=true: {refused}"):
        shared = [text for text in overrides if text != "adapter.r=4"]
        prepared.prepare(compose.compose([*shared, f"model.path={base}", *OFFLOADED, *told]))


def test_embeddings_of_a_kind_of_their_own_are_refused(config_of):
    class Scaled(torch.nn.Embedding):
        pass

    prepared_model = prepared.find_base(config_of()).model
    prepared_model.get_input_embeddings().__class__ = Scaled
    with pytest.raises(ConfigError, match=r"are a Scaled, which does more"):
        embeddings.check(prepared_model, set(), None)


def test_they_are_on_the_cpu_anyway(config_of):
    with pytest.raises(ConfigError, match=r"hardware\.offload_embeddings=true: no effect with hardware\.device=cpu"):
        config_of("hardware.offload_embeddings=true")
    with pytest.raises(ConfigError, match=r"hardware\.offload_embeddings=true: no effect on the CPU"):
        pipeline.train(config_of("hardware=auto", "hardware.offload_embeddings=true"))
