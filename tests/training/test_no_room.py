"""A lack of memory at each stage of a run: a smaller way with the same result, or a message with the way out and what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lab import cli
from lora_lab.errors import BaseModelError, NoRoomError
from lora_lab.export import targets
from lora_lab.fast import apply
from lora_lab.run import pipeline
from lora_lab.run import prepared as stages
from lora_lab.tasks import generation
from lora_lab.tasks.causal_lm.task import PackedTask
from lora_lab.tasks.masked_lm.task import MaskedLM
from lora_lab.tasks.preference.task import Preference
from tests.conftest import make_rows, write_jsonl
from tests.training.test_invariants import prepared_and_model

FULL = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.20 GiB is free."
)


def failing(real, when):
    """A function that finds no memory where `when` says so of what it is given."""

    def called(*args, **kwargs):
        if when(*args):
            raise torch.OutOfMemoryError(FULL)
        return real(*args, **kwargs)

    return called


def measured(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def trained_with_adapter(model) -> bool:
    return not next(module for module in model.modules() if isinstance(module, BaseTunerLayer)).disable_adapters


@pytest.fixture
def arguments(overrides, eval_file):
    """Of a short run with held-out rows."""
    return ["train", *overrides, f"data.eval={eval_file}", "train.max_steps=2"]


# -- the trial of the accelerations ---------------------------------------------------------------------------------------


class _Made(TorchDispatchMode):
    """Elements of the largest tensor that is made inside the block."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [
            one.untyped_storage().nbytes() // one.element_size()
            for one in tree_leaves(made)
            if isinstance(one, torch.Tensor)
        ]
        self.largest = max([self.largest, *sizes])
        return made


def test_accelerations_are_tried_on_a_few_tokens(overrides, tmp_path):
    """A long row: neither its logits nor its hidden states come to be."""
    from lora_lab.config import compose

    words = " ".join(row["prompt"] for row in make_rows(50))
    rows = write_jsonl(tmp_path / "long.jsonl", [{"prompt": words, "completion": words}])
    prepared = stages.prepare(
        compose.compose([*overrides, f"data.train={rows}", "data.max_tokens=20000", "data.too_long=error"])
    )
    length = prepared.train.longest
    live = prepared.loaded()
    vocabulary = live.model.config.vocab_size
    weights = max(parameter.numel() for parameter in live.model.parameters())
    with _Made() as made:
        live.accelerate()
    assert length > 1000
    assert made.largest <= max(3 * weights, 48 * vocabulary)  # fused weights of three layers, or logits of 48 tokens
    assert made.largest < length * 64  # 64: the width


def test_kept_weights_are_dropped_where_the_trial_does_not_fit(arguments, monkeypatch, capsys, tmp_path):
    kept = failing(apply.accelerate, lambda model, forward, speed, *_: speed.dequantize != "always")
    monkeypatch.setattr(apply, "accelerate", kept)
    assert cli.main(arguments) == 0
    assert "tried again without weights that are kept dequantized" in capsys.readouterr().out
    monkeypatch.setattr(apply, "accelerate", failing(apply.accelerate, lambda *_: True))
    assert cli.main([*arguments, f"run_dir={tmp_path}/second"]) == 3
    message = capsys.readouterr().err
    assert "there is no room for a pass over the end of one row (CUDA out of memory" in message
    assert "Traceback" not in message
    assert not (tmp_path / "second").exists()


# -- evaluation -----------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_measured_in_smaller_passes(config_of, eval_file, monkeypatch):
    prepared, model = prepared_and_model(config_of(f"data.eval={eval_file}"))
    whole = prepared.task.measure(model.eval(), prepared.held_out)
    alone = failing(PackedTask.loss, lambda task, model, batch, *_: len(batch.lengths) > 1)
    monkeypatch.setattr(PackedTask, "loss", alone)
    found = prepared.task.measure(model, prepared.held_out)
    assert found.metrics == pytest.approx(whole.metrics, rel=1e-6)
    assert prepared.task.eval_tokens < 2048
    monkeypatch.setattr(PackedTask, "loss", failing(PackedTask.loss, lambda *_: True))
    with pytest.raises(
        NoRoomError, match=r"data.eval: a row of \d+ tokens does not fit into memory, by itself.*quant=nf4"
    ):
        prepared.task.measure(model, prepared.held_out)


def test_a_training_whose_rows_cannot_be_measured_ends_with_its_result(arguments, monkeypatch, capsys, tmp_path):
    """The base could be measured, the adapted model cannot: training goes on, and a later resume measures it."""
    with monkeypatch.context() as patch:
        late = failing(PackedTask.loss, lambda task, model, *_: not model.training and trained_with_adapter(model))
        patch.setattr(PackedTask, "loss", late)
        assert cli.main([*arguments, "train.eval_steps=1"]) == 3
    told = capsys.readouterr()
    assert told.out.count("not measured: data.eval: a row of") == 2
    assert "Traceback" not in told.err
    result = measured(tmp_path / "run")
    assert result["steps"] == 2
    assert result["base"]["loss"] > 0
    assert result["tuned"] is None
    assert "does not fit into memory" in result["unmade"]["evaluate"]
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    assert cli.main(["resume", f"run={tmp_path}/run"]) == 0
    result = measured(tmp_path / "run")
    assert result["tuned"]["loss"] > 0
    assert "unmade" not in result


def test_a_base_that_cannot_be_measured_is_told_before_training(arguments, monkeypatch, capsys):
    monkeypatch.setattr(PackedTask, "loss", failing(PackedTask.loss, lambda *_: True))
    assert cli.main(arguments) == 3
    assert "smaller data.max_tokens, quant=nf4 or speed.dequantize=always" in capsys.readouterr().err


# -- answers --------------------------------------------------------------------------------------------------------------


def test_answers_are_generated_with_fewer_rows_at_once(config_of, monkeypatch):
    prepared, model = prepared_and_model(config_of("task.max_new_tokens=4"))
    prompts = ["red", "red green blue", "cat dog", "one two three", "bird"]
    plain = prepared.task.generate(model, prompts)
    seen = []
    monkeypatch.setattr(
        generation,
        "_generate",
        failing(generation._generate, lambda *given: seen.append(len(given[2])) or len(given[2]) > 2),
    )
    assert prepared.task.generate(model, prompts) == plain
    assert seen == [5, 2, 2, 1]
    monkeypatch.setattr(generation, "_generate", failing(generation._generate, lambda *_: True))
    with pytest.raises(NoRoomError, match="task.max_new_tokens=4: an answer to a row of .* generated by itself"):
        prepared.task.generate(model, prompts)


def test_rows_are_generated_together_by_the_size_of_their_cache(config_of, monkeypatch):
    prepared, model = prepared_and_model(config_of("task.max_new_tokens=4"))
    # keys and values of 2 heads of 16 in 4 layers, beside four times the width of 64 and three times an MLP's 128; float32
    assert generation._token_bytes(model.get_base_model()) == 4 * (2 * 4 * 2 * 16 + 4 * 64 + 3 * 128)
    rows = [[5] * length for length in (3, 3, 6, 9, 20)]
    together = [
        generation._fitting(list(order), rows, 4, 32, 24) for order in ([0, 1, 2, 3, 4], [2, 3, 4], [3, 4], [4])
    ]
    assert together == [[0, 1], [2], [3], [4]]  # of at most 24 tokens, 4 new ones each among them, or one row
    assert generation._fitting([0, 1, 2], rows, 4, 2, 10**6) == [0, 1]
    sizes = []
    monkeypatch.setattr(
        generation, "free_bytes", lambda device: 2 * 40 * generation._token_bytes(model.get_base_model())
    )
    monkeypatch.setattr(
        generation, "_generate", lambda model, tokenizer, rows, settings: sizes.append(len(rows)) or ["x"] * len(rows)
    )
    prepared.task.generate(model, ["red"] * 9)
    assert sum(sizes) == 9
    assert max(sizes) < 9


@pytest.mark.long
def test_pseudo_perplexity_with_fewer_copies_of_a_row(monkeypatch, tmp_path, overrides):
    from lora_lab.config import compose
    from tests.tasks.test_tasks import make_bert

    rows = write_jsonl(tmp_path / "texts.jsonl", [{"text": "red green blue one two three cat dog"}] * 4)
    base = make_bert(tmp_path / "bert")
    given = [f"model.path={base}", f"data.train={rows}", f"data.eval={rows}", "task=masked_lm", "task.pseudo_perplexity_rows=2",
             "data.duplicates=keep"]  # fmt: skip
    prepared, model = prepared_and_model(compose.compose([*overrides, *given]))
    whole = prepared.task.examine(model.eval(), prepared.held_out, "x").metrics
    few = failing(MaskedLM._one_by_one, lambda task, model, ids, places: len(places) > 2)
    monkeypatch.setattr(MaskedLM, "_one_by_one", few)
    assert prepared.task.examine(model, prepared.held_out, "x").metrics == pytest.approx(whole, rel=1e-5)


# -- a reference model ----------------------------------------------------------------------------------------------------


def test_a_reference_that_does_not_fit_makes_micro_batches_smaller(overrides, monkeypatch, tmp_path, capsys):
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{row['completion']} Oslo"}
        for row in make_rows(8)
    ]
    rows = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    given = ["train", *overrides, f"data.train={rows}", "task=preference", "train.max_steps=1"]
    assert cli.main(given) == 0
    plain = (tmp_path / "run/metrics.jsonl").read_text()
    monkeypatch.setattr(
        Preference, "_reference", failing(Preference._reference, lambda task, model, batch: batch.num_rows > 1)
    )
    assert cli.main([*given, f"run_dir={tmp_path}/tight"]) == 0
    assert "does not fit: micro-batches of 2 instead of 4 rows" in capsys.readouterr().out
    losses = [json.loads(text)["loss"] for text in (plain, (tmp_path / "tight/metrics.jsonl").read_text())]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# -- merging and exporting ------------------------------------------------------------------------------------------------

MERGED = ("export=merged", "export.dtype=float32")


@pytest.mark.parametrize("part", ["_as_trained", pytest.param("merge_adapter", marks=pytest.mark.long)])
def test_a_merge_that_does_not_fit_leaves_the_result_and_is_made_later(
    part, arguments, monkeypatch, capsys, tmp_path, reload_here
):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, part, failing(None, lambda *_: True))
        assert cli.main([*arguments, *MERGED]) == 4
    message = capsys.readouterr().err
    assert "memory ran out while hf was made (CUDA out of memory" in message
    assert f"lora-lab export run={tmp_path}/run export.targets=[hf]" in message
    assert "Traceback" not in message
    result = measured(tmp_path / "run")
    assert result["steps"] == 2
    assert result["tuned"]["loss"] > 0
    assert "memory ran out" in result["merge"]["refused"][0]
    assert "memory ran out" in result["unmade"]["merge"]
    assert cli.main(["resume", f"run={tmp_path}/run"]) == 0
    now = measured(tmp_path / "run")
    assert now["merge"]["refused"] == []
    assert "unmade" not in now
    assert now["tuned"] == result["tuned"]
    assert (tmp_path / "run/merged").is_dir()
    assert cli.main(["resume", f"run={tmp_path}/run"]) == 0
    assert "is finished; nothing to do" in capsys.readouterr().out


def test_a_base_that_cannot_be_loaded_again_leaves_the_result(arguments, monkeypatch, capsys, tmp_path):
    def gone(*_):
        raise BaseModelError("model.path=x: cannot be loaded with quant.method=none (gone).")

    monkeypatch.setattr(pipeline, "merge_adapter", gone)
    assert cli.main([*arguments, *MERGED]) == 4
    assert "hf could not be made: model.path=x: cannot be loaded" in capsys.readouterr().err
    assert measured(tmp_path / "run")["tuned"]["loss"] > 0


def test_a_merge_that_is_killed_leaves_the_result(arguments, monkeypatch, tmp_path):
    """The system ends a process that takes too much without a word."""

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(pipeline, "merge_adapter", killed)
    with pytest.raises(Killed):
        cli.main([*arguments, *MERGED])
    result = measured(tmp_path / "run")
    assert result["tuned"]["loss"] > 0
    assert result["unmade"] == {"export": "it was interrupted"}


def test_an_export_that_does_not_fit_leaves_the_result_and_the_other_targets(
    arguments, monkeypatch, capsys, tmp_path, reload_here
):
    def full(*_):
        raise RuntimeError(
            "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com"
        )

    with monkeypatch.context() as patch:
        patch.setitem(targets.TARGETS, "vllm", targets.Target(full, lambda setup: ()))
        assert cli.main([*arguments, "export.targets=[vllm,adapter]"]) == 4
    message = capsys.readouterr().err
    assert "memory ran out while vllm was made (CUDA error: out of memory)" in message
    assert "Traceback" not in message
    result = measured(tmp_path / "run")
    assert result["export"]["vllm"]["unmade"] is True
    assert "refused" not in result["export"]["adapter"]
    assert "vllm" in result["unmade"]["export"]
    assert result["tuned"]["loss"] > 0


def test_no_disk_for_a_merge_leaves_the_result(arguments, monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device", "merged")

    monkeypatch.setattr(pipeline, "merge_adapter", full)
    assert cli.main([*arguments, *MERGED]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert "merge" in measured(tmp_path / "run")["unmade"]


def test_the_verb_merge_tells_a_lack_of_memory(arguments, monkeypatch, capsys, tmp_path):
    assert cli.main(arguments) == 0
    monkeypatch.setattr(pipeline, "merge_adapter", failing(None, lambda *_: True))
    assert cli.main(["merge", f"run={tmp_path}/run"]) == 4
    assert "memory ran out while hf was made" in capsys.readouterr().err
