"""Methods of virtual tokens: their loss and gradients are plain peft's, and their answers what the model itself reads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_lab.adapters import ADAPTERS, files
from lora_lab.adapters.attach import base_of, trainable, without_adapter
from lora_lab.adapters.prompts import PromptAdapter, positions_before
from lora_lab.config import compose
from lora_lab.data.collate import pad
from lora_lab.plan.plan import plan
from lora_lab.run import pipeline
from lora_lab.run.answering import Answering
from lora_lab.run.prepared import prepare
from lora_lab.sweep import cohort, jobs
from tests.conftest import fails, make_base

METHODS = [name for name, section in ADAPTERS.items() if issubclass(section, PromptAdapter)]
PLAIN_AND_FAST = ["plain", pytest.param("fast", marks=pytest.mark.long)]


@pytest.fixture(params=METHODS)
def method(request) -> str:
    return request.param


@pytest.fixture
def config_for(overrides, eval_file):
    plain = [text for text in overrides if not text.startswith("adapter.")]
    shared = [f"data.eval={eval_file}", "train.max_steps=3", "adapter.num_virtual_tokens=5"]
    return lambda *more: compose.compose([*plain, *shared, *more])


def plain_twin(prepared, model) -> PeftModel:
    """The same in plain peft and transformers, with the same weights."""
    base = AutoModelForCausalLM.from_pretrained(prepared.base.folder, dtype=torch.float32)
    config = prepared.config.adapter.peft_config("CAUSAL_LM")
    twin = get_peft_model(base, config).eval()
    twin.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    return twin


def check_twin(prepared) -> None:
    model = prepared.loaded().model.eval()
    examples = [prepared.train[place][0] for place in (0, 3, 5)]  # of unlike lengths
    batches = prepared.task.step(model, [examples], np.random.default_rng(0))
    assert len(batches) == 3
    loss = sum(prepared.task.loss(model, batch).loss for batch in batches.batches) / batches.weight
    loss.backward()

    twin = plain_twin(prepared, model)
    labels = [np.where(one.weights > 0, one.input_ids, -100) for one in examples]
    ids = [one.input_ids for one in examples]
    mask = pad([np.ones_like(row) for row in ids], 0)
    other = twin(input_ids=pad(ids, 0), attention_mask=mask, labels=pad(labels, -100)).loss
    other.backward()
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    own, plain = trainable(model), trainable(twin)
    assert own.keys() == plain.keys()
    assert all(one.grad.any() for one in own.values())
    for name, one in own.items():
        gap = (one.grad - plain[name].grad).norm() / plain[name].grad.norm()
        assert gap < 1e-4, name


@pytest.mark.parametrize("speed", PLAIN_AND_FAST)
def test_loss_and_gradients_are_those_of_plain_peft_on_padded_rows(config_for, method, speed):
    check_twin(prepare(config_for(f"adapter={method}", f"speed={speed}")))


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        ["adapter=prompt_tuning", "adapter.prompt_tuning_init=RANDOM"],
        ["adapter=prefix_tuning", "adapter.encoder_hidden_size=8"],
        ["adapter=p_tuning", "adapter.encoder_reparameterization_type=LSTM"],
    ],
    ids=lambda settings: settings[0].partition("=")[2],
)
def test_so_are_those_of_other_settings_and_they_resume(config_for, settings, tmp_path):
    check_twin(prepare(config_for(*settings)))
    whole = pipeline.train(config_for(*settings, f"run_dir={tmp_path}/whole"))
    pipeline.train(config_for(*settings, "train.max_steps=3", "train.save_steps=1", f"run_dir={tmp_path}/saved"))
    assert (whole.adapter / files.WEIGHTS).read_bytes() == (tmp_path / "saved/adapter" / files.WEIGHTS).read_bytes()


def greedy(model, ids: list[int], count: int) -> list[int]:
    """An answer token by token, of which each is read from the beginning."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_answers_are_what_the_model_reads_and_plain_peft_loads_the_folder(config_for, method):
    run = pipeline.train(config_for(f"adapter={method}", "optim.lr=0.1"))
    plain = AutoModelForCausalLM.from_pretrained(json.loads(run.manifest.read_text())["base"]["name"])
    plain = PeftModel.from_pretrained(plain, run.adapter).eval()
    with Answering.open(str(run.path), ["task.max_new_tokens=6"]) as answering:
        tokenizer, prompts = answering.tokenizer, ["red green", "one two three cat dog bird table", "Graz"]
        given = [answering._given(prompt, 1) for prompt in prompts]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in given]
        answers = answering.answers(prompts)
        model = answering._live.model
        for mine, text in zip(ids, answers, strict=True):
            expected = greedy(plain, mine, 6)
            assert greedy(model, mine, 6) == expected
            assert text == tokenizer.decode(expected, skip_special_tokens=True) or 2 in expected  # ends early
        with without_adapter(model):
            assert positions_before(model) == 0
            base = model(input_ids=torch.tensor([ids[0]])).logits
            assert torch.equal(base, base_of(model)(input_ids=torch.tensor([ids[0]])).logits)
    saved = load_file(run.adapter / files.WEIGHTS)
    assert "prompt_embeddings" in saved


def test_what_it_cannot_do_is_said_before_training(config_for, overrides, method, tmp_path, capsys):
    plain = [text for text in overrides if not text.startswith("adapter.")]
    for more, said in (
        (["task=classification"], f"task=classification: not with adapter={method}"),
        (["task=preference"], f"task=preference: not with adapter={method}"),
        (
            ["train.packing=true"],
            f"train.packing=true: not with adapter={method}, because its virtual tokens stand before each row",
        ),
        (["speed.prefix_cache=true"], f"speed.prefix_cache=true: not with adapter={method}"),
        (["export=merged"], "it changes no weight but puts virtual tokens before each row"),
    ):
        assert said in " ".join(fails(["train", *plain, f"adapter={method}", *more], capsys).split())
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_its_memory_is_planned_and_members_take_turns_for_a_reason(config_for, method, tmp_path, capsys):
    plan(config_for(f"adapter={method}"))
    said = capsys.readouterr().out
    assert "peak of each phase (estimated, GiB)" in said
    assert "cannot be estimated" not in said
    found = [
        config_for(f"adapter={method}", "train.max_steps=1", f"seed={n}", f"run_dir={tmp_path}/sweep/{n}")
        for n in range(2)
    ]
    cohort.train(jobs.jobs_of(found))
    assert "2 runs take turns on one base: its virtual tokens stand before each row" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        ["model.dtype=bfloat16"],
        ["model.dtype=bfloat16", "quant=nf4"],
        ["train.neftune_alpha=5"],
        ["train.fgm_epsilon=0.5"],
        ["task.generate_rows=3", "task.num_beams=2", "task.max_new_tokens=4", "task.few_shot=1"],
    ],
    ids=lambda more: more[-1].partition("=")[0],
)
def test_it_trains_with_whatever_else_a_run_is_told(config_for, method, more):
    run = pipeline.train(config_for(f"adapter={method}", *more))
    result = json.loads(run.result.read_text())
    assert result["tuned"]["loss"] != result["base"]["loss"]
    assert result["tuned"].keys() >= result["base"].keys()


@pytest.mark.long
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"prefix_tuning"}))
def test_recomputed_layers_give_the_same_weights(config_for, method, tmp_path):
    runs = [
        pipeline.train(
            config_for(f"adapter={method}", f"train.gradient_checkpointing={on}", f"run_dir={tmp_path}/{on}")
        )
        for on in ("true", "false")
    ]
    ones, others = (load_file(run.adapter / files.WEIGHTS) for run in runs)
    for name, one in ones.items():
        torch.testing.assert_close(one, others[name], rtol=1e-4, atol=1e-5)


def test_recomputed_layers_are_refused_where_the_prefix_lies_in_the_cache(config_for):
    said = "train.gradient_checkpointing=true: not with adapter=prefix_tuning, because its keys and values lie in the cache"
    with pytest.raises(Exception, match=said):
        config_for("adapter=prefix_tuning", "train.gradient_checkpointing=true")
    for method in set(METHODS) - {"prefix_tuning"}:
        config_for(f"adapter={method}", "train.gradient_checkpointing=true")


def test_virtual_tokens_count_against_the_positions(config_for, method, tmp_path):
    base = make_base(tmp_path / "short", max_position_embeddings=66)  # rows have up to 63 tokens
    more = [f"adapter={method}", f"model.path={base}"]
    prepare(config_for(*more, "adapter.num_virtual_tokens=3"))
    with pytest.raises(
        Exception, match=r"a row has 63 tokens and 4 virtual ones .* 66 positions. Set data.max_tokens=62"
    ):
        prepare(config_for(*more, "adapter.num_virtual_tokens=4"))
    with pytest.raises(Exception, match=r"adapter.num_virtual_tokens=66: the model has 66 positions"):
        prepare(config_for(*more, "adapter.num_virtual_tokens=66"))
