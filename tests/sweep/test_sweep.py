"""Sweeps: members of a cohort are what they would be alone, leave each other alone, survive kills, and are ranked honestly."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_lab import cli
from lora_lab.config import compose
from lora_lab.errors import ConfigError, RunError, TrainingError
from lora_lab.run import pipeline
from lora_lab.runtime import storage
from lora_lab.sweep import cohort, engines, halving, jobs, nodes, ranking
from lora_lab.sweep.budget import Budget
from lora_lab.training import loop, sharing

UNLIKE = [
    ["adapter.r=2", "optim.lr=0.02", "seed=3", "adapter.lora_alpha=4"],
    ["adapter.r=8", "adapter.target_modules=[q_proj,down_proj]", "train.batch_size=3", "optim.schedule=cosine"],
    ["adapter.use_rslora=true", "adapter.rank_pattern={v_proj: 7}", "train.max_steps=4", "optim.weight_decay=0.1"],
    ["adapter.lora_dropout=0.3", "train.batch_size=4", "train.micro_batch_size=2", "optim.max_grad_norm=0.1"],
]


@pytest.fixture
def points(overrides, eval_file, tmp_path):
    """Configurations that differ as told, each with a run folder of its own in a sweep."""

    def make(*each: list[str], name: str = "sweep"):
        shared = [*overrides, f"data.eval={eval_file}", "train.epochs=2"]
        return [compose.compose([*shared, *own, f"run_dir={tmp_path}/{name}/{i}"]) for i, own in enumerate(each)]

    return make


def sweep_of(overrides, eval_file, folder: Path, *more: str) -> list[str]:
    """The command line of a sweep."""
    points = [text for text in overrides if not text.startswith("run_dir=")]
    return ["train", "-m", *points, f"data.eval={eval_file}", *more, f"hydra.sweep.dir={folder}"]


GRID = ("train.max_steps=3", "adapter.r=2,4", "optim.lr=0.01,0.001")


def trained(configs) -> list[jobs.Job]:
    found = jobs.jobs_of(configs)
    cohort.train(found)
    return found


def adapter_of(folder: Path) -> torch.Tensor:
    state = load_file(folder / "adapter/adapter_model.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [value for line in lines for key, value in line.items() if key in ("loss", "eval_loss")]


def assert_same_run(one: Path, other: Path, rtol: float = 1e-5) -> None:
    """Loss curves and adapters of two runs; float32 sums in another order, through up to fourteen steps of Adam."""
    assert losses_of(one) == pytest.approx(losses_of(other), rel=rtol)
    found, expected = adapter_of(one), adapter_of(other)
    assert ((found - expected).norm() / expected.norm()).item() <= 3 * rtol


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["none", pytest.param("nf4", marks=pytest.mark.long)])
def test_unlike_members_that_share_passes_equal_runs_of_their_own(points, quant):
    each = [[*own, f"quant={quant}"] for own in UNLIKE]
    found = trained(points(*each))
    assert [job.error for job in found] == [None] * 4
    for config in points(*each, name="alone"):
        alone = pipeline.train(config)
        assert_same_run(alone.path.parents[1] / "sweep" / alone.path.name, alone.path)


@pytest.mark.parametrize(
    "more",
    [
        ["sweep.execution=interleaved"],
        *(pytest.param([one], marks=pytest.mark.long) for one in ("adapter.use_dora=true", "speed=plain")),
    ],
    ids=str,
)
def test_members_in_turns_equal_runs_of_their_own_to_the_byte(points, capsys, more):
    each = [[*own, *more] for own in (["adapter.r=2", "seed=3"], ["adapter.r=8", "optim.lr=0.002"])]
    trained(points(*each))
    if "sweep.execution=interleaved" not in more:
        assert "take turns on one base" in capsys.readouterr().out
    for config in points(*each, name="alone"):
        alone = pipeline.train(config)
        files = [
            folder / "adapter/adapter_model.safetensors"
            for folder in (alone.path, alone.path.parents[1] / "sweep" / alone.path.name)
        ]
        assert storage.sha256(files[0]) == storage.sha256(files[1])


def test_a_shared_pass_is_refused_where_it_would_not_be_exact(points):
    found = trained(points(["adapter.r=2"], ["adapter.r=4", "adapter.use_dora=true"], ["adapter.r=8"]))
    assert [job.error for job in found] == [None] * 3
    found = trained(
        points(*([f"adapter.r={r}", "adapter.use_dora=true", "sweep.execution=batched"] for r in (2, 4)), name="dora")
    )
    assert "sweep.execution=batched: " in str(found[0].error)
    assert "DoRA" in str(found[0].error)


@pytest.mark.parametrize("execution", ["sweep.execution=auto", "sweep.execution=batched"])
def test_rows_that_reach_the_wrong_member_are_noticed(points, monkeypatch, capsys, execution):
    from lora_lab.fast.routing import Routing

    plain = Routing.rows
    monkeypatch.setattr(
        Routing,
        "rows",
        lambda self, count: zip(self.routes, [rows for _, rows in plain(self, count)][::-1], strict=True),
    )
    each = [["seed=1", execution], ["seed=2", execution]]
    found = trained(points(*each))
    if execution == "sweep.execution=auto":
        assert [job.error for job in found] == [None, None]
        assert "2 runs take turns after all: a shared pass changes the gradients" in " ".join(
            capsys.readouterr().out.split()
        )
    else:
        assert all(isinstance(job.error, TrainingError) for job in found)
        assert "a shared pass changes the gradients" in str(found[0].error)


def test_a_pass_that_does_not_fit_is_shared_by_fewer(points, monkeypatch, capsys):
    plain = loop.learn

    def learn(shares, *more):
        plain(shares, *more)
        if len(shares) > 2:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(sharing, "check", lambda *_: None)
    monkeypatch.setattr(loop, "learn", learn)
    each = [[f"seed={i}", "adapter.lora_dropout=0.2"] for i in range(4)]
    found = trained(points(*each))
    assert [job.error for job in found] == [None] * 4
    assert "passes of 2 members from now on" in capsys.readouterr().out
    assert_same_run(found[3].run.path, pipeline.train(points(*each, name="alone")[3]).path)


# -- isolation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("execution", "fault"),
    [
        ("batched", "diverges"),
        pytest.param("interleaved", "raises", marks=pytest.mark.long),
        pytest.param("batched", "raises", marks=pytest.mark.long),
        pytest.param("interleaved", "diverges", marks=pytest.mark.long),
    ],
)
def test_a_member_that_fails_leaves_the_others_alone(points, monkeypatch, execution, fault):
    plain = loop._update

    def update(share):
        if share.member.run.path.name == "1" and share.member.state.step == 3:
            if fault == "raises":
                raise ValueError("a bug in an optimizer")
            next(iter(share.member.parameters.values())).data.fill_(float("nan"))
        return plain(share)

    each = [[f"adapter.r={r}", f"sweep.execution={execution}"] for r in (2, 4, 8)]
    alone = {place: pipeline.train(points(*each, name="alone")[place]) for place in (0, 2)}
    monkeypatch.setattr(loop, "_update", update)
    found = trained(points(*each))
    assert [job.error is None for job in found] == [True, False, True]
    assert ("a bug in an optimizer" if fault == "raises" else "not finite") in str(found[1].error)
    for place in (0, 2):
        assert_same_run(found[place].run.path, alone[place].path)
    assert not found[1].run.result.exists()
    left = json.loads((found[1].run.path / "failed.json").read_text())
    assert left["error"] == str(found[1].error)
    assert ("in update" if fault == "raises" else "in _check") in "".join(left["traceback"])


def test_a_sweep_with_points_that_cannot_be_used_begins_none(overrides, eval_file, tmp_path, capsys):
    points = [text for text in overrides if not text.startswith("run_dir=")]
    sweep = [
        "train",
        "-m",
        *points,
        f"data.eval={eval_file}",
        "train.max_steps=2",
        "adapter.r=4,-1",
        "adapter.target_modules=[q_proj],[nope]",
    ]
    assert cli.main([*sweep, f"hydra.sweep.dir={tmp_path}/sweep"]) == 2
    assert capsys.readouterr().err.count("adapter.r=-1: must be an integer, at least 1") == 1
    assert cli.main([*sweep, "adapter.r=4,8", f"hydra.sweep.dir={tmp_path}/sweep"]) == 2
    assert "adapter.target_modules: nope matches no linear layer" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_s_settings_have_no_effect_on_one_run(overrides, capsys):
    assert cli.main(["train", *overrides, "sweep.seeds=3"]) == 2
    assert "sweep.seeds=3: no effect on a single run" in capsys.readouterr().err


# -- groups ---------------------------------------------------------------------------------------------------------------


def test_jobs_that_cannot_share_a_base_form_groups(points, capsys):
    found = trained(points(["adapter.r=2"], ["adapter.r=4"], ["quant=nf4"], ["adapter.r=2", "name=again"]))
    said = capsys.readouterr().out
    assert len(found) == 3
    assert "would repeat" in said
    assert "1 runs of their own: other quant.method" in said
    assert said.count("tiny, float32, quant none") == 1
    assert found[1].title == '1 (quant.method="none" quant.double_quant=false adapter.r=4)'


def test_a_tracker_of_one_run_at_a_time_gets_one(points):
    found = jobs.jobs_of(points(["tracker=wandb", "adapter.r=2"], ["tracker=wandb", "adapter.r=4"]))
    assert len(jobs.groups(found)) == 2
    assert "tracker.name=wandb follows one at a time" in jobs.why_apart(*found)


def test_a_new_head_is_drawn_for_its_own_seed(points):
    found = jobs.jobs_of(
        points(*(["task=classification", f"seed={seed}", f"adapter.r={r}"] for seed in (0, 1) for r in (2, 4)))
    )
    assert [len(group) for group in jobs.groups(found)] == [2, 2]


# -- stopping and going on ------------------------------------------------------------------------------------------------


def _sweep_command(overrides, eval_file, folder) -> list[str]:
    return sweep_of(overrides, eval_file, folder, "train.epochs=4", "train.save_steps=2", "adapter.r=2,4,8")


_KILLED = """
import os, signal, sys
from lora_lab import cli
from lora_lab.training import loop
plain, count, last = loop._update, [0], int(sys.argv[1])
def update(*given):
    lr = plain(*given)
    count[0] += 1
    if count[0] == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return lr
loop._update = update
cli.main(sys.argv[2:])
"""


@pytest.mark.long
@pytest.mark.parametrize("updates", [5, 32])
def test_a_killed_sweep_goes_on_where_it_stopped(overrides, eval_file, tmp_path, capsys, updates):
    assert cli.main(_sweep_command(overrides, eval_file, tmp_path / "whole")) == 0
    command = _sweep_command(overrides, eval_file, tmp_path / "killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(updates), *command], env=environment, check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL
    assert not list((tmp_path / "killed").glob("*/result.json"))
    capsys.readouterr()
    again = command if updates == 5 else ["resume", f"sweep={tmp_path}/killed"]
    assert cli.main(again) == 0
    assert capsys.readouterr().out.count("resume") == (1 if updates == 5 else 3)
    for name in "012":
        assert_same_run(tmp_path / "killed" / name, tmp_path / "whole" / name)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("*/result.json")}
    assert cli.main(["resume", f"sweep={tmp_path}/killed"]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert "3 of 3 runs are finished already" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.parametrize("updates", [7, 13, 25])
def test_a_killed_halving_goes_on_where_it_stopped(overrides, eval_file, tmp_path, updates):
    found = []
    for name in ("whole", "killed"):
        command = [
            *_sweep_command(overrides, eval_file, tmp_path / name),
            "sweep=halving",
            "sweep.eta=2",
            "sweep.rungs=3",
        ]
        if name == "killed":
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            killed = subprocess.run(
                [sys.executable, "-c", _KILLED, str(updates), *command],
                env=environment,
                check=False,
                capture_output=True,
            )
            assert killed.returncode == -signal.SIGKILL
        assert cli.main(command) == 0
        ranked = json.loads((tmp_path / name / "ranking.json").read_text())
        found.append((ranked["take"], [place["note"] for place in ranked["ranking"]]))
    assert found[0] == found[1]
    assert_same_run(tmp_path / "killed" / found[0][0], tmp_path / "whole" / found[0][0])


def test_a_sweep_is_not_gone_on_with_other_values(overrides, eval_file, tmp_path, capsys):
    command = [*_sweep_command(overrides, eval_file, tmp_path / "sweep"), "train.max_steps=2"]
    assert cli.main(command) == 0
    assert cli.main([*command, "optim.lr=0.001"]) == 2
    assert "holds a run with another optim.lr" in capsys.readouterr().err


# -- spending less --------------------------------------------------------------------------------------------------------


def test_halving_stops_the_worse_and_the_better_are_as_if_alone(points):
    each = [[f"optim.lr={lr}", "sweep=halving", "sweep.eta=2"] for lr in (1e-5, 3e-3, 1e-4, 1e-2)]
    found = trained(points(*each))
    finished = [job for job in found if job.result is not None]
    assert [job.stopped.split(" of ")[0] for job in found if job.stopped] == [
        "stopped at step 2",
        "stopped at step 5",
        "stopped at step 2",
    ] or len(finished) == 1
    assert len(finished) == 1
    alone = {config.optim.lr: config for config in points(*each, name="alone")}
    kept = finished[0]
    whole = pipeline.train(alone[kept.config.optim.lr])
    assert adapter_of(kept.run.path).numpy() == pytest.approx(adapter_of(whole.path).numpy(), abs=1e-4)
    # what went on was the better half, each time
    first = {job.config.optim.lr: halving_loss(job, 2) for job in found}
    went_on = [lr for lr in first if any(job.config.optim.lr == lr and "step 2 " not in job.stopped for job in found)]
    assert sorted(first, key=first.get)[:2] == sorted(went_on, key=first.get)


def halving_loss(job, step: int) -> float:
    lines = [json.loads(line) for line in (job.run.path / "metrics.jsonl").read_text().splitlines()]
    return next(line["eval_loss"] for line in lines if line["step"] == step and "eval_loss" in line)


def test_a_budget_ends_a_sweep(points):
    found = trained(points(["adapter.r=2", "sweep.budget=7steps"], ["adapter.r=4", "sweep.budget=7steps"]))
    assert [job.stopped for job in found] == ["stopped at step 4 of 10"] * 2
    assert [job.error for job in found] == [None, None]
    both = trained(points(["quant=none", "sweep.budget=12steps"], ["quant=nf4", "sweep.budget=12steps"], name="groups"))
    assert both[0].result is not None
    assert both[1].stopped == "stopped at step 2 of 10"
    budget = Budget.of("30minutes")
    assert not budget.used_up()
    budget.began -= 1801
    assert budget.used_up()


def test_rungs_spend_what_they_promise():
    class Member:
        total_steps, stop_at, failure = 90, 90, None

    members = [Member() for _ in range(9)]
    config = compose.compose(["data.train=t.jsonl", "sweep=halving"]).sweep
    spent, at = 0, 0
    for rung in halving.rungs(members, config):
        spent += len(rung.members) * (rung.members[0].stop_at - at)
        at, rung.kept = rung.members[0].stop_at, rung.members[: rung.keep]
    assert spent == 9 * 10 + 3 * 20 + 1 * 60  # instead of 9 * 90
    two = list(halving.rungs(members, dataclasses.replace(config, rungs=2)))[:1]
    assert members[0].stop_at == 30
    assert two[0].keep == 3


# -- ranking ----------------------------------------------------------------------------------------------------------------


def _place(name: str, metrics: list[float], parameters: int = 100) -> ranking.Place:
    return ranking.Place(
        name, {"adapter.r": int(name)}, metrics[0] if metrics else None, metrics, parameters, 1.0, 1.0, 10, ""
    )


def test_what_cannot_be_told_apart_is_said_and_the_smaller_taken():
    places = [_place("64", [1.00, 1.04, 0.98], 400), _place("16", [1.01, 0.99, 1.05], 100), _place("8", [1.3])]
    words, take = ranking.judge(places, "loss", 1)
    assert words.startswith("r=64 and r=16 cannot be told apart here (difference -0.0")
    assert words.endswith("take r=16, the smaller adapter")
    assert take == "16"


def test_a_difference_beyond_the_noise_is_said():
    words, take = ranking.judge([_place("64", [1.00, 1.01, 0.99]), _place("16", [1.21, 1.22, 1.20])], "loss", 1)
    assert "r=64 is better than r=16 (difference +0.1" in words
    assert take == "64"


def test_one_seed_is_no_proof():
    words, take = ranking.judge([_place("4", [1.0]), _place("8", [1.1])], "loss", 1)
    assert "the noise between seeds is unknown" in words
    assert take == "4"
    assert ranking.judge([_place("4", [])], "loss", 1)[1] is None


def test_a_sweep_ends_with_ranking_seeds_report_and_merge(overrides, eval_file, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert cli.main(sweep_of(overrides, eval_file, folder, *GRID, "sweep.seeds=2")) == 0
    result = json.loads((folder / "ranking.json").read_text())
    assert [len(place["metrics"]) for place in result["ranking"]] == [3, 3, 1, 1]
    metrics = [place["metric"] for place in result["ranking"][2:]]
    assert metrics == sorted(metrics)
    rows = list(csv.DictReader((folder / "ranking.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == [place["name"] for place in result["ranking"]]
    assert {row["adapter.r"] for row in rows} == {"2", "4"}
    assert result["judgement"] in capsys.readouterr().out
    assert cli.main(["merge", f"sweep={folder}", "export.dtype=float32"]) == 0
    assert (folder / result["take"] / "merged/config.json").exists()
    with pytest.raises(RunError, match="no run nope to merge"):
        from lora_lab.sweep import sweep

        sweep.merge(str(folder), [], "nope")
    assert cli.main(["resume", f"sweep={folder}"]) == 0  # nothing is left to do, seeds included
    assert json.loads((folder / "ranking.json").read_text()) == result


CHROMIUM = next(
    (
        path
        for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
        if Path(path).exists()
    ),
    None,
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
def test_the_report_is_drawn_by_a_browser(overrides, eval_file, tmp_path):
    from PIL import Image

    folder = tmp_path / "sweep"
    assert cli.main(sweep_of(overrides, eval_file, folder, *GRID, "name=<b>名")) == 0
    page = folder / "report.html"
    text = page.read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[:3] == ["Ranking", "Loss by r and lr", "Training loss, smoothed"]
    assert titles[3:5] == ["Loss against parameters", "Loss against memory"]  # and seconds, where they differ
    assert text.count("<svg") == len(titles) - 1
    assert not re.search(r"(src|href)=.(?!#|data:)", text)  # nothing from elsewhere
    shot = tmp_path / "page.png"
    browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}/profile",
               "--window-size=1200,2600", f"--screenshot={shot}", page.as_uri()]  # fmt: skip
    subprocess.run(browser, check=True, capture_output=True, timeout=120)
    colours = {colour for _, colour in Image.open(shot).convert("RGB").getcolors(10**7)}
    assert (232, 242, 250) in colours  # the taken run's row
    assert (47, 111, 219) in colours  # the Pareto front, and the heat map's best cell
    assert any(abs(r - 238) < 2 and abs(g - 243) < 2 and abs(b - 252) < 2 for r, g, b in colours)  # its worst cell


# -- the plugin -----------------------------------------------------------------------------------------------------------


def test_the_launcher_is_harmless_to_other_applications(tmp_path):
    app = tmp_path / "app.py"
    app.write_text(
        "import sys, hydra\n@hydra.main(version_base='1.3', config_path=None)\ndef main(c): print('ran', c.x, 'torch' in sys.modules, 'lora_lab' in sys.modules)\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, str(app), "-m", "+x=1,2"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("ran 1 False False") == done.stdout.count("ran 2 False False") == 1
    refused = subprocess.run(
        [sys.executable, str(app), "-m", "+x=1", "hydra/launcher=cohort"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "is lora_lab's" in refused.stderr


# -- Optuna -----------------------------------------------------------------------------------------------------------------


def _search_command(overrides, eval_file, folder, *more) -> list[str]:
    search = ["hydra/sweeper=optuna_cohort", "hydra.sweeper.trials=6", "hydra.sweeper.batch=3"]
    space = ["optim.lr=tag(log,interval(1e-5,1e-1))", "adapter.r=2,4"]
    return sweep_of(overrides, eval_file, folder, "train.max_steps=6", "train.save_steps=1", *search, *space, *more)


def _trials(folder: Path) -> list:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage_ = JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    return optuna.load_study(study_name="sweep", storage=storage_).trials


def test_optuna_chooses_batches_that_train_as_cohorts(overrides, eval_file, tmp_path, capsys):
    assert cli.main(_search_command(overrides, eval_file, tmp_path / "search", "sweep=halving")) == 0
    assert capsys.readouterr().out.count("3 runs on one base, 3 in each pass") == 2
    trials = _trials(tmp_path / "search")
    states = [trial.state.name for trial in trials]
    assert len(states) == 6
    assert states.count("PRUNED") == 4
    assert states.count("COMPLETE") == 2
    for trial in trials:
        config = compose.load(tmp_path / "search" / str(trial.number) / "config.yaml")
        assert config.optim.lr == pytest.approx(trial.params["++optim.lr"])
        if trial.state.name == "COMPLETE":
            result = json.loads((tmp_path / "search" / str(trial.number) / "result.json").read_text())
            assert trial.value == result["tuned"]["loss"]
    ranked = json.loads((tmp_path / "search/ranking.json").read_text())["ranking"]
    assert [place["note"].startswith("stopped") for place in ranked] == [False] * 2 + [True] * 4


def test_a_point_that_comes_again_is_not_trained_again(tmp_path):
    from lora_lab.sweep.search import Search

    space = {"adapter.r": {"choices": [2, 4]}}
    search = Search(space, tmp_path / "journal", "random", seed=0)
    asked = []
    while batch := search.ask(3, 6):
        asked += [trial.params["adapter.r"] for trial in batch]
        search.tell(batch, [jobs.Outcome(float(trial.params["adapter.r"])) for trial in batch])
    assert sorted(asked) == [2, 4]
    trials = search.study.trials
    assert len(trials) == 6
    assert all(trial.value == trial.params["adapter.r"] for trial in trials)
    # interrupted in a batch that holds a point twice
    search = Search(space, tmp_path / "other", "random", seed=0)
    first = search.ask(2, 4)
    again = Search(space, tmp_path / "other", "random", seed=0)
    left = again.ask(2, 4)
    assert [trial.number for trial in left] == [trial.number for trial in first]
    again.tell(left, [jobs.Outcome(1.0, stopped_at=3)] * 2)
    assert {trial.state.name for trial in again.study.trials} == {"PRUNED"}
    assert again.ask(2, 8) == []


@pytest.mark.long
def test_a_killed_search_goes_on_with_the_batch_it_was_in(overrides, eval_file, tmp_path):
    command = _search_command(overrides, eval_file, tmp_path / "search")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, "24", *command], env=environment, check=False, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL  # in the second batch
    before = _trials(tmp_path / "search")
    assert [trial.state.name for trial in before] == ["COMPLETE"] * 3 + ["RUNNING"] * 3
    assert cli.main(command) == 0
    after = _trials(tmp_path / "search")
    assert [trial.state.name for trial in after] == ["COMPLETE"] * 6
    assert [trial.params for trial in after] == [trial.params for trial in before]


def test_a_search_for_nothing_is_refused(overrides, eval_file, tmp_path, capsys):
    command = _search_command(overrides, eval_file, tmp_path / "search")
    fixed = [text for text in command if not text.startswith(("optim.lr=tag", "adapter.r="))]
    assert cli.main(fixed) == 2
    assert "nothing to search" in capsys.readouterr().err
    assert cli.main([*command, "hydra.sweeper.sampler=nope"]) == 2
    assert "there are tpe and random" in capsys.readouterr().err


def test_a_sweep_over_recipes(overrides, eval_file, tmp_path, base, rows_file):
    mine = tmp_path / "mine/recipe"
    mine.mkdir(parents=True)
    for name, rank in (("small", 2), ("large", 8)):
        (mine / f"{name}.yaml").write_text(f"# @package _global_\nadapter:\n  r: {rank}\n")
    points = [text for text in overrides if not text.startswith(("run_dir=", "adapter.r="))]
    command = [
        "train",
        "-m",
        "--config-dir",
        str(tmp_path / "mine"),
        *points,
        f"data.eval={eval_file}",
        "train.max_steps=2",
    ]
    assert cli.main([*command, "recipe=small,large", f"hydra.sweep.dir={tmp_path}/sweep"]) == 0
    assert [compose.load(tmp_path / f"sweep/{i}/config.yaml").adapter.r for i in range(2)] == [2, 8]


# -- other nodes ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_cohorts_train_on_two_workers(overrides, eval_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # several processes that wait for each other's threads take for ever
    points = [text for text in overrides if not text.startswith("run_dir=")]
    command = [
        "train",
        "-m",
        *points,
        f"data.eval={eval_file}",
        "train.max_steps=3",
        "adapter.r=2,4",
        "quant=none,nf4",  # bases that cannot be shared: a cohort for each worker
    ]
    nodes = ["hydra/launcher=cohort_local", "hydra.launcher.workers=2", f"hydra.sweep.dir={tmp_path}/nodes"]
    assert cli.main([*command, *nodes]) == 0
    assert capsys.readouterr().out.count("   node  ") == 2
    assert cli.main([*command, f"hydra.sweep.dir={tmp_path}/here"]) == 0
    for name in "0123":
        assert_same_run(tmp_path / "nodes" / name, tmp_path / "here" / name)
    here, there = (json.loads((tmp_path / name / "ranking.json").read_text()) for name in ("here", "nodes"))
    assert [place["name"] for place in here["ranking"]] == [place["name"] for place in there["ranking"]]


@pytest.fixture
def two_cards(monkeypatch):
    """torch's answers on a machine with two cards."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))


@pytest.mark.parametrize(("told", "own"), [(None, "01"), ("5,3", "53")])
@pytest.mark.usefixtures("two_cards")
def test_each_worker_of_this_machine_sees_its_own_card(points, tmp_path, monkeypatch, capsys, told, own):
    if told is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    shim = tmp_path / "python"  # in the place of the interpreter: says what the worker's process sees
    shim.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" > "{tmp_path}/seen-by-${{5#members=}}"\n')
    shim.chmod(0o755)
    monkeypatch.setattr(engines, "sys", types.SimpleNamespace(executable=str(shim)))
    found = jobs.jobs_of(points(["adapter.r=2", "hardware=auto"], ["adapter.r=4", "hardware=auto"]))
    nodes.train(found, jobs.Nodes("local", None, {"timeout_min": 10}))
    assert [(tmp_path / f"seen-by-{name}").read_text().strip() for name in "01"] == list(own)
    said = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("node ")]
    assert [line.rpartition(" ")[2] for line in said] == list(own)


@pytest.mark.parametrize(
    ("executor", "workers", "parameters", "device", "refused"),
    [
        ("local", 3, {}, "auto", r"hydra\.launcher\.workers=3: .* has 2\. Set hydra\.launcher\.workers=2"),
        ("local", 2, {"gpus_per_node": 1}, "auto", r"hydra\.launcher\.parameters\.gpus_per_node: each worker"),
        ("local", 2, {"visible_gpus": [1]}, "cuda", r"hydra\.launcher\.parameters\.visible_gpus: each worker"),
        ("local", 2, {}, "cuda:1", r"hardware\.device=cuda:1: each worker .*_local .* hardware\.device=cuda\."),
        ("ray", 2, {}, "cuda:1", r"hardware\.device=cuda:1: each worker .*_ray .* hardware\.device=cuda\."),
    ],
)
@pytest.mark.usefixtures("two_cards")
def test_workers_without_a_card_of_their_own_are_refused(points, executor, workers, parameters, device, refused):
    found = jobs.jobs_of(
        points(["adapter.r=2", f"hardware.device={device}"], ["adapter.r=4", f"hardware.device={device}"])
    )
    with pytest.raises(ConfigError, match=refused):
        nodes.train(found, jobs.Nodes(executor, workers, parameters))
    assert not any(job.run.path.exists() for job in found)


@pytest.mark.usefixtures("two_cards")
def test_workers_on_the_cpu_and_of_schedulers_get_no_card(points):
    on_cpu = jobs.jobs_of(points(["adapter.r=2"], ["adapter.r=4"]))
    assert nodes._cards(on_cpu, jobs.Nodes("local", 8, {})) == []
    on_cards = jobs.jobs_of(points(["hardware=cuda"]))
    assert nodes._cards(on_cards, jobs.Nodes("slurm", 8, {"gpus_per_node": 1})) == []


def test_groups_are_spread_over_workers(points):
    found = jobs.jobs_of(
        points(*([f"adapter.r={r}", f"quant={q}"] for q in ("none", "nf4", "int8") for r in (2, 4, 8)))
    )
    sizes = {workers: sorted(map(len, nodes.parts(found, workers))) for workers in (1, 2, 3, 4, 9, 20)}
    assert sizes == {1: [9], 2: [3, 6], 3: [3, 3, 3], 4: [1, 2, 3, 3], 9: [1] * 9, 20: [1] * 9}
    for part in nodes.parts(found, 4):
        assert len(jobs.groups(part)) == 1
