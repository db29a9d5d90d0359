# ruff: noqa: F811  (fixtures of other files)
"""Members of padded tasks that share passes: each is what it would be alone, with its own head and its own dropout."""

from __future__ import annotations

import json

import pytest
import torch

from lora_lab.config import compose
from lora_lab.data.dataset import first_examples
from lora_lab.errors import TrainingError
from lora_lab.fast import routing, unpadded
from lora_lab.run import pipeline
from lora_lab.training import loop
from tests.conftest import write_jsonl
from tests.fast.test_members_at_once import cohort, gradients
from tests.sweep.test_sweep import assert_same_run, trained
from tests.tasks.test_tasks import CASES, COLOURS, make_bert, make_t5, start  # noqa: F401

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
DAILY = ("classification",)


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
        shared = [text for text in start(case) if not text.startswith("run_dir=")]
        return [
            compose.compose([*shared, *SETTINGS, *more, *own, f"run_dir={tmp_path}/{name}/{i}"])
            for i, own in enumerate(each)
        ]

    return make


def assert_as_alone(points, case, each, *more):
    found = trained(points(case, each, *more))
    assert [job.error for job in found] == [None] * len(each)
    for place, config in enumerate(points(case, each, *more, "sweep.execution=auto", name="alone")):
        assert_same_run(found[place].run.path, pipeline.train(config).path)


@pytest.mark.parametrize("case", [one if one in DAILY else pytest.param(one, marks=pytest.mark.long) for one in PADDED])
def test_unlike_members_of_padded_tasks_equal_runs_of_their_own(points, capsys, case):
    assert_as_alone(points, case, UNLIKE)
    assert "3 runs on one base, 3 in each pass" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["classification", pytest.param("token_classification", marks=pytest.mark.long)])
def test_rows_of_one_length_draw_alone_what_they_draw_beside_others(points, tmp_path, monkeypatch, case):
    """A pass without padding is rare, and beside padded rows it has padding too."""
    words = [[COLOURS[i % len(COLOURS)], *["table"] * (5 if i % 5 == 3 else 2)] for i in range(20)]
    rows = [{"text": " ".join(one), "label": one[0]} for one in words]
    if case == "token_classification":
        rows = [{"tokens": one, "tags": ["B-colour", "B-animal", *["O"] * (len(one) - 2)]} for one in words]
    file = write_jsonl(tmp_path / "alike.jsonl", rows)
    seen, found = [], unpadded._found
    monkeypatch.setattr(unpadded, "_found", lambda mask: seen.append(bool(mask.all())) or found(mask))
    sizes = [["train.batch_size=2"], ["train.batch_size=3"], ["train.batch_size=4", "train.micro_batch_size=2"]]
    assert_as_alone(points, case, sizes, f"data.train={file}", "data.check=warn")
    assert {True, False} == set(seen)


@pytest.mark.long
def test_encoder_and_decoder_share_passes(points, capsys):
    assert_as_alone(points, "seq2seq", T5_UNLIKE)
    assert "3 runs on one base, 3 in each pass" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["classification", pytest.param("token_classification", marks=pytest.mark.long)])
def test_a_member_that_fails_leaves_the_others_alone(points, monkeypatch, case):
    plain = loop._update

    def update(share):
        if share.member.run.path.name == "1" and share.member.state.step == 2:
            next(iter(share.member.parameters.values())).data.fill_(float("nan"))
        return plain(share)

    alone = {
        place: pipeline.train(points(case, UNLIKE, "sweep.execution=auto", name="alone")[place]) for place in (0, 2)
    }
    monkeypatch.setattr(loop, "_update", update)
    found = trained(points(case, UNLIKE))
    assert [job.error is None for job in found] == [True, False, True]
    assert "not finite" in str(found[1].error)
    for place in (0, 2):
        assert_same_run(found[place].run.path, alone[place].path)


@pytest.mark.parametrize("case", ["classification", "token_classification"])
def test_what_is_not_a_number_stays_with_whom_it_belongs_to(start, tmp_path, case):
    """Adapter, head, attention and dropout: the other members' gradients are the same to the bit."""
    common = [text for text in start(case) if not text.startswith("run_dir=")]
    setup, members = cohort(compose_in(common), tmp_path, [["adapter.r=4"], ["adapter.r=4"], ["adapter.r=2"]])
    examples = first_examples(setup.train, 9)
    rows = [examples[:3], examples[3:6], examples[6:]]
    expected = gradients(setup, members, rows)
    for parameter in members[1].parameters.values():
        parameter.data.fill_(float("nan"))
    found = gradients(setup, members, rows)
    assert not found[1].isfinite().any()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[2], expected[2])


def compose_in(common: list[str]):
    return lambda *more: compose.compose([*common, *more])


def test_a_base_that_drops_in_its_own_way_lets_members_take_turns(points, monkeypatch, capsys):
    """Somebody's functional dropout draws from torch's generator: noticed before training, whatever its rate."""
    from transformers.models.bert.modeling_bert import BertPooler

    plain = BertPooler.forward
    monkeypatch.setattr(
        BertPooler,
        "forward",
        lambda self, hidden: torch.nn.functional.dropout(plain(self, hidden), 1e-6, self.training),
    )
    found = trained(points("classification", UNLIKE[:2]))
    assert "sweep.execution=batched: the base drops something in a way that knows no members" in str(found[0].error)
    found = trained(points("classification", UNLIKE[:2], "sweep.execution=auto", name="auto"))
    assert [job.error for job in found] == [None, None]
    assert "2 runs take turns after all: the base drops something" in " ".join(capsys.readouterr().out.split())


# -- whose rows are whose ---------------------------------------------------------------------------------------------------


def routes(*padded, items=(0, 0), tokens=(5, 4)):
    return [routing.Route(f"m{i}", tokens[i], items[i], None, tuple(shape[i] for shape in padded)) for i in range(2)]


def slices(told, *shape):
    return [(part.rows.start, part.rows.stop, part.alone) for part in told.parts(shape)]


def test_rows_are_told_apart_by_shape():
    told = routing.Routing()
    with told.routed(routes([(2, 3), (3, 2)], items=(4, 1))):
        assert slices(told, 5, 3) == [(0, 6, (2, 3)), (6, 15, (3, 2))]  # padded to the longest of all
        assert slices(told, 15) == slices(told, 5, 3)
        # end to end, as many for each member, and as a pass of its own has
        assert slices(told, 1, 32) == [(0, 16, (1, 16)), (16, 32, (1, 16))]


def test_what_could_be_two_members_is_nobodys():
    told = routing.Routing()
    with told.routed(routes([(2, 3), (3, 2)], items=(4, 1))):  # five rows, and five items that are others'
        for shape in ((5,), (7, 7)):
            with pytest.raises(TrainingError, match="it cannot be told whose rows"):
                told.parts(shape)


def test_an_encoder_s_places_are_never_as_many_as_a_decoder_s():
    told = routing.Routing()
    with told.routed(routes([(2, 3), (3, 2)], [(2, 1), (3, 3)])):
        assert slices(told, 5, 3) == [(0, 6, (2, 3)), (6, 15, (3, 2))]
        assert slices(told, 5, 4) == [(0, 8, (2, 1)), (8, 20, (3, 3))]


def test_a_member_s_part_is_as_it_is_alone():
    told, x = routing.Routing(), torch.arange(5 * 3 * 2.0).view(5, 3, 2)
    with told.routed(routes([(2, 3), (3, 2)])):
        (_, one), (_, other) = told.split(x, 2)
        assert torch.equal(one, x[:2])
        assert torch.equal(other, x[2:, :2])
        joined = told.joined([one, other], (5, 3))
    x[2:, 2] = 0
    assert torch.equal(joined, x)
