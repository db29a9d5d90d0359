"""lora_lab from Python: the names that a notebook needs, and that they do what the verbs do."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import weakref

import pytest

import lora_lab
from lora_lab import LoraLabError, cli
from lora_lab.errors import ConfigError, DataError, RunError
from lora_lab.runtime import console
from tests.conftest import WORDS, write_jsonl
from tests.tasks.test_tasks import make_t5


def test_nothing_heavy_is_loaded_before_it_is_used():
    code = """
import sys
import lora_lab
import lora_lab.api
assert set(lora_lab.__all__) <= set(dir(lora_lab))
lora_lab.LoraLabError
print(sorted({'torch', 'hydra', 'transformers', 'numpy'} & set(sys.modules)))
lora_lab.load_config('recipe=demo')
lora_lab.train
print('torch' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False"]


def test_a_program_is_set_up_as_the_command_line_is(monkeypatch):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    with pytest.raises(RunError):
        lora_lab.open_run("nowhere")
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == os.environ["LRU_CACHE_CAPACITY"] == "128"


def test_what_means_nothing_to_training_is_refused():
    with pytest.raises(ConfigError, match="evaluate.suite=arc_easy: no effect on train. It is for lora-lab evaluate"):
        lora_lab.load_config("recipe=demo", "evaluate.suite=arc_easy")


def test_unknown_names_are_told():
    with pytest.raises(AttributeError, match="'lora_lab' has no attribute 'trian'"):
        lora_lab.trian  # noqa: B018
    for name in lora_lab.__all__:
        assert callable(getattr(lora_lab, name))


@pytest.fixture(scope="module")
def told(base, rows_file, eval_file) -> list[str]:
    return [
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu",
        f"data.train={rows_file}", f"data.eval={eval_file}", "optim.lr=0.01", "adapter.r=4", "train.batch_size=4",
        "train.max_steps=3", "train.eval_steps=3", "task.generate_rows=0", "task.max_new_tokens=6",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(told, tmp_path_factory) -> lora_lab.Run:
    return lora_lab.train(lora_lab.load_config(*told, f"run_dir={tmp_path_factory.mktemp('api')}/run"))


def test_a_run_says_what_its_folder_says(run):
    assert isinstance(run.config, lora_lab.RunConfig)
    assert run.config.adapter.r == 4
    assert run.path.name == "run"
    assert run.result == json.loads((run.path / "result.json").read_text())
    lines = run.metrics()
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert lines[-1]["eval_loss"] == pytest.approx(run.result["tuned"]["loss"])
    again = lora_lab.open_run(run.path)
    assert (again.config, again.result) == (run.config, run.result)
    assert repr(again) == f"Run('{run.path}')"


def test_a_configuration_prints_what_is_not_a_default(run):
    title, *lines = repr(run.config).splitlines()
    assert title == "RunConfig, beside defaults:"
    assert "  adapter.r=4" in lines
    assert not any(line.startswith(("  seed=", "  task.name=")) for line in lines)
    assert "  task.name='classification'" in repr(lora_lab.load_config("recipe=spam", "run_dir=x")).splitlines()


def test_a_notebook_shows_what_it_reached(run):
    shown = run._repr_html_()
    assert f"{run.result['tuned']['loss']:.4g}" in shown
    assert shown.count("<svg") == 1
    assert "<script" not in shown


def test_it_is_evaluated_as_by_the_verb(run):
    found = run.evaluate("task.generate_rows=1")
    assert found["tuned"]["loss"] == pytest.approx(run.result["tuned"]["loss"])
    assert found == json.loads((run.path / "evaluation.json").read_text())
    with pytest.raises(ConfigError, match=r"adapter\.lora_alpha=1: no effect on a trained run"):
        run.evaluate("adapter.lora_alpha=1")


def test_what_it_is_exported_to_is_named(run):
    with pytest.raises(ConfigError, match=r"export\.targets: nothing to export"):
        run.export()
    with pytest.raises(ConfigError, match=r"export\.targets.*guff.*Did you mean 'gguf'"):
        run.export("guff", "export.gguf_type=q8_0")


@pytest.mark.long
def test_it_is_exported(run):
    found = run.export("adapter", "export.dtype=float32")
    assert list(found) == ["adapter"]
    assert (run.path / "export/adapter/adapter_model.safetensors").is_file()


def test_it_is_merged(run, reload_here):
    assert run.merge("export.dtype=float32")["refused"] == []
    assert (run.path / "merged/config.json").exists()


def test_answers_are_those_of_chat(run, capsys):
    prompts = ["red green", "one two three"]
    capsys.readouterr()
    answers = run.generate(prompts)
    model = run._answering
    assert run.generate(prompts[1:]) == answers[1:]  # alone as together
    assert run.generate([[{"role": "user", "content": prompts[0]}]]) == answers[:1]
    assert run.predict([{"prompt": prompts[0]}, {"text": prompts[1]}]) == [{"answer": answer} for answer in answers]
    asked = [{"role": "user", "content": prompts[0]}, {"role": "assistant", "content": "known"}]
    assert run.predict([{"messages": asked}, {"messages": asked[:1]}]) == [{"answer": answers[0]}] * 2
    assert run._answering is model
    for prompt, answer in zip(prompts, answers, strict=True):
        capsys.readouterr()
        assert cli.main(["chat", f"run={run.path}", f"prompt={prompt}"]) == 0
        assert console.shown(answer) in capsys.readouterr().out
    shorter = run.generate(prompts, "task.max_new_tokens=1")
    assert run._answering is not model
    assert all(answer.startswith(short) for short, answer in zip(shorter, answers, strict=True))
    alive = weakref.ref(run._answering[1]._live.model)
    run.unload()
    assert alive() is None
    with pytest.raises(ConfigError, match=r"run\.generate\(\[prompt\]\)"):
        run.generate(prompts[0])


def test_texts_are_made_of_texts(tmp_path, capsys):
    rows = [{"source": " ".join(WORDS[i : i + 3]), "target": WORDS[i]} for i in range(8)]
    config = lora_lab.load_config(
        "task=seq2seq", "model=hub", f"model.path={make_t5(tmp_path / 't5')}", "model.dtype=float32", "quant=none",
        "tracker=none", "hardware=cpu", f"data.train={write_jsonl(tmp_path / 'rows.jsonl', rows)}", "train.max_steps=1",
        "task.max_new_tokens=4", f"run_dir={tmp_path}/run",
    )  # fmt: skip
    run = lora_lab.train(config)
    answers = run.generate(["red green blue", "one two"])
    assert run.generate(["one two"]) == answers[1:]
    assert run.predict([{"source": "red green blue", "target": "one"}, {"text": "one two"}]) == [
        {"answer": answer} for answer in answers
    ]
    with pytest.raises(DataError, match="prompt 1: this run turns one text into another"):
        run.generate([[{"role": "user", "content": "red"}]])
    with pytest.raises(DataError, match="prompt 2: the text is nothing but the tokenizer's own marks"):
        run.generate(["red", "</s>"])
    capsys.readouterr()
    assert cli.main(["chat", f"run={run.path}", "prompt=red"]) == 2
    assert "trained for task=seq2seq, which does not answer" in capsys.readouterr().err


def test_mistakes_are_errors_and_end_no_process(told, run, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"adapter\.rr=4: unknown key"):
        lora_lab.load_config("recipe=demo", "adapter.rr=4")
    with pytest.raises(RunError, match="no run there"):
        lora_lab.open_run(tmp_path)
    with pytest.raises(RunError, match="exists and is not empty"):
        lora_lab.train(run.config)
    changed = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, eval_ratio=0.5))
    with pytest.raises(ConfigError, match=r"data\.eval_ratio"):
        lora_lab.train(changed)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_bytes((run.path / "config.yaml").read_bytes())
    with pytest.raises(RunError, match=f"not finished. To finish it: lora-lab resume run={begun}"):
        lora_lab.open_run(begun).result  # noqa: B018
    assert lora_lab.open_run(begun).metrics() == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LoraLabError, match="RANK=None: must be a number"):
        lora_lab.train(lora_lab.load_config(*told, f"run_dir={tmp_path}/run"))


def test_own_recipes_are_found_and_start_no_upload(told, tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/own.yaml").write_text("# @package _global_\nexport:\n  push_to_hub: somebody/model\n")
    with pytest.raises(ConfigError, match="a recipe starts no upload"):
        lora_lab.load_config("recipe=own", *told, config_dir=tmp_path)
    own = lora_lab.load_config("recipe=own", *told, "export.push_to_hub=null", config_dir=tmp_path)
    assert own.export.push_to_hub is None
