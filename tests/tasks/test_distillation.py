"""Distillation: divergences beside torch's own, the kept classes beside whole logits, and a teacher that is found, compared, read once and
let go."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lora_lab import cli
from lora_lab.base import load
from lora_lab.config import compose
from lora_lab.data import soft_targets
from lora_lab.fast.loss import LossesInChunks
from lora_lab.run import prepared
from lora_lab.tasks.distillation import losses
from tests.conftest import fails, make_base, make_tokenizer


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Another random Llama with the same tokenizer, and two layers more."""
    return make_base(tmp_path_factory.mktemp("teacher") / "six", seed=1, num_hidden_layers=6)


@pytest.fixture
def told(overrides, eval_file, teacher) -> list[str]:
    return [
        *overrides, "task=distillation", f"task.teacher={teacher}", f"data.eval={eval_file}", "data.check=off", "optim.warmup_steps=0",
        "train.max_steps=3",
    ]  # fmt: skip


DIVERGENCES = ["forward_kl", *(pytest.param(name, marks=pytest.mark.long) for name in ("reverse_kl", "jensen_shannon"))]


def moved(model) -> None:
    """Away from the fresh adapter, whose gradients are half zero."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)


def learned(task, model, examples) -> tuple[float, torch.Tensor]:
    """The mean loss of a step and its gradients, flat, without dropout."""
    model.zero_grad()
    model.eval()
    step = task.step(model, [examples], np.random.default_rng(0))
    loss = sum(task.loss(model, batch).loss for batch in step.batches) / step.weight
    loss.backward()
    return loss.item(), torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


# -- divergences ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(7, 40).double(), (3 * torch.randn(7, 40)).double().requires_grad_()


def test_divergences_are_torchs_own(pair):
    teacher, student = (log_softmax(one, -1) for one in pair)
    plain = torch.distributions.kl_divergence
    p, q = (torch.distributions.Categorical(logits=one) for one in (teacher, student))
    assert torch.allclose(losses.forward_kl(teacher, student), plain(p, q), atol=1e-6)
    assert torch.allclose(losses.reverse_kl(teacher, student), plain(q, p), atol=1e-6)
    mixed = torch.distributions.Categorical(probs=0.3 * p.probs + 0.7 * q.probs)
    expected = 0.3 * plain(p, mixed) + 0.7 * plain(q, mixed)
    assert torch.allclose(losses.jensen_shannon(teacher, student, 0.3), expected, atol=1e-6)


def test_an_impossible_token_is_no_nan():
    teacher = torch.tensor([[0.0, -float("inf"), 1.0]]).log_softmax(-1)
    student = torch.tensor([[0.0, 1.0, -float("inf")]], requires_grad=True)
    own = student.log_softmax(-1)
    for found in (losses.forward_kl(teacher, own), losses.reverse_kl(teacher, own), losses.jensen_shannon(teacher, own, 0.5)):  # fmt: skip
        assert found.isfinite().all()
        [gradient] = torch.autograd.grad(found.sum(), student, retain_graph=True)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("k", [1, 5, 39])
def test_the_rest_as_one_class_is_a_lower_bound(pair, k):
    """And all classes together are everything: their probabilities sum to 1."""
    logits, student = pair
    tokens = logits.topk(k).indices
    p, q = losses.classes(logits, tokens), losses.classes(student, tokens)
    assert p.shape == (7, k + 1)
    assert torch.allclose(p.exp().sum(1), torch.ones(7).double())
    whole = [log_softmax(one, -1) for one in pair]
    for divergence in (losses.forward_kl, losses.reverse_kl, lambda one, other: losses.jensen_shannon(one, other, 0.5)):
        assert (divergence(p, q) <= divergence(*whole) + 1e-6).all()


def test_how_far_off_the_gradient_may_be(pair):
    """docs/tasks.md: of forward KL no more than twice the probability that is not kept, summed over the logits."""
    logits, student = pair
    tokens = logits.topk(5).indices
    kept = losses.classes(logits, tokens)
    found = []
    for loss in (
        losses.forward_kl(kept, losses.classes(student, tokens)),
        losses.forward_kl(logits.log_softmax(-1), student.log_softmax(-1)),
    ):
        found += torch.autograd.grad(loss.sum(), student)
    off = (found[0] - found[1]).abs().sum(1)
    assert (off <= 2 * kept[:, -1].exp() + 1e-6).all()
    assert off.max() > 1e-3


def test_chunks_are_the_whole_loss(monkeypatch):
    """Losses and gradients to float32 rounding (1e-6 of the largest), whatever the chunk."""
    monkeypatch.setattr("lora_lab.fast.loss._CHUNK_BYTES", 1)
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 8, requires_grad=True), torch.randn(50, 8)
    targets = torch.randint(50, (37,))
    dlosses = torch.rand(37)

    def losses_of(logits, part):
        return cross_entropy(logits, targets[part], reduction="none"), logits.argmax(1)[:, None].float()

    plain = losses_of(hidden @ weight.T, slice(None))
    chunked = LossesInChunks.apply(hidden, weight, None, losses_of)
    assert torch.allclose(chunked[0], plain[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(chunked[1], plain[1])
    expected, found = (torch.autograd.grad((one * dlosses).sum(), hidden)[0] for one in (plain[0], chunked[0]))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# -- a student and its teacher ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_all_tokens_kept_is_the_divergence_of_whole_logits(told, divergence):
    """Loss and gradients against plain logits of teacher and student, computed here: float32 rounding, 1e-6 of the largest."""
    temperature, ratio = 2.0, 0.7
    options = [f"task.divergence={divergence}", f"task.temperature={temperature}", f"task.kd_ratio={ratio}", "task.top_k=null", "speed=plain"]  # fmt: skip
    ready = prepared.prepare(compose.compose([*told, *options]))
    examples = [example for i in range(6) for example in ready.train[i]]
    taught = torch.cat([_plain(ready.teacher._loaded(), example) for example in examples]).detach()
    with ready.loaded() as live:
        moved(live.model)
        examples = [example for i in range(6) for example in live.setup.train[i]]
        loss, gradient = learned(live.setup.task, live.model, examples)
        live.model.zero_grad()
        own = torch.cat([_plain(live.model, example) for example in examples])
        p, q = log_softmax(taught / temperature, -1), log_softmax(own / temperature, -1)
        middle = torch.log((p.exp() + q.exp()) / 2)
        apart = {
            "forward_kl": lambda: kl_div(q, p, reduction="batchmean", log_target=True),
            "reverse_kl": lambda: kl_div(p, q, reduction="batchmean", log_target=True),
            "jensen_shannon": lambda: (
                sum(kl_div(middle, one, reduction="batchmean", log_target=True) for one in (p, q)) / 2
            ),
        }[divergence]()
        targets = torch.cat([torch.from_numpy(e.input_ids[e.supervised]) for e in examples])
        expected = ratio * temperature**2 * apart + (1 - ratio) * cross_entropy(own, targets)
        expected.backward()
        plain = torch.cat([p.grad.reshape(-1) for p in live.model.parameters() if p.grad is not None])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient - plain).abs().max() <= 2e-6 * plain.abs().max()


def _plain(model, example) -> torch.Tensor:
    """[S, V] the logits of a row alone, by the model itself."""
    where = torch.from_numpy(np.flatnonzero(example.supervised) - 1)
    return model(input_ids=torch.from_numpy(example.input_ids)[None]).logits[0, where].float()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(told, base, divergence):
    """The divergence and its gradient are float32 rounding of 0, whatever is kept; measured so too."""
    for kept in ("8", "null"):
        options = [f"task.teacher={base}", f"task.divergence={divergence}", f"task.top_k={kept}", "task.kd_ratio=1", "task.temperature=3"]  # fmt: skip
        with prepared.prepare(compose.compose([*told, *options])).loaded() as live:
            examples = [example for i in range(6) for example in live.setup.train[i]]
            loss, gradient = learned(live.setup.task, live.model, examples)
            measured = live.measure("base").metrics
            moved(live.model)
            other, away = learned(live.setup.task, live.model, examples)
        assert abs(loss) <= 1e-5
        assert gradient.abs().max() <= 1e-5 * away.abs().max()
        assert other > 0.01
        assert abs(measured["divergence"]) <= 1e-5
        assert measured["teacher_agreement"] == 1
        assert measured["perplexity"] == pytest.approx(
            live.setup.task.baselines(live.setup.held_out)["teacher"].metrics["perplexity"], rel=1e-5
        )


def test_the_loss_in_chunks_is_the_plain_one(told, monkeypatch):
    """Loss and gradients of a run's own step, in chunks of 16 tokens: float32 rounding, 1e-5 of the largest, as of the other
    accelerations of the head."""
    monkeypatch.setattr("lora_lab.fast.loss._CHUNK_BYTES", 1)
    found = []
    for chunked in ("false", "true"):
        options = ["speed=plain", f"speed.chunked_loss={chunked}", "task.divergence=jensen_shannon", "task.beta=0.3"]
        with prepared.prepare(compose.compose([*told, *options])).loaded() as live:
            assert live.setup.task.forward.chunked_head is (chunked == "true")
            moved(live.model)
            found.append(learned(live.setup.task, live.model, [e for i in range(6) for e in live.setup.train[i]]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert (found[1][1] - found[0][1]).abs().max() <= 1e-5 * found[0][1].abs().max()


def test_the_end_of_a_row_keeps_the_teachers_word(told, monkeypatch):
    """Accelerations and shared passes are tried on it; where no token of an answer is left, on a word about another."""
    setup = prepared.prepare(compose.compose(told)).taught()
    for tokens in (1, 4, 1000):
        monkeypatch.setattr("lora_lab.tasks.base.TRIED_TOKENS", tokens)
        for example in setup.train:
            short = setup.task.shortened(example)
            [batch] = setup.task.step(None, [[short]], np.random.default_rng(0)).batches
            [whole] = setup.task.step(None, [[example]], np.random.default_rng(0)).batches
            count = len(batch.targets)
            assert 0 < count == len(batch.teacher_tokens)
            assert torch.equal(batch.teacher_tokens, whole.teacher_tokens[-count:])
            assert torch.equal(batch.teacher_logprobs, whole.teacher_logprobs[-count:])
            assert tokens == 1 or torch.equal(batch.targets, whole.targets[-count:])


def _remembered(model, loaded: list):
    loaded.append(weakref.ref(model))
    return model


def test_a_teacher_reads_once_and_goes_on_where_it_was_stopped(told, monkeypatch, capsys):
    """Other divergences, shares and rates find what is kept; an interruption loses one part; new rows cost themselves alone."""
    monkeypatch.setattr(soft_targets, "_ITEMS", 20)
    told = [*told, "task.temperature=1.5"]  # an entry of its own
    make, made = soft_targets.Part.make, []

    def interrupted(part, say):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(part)
        make(part, say)

    monkeypatch.setattr(soft_targets.Part, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepared.prepare(compose.compose(told)).taught()
    monkeypatch.setattr(soft_targets.Part, "make", lambda part, say: made.append(part) or make(part, say))
    load_model, loaded = load.load_model, []
    monkeypatch.setattr(load, "load_model", lambda *given: _remembered(load_model(*given), loaded))
    setup = prepared.prepare(compose.compose(told)).taught()
    assert [one() for one in loaded] == [None]  # it is gone before the student is loaded
    folders = [part.folder for part in made]
    assert len(folders) == len(set(folders)) > 4

    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    more = ["task.divergence=reverse_kl", "task.kd_ratio=0.9", "optim.lr=0.1", "data.max_train_rows=9"]
    again = prepared.prepare(compose.compose([*told, "data.eval=null", *more[:3]])).taught()
    for one, other in zip(again.train, setup.train, strict=True):
        assert np.array_equal(one["teacher_logprobs"], other["teacher_logprobs"])
        assert one["teacher_tokens"].dtype == np.int64
    assert "reads" not in capsys.readouterr().out.rpartition("data.eval")[2]


@pytest.mark.long
def test_a_damaged_part_is_made_again(told, monkeypatch, capsys):
    told = [*told, "task.temperature=1.7"]
    setup = prepared.prepare(compose.compose(told))
    parts = []
    make = soft_targets.Part.make
    monkeypatch.setattr(soft_targets.Part, "make", lambda part, say: parts.append(part) or make(part, say))
    before = setup.taught().train[0][0]["teacher_logprobs"].copy()
    file = parts[0].folder / "targets.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    count = len(parts)
    after = prepared.prepare(compose.compose(told)).taught().train[0][0]["teacher_logprobs"]
    assert len(parts) == count + 1
    assert np.array_equal(before, after)
    assert "It is made again" in capsys.readouterr().out


@pytest.mark.long
def test_a_run_teaches_with_its_adapter(told, overrides, tmp_path, capsys):
    """A student on the same base that learned nothing yet diverges from a trained run, and not from the run's base."""
    run = tmp_path / "teacher"
    assert (
        cli.main(["train", *overrides, "train.max_steps=3", "optim.warmup_steps=0", "data.check=off", f"run_dir={run}"])
        == 0
    )
    found = {}
    for name in (run, "base"):
        with prepared.prepare(compose.compose([*told, f"task.teacher={name}"])).loaded() as live:
            found[name] = live.measure("base").metrics["divergence"]
            assert live.setup.data_hashes()["task.teacher"]
    assert abs(found["base"]) < 1e-5 < 1e-3 < found[run]

    student = tmp_path / "student"
    assert cli.main(["train", *told, f"task.teacher={run}", f"run_dir={student}"]) == 0
    manifest = json.loads((student / "manifest.json").read_text())
    assert len(manifest["data"]["task.teacher"][str(run)]) == 64
    result = json.loads((student / "result.json").read_text())
    assert set(result["baselines"]) == {"teacher"}
    moved_to = run.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert "no such file or folder" in fails(["evaluate", f"run={student}"], capsys)
    assert cli.main(["evaluate", f"run={student}", f"task.teacher={moved_to}"]) == 0
    evaluation = json.loads((student / "evaluation.json").read_text())
    assert evaluation["tuned"] == pytest.approx(result["tuned"], rel=1e-5)


@pytest.mark.long
def test_another_teacher_than_in_training_is_refused(told, teacher, tmp_path, capsys):
    assert cli.main(["train", *told]) == 0
    other = make_base(tmp_path / "other", seed=3)
    capsys.readouterr()
    assert "it is another one than in training" in fails(
        ["evaluate", f"run={tmp_path}/run", f"task.teacher={other}"], capsys
    )
    assert cli.main(["chat", f"run={tmp_path}/run", "prompt=red", "task.max_new_tokens=2"]) == 0  # nobody is asked


REFUSED = {
    "nobody": (["task.teacher=null"], "task.teacher: nobody is named to learn from"),
    "nowhere": (["task.teacher=nowhere"], "task.teacher=nowhere: no such file or folder"),
    "beta": (["task.beta=0.3"], "task.beta: no effect with task.divergence=forward_kl"),
    "itself": (["task.teacher=base", "task.kd_ratio=1"], "nothing would be learned"),
    "smoothing": (["task.kd_ratio=1", "task.label_smoothing=0.1"], "task.label_smoothing: no effect with task.kd_ratio=1"),
    "streaming": (["data.streaming=true", "data.max_tokens=64"], "data.streaming=true: a teacher reads all rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_learned_is_refused(name, told, tmp_path, capsys):
    more, says = REFUSED[name]
    assert says in fails(["train", *told, *more], capsys)
    assert not (tmp_path / "run").exists()


def test_other_tokens_are_refused(told, tmp_path, capsys):
    """Another vocabulary, and the same one that splits texts otherwise."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    other = make_base(tmp_path / "other", seed=1, vocab_size=400)
    make_tokenizer(other, corpus="quite different words")
    assert "its vocabulary is another than the student's" in fails(["train", *told, f"task.teacher={other}"], capsys)
    same = make_base(tmp_path / "same", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(same)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(same)
    assert "splits texts into other tokens than the student" in fails(["train", *told, f"task.teacher={same}"], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_teacher_with_more_rows_than_tokens_says_the_same(told, tmp_path, teacher):
    """Models of one family have unlike numbers of rows beyond the vocabulary; they are no tokens."""
    from transformers import AutoModelForCausalLM

    wider = tmp_path / "wider"
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(model.config.vocab_size + 64, mean_resizing=False)
    model.save_pretrained(wider)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (teacher / file).exists():
            (wider / file).write_bytes((teacher / file).read_bytes())
    rows = []
    for name in (teacher, wider):
        setup = prepared.prepare(compose.compose([*told, f"task.teacher={name}", "task.top_k=null"])).taught()
        rows.append(setup.train[0][0]["teacher_logprobs"])
    assert np.abs(rows[0] - rows[1]).max() <= 1e-5


@pytest.mark.long
def test_members_of_a_sweep_share_passes(told, tmp_path, monkeypatch):
    """Each adapter is what it is alone (float32, sums in another order)."""
    from safetensors.torch import load_file

    folder = tmp_path / "sweep"
    shared = [one for one in told if not one.startswith("run_dir=")]
    assert (
        cli.main(
            ["train", "-m", *shared, "optim.lr=0.01,0.003", f"hydra.sweep.dir={folder}", "sweep.execution=batched"]
        )
        == 0
    )
    for number, lr in enumerate((0.01, 0.003)):
        alone = tmp_path / f"alone{number}"
        assert cli.main(["train", *shared, f"optim.lr={lr}", f"run_dir={alone}"]) == 0
        one, other = (load_file(path / "adapter/adapter_model.safetensors") for path in (alone, folder / str(number)))
        for name, value in one.items():
            assert torch.allclose(value, other[name], atol=1e-4), name


def test_rows_are_parted_by_what_is_kept_of_them(told):
    train = prepared.prepare(compose.compose(told)).train
    for kept in (2**22 // 9, 1, 2**30):
        parts = soft_targets.parts(train, {}, kept)
        assert [item for part in parts for item in part.items] == list(range(len(train)))
        sizes = [sum(int(train.supervised[item]) for item in part.items) for part in parts]
        most = max(1, min(soft_targets._ITEMS, 2**22 // kept))
        assert all(size <= most or len(part.items) == 1 for size, part in zip(sizes, parts, strict=True))
    assert len({soft_targets.parts(train, {"a": number}, 2**22)[0].folder for number in (1, 2)}) == 2
