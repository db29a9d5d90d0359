# ruff: noqa: F811  (fixtures of other files)
"""Members of padded tasks that share passes: each is what it would be alone, with its own head and its own dropout."""

from __future__ import annotations

import json

import pytest

from lora_lab.config import compose
from lora_lab.run import pipeline
from tests.sweep.test_sweep import assert_same_run, trained
from tests.tasks.test_tasks import CASES, make_bert, make_t5, start  # noqa: F401

# They differ in rank, rate, targets, dropout, rows of a step and of a pass; a new head is drawn for the seed, which they share.
UNLIKE = [
    ["adapter.r=2", "optim.lr=0.003", "adapter.lora_alpha=4"],
    ["adapter.r=8", "adapter.lora_dropout=0.2", "train.batch_size=6", "train.micro_batch_size=4"],
    ["adapter.r=3", "adapter.target_modules=[query,value]", "optim.weight_decay=0.1", "train.batch_size=5"],
]
T5_UNLIKE = [*UNLIKE[:2], ["adapter.r=3", "adapter.target_modules=[q,v,wo]", "train.batch_size=5", "seed=4"]]
# A reward head's bias has no gradient but rounding, of which Adam would make a step: hence `optim.eps`.
SETTINGS = [
    "optim.lr=0.001",
    "optim.eps=1e-5",
    "train.max_steps=5",
    "train.save_steps=5",
    "train.eval_steps=5",
    "sweep.execution=batched",
]
PADDED = (
    "classification", "classification-several", "classification-weights", "regression", "reward", "token_classification",
    "question_answering", "masked_lm",
)  # fmt: skip
DAILY = ("classification", "reward", "token_classification", "question_answering", "masked_lm")


def dropping(folder, rate: float = 0.2):
    """A model's configuration with dropout in every place that it knows of."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate"):
        if name in config:
            config[name] = rate
    file.write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("dropping")
    return {
        "llama": base,
        "bert": dropping(make_bert(folder / "bert")),
        "bert_without_head": dropping(make_bert(folder / "bare", with_head=False)),
        "t5": dropping(make_t5(folder / "t5")),
    }


@pytest.fixture
def points(start, tmp_path):
    """Configurations of a case's sweep, or of its runs alone."""

    def make(case: str, each: list[list[str]], *more: str, name: str = "sweep"):
        shared = [text for text in start(case, *more) if not text.startswith("run_dir=")]
        return [
            compose.compose([*shared, *SETTINGS, *own, f"run_dir={tmp_path}/{name}/{i}"]) for i, own in enumerate(each)
        ]

    return make


def assert_as_alone(points, case, each, *more):
    found = trained(points(case, each, *more))
    assert [job.error for job in found] == [None] * len(each)
    alone = [text for text in more if text != "sweep.execution=auto"]
    for place, config in enumerate(points(case, each, *alone, "sweep.execution=auto", name="alone")):
        assert_same_run(found[place].run.path, pipeline.train(config).path)


@pytest.mark.parametrize("case", [one if one in DAILY else pytest.param(one, marks=pytest.mark.long) for one in PADDED])
def test_unlike_members_of_padded_tasks_equal_runs_of_their_own(points, capsys, case):
    assert_as_alone(points, case, UNLIKE)
    assert "3 runs on one base, 3 in each pass" in capsys.readouterr().out
