"""Padded rows: attention of short ones, no padding between the layers, and dropout, each beside its plain twin."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, softmax

from lora_lab.adapters.attach import base_of, trainable
from lora_lab.data.dataset import first_examples
from lora_lab.fast import dense, dropout, short_rows, unpadded
from lora_lab.fast.modules import Projection
from lora_lab.fast.routing import whole
from lora_lab.training import oom
from tests import families
from tests.conftest import write_jsonl
from tests.fast.test_fast import first_step

# float32 sums in another order, through two layers and back (measured: at most 2e-6)
CLOSE = 1e-5
WORDS = "red green blue lamp table small old new the a".split()
ENCODERS = (
    "bert",
    "roberta",
    "electra",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "mpnet",
    "deberta-v2",
    "modernbert",
    "albert",
)
DAILY = ("bert", "electra", "mpnet", "deberta-v2")


def rows_of(task: str, count: int = 12) -> list[dict]:
    rng = np.random.default_rng(0)
    texts = [[str(word) for word in rng.choice(WORDS, size=2 + 3 * (i % 7))] for i in range(count)]
    if task == "token_classification":
        return [{"tokens": words, "tags": ["O" if word != "lamp" else "B-X" for word in words]} for words in texts]
    return [{"text": " ".join(words), "label": "ab"[i % 2]} for i, words in enumerate(texts)]


def step(config, train: bool = True):
    """Loss, gradients and the live model, of six rows of different lengths."""
    loss, gradients, live = first_step(config, rows=6, train=train)
    return loss.item(), torch.cat([one.flatten() for one in gradients.values() if one is not None]), live


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    made: dict[str, str] = {}

    def of(family: str, task: str = "classification") -> str:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            families.make(task, family, folder)
            made[family] = str(folder)
        return made[family]

    return of


def config(config_of, tmp_path, base: str, task: str = "classification", *more: str):
    rows = write_jsonl(tmp_path / f"{task}.jsonl", rows_of(task))
    return config_of(f"model.path={base}", f"task={task}", f"data.train={rows}", *more)


@pytest.mark.parametrize(
    "family", [one if one in DAILY else pytest.param(one, marks=pytest.mark.long) for one in ENCODERS]
)
@pytest.mark.parametrize("task", ["classification", "token_classification"])
def test_rows_without_padding_learn_what_padded_rows_learn(encoders, config_of, tmp_path, capsys, family, task):
    base = encoders(family)
    loss, gradients, live = step(config(config_of, tmp_path, base, task), train=False)
    said = capsys.readouterr().out
    expected, plain, _ = step(config(config_of, tmp_path, base, task, "speed=plain"), train=False)
    assert loss == pytest.approx(expected, rel=CLOSE)
    assert (gradients - plain).norm() <= CLOSE * plain.norm()
    if family in ("bert", "roberta", "electra", "xlm-roberta", "camembert"):
        assert live.setup.task.forward.unpadded, said
        assert ("last layer only where it is read" in said) == (task == "classification")


def test_rows_of_unlike_length_are_attended_to_in_groups(encoders, config_of, tmp_path, monkeypatch):
    given = config(config_of, tmp_path, encoders("bert"), "classification", "speed.last_layer_rows=false")
    monkeypatch.setattr(unpadded, "_ENOUGH_TOKENS", 10**6)
    expected, plain, _ = step(given, train=False)
    seen = []
    monkeypatch.setattr(unpadded, "_ENOUGH_TOKENS", 0)
    alike = unpadded.Rows.alike.func
    monkeypatch.setattr(unpadded.Rows, "alike", property(lambda rows: seen.append(alike(rows)) or seen[-1]))
    loss, gradients, live = step(given, train=False)
    assert live.setup.task.forward.unpadded
    assert max(map(len, seen)) > 1
    for groups in seen:
        for _, group in groups:
            shortest = unpadded.in_widths(int(group.mask.flatten(1).sum(-1).min()))
            assert group.shape[1] <= 1.5 * shortest
    assert loss == pytest.approx(expected, rel=CLOSE)
    assert (gradients - plain).norm() <= CLOSE * plain.norm()


def test_a_long_row_beside_short_ones_costs_what_it_has():
    lengths = torch.tensor([12, 400, 9, *[11] * 28, 390])
    mask = (torch.arange(400) < lengths[:, None])[:, None, None].expand(-1, 1, 400, 400)
    rows = unpadded._found(mask)
    groups = rows.alike
    assert sorted(token for tokens, _ in groups for token in tokens.tolist()) == list(range(int(lengths.sum())))
    squares = sum(group.shape[0] * group.shape[1] ** 2 for _, group in groups)
    assert squares <= 1.1 * sum(
        unpadded.in_widths(length) ** 2 for length in lengths.tolist()
    )  # all in one: 15 times as many
    x = torch.randn(1, len(rows.places), 3)
    parts = [group.take(group.put(x[:, tokens])) for tokens, group in groups]
    assert torch.equal(torch.cat(parts, 1)[:, rows.back][:, rows.read], x[:, rows.read])


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_layers_see_the_same_rows(encoders, config_of, tmp_path, every):
    base = encoders("bert")
    more = ["train.gradient_checkpointing=true", f"train.recompute_every={every}"]
    settings = [base, "classification", *more]
    loss, gradients, live = step(config(config_of, tmp_path, *settings))
    oom.recompute(live.model, every, offload=False)
    live.model.zero_grad()
    batch = live.setup.task.collate(first_examples(live.setup.train, 6), np.random.default_rng(1))
    torch.manual_seed(1)
    again = live.setup.task.loss(live.model, batch).loss
    again.backward()
    found = torch.cat([one.grad.flatten() for one in trainable(live.model).values() if one.grad is not None])
    assert again.item() == loss
    assert torch.equal(found, gradients)


def test_nothing_is_computed_of_padding(encoders, config_of, tmp_path):
    _, _, live = step(config(config_of, tmp_path, encoders("bert")), train=False)
    layers = unpadded.layers_of(base_of(live.model))
    seen = []
    handles = [
        layer.attention.self.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape)) for layer in layers
    ]
    batch = live.setup.task.collate(first_examples(live.setup.train, 6), np.random.default_rng(0))
    live.setup.task.loss(live.model, batch)
    for handle in handles:
        handle.remove()
    tokens = int(batch.inputs["attention_mask"].sum())
    assert tokens < batch.inputs["attention_mask"].numel()
    assert [shape[:2] for shape in seen] == [(1, whole(tokens))] * len(layers)
    assert whole(tokens) < batch.inputs["attention_mask"].numel()


def test_rows_of_one_length_are_not_unpadded(encoders, config_of, tmp_path):
    """Without padding in the rows that are tried nothing is known of how the model reads it."""
    orders = itertools.permutations(("red", "lamp", "small"))
    rows = write_jsonl(tmp_path / "even.jsonl", [{"text": " ".join(order), "label": order[0]} for order in orders])
    _, _, live = step(config_of(f"model.path={encoders('bert')}", "task=classification", f"data.train={rows}"))
    assert not live.setup.task.forward.unpadded


def test_a_mask_that_tells_more_than_padding_is_left_alone():
    padding = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    padding[1, :, :, 3:] = False
    rows = unpadded._found(padding)
    assert rows is not None
    assert rows.places[rows.read].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert rows.places.tolist() == [0, 1, 2, 3, 4, 5, 6, *[7] * 9]  # as many as make a whole
    assert rows.starts.tolist() == [0, 5]
    x = torch.randn(2, 5, 3)
    assert torch.equal(rows.put(rows.take(x)), x * padding[:, 0, 0, :, None])
    assert unpadded._found(padding.tril()) is None
    assert unpadded._found(torch.ones(2, 1, 5, 5, dtype=torch.bool)).read.tolist() == list(range(10))
    assert unpadded._found(padding.float()) is None


def test_passes_are_of_few_sizes():
    sizes = [whole(tokens) for tokens in range(1, 5000)]
    assert all(tokens <= size <= tokens + max(15, tokens / 16) for tokens, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert len(set(sizes[100:800])) <= 35  # of 700


# -- linear layers with what follows them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropped", [(0.0, 0.0), (0.3, 0.0), (0.3, 0.2)])
@pytest.mark.parametrize("name", ["intermediate", "output", "attention.output"])
def test_a_layer_with_what_follows_it_is_the_plain_module(encoders, config_of, tmp_path, name, dropped):
    """Outputs and gradients, with the very masks that the plain module draws."""
    of_model, of_lora = dropped
    _, _, live = step(
        config(config_of, tmp_path, encoders("bert"), "classification", f"adapter.lora_dropout={of_lora}")
    )
    module = layers_of(live)[0].get_submodule(name)
    fused = module.__dict__["forward"].__self__
    for part in live.model.train().modules():
        if type(part) is dropout.Dropout and part not in lora_dropouts(live):
            part.p = of_model
    for own, parameter in module.named_parameters():
        if "lora_B" in own:
            torch.nn.init.normal_(parameter)
    linear = fused.dense.base
    widths = [linear.in_features] + [linear.out_features] * isinstance(fused, dense.FusedOutput)
    given = [torch.randn(2, 5, width, requires_grad=True) for width in widths]
    learned = [*given, *(one for one in module.parameters() if one.requires_grad)]
    found = []
    for forward in (fused.forward, fused.plain):
        torch.manual_seed(3)
        out = forward(*given)
        found.append([out, *torch.autograd.grad(out.square().sum(), learned)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)  # sums in another order, squared


def layers_of(live):
    return unpadded.layers_of(base_of(live.model))


def lora_dropouts(live) -> set:
    return {one for part in live.model.modules() for one in getattr(part, "lora_dropout", {}).values()}


# -- attention --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (5, 9), (1, 1)])
@pytest.mark.parametrize("dropped", [0.0, 0.2])
@pytest.mark.parametrize("seed", [1, 2])
def test_short_rows_equal_torch(queries, keys, dropped, seed):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(3, length, 2, 8).transpose(1, 2).requires_grad_() for length in (queries, keys, keys))
    mask = torch.ones(3, 1, queries, keys, dtype=torch.bool)
    mask[1, :, :, keys // 2 + 1 :] = False
    bias = torch.randn(1, 2, queries, keys)
    added = short_rows._added(mask, bias, q.dtype)
    torch.manual_seed(seed)
    own = short_rows.ShortRows.apply(q, k, v, added, dropped, 0.3)
    if dropped:
        torch.manual_seed(seed)
        left = dropout.kept(torch.Size([6, queries, keys]), dropped, q.device).view(3, 2, queries, keys)
        shares = softmax(q @ k.transpose(2, 3) * 0.3 + added, -1) * left * dropout.scale(dropped)
        plain = shares @ v
    else:
        plain = scaled_dot_product_attention(q, k, v, attn_mask=added, scale=0.3)
    goal = torch.randn_like(plain)
    for one, other in zip(
        (own, *torch.autograd.grad(own, (q, k, v), goal)),
        (plain, *torch.autograd.grad(plain, (q, k, v), goal)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# -- dropout ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9, 1.0])
def test_a_mask_leaves_its_share(p):
    left = dropout.kept(torch.Size([401, 1001]), p, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert left.unique().tolist() in ([0, 1], [0], [1])
    count = left.numel()
    assert abs(left.float().mean().item() - (1 - p)) <= 5 * (max(p * (1 - p), 1e-12) / count) ** 0.5 + 2**-15
    rows = left.float().mean(1)  # and so in every row, and beside every other element
    assert rows.std() <= 1.2 * (p * (1 - p) / 1001) ** 0.5 + 1e-6
    beside = ((left[:, 1:].float() - 1 + p) * (left[:, :-1].float() - 1 + p)).mean()
    assert abs(beside) <= 5 * max(p * (1 - p), 1e-12) / count**0.5 + 1e-6


def test_a_mask_depends_on_generator_and_size_only():
    one, other, third = (
        dropout.kept(shape, 0.3, torch.device("cpu"), torch.Generator().manual_seed(seed)).flatten()
        for shape, seed in ((torch.Size([6, 7]), 3), (torch.Size([42]), 3), (torch.Size([42]), 4))
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


def test_dropout_is_torchs_but_for_the_masks():
    module = dropout.Dropout(0.25)
    x = torch.randn(50, 40, requires_grad=True)
    torch.manual_seed(1)
    out = module(x)
    [gradient] = torch.autograd.grad(out.sum(), x)
    left = gradient != 0
    assert torch.allclose(out, torch.where(left, x / 0.75, 0 * x))
    assert torch.equal(gradient[left], torch.full_like(gradient[left], 1 / 0.75))
    assert module.eval()(x) is x


def test_every_dropout_of_a_model_draws_so(encoders, config_of, tmp_path):
    _, _, live = step(
        config(config_of, tmp_path, encoders("bert"), "classification", "adapter.lora_dropout=0.2", "speed=plain")
    )
    kinds = {type(module) for module in live.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert kinds == {dropout.Dropout}
    adapted = next(module for module in live.model.modules() if hasattr(module, "lora_dropout"))
    [member] = adapted.lora_dropout
    torch.manual_seed(5)
    x = torch.ones(3, 4, adapted.in_features)
    plain = adapted.lora_dropout[member].train()(x)
    torch.manual_seed(5)
    fused = Projection(adapted).drawn(member, x.shape, x, None)
    assert torch.equal(plain.flatten(0, 1) != 0, fused != 0)
