"""`evaluate.suite`: lm-eval's tasks on a run's model as it was trained, from folders that run nothing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

import lora_lab
from lora_lab import cli
from lora_lab.errors import DataError
from lora_lab.suites import folder
from tests.conftest import WORDS, fails, make_base, make_rows, write_jsonl

KINDS = {
    "choose": {
        "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}", "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "training_split": "train", "fewshot_split": "train", "num_fewshot": 1,
    },
    "text": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "write": {
        "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{completion}}",
        "generation_kwargs": {"until": [WORDS[0]], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip
COMMON = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"train": "rows.jsonl", "test": "rows.jsonl"}}, "test_split": "test"}  # fmt: skip
ABSENT = importlib.util.find_spec("lm_eval") is None


def make_tasks(place: Path, **kinds: dict) -> Path:
    """A folder of tasks over a few rows."""
    place.mkdir()
    rows = [row | {"choices": [row["completion"], "zz"], "answer": 0} for row in make_rows(6, seed=3)]
    write_jsonl(place / "rows.jsonl", rows)
    (place / "_common").with_suffix(".yaml").write_text(yaml.safe_dump(COMMON))
    for name, kind in (kinds or KINDS).items():
        (place / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "include": "_common.yaml", **kind}))
    return place


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_folder_gives_its_tasks_as_plain_values(tmp_path):
    place = make_tasks(tmp_path / "tasks")
    found = folder.read(str(place))
    assert set(found) == set(KINDS)
    assert found["choose"]["num_fewshot"] == 1
    assert found["choose"]["test_split"] == "test"  # of what it includes
    assert folder.rows(found["choose"])["test"] == read(place / "rows.jsonl")


WRONG = {  # what is said in a task's file -> part of the message
    "process_docs: !function utils.go": "names code, and no file runs code here",
    "process_results: x": "process_results: names code",
    "class: x": "class: names code",
    "group: x": "name its tasks in evaluate.suite",
    "doc_to_txt: x": "Did you mean 'doc_to_text'?",
    "task: [a, b]": "a group",
    "task: choose": "is also in",
    "include: ../outside.yaml": "lies outside",
    "include: other.yaml": "it includes itself",
    "include: none.yaml": "is no file",
    "dataset_kwargs: {data_files: {test: ../outside.yaml}}": "lies outside",
    "dataset_kwargs: {data_files: {test: link.jsonl}}": "lies outside",
    "dataset_kwargs: {data_dir: x}": "name the files of rows and nothing else",
    "dataset_path: somebody/data": "the rows of a task in a folder lie there too",
    "metric_list: [{metric: acc, hf_evaluate: true}]": "must name one of lm-eval's own metrics",
}


@pytest.mark.parametrize("says", WRONG)
def test_what_a_folder_may_not_say(says, tmp_path):
    (tmp_path / "outside.yaml").write_text("task: outside")
    place = make_tasks(tmp_path / "tasks", choose=KINDS["choose"])
    (place / "link.jsonl").symlink_to(tmp_path / "outside.yaml")
    own = {} if says.startswith("task") else {"task": "other"}
    more = {} if says.startswith(("include", "dataset_path")) else {"include": "_common.yaml"}
    (place / "other.yaml").write_text(yaml.safe_dump(own | more) + says)
    with pytest.raises(DataError) as failed:
        folder.read(str(place))
    assert WRONG[says] in str(failed.value)
    assert "other.yaml" in str(failed.value)


def test_what_is_not_there_is_named(tmp_path, config_of):
    place = make_tasks(tmp_path / "tasks", choose=KINDS["choose"])
    with pytest.raises(DataError, match="no task 'chose'.*Did you mean 'choose'"):
        folder.chosen(str(place), ["chose"])
    with pytest.raises(DataError, match="no folder"):
        folder.read(str(tmp_path / "none"))
    (place / "rows.jsonl").write_text('{"a": 1}\nx\n')
    with pytest.raises(DataError, match="row 2"):
        folder.rows(folder.chosen(str(place), ["choose"])[0])
    for told, said in {
        ("evaluate.limit=3",): "evaluate.limit=3: no effect without evaluate.suite",
        ("evaluate.suite=[a]", "task=classification"): "does not say that",
        ("evaluate.suite=[a]", "task=seq2seq"): "the model of task=seq2seq does not say that",
        ("evaluate.suite=[a]", "task=completion", "evaluate.chat_template=true"): "whose model reads plain texts",
    }.items():
        with pytest.raises(lora_lab.errors.ConfigError, match=said):
            config_of(*told)


def test_members_of_a_sweep_are_named_one_by_one(tmp_path, capsys):
    suite = "evaluate.suite=[kept]"
    assert f"{suite}: no effect on train" in fails(["train", "-m", "recipe=demo", "adapter.r=2,4", suite], capsys)
    (tmp_path / "sweep/0").mkdir(parents=True)
    (tmp_path / "sweep/0/config.yaml").write_text("name: a\n")
    message = fails(["evaluate", f"run={tmp_path}/sweep", suite], capsys)
    assert f"a sweep. Name one of its runs: run={tmp_path}/sweep/0" in message


@pytest.mark.skipif(not ABSENT, reason="lm-eval is installed")
def test_without_lm_eval_its_extra_is_named():
    from lora_lab.errors import ConfigError
    from lora_lab.suites import harness

    with pytest.raises(ConfigError, match=r"lora-lab\[lm-eval\]"):
        harness.check_extra()


# -- with lm-eval -------------------------------------------------------------------------------------------------------

with_lm_eval = pytest.mark.skipif(ABSENT, reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Runs that learned something: of chats with a merged checkpoint beside it, and of texts without held-out rows."""
    place = tmp_path_factory.mktemp("suites")
    base = make_base(place / "base", max_position_embeddings=96)
    rows = make_rows(20)
    write_jsonl(place / "chats.jsonl", rows)
    write_jsonl(place / "texts.jsonl", [{"text": f"{row['prompt']} {row['completion']}"} for row in rows])
    common = (
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu", "optim.lr=0.01",
        "train.epochs=8", "train.batch_size=4", "data.max_tokens=64", "data.check=off",
    )  # fmt: skip
    told = {
        "causal_lm": (
            f"data.train={place}/chats.jsonl",
            "data.eval_ratio=0.2",
            "export.targets=[hf]",
            "export.dtype=float32",
        ),
        "completion": ("task=completion", f"data.train={place}/texts.jsonl"),
    }
    return {
        name: lora_lab.train(lora_lab.load_config(*common, *own, f"run_dir={place}/{name}")).path
        for name, own in told.items()
    }


@with_lm_eval
@pytest.mark.long
def test_base_and_adapter_are_compared_on_the_same_rows(runs, tmp_path, capsys):
    place = make_tasks(tmp_path / "tasks")
    for name, run in runs.items():
        told = [f"evaluate.suite=[{','.join(KINDS)}]", f"evaluate.tasks_dir={place}", "evaluate.limit=5"]
        assert cli.main(["evaluate", f"run={run}", *told]) == 0
        said = capsys.readouterr().out
        assert "Suite" in said
        found = json.loads((run / "evaluation.json").read_text())
        assert ("rows" in found) == (name == "causal_lm")
        by_name = {one["task"]: one for one in found["suite"]["tasks"]}
        assert set(by_name) == set(KINDS)
        assert by_name["choose"]["rows"] == 5
        assert by_name["choose"]["shots"] == 1
        text = by_name["text"]
        assert text["tuned"] < text["base"]  # it learned such texts
        assert text["low"] <= text["tuned"] - text["base"] <= text["high"]
        assert text["says"] == "better"
        assert "word_perplexity" in (run / "evaluation.html").read_text()


@with_lm_eval
@pytest.mark.long
@pytest.mark.parametrize("chat", [False, True])
def test_likelihoods_and_texts_are_those_of_lm_evals_own_model(runs, tmp_path, chat):
    """Of the merged checkpoint in float32, whose weights differ from the adapter's by rounding: 1e-4 of a log-likelihood."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_lab.run import takes
    from lora_lab.run.prepared import Trained
    from lora_lab.suites import harness
    from lora_lab.suites.model import AsTrained

    run = runs["causal_lm"]
    place = make_tasks(tmp_path / "tasks")
    long = " ".join(WORDS * 40)  # many windows of the model's 96 positions
    longest = {"prompt": long, "completion": "a", "choices": ["b", "c d"], "answer": 1}
    write_jsonl(place / "rows.jsonl", [*read(place / "rows.jsonl"), longest])
    told = [f"evaluate.suite=[{','.join(KINDS)}]", f"evaluate.tasks_dir={place}", f"evaluate.chat_template={chat}"]
    trained = Trained.open(str(run), takes.EVALUATE, told)
    config = trained.setup.config.evaluate
    tasks = harness.load(config)
    options = {"bootstrap_iters": 0, "apply_chat_template": chat, "fewshot_as_multiturn": chat}

    def answers(model) -> dict:
        for task in tasks["tasks"].values():
            task.set_fewshot_seed(0)
        found = evaluate(model, tasks, **options)
        return {name: [one["resps"] for one in rows] for name, rows in found["samples"].items()}

    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    theirs = answers(HFLM(merged, tokenizer=AutoTokenizer.from_pretrained(run / "merged"), device="cpu", batch_size=2))
    with trained.loaded() as live:
        ours = answers(AsTrained(live, "tuned"))
    assert ours["write"] == theirs["write"]
    numbers = 0
    for name in ("choose", "text"):
        for own, other in zip(ours[name], theirs[name], strict=True):
            for [mine], [its] in zip(own, other, strict=True):
                mine, its = (one if isinstance(one, tuple) else (one, None) for one in (mine, its))
                assert mine[0] == pytest.approx(its[0], abs=1e-4, rel=1e-5)
                assert mine[1] == its[1]
                numbers += 1
    assert numbers == 7 * 2 + 7


@with_lm_eval
@pytest.mark.long
def test_an_adapter_that_changes_nothing_is_refused(runs, tmp_path, capsys):
    place = make_tasks(tmp_path / "tasks")
    config = lora_lab.load_config(
        "model=hub", f"model.path={runs['completion'].parent}/base",
        "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu", "task=completion", "data.check=off",
        f"data.train={runs['completion'].parent}/texts.jsonl", "train.max_steps=1", "optim.lr=1e-30", f"run_dir={tmp_path}/run",
    )  # fmt: skip
    run = lora_lab.train(config).path
    for suite in ("choose", "write"):  # also where only texts are asked for
        message = fails(["evaluate", f"run={run}", f"evaluate.suite=[{suite}]", f"evaluate.tasks_dir={place}"], capsys)
        assert "base and adapter give the same likelihoods" in message


@with_lm_eval
@pytest.mark.long
def test_templates_of_files_stay_in_their_sandbox(runs, tmp_path, capsys):
    kinds = {
        "leaves": KINDS["text"] | {"doc_to_target": "{{ prompt.__class__.__mro__ }}"},
        "elsewhere": KINDS["text"] | {"metric_list": [{"metric": "somebody/code"}]},
        "filtered": KINDS["write"] | {"filter_list": [{"name": "x", "filter": [{"function": "none_such"}]}]},
    }
    place = make_tasks(tmp_path / "tasks", **kinds)
    for name, said in {"leaves": "unsafe", "elsewhere": "no metric", "filtered": "none_such"}.items():
        told = [f"run={runs['causal_lm']}", f"evaluate.suite=[{name}]", f"evaluate.tasks_dir={place}"]
        assert said in fails(["evaluate", *told], capsys)


@with_lm_eval
@pytest.mark.long
def test_lm_evals_own_tasks_need_the_hub(runs, capsys):
    run = f"run={runs['causal_lm']}"
    assert "no task 'hellaswagg'. Did you mean 'hellaswag'?" in fails(
        ["evaluate", run, "evaluate.suite=[hellaswagg]"], capsys
    )
    assert "evaluate.tasks_dir=DIR" in fails(["evaluate", run, "evaluate.suite=[hellaswag]"], capsys)
    groups = {"ai2_arc": "[arc_challenge,arc_easy]", "mmlu": "57 tasks", "bbh_cot_zeroshot": "27 tasks"}
    for group, said in groups.items():
        assert said in fails(["evaluate", run, f"evaluate.suite=[{group}]"], capsys)
