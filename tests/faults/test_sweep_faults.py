"""A sweep in which something is wrong: one bad file, one bad member, one bad metric never costs the others anything."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_lab import cli
from lora_lab.config import compose
from lora_lab.errors import RunError
from lora_lab.run import pipeline
from lora_lab.runtime import storage
from lora_lab.sweep import cohort, jobs, ranking, sweep
from lora_lab.tasks import TASKS, metrics
from lora_lab.training import loop
from tests.conftest import write_jsonl
from tests.faults import soak
from tests.sweep.test_sweep import assert_same_run
from tests.tasks.test_tasks import make_bert, several_row


def tiny(base: Path, rows: Path, held_out: Path, *more: str) -> list[str]:
    """Overrides of a small run."""
    return [
        "model=hub", f"model.path={base}", "model.dtype=float32", "quant=none", "tracker=none", "hardware=cpu", f"data.train={rows}",
        f"data.eval={held_out}", "optim.lr=0.01", "adapter.r=2", "train.batch_size=4", *more,
    ]  # fmt: skip


# -- which way a metric is better -------------------------------------------------------------------------------------------

LOWER = {"loss", "perplexity", "pseudo_perplexity", "hamming_loss", "mse", "mae", "reward_rejected", "divergence"}


def test_every_metric_that_a_task_can_report_has_a_direction():
    on = {"generate_rows": 1, "pseudo_perplexity_rows": 1}
    options = [{}, on, {**on, "answer_format": "json"}, {**on, "multi_label": True}]
    found = set()
    for own, more in itertools.product(TASKS.values(), options):
        known = {key: value for key, value in more.items() if key in own.__pydantic_fields__}
        section = own(**known)
        found |= set(section.load().reported(section))
    assert {"bleu", "rougeL", "valid_json", "spearman", "hamming_loss", "masked_accuracy"} <= found
    assert {name for name in found if metrics.lower_is_better(name)} == LOWER
    assert set(metrics._LOWER) == found  # and none is declared that no task reports


def test_a_metric_without_a_direction_is_our_own_mistake():
    with pytest.raises(AssertionError, match="typo: no function declares which way"):
        metrics.lower_is_better("typo")
    with pytest.raises(AssertionError, match="loss: .* declares it the other way"):
        metrics.reports(higher=("loss",))(lambda: None)


@pytest.mark.parametrize("name", ["hamming_loss", pytest.param("f1", marks=pytest.mark.faults)])
def test_a_sweep_ranks_the_best_first_and_merges_it(name, tmp_path, reload_here):
    base = make_bert(tmp_path / "bert")
    files = [
        write_jsonl(tmp_path / f"{kind}.jsonl", [several_row(draw) for _ in range(count)])
        for kind, draw, count in (("train", random.Random(0), 48), ("eval", random.Random(1), 12))
    ]
    command = [
        "train", "-m", *tiny(base, *files), "task=classification", "task.multi_label=true", "data.check=warn", "optim.schedule=constant",
        "optim.warmup_steps=0", "train.epochs=9", "train.max_steps=30", "train.keep_best=false", "optim.lr=1e-9,0.005",
        f"sweep.metric={name}", f"hydra.sweep.dir={tmp_path}/sweep",
    ]  # fmt: skip
    assert cli.main(command) == 0
    ranked = json.loads((tmp_path / "sweep/ranking.json").read_text())
    first, second = (place["metric"] for place in ranked["ranking"])
    assert first < second if name == "hamming_loss" else first > second
    assert (ranked["take"], ranked["lower_is_better"]) == ("1", name == "hamming_loss")
    assert cli.main(["merge", f"sweep={tmp_path}/sweep", "export.dtype=float32", "merge.max_loss_increase=9"]) == 0
    assert (tmp_path / "sweep/1/merged").is_dir()


# -- what can be known before anything is loaded -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ["sweep.metric=perplexty"],
            "sweep.metric=perplexty: task=causal_lm does not report it. Did you mean 'perplexity'?",
        ),
        (["sweep.metric=hamming_loss"], "sweep.metric=hamming_loss: task=causal_lm does not report it."),
        (["sweep.metric=bleu"], "sweep.metric=bleu: task=causal_lm does not report it. Set task.generate_rows=100."),
        (["sweep.metric=valid_json", "task.generate_rows=2"], "There are: loss, token_accuracy, perplexity, rouge1"),
        (["sweep=halving", "data.eval=null"], "sweep=halving: compares held-out losses. Set data.eval=FILE"),
        (["sweep.metric=perplexity", "data.eval=null"], "sweep.metric=perplexity: is measured on held-out rows. Set"),
        (["seed=range(4,4)"], "seed=range(4,4): a sweep without values."),
        (["sweep.seeds=2", "data.eval=null"], "sweep.seeds=2: repeats what is best on held-out rows. Set"),
    ],
)
def test_a_sweep_that_could_not_be_ranked_is_refused_at_once(
    base, rows_file, eval_file, tmp_path, capsys, monkeypatch, more, told
):
    monkeypatch.setattr(cohort, "prepare", lambda *_: pytest.fail("something was loaded"))
    command = ["train", "-m", *tiny(base, rows_file, eval_file), *more, f"hydra.sweep.dir={tmp_path}/sweep"]
    assert cli.main([*command, "adapter.r=2,4"]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_point_with_a_metric_of_another_task_makes_no_folder(base, rows_file, eval_file, tmp_path):
    shared = tiny(base, rows_file, eval_file)
    points = [
        compose.compose([*shared, f"sweep.metric={name}", f"run_dir={tmp_path}/sweep/{name}"])
        for name in ("loss", "f1")
    ]
    waiting = cohort.opened(jobs.jobs_of(points))
    assert [job.config.sweep.metric for job in waiting] == ["loss"]
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["loss"]


# -- one bad file -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base, rows_file, eval_file) -> Path:
    """A sweep of three runs at its end."""
    folder = tmp_path_factory.mktemp("sweeps") / "sweep"
    shared = tiny(base, rows_file, eval_file, "train.max_steps=3", "train.save_steps=1")
    found = sweep.Sweep()
    found.launch([compose.compose([*shared, f"seed={seed}", f"run_dir={folder}/{seed}"]) for seed in range(3)])
    assert found.end([]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "sweep"))


def bytes_of(folder: Path, *names: str) -> dict[str, bytes]:
    """What two runs have made."""
    files = ("adapter/adapter_model.safetensors", "result.json", "metrics.jsonl", "config.yaml")
    return {f"{name}/{file}": (folder / name / file).read_bytes() for name in names for file in files}


def _cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _with(**values) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **values}).encode()


RESULTS = {
    "empty": lambda _: b"",
    "cut": _cut,
    "zeros": lambda content: bytes(len(content)),
    "a list": lambda _: b"[]",
    "a number": lambda _: b"3",
    "an empty object": lambda _: b"{}",
    "not UTF-8": lambda content: content + b"\xff",
    "deep": lambda _: b"[" * 100_000,
    "tuned is text": _with(tuned="good"),
    "a metric is text": _with(tuned={"loss": "0.1"}),
    "coverage is a list": _with(coverage=[]),
    "steps is missing": _with(steps=None),
}


@pytest.mark.parametrize("damage", RESULTS)
def test_a_damaged_result_is_a_run_that_is_not_finished(damage, folder, monkeypatch):
    """Told without loading anything: which runs would train."""
    file = folder / "1/result.json"
    file.write_bytes(RESULTS[damage](file.read_bytes()))
    found, left_out = jobs.in_folder(folder)
    waiting = cohort.opened(found)
    assert [job.run.path.name for job in waiting] == ["1"]
    assert left_out == []
    assert str(file) in waiting[0].damage
    assert ranking.metric(waiting[0]) is None
    assert ranking.metric(found[0]) is not None


def test_a_sweep_with_a_cut_result_goes_on_and_is_whole_again(folder, finished, capsys):
    (folder / "1/result.json").write_bytes(b'{"steps": 3, "tu')
    others = bytes_of(folder, "0", "2")
    assert cli.main(["resume", f"sweep={folder}"]) == 0
    assert "is not finished after all" in capsys.readouterr().out
    assert bytes_of(folder, "0", "2") == others
    weights = "1/adapter/adapter_model.safetensors"
    assert (folder / weights).read_bytes() == (finished / weights).read_bytes()
    assert json.loads((folder / "1/result.json").read_text())["steps"] == 3
    [before, after] = [json.loads((one / "ranking.json").read_text()) for one in (finished, folder)]
    assert [place["name"] for place in before["ranking"]] == [place["name"] for place in after["ranking"]]


METRICS = {
    "torn": _cut,
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "other values": lambda content: b'3\n[]\n{"step": "x"}\n{"step": 1, "loss": "low"}\n' + content,
    "one long line": lambda content: b"[" * 100_000 + b"\n" + content,
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("damage", METRICS)
def test_damaged_metrics_of_a_finished_run_cost_its_curve_at_most(damage, folder, finished, capsys):
    file = folder / "1/metrics.jsonl"
    file.write_bytes(METRICS[damage](file.read_bytes()))
    assert cli.main(["resume", f"sweep={folder}"]) == 0
    said = capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    if damage != "empty":
        assert f"{file}: " in said
        assert "left out of its curve" in page
    [before, after] = [json.loads((one / "ranking.json").read_text()) for one in (finished, folder)]
    assert before["take"] == after["take"]
    assert len(after["ranking"]) == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"error": 3}', b'{"error": "x", "exit_code": "y"}', b"\xff"])
def test_a_damaged_failure_is_still_a_failure(folder, content):
    job = jobs.in_folder(folder)[0][1]
    (job.run.path / "failed.json").write_bytes(content)
    error = job.failure()
    assert error is not None
    assert error.exit_code in (1, 2)


def test_a_failure_that_cannot_be_kept_stops_no_other_run(folder, capsys):
    (folder / "1/failed.json").mkdir()
    (folder / "1/result.json").unlink()
    assert cli.main(["resume", f"sweep={folder}"]) == 0
    assert "its error cannot be kept" in capsys.readouterr().out
    assert (folder / "1/result.json").exists()


CONFIGS = {
    "cut": _cut,
    "empty": lambda _: b"",
    "not YAML": lambda _: b"a: b: c\n\t- {",
    "a list": lambda _: b"- 1\n",
    "not UTF-8": lambda content: content + b"\xff",
    "deep": lambda _: b"[" * 50_000,
    "newer": lambda content: content.replace(b"schema_version: ", b"schema_version: 9"),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_a_damaged_config_leaves_its_run_out_and_no_other(damage, folder, capsys):
    file = folder / "1/config.yaml"
    file.write_bytes(CONFIGS[damage](file.read_bytes()))
    others = bytes_of(folder, "0", "2")
    assert cli.main(["resume", f"sweep={folder}"]) == 2
    captured = capsys.readouterr()
    assert f"{folder}/1" in captured.err
    assert "Traceback" not in captured.err
    assert "2 of 2 runs are finished already" in captured.out
    assert bytes_of(folder, "0", "2") == others
    ranked = json.loads((folder / "ranking.json").read_text())["ranking"]
    assert sorted(place["name"] for place in ranked) == ["0", "1", "2"]
    assert ranked[-1]["name"] == "1"
    assert ranked[-1]["note"].startswith("failed: ")


def test_what_is_no_run_is_named_or_passed_over(folder, tmp_path, capsys):
    (folder / "multirun.yaml").write_bytes(b"\xff{")
    shutil.copytree(folder / "0", folder / ".0.123.tmp")  # hidden: a copy in the making
    (folder / "notes").mkdir()
    (folder / "7").write_text("a file")
    (folder / "8").mkdir()
    shutil.copytree(folder / "0", tmp_path / "elsewhere")
    (folder / "9").symlink_to(tmp_path / "elsewhere")
    assert cli.main(["resume", f"sweep={folder}"]) == 2
    message = capsys.readouterr().err
    for name, why in (
        ("7", "a file where a run's folder should be"),
        ("8", "no config.yaml, so the run never began"),
        ("9", "a link"),
    ):
        assert f"{folder}/{name}: {why}" in message
    ranked = json.loads((folder / "ranking.json").read_text())["ranking"]
    assert [place["name"] for place in ranked if place["metric"] is not None] != []
    assert {place["name"] for place in ranked} == {"0", "1", "2", "7", "8", "9"}
    for names in (["../0"], ["nope"], [".0.123.tmp"]):
        with pytest.raises(RunError, match="there. Name a folder"):
            jobs.in_folder(folder, names)
    with pytest.raises(RunError, match="cannot be read"):
        jobs.in_folder(folder / "7")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"take": ', b'{"take": 3}', b"{}", b"\xff", b'{"take": ["1"]}'], ids=repr
)
def test_a_damaged_ranking_is_told_with_the_way_to_make_it_again(content, folder, capsys):
    (folder / "ranking.json").write_bytes(content)
    assert cli.main(["merge", f"sweep={folder}"]) == 2
    message = capsys.readouterr().err
    assert f"Make it again: lora-lab resume sweep={folder}" in message
    assert "Traceback" not in message


def test_a_ranking_is_made_again_and_leads_nowhere_else(folder, finished, tmp_path, capsys):
    (folder / "ranking.json").write_text("{")
    assert cli.main(["resume", f"sweep={folder}"]) == 0
    again = json.loads((folder / "ranking.json").read_text())
    assert again["take"] == json.loads((finished / "ranking.json").read_text())["take"]
    shutil.copytree(folder / "0", tmp_path / "evil")
    (folder / "ranking.json").write_text(json.dumps({**again, "take": "../evil"}))
    assert cli.main(["merge", f"sweep={folder}"]) == 2
    assert "no run ../evil to merge. Name one of 0, 1, 2" in capsys.readouterr().err


def test_a_drawing_that_cannot_be_made_costs_only_itself(folder, monkeypatch, capsys):
    from lora_lab.report import sweep_report

    def fails(*_):
        raise ValueError("no such colour")

    monkeypatch.setattr(sweep_report, "_pareto", fails)
    assert cli.main(["resume", f"sweep={folder}"]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Loss against cost: cannot be drawn of these runs (no such colour)." in page
    assert "<h2>Training loss, smoothed</h2>" in page
    assert "no such colour" in capsys.readouterr().out


# -- the journal of a search ----------------------------------------------------------------------------------------------------


def _search(journal: Path):
    pytest.importorskip("optuna")
    from lora_lab.sweep.search import Search

    return Search({"adapter.r": {"choices": [2, 4, 8]}}, journal, "random", seed=0)


@pytest.mark.parametrize(
    "tail", [b'{"op_code":', b'{"op_code":4}', b"\xff\xfe", b"garbage\n", b"[]\n", b"\n"], ids=repr
)
def test_a_torn_journal_goes_on_without_its_end(tail, tmp_path, capsys):
    journal = tmp_path / "optuna.journal"
    asked = _search(journal).ask(2, 4)
    whole = journal.read_bytes()
    journal.write_bytes(whole + tail)
    again = _search(journal)
    assert journal.read_bytes().startswith(whole)  # and what Optuna writes when a study is loaded
    assert [trial.number for trial in again.ask(2, 4)] == [trial.number for trial in asked]
    assert "its last line is torn; it was moved to optuna.journal.torn1" in capsys.readouterr().out
    assert (tmp_path / "optuna.journal.torn1").exists()
    journal.write_bytes(journal.read_bytes() + tail)
    _search(journal)
    assert (tmp_path / "optuna.journal.torn2").exists()


def test_a_journal_cut_anywhere_goes_on_or_begins_anew(tmp_path):
    journal = tmp_path / "optuna.journal"
    search = _search(journal)
    search.tell(search.ask(1, 1), [jobs.Outcome(1.0)])
    whole = journal.read_bytes()
    for cut in range(0, len(whole), 37):
        journal.write_bytes(whole[:cut])
        again = _search(journal)
        assert len(again.study.trials) <= 1


def test_a_journal_that_is_damaged_inside_is_refused(tmp_path):
    journal = tmp_path / "optuna.journal"
    _search(journal).ask(2, 4)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], b"garbage\n", *lines[1:]]))
    with pytest.raises(RunError, match=r"line 2 of \d+ is damaged, and not only the last one. Move the journal away"):
        _search(journal)
    journal.write_bytes(b'{"op_code": 77}\n{"op_code": "x", "worker_id": []}\n')
    with pytest.raises(RunError, match="optuna.journal: cannot be read"):
        _search(journal)
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(RunError, match="not a regular file"):
        _search(journal)
    journal.unlink()
    (tmp_path / "other").write_text("precious")
    journal.symlink_to(tmp_path / "other")
    with pytest.raises(RunError, match="a link, which may lead anywhere"):
        _search(journal)
    assert (tmp_path / "other").read_text() == "precious"


# -- isolation of eight -----------------------------------------------------------------------------------------------------------

FAULTS = ("raises", "diverges", "does not fit")


def _failing(monkeypatch, fault: str, name: str) -> None:
    """From its second step on, something is wrong with one run."""

    def is_it(member) -> bool:
        return member.run.path.name == name and member.state.step >= 1

    plain, learned = loop._check, loop.learn

    def check(share, *more):
        if is_it(share.member) and fault == "raises":
            raise ValueError("a bug in an optimizer")
        if is_it(share.member) and fault == "diverges":
            share.loss = float("nan")
        plain(share, *more)

    def learn(shares, *more):
        if fault == "does not fit" and any(is_it(one.member) for one in shares):
            raise torch.OutOfMemoryError("no room")
        learned(shares, *more)

    monkeypatch.setattr(loop, "_check", check)
    monkeypatch.setattr(loop, "learn", learn)


@pytest.fixture
def eight(base, rows_file, eval_file, tmp_path):
    def make(name: str, execution: str):
        shared = tiny(base, rows_file, eval_file, "train.max_steps=2", f"sweep.execution={execution}")
        return [
            compose.compose(
                [*shared, f"adapter.r={2 + place % 3}", f"seed={place}", f"run_dir={tmp_path}/{name}/{place}"]
            )
            for place in range(8)
        ]

    return make


def _weights(path: Path) -> str:
    return storage.sha256(path / "adapter/adapter_model.safetensors")


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("execution", ["batched", "interleaved"])
def test_one_of_eight_fails_in_any_way_and_seven_are_what_they_would_be(eight, tmp_path, monkeypatch, execution, fault):
    """In turns to the byte; in shared passes to rounding, because batches of seven and of eight add up in another order."""
    alone = [pipeline.train(config).path for config in eight("alone", execution)]
    for place in range(8):
        with monkeypatch.context() as patch:
            _failing(patch, fault, str(place))
            found = jobs.jobs_of(eight(f"with{place}", execution))
            cohort.train(found)
        assert [job.error is None for job in found] == [other != place for other in range(8)]
        for other in set(range(8)) - {place}:
            if execution == "interleaved":
                assert _weights(found[other].run.path) == _weights(alone[other])
            else:
                assert_same_run(found[other].run.path, alone[other])
        assert not found[place].run.result.exists()


def test_one_of_eight_that_does_not_fit_leaves_seven(eight, monkeypatch):
    _failing(monkeypatch, "does not fit", "3")
    found = jobs.jobs_of(eight("sweep", "batched"))
    cohort.train(found)
    assert [job.run.path.name for job in found if job.error is not None] == ["3"]
    assert "does not fit into memory" in str(found[3].error)
    assert all(job.result["steps"] == 2 for job in found if job.error is None)


# -- many runs, and faults at random ----------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_a_small_soak_loses_nothing(tmp_path, monkeypatch):
    """24 runs in this process: one raises, one diverges, one result is cut, one SIGTERM."""
    runs, group = 24, 12
    faults = soak.Faults(tmp_path, soak.plan(runs, seed=1), signal.SIGTERM)
    monkeypatch.setattr(loop, "_update", faults.update)
    from lora_lab.errors import Interrupted
    from lora_lab.runtime import signals

    signals.install()
    codes = []
    while len(codes) < 4 and not (codes and codes[-1] == 0 and not faults.cut()):
        try:
            codes.append(soak.launch(tmp_path, runs, group))
        except Interrupted as stopped:
            codes.append(stopped.exit_code)
    assert 143 in codes
    assert codes[-1] == 0
    soak.check(tmp_path, runs)
    assert {mark.name.split("-")[1] for mark in faults.marks.iterdir()} == {"raise", "nan", "cut", "kill"}


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_a_soak_loses_nothing_and_memory_stays_flat(tmp_path):
    """Many runs of 20 steps on one tiny base; 5 % of them raise, diverge, lose their result, or take the process with them."""
    runs, group = int(os.environ.get("LORA_LAB_SOAK_RUNS", "1000")), 100
    command = [sys.executable, "-m", "tests.faults.soak", str(tmp_path), str(runs), str(group), "1"]
    before: dict[Path, int] = {}
    for _ in range(soak.KILLS + 4):
        with open(tmp_path / "log", "a", encoding="utf-8") as log:
            done = subprocess.run(
                command, check=False, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        assert done.returncode in (0, 1, 2, 3, -signal.SIGKILL), (tmp_path / "log").read_text()[-3000:]
        now = {file: file.stat().st_mtime_ns for file in tmp_path.glob("sweep/*/result.json")}
        cut = {tmp_path / "sweep" / mark.name.split("-")[0] / "result.json" for mark in tmp_path.glob("faults/*-cut")}
        assert all(now[file] == time for file, time in before.items() if file not in cut)  # no run is made twice
        before = now
        if done.returncode == 0 and all(_is_whole(file) for file in now):
            break
    soak.check(tmp_path, runs)
    kinds = {mark.name.split("-")[1] for mark in tmp_path.glob("faults/*")}
    assert kinds == {"raise", "nan", "cut", "kill"}
    processes: dict[int, list[int]] = {}
    for line in (tmp_path / "rss.jsonl").read_text().splitlines():
        process, memory = json.loads(line)
        processes.setdefault(process, []).append(memory)
    longest = max(processes.values(), key=len)
    assert max(longest[1:], default=0) <= longest[0] * 1.1 + 32, longest  # MiB after each group


def _is_whole(file: Path) -> bool:
    try:
        return json.loads(file.read_text())["steps"] == soak.STEPS
    except ValueError:
        return False
