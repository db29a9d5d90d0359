"""Whole runs on a card that does not exist: no tensor on the wrong device, no needless wait of the host, no part that takes more than a
training step."""

from __future__ import annotations

import random

import pytest
import torch

from lora_lab.config import compose
from lora_lab.plan import card
from lora_lab.plan.card import MixedDevices
from lora_lab.run.setup import Live
from lora_lab.tasks.causal_lm.task import CausalLM
from tests.conftest import write_jsonl
from tests.no_card.dry import assert_few_waits, assert_peaks_in_order, loaded
from tests.tasks.test_tasks import CASES, models  # noqa: F401 - a fixture

# Copies for each micro-batch that are more than four: of tensors beside ids and labels, and what transformers' code makes of numbers.
_COPIES = {
    **dict.fromkeys(("masked_lm", "masked_lm-words", "token_classification", "question_answering", "distillation"), 6),
    **dict.fromkeys(("regression", "reward", "classification-weights"), 5),
    **dict.fromkeys(("preference-dpo", "preference-ipo", "preference-simpo", "preference-orpo"), 5),
    "preference-kto": 11,
    **{
        f"{task}-decoder": 13 for task in ("classification", "regression", "token_classification", "reward", "reranker")
    },
    "embedding-decoder": 25,  # texts of like length are a pass, of which there are two
    "seq2seq": 14,
}
_OPTIONS = {
    "float32": ["model.dtype=float32", "quant=none"],
    "bfloat16": ["model.dtype=bfloat16", "quant=none"],
    "nf4": ["model.dtype=bfloat16", "quant=nf4"],
    "int8": ["model.dtype=bfloat16", "quant=int8"],
    "checkpointing": ["quant=nf4", "train.gradient_checkpointing=true"],
    "offloading": ["quant=nf4", "train.gradient_checkpointing=true", "train.offload_activations=true"],
    "dropout": ["quant=nf4", "adapter.lora_dropout=0.1"],
    "plain": ["quant=nf4", "speed=plain"],
    "always": ["quant=nf4", "speed.dequantize=always"],
    "micro-batches": ["quant=nf4", "train.micro_batch_size=2"],
    "dora": ["quant=nf4", "adapter=dora"],
    "adamw_8bit": ["quant=nf4", "optim.name=adamw_8bit", "adapter.r=64"],
    "neftune": ["quant=nf4", "train.neftune_alpha=5"],
    "fgm": ["quant=nf4", "train.fgm_epsilon=0.5"],
    "rdrop": ["quant=nf4", "adapter.lora_dropout=0.1", "train.rdrop_alpha=0.5"],
}


@pytest.fixture
def config_on(tmp_path, models):  # noqa: F811
    """Compose the configuration of a case of `CASES`."""

    def compose_it(case, *more):
        told, kind, row, _, _ = CASES[case]
        draw = random.Random(0)
        train = write_jsonl(tmp_path / "train.jsonl", [row(draw) for _ in range(12)])
        held_out = write_jsonl(tmp_path / "eval.jsonl", [row(draw) for _ in range(4)])
        return compose.compose(
            [
                "model=hub", f"model.path={models[kind]}", "model.dtype=bfloat16", "quant=nf4", "tracker=none", "hardware=cpu",
                f"data.train={train}", f"data.eval={held_out}", "data.check=off", "data.duplicates=keep", "adapter.r=4",
                "optim.lr=0.01", "train.batch_size=4", f"run_dir={tmp_path}/run", *told, *more,
            ]
        )  # fmt: skip

    return compose_it


def _runs(config, copies, *others):
    with loaded(config, *others) as dry:
        dry.train(steps=2)
        dry.measure()
        assert_few_waits(dry, copies)
        assert_peaks_in_order(dry)


def test_a_run_with_everything(config_on):
    _runs(
        config_on(
            "causal_lm", "train.gradient_checkpointing=true", "train.micro_batch_size=2", "adapter.lora_dropout=0.1"
        ),
        4,
    )


def test_an_encoder(config_on):
    _runs(config_on("classification"), 4)


def test_members_that_share_passes(config_on, tmp_path):
    first, *others = (config_on("completion", f"run_dir={tmp_path}/{place}", f"seed={place}") for place in range(3))
    with loaded(first, *others) as dry:
        dry.live.setup.task.forward.members = 3
        dry.train(steps=2)
        assert_few_waits(dry)
        assert_peaks_in_order(dry)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_every_task(config_on, case):
    _runs(config_on(case), _COPIES.get(case, 4))


@pytest.mark.long
@pytest.mark.parametrize("name", _OPTIONS)
def test_every_option(config_on, name):
    config = config_on("completion", *_OPTIONS[name])
    with loaded(config) as dry:
        dry.train(steps=2)
        dry.measure()
        if name not in ("int8", "offloading"):  # these wait by what they are
            assert_few_waits(dry)


# -- what must be found ---------------------------------------------------------------------------------------------------


@pytest.fixture
def planted(config_on, monkeypatch):
    """A short run in whose loss something is done."""

    def run(what):
        plain = CausalLM.loss

        def loss(self, model, batch, *args, **kwargs):
            what(batch)
            return plain(self, model, batch, *args, **kwargs)

        monkeypatch.setattr(CausalLM, "loss", loss)
        with loaded(config_on("causal_lm", "speed=plain")) as dry:
            dry.train(steps=2)
            assert_few_waits(dry)

    return run


def test_an_index_on_the_host_is_found(planted):
    with pytest.raises(MixedDevices, match="of the CPU and of the card, at"):
        planted(lambda batch: batch.targets[torch.arange(1)])


def test_a_value_that_is_read_is_found(planted):
    with pytest.raises(AssertionError, match=r"read at .*test_no_card\.py"):
        planted(lambda batch: batch.targets.sum().item())


def test_a_trial_of_whole_logits_is_found(config_on, monkeypatch):
    plain = Live.accelerate

    def accelerate(self):
        row = torch.zeros(1, 1500, dtype=torch.int64, device=self.model.device)
        assert self.model(input_ids=row).logits.float().isfinite().all()
        plain(self)

    monkeypatch.setattr(Live, "accelerate", accelerate)
    with pytest.raises(AssertionError, match="trial"):
        _runs(config_on("causal_lm", "task.generate_rows=0"), 4)


# -- the card itself ------------------------------------------------------------------------------------------------------


def test_blocks_are_counted_as_the_allocator_hands_them_out():
    with card.pretended() as there:
        kept = torch.empty(100, 64, device="cuda")  # 25,600 bytes: 50 blocks
        assert there.allocated == 25_600
        with there.phase("more"):
            torch.empty(1, device="cuda")
        assert there.peaks == {"more": 25_600 + 512}
        view = kept[1:]
        del kept
        assert there.allocated == 25_600
        del view
        assert there.allocated == 0


def test_what_python_sees_is_a_card():
    with card.pretended() as there:
        x = torch.randn(4, 8, device="cuda", requires_grad=True)
        assert (x.device.type, x.is_cuda, x.to("cuda") is x) == ("cuda", True, True)
        with card.Precision("bfloat16").autocast():
            y = x @ x.t()
            assert (y.dtype, y.exp().dtype) == (torch.bfloat16, torch.float32)
        y.sum().backward()
        assert (x.grad.dtype, x.grad.device) == (torch.float32, x.device)
        assert not there.waits
        host = x.detach().cpu()
        assert host.tolist() == [[0.0] * 8] * 4
        assert [wait.kind for wait in there.waits] == ["read"]
    assert (torch.ones(2, requires_grad=True) * 2).sum().backward() is None  # and nothing of it stays


@pytest.mark.parametrize(
    ("dtype", "key_heads", "found"),
    [("bfloat16", 2, "Flash"), ("float32", 8, "Efficient"), ("float32", 2, "UnsafeView")],
)
def test_attention_takes_the_kernel_that_a_card_takes(dtype, key_heads, found):
    """Float32 with fewer key heads has no kernel: there the plain product of matrices is left."""
    with card.pretended():
        q, k = (torch.empty(1, heads, 64, 32, device="cuda", dtype=getattr(torch, dtype)) for heads in (8, key_heads))
        out = torch.nn.functional.scaled_dot_product_attention(
            q.requires_grad_(), k, k, is_causal=True, enable_gqa=key_heads != 8
        )
        names, node = [], out.grad_fn
        while node is not None:
            names.append(node.name())
            node = node.next_functions[0][0] if node.next_functions else None
        assert any(found in name for name in names), names
