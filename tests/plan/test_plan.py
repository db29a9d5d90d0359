"""What is foreseen is what happens: steps, tokens, rows, modules; and nothing is loaded."""

from __future__ import annotations

import json

import pytest

from lora_lab import cli
from lora_lab.plan import plan as planning
from lora_lab.run import pipeline
from lora_lab.run import prepared as stages
from lora_lab.training import loop
from tests.conftest import make_rows, write_jsonl
from tests.training.test_invariants import member_of, prepared_and_model


def planned(config):
    data, _, task = stages.build_data(config, stages.find_base(config))
    return planning.foresee(config, task, data.train, data.held_out), data


@pytest.mark.parametrize(
    "more",
    [
        ["train.epochs=3"],
        ["train.epochs=2", "train.max_steps=7", "train.micro_batch_size=3"],
        ["train.batch_size=64", "train.packing=false"],
        ["data.max_tokens=40", "data.too_long=truncate_prompt"],
        ["data.max_tokens=48", "data.too_long=drop", "data.eval_ratio=0.2"],
    ],
    ids=str,
)  # fmt: skip
def test_steps_tokens_and_rows_are_exact(config_of, tmp_path, more):
    file = write_jsonl(tmp_path / "rows.jsonl", make_rows(37, seed=4))
    config = config_of(f"data.train={file}", *more)
    work, data = planned(config)
    done = pipeline.train(config)
    result = json.loads(done.result.read_text())
    assert work.steps == result["steps"]
    assert work.tokens == result["tokens"]
    assert data.train.rows_read == 37 == data.train.rows_used + sum(data.train.rows_dropped.values())
    longest = int(data.train.lengths.max())
    if config.train.packing is False:
        assert work.largest.lengths == [longest]
        assert len(work.largest.targets) == int(data.train.supervised.max())
    assert work.largest.num_tokens >= longest


def test_the_largest_micro_batch_is_found(config_of, rows_file):
    config = config_of("train.epochs=2", "train.micro_batch_size=2")
    work, data = planned(config)
    sizes = [
        sum(int(data.train.lengths[i]) for i in part)
        for step in range(work.steps)
        for part in planning.plan_of(config, data.train).step(step)
    ]
    assert work.largest.num_tokens == max(sizes)


def test_a_stream_is_foreseen_from_some_of_its_steps(config_of):
    stored, _ = planned(config_of("train.epochs=2"))
    streamed, _ = planned(config_of("train.epochs=2", "data.streaming=true"))
    assert (streamed.steps, streamed.tokens) == (stored.steps, stored.tokens)


def test_passes_are_filled_with_tokens_as_the_loop_fills_them(config_of, tmp_path):
    """Of rows that are stored, and of a stream."""
    file = write_jsonl(tmp_path / "rows.jsonl", make_rows(37, seed=4))
    told = [f"data.train={file}", "train.batch_size=8", "train.micro_batch_tokens=90"]
    config = config_of(*told)
    prepared, model = prepared_and_model(config)
    member = member_of(prepared, model, config)
    sizes = []
    for step in range(member.total_steps):
        member.state.step = step
        sizes += [sum(one.num_tokens for one in part) for part in loop._parts(member, prepared.train)]
    stored, _ = planned(config)
    streamed, _ = planned(config_of(*told, "data.streaming=true"))
    assert stored.largest.num_tokens == streamed.largest.num_tokens == max(sizes)
    assert len(streamed.largest.targets) == len(stored.largest.targets)
    assert stored.tokens == streamed.tokens == sum(sizes)


def test_the_plan_verb(overrides, eval_file, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("lora_lab.base.load.load_model", lambda *_: pytest.fail("weights were loaded"))
    more = [f"data.eval={eval_file}", "adapter.target_modules=[q_proj,v_proj]", "export=merged"]
    assert cli.main(["plan", *overrides, *more]) == 0
    printed = capsys.readouterr().out
    assert "│ q_proj    │       4 │          0 │" in printed
    assert "│ k_proj    │       0 │          4 │" in printed
    for text in ("5 (5 an epoch)", "trainable parameters", "peak of each phase", "8 GiB yes", "merged", "data.train"):
        assert text in printed
    assert not (tmp_path / "run").exists()


def test_the_plan_verb_names_mistakes(overrides, capsys):
    assert cli.main(["plan", *overrides, "probe=yes"]) == 2
    assert cli.main(["plan", *overrides, "adapter.target_modules=[kproj]"]) == 2
    assert "matches no linear layer" in capsys.readouterr().err
    assert cli.main(["plan", *overrides, "hardware.shard=true"]) == 2
    assert "is not known. Set hardware.processes=N." in capsys.readouterr().err
    assert cli.main(["plan", *overrides, "hardware.shard=true", "hardware.processes=2", "probe=true"]) == 2
    assert "probe=true: trains in one process" in capsys.readouterr().err


@pytest.mark.long
def test_a_probe_trains_some_steps_and_leaves_nothing(overrides, capsys, tmp_path):
    assert cli.main(["plan", *overrides, "train.epochs=4", "probe=true"]) == 0
    printed = capsys.readouterr().out
    assert "tokens/s: about" in printed
    assert "for the 20 steps" in printed
    assert not (tmp_path / "run").exists()
