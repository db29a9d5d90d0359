"""What a task may do in a step: use the model, generate with it, and have figures of its own logged beside the loss."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from lora_lab.data.collate import join, pack
from lora_lab.data.encode import Example
from lora_lab.fast import segments
from lora_lab.run import pipeline
from lora_lab.tasks.causal_lm.config import CausalLMConfig
from lora_lab.tasks.causal_lm.task import CausalLM
from lora_lab.training.batches import plan_of
from tests.training.test_invariants import prepared_and_model


class Sampled(CausalLM):
    """Learns from answers that it has sampled itself in the step; an answer is worth its share of even tokens."""

    NEW = 6
    seen: list[tuple[bool, str]]

    def step(self, model, parts, rng):
        sampled = [[self._sampled(model, example) for example in part] for part in parts]
        self.seen.append((model.training, segments.implementation(model)))
        return super().step(model, sampled, rng)

    def _sampled(self, model, example: Example) -> Example:
        start = int(np.argmax(example.supervised))
        prompt = torch.from_numpy(example.input_ids[:start])[None]
        with self.forward.generating(model):
            assert not model.training
            ids = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=self.NEW, pad_token_id=0
            )[0].numpy()  # fmt: skip
        weights = np.zeros(len(ids), dtype=np.float32)
        weights[start:] = 0.1 + (ids[start:] % 2 == 0).mean()
        return Example(ids, weights, example.origin)

    def loss(self, model, batch, rdrop_alpha=None):
        found = super().loss(model, batch, rdrop_alpha)
        even = (batch.targets % 2 == 0).float()
        weights = torch.ones_like(even) if batch.weights is None else batch.weights
        return dataclasses.replace(found, figures={"reward": (even * weights).sum().item()})


class Greedy(CausalLM):
    """Generates as `CausalLM.generate` does, in the step, and notes what."""

    said: list[list[str]]

    def step(self, model, parts, rng):
        parts = list(parts)
        prompts = [self._prompt(example, []) for part in parts for example in part]
        self.said.append(self.generate(model, prompts, max_new_tokens=5))
        return super().step(model, parts, rng)


class Figured(CausalLM):
    """A figure that can be told from the others: the mean number of the tokens that are learned."""

    def loss(self, model, batch, rdrop_alpha=None):
        found = super().loss(model, batch, rdrop_alpha)
        return dataclasses.replace(found, figures={"mean_token": float(batch.targets.sum())})


def metrics_of(run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["speed=plain"], marks=pytest.mark.long),
        pytest.param(["train.packing=false"], marks=pytest.mark.long),
        pytest.param(["train.gradient_checkpointing=true"], marks=pytest.mark.long),
    ],
)
def test_a_task_generates_inside_its_step(config_of, tmp_path, monkeypatch, more):
    """The attention that packed rows share for the whole of training takes no key cache: it steps aside, and is there again."""
    monkeypatch.setattr(Sampled, "seen", [], raising=False)
    monkeypatch.setattr(CausalLMConfig, "load", classmethod(lambda cls: Sampled))
    common = ["train.max_steps=3", "train.micro_batch_size=2", *more]
    runs = [pipeline.train(config_of(*common, f"run_dir={tmp_path}/{name}")) for name in "ab"]
    weights = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]  # what is sampled follows from seed and step
    lines = metrics_of(runs[0])
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 <= line["reward"] <= 1 for line in lines)
    packed = segments.IMPLEMENTATION if "train.packing=false" not in more else "sdpa"
    assert Sampled.seen == [(True, packed)] * 6


def test_what_is_generated_inside_a_step_is_what_the_model_says(config_of, monkeypatch):
    """A batch of prompts of unlike lengths, padded on the left, against each alone outside training."""
    config = config_of("train.max_steps=1", "train.batch_size=6")
    monkeypatch.setattr(Greedy, "said", [], raising=False)
    monkeypatch.setattr(CausalLMConfig, "load", classmethod(lambda cls: Greedy))
    prepared, model = prepared_and_model(config)
    task, rows = prepared.task, [prepared.train[i][0] for i in range(6)]
    with task.forward.segments(model):
        model.train()
        task.step(model, [rows[:3], rows[3:]], np.random.default_rng(0))
        assert model.training
        assert segments.implementation(model) == segments.IMPLEMENTATION
    [said] = task.said
    assert len({len(row.input_ids) for row in rows}) > 1
    for row, text in zip(rows, said, strict=True):
        ids = task.tokenizer(task._prompt(row, []), add_special_tokens=False, return_tensors="pt")["input_ids"]
        model.eval()
        done = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5, pad_token_id=0,
            eos_token_id=task.encoder.end_tokens(),
        )  # fmt: skip
        assert task.tokenizer.decode(done[0, ids.shape[1] :], skip_special_tokens=True) == text


@pytest.mark.parametrize("micro", [pytest.param(1, marks=pytest.mark.long), 2])
def test_figures_are_means_over_the_step_however_it_is_split(config_of, tmp_path, monkeypatch, micro):
    plain = pipeline.train(config_of("train.max_steps=2", f"train.micro_batch_size={micro}", f"run_dir={tmp_path}/p"))
    monkeypatch.setattr(CausalLMConfig, "load", classmethod(lambda cls: Figured))
    config = config_of("train.max_steps=2", f"train.micro_batch_size={micro}", f"run_dir={tmp_path}/r")
    lines = metrics_of(pipeline.train(config))
    prepared, _ = prepared_and_model(config)
    for step, line in enumerate(lines):
        rows = [prepared.train[int(i)][0] for part in plan_of(config, prepared.train).step(step) for i in part]
        tokens = np.concatenate([row.input_ids[row.supervised] for row in rows])
        assert line.pop("mean_token") == pytest.approx(tokens.mean(), rel=1e-6)
    assert lines == metrics_of(plain)  # and nothing else is changed or added


def test_batches_end_to_end_are_their_examples_packed(config_of):
    prepared, _ = prepared_and_model(config_of())
    rows = [prepared.train[i][0] for i in range(6)]
    half = dataclasses.replace(rows[2], weights=rows[2].weights * 0.5)
    for examples in (rows, [*rows[:2], half, *rows[3:]]):
        whole, joined = pack(examples), join([pack(examples[:1]), pack(examples[1:4]), pack(examples[4:])])
        for field in dataclasses.fields(whole):
            one, other = getattr(whole, field.name), getattr(joined, field.name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
