"""What tokens, layers and training rows contribute: sums that add up, fast ways equal to plain ones, and captum's numbers."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from lora_lab.adapters import deltas
from lora_lab.adapters.attach import base_of, trainable
from lora_lab.config import compose
from lora_lab.data.collate import PackedBatch
from lora_lab.data.dataset import first_examples
from lora_lab.explain import ablation, anatomy, attributions, influence, variants
from lora_lab.run import prepared
from tests.tasks.test_tasks import CASES, models, start  # noqa: F401  (fixtures)

BY_DEFAULT = ("causal_lm", "classification", "embedding")  # packed, padded, several texts of a row


@pytest.fixture
def loaded(start):  # noqa: F811
    """A case's model with an adapter that does something, as if it were trained: `loaded('reward')`."""
    with contextlib.ExitStack() as stack:

        def load(case: str, *more: str):
            given = start(case, "adapter.lora_dropout=0", *more, rows=12)
            if any(text.startswith("adapter=") for text in more):
                given = [text for text in given if not text.startswith("adapter.")]
            config = compose.compose(given)
            live = stack.enter_context(prepared.prepare(config).loaded())
            torch.manual_seed(0)
            with torch.no_grad():
                for name, parameter in trainable(live.model).items():
                    if "lora_B" in name:
                        parameter.normal_(std=0.1)
            live.model.eval()
            return live

        yield load


# -- tokens -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [case if case in BY_DEFAULT else pytest.param(case, marks=pytest.mark.long) for case in CASES]
)
def test_what_tokens_get_adds_up(case, loaded, monkeypatch):
    monkeypatch.setattr(
        attributions, "STEPS", (16, 512)
    )  # models with random weights are less smooth than trained ones
    live = loaded(case)
    task = live.setup.task
    [example] = first_examples(live.setup.held_out_rows(), 1)
    found = attributions.explain(live, example)
    assert found.relative_error <= attributions.ENOUGH
    assert found.output != found.empty
    with torch.no_grad(), task.forward.plain(live.model):
        batch = task.collate([example], np.random.default_rng(0))
        assert found.output == pytest.approx(float(task.explained(live.model, batch)), abs=1e-6)
    marks = set(task.tokenizer.all_special_ids)
    for tokens, own in zip(found.tokens, found.integrated, strict=True):
        assert len(tokens) == len(own)
        assert [value for token, value in zip(tokens, own, strict=True) if token in marks] == [0] * sum(
            t in marks for t in tokens
        )
    if isinstance(batch, PackedBatch):  # the answer stays, so it gets nothing
        [own] = found.integrated
        assert not own[(batch.logit_positions + 1).numpy()].any() or case == "completion"


@pytest.mark.long
@pytest.mark.parametrize("case", ["causal_lm", "classification"])
def test_a_row_alone_and_copies_of_it_in_a_pass_give_the_same(case, loaded, monkeypatch):
    live = loaded(case)
    [example] = first_examples(live.setup.held_out_rows(), 1)
    with live.setup.task.forward.plain(live.model):
        row = attributions._Row(live.setup.task, live.model, example)
        assert row._copies > 1
        fast = row.attribution(8)
        monkeypatch.setattr(attributions, "_TOKENS", 1)
        plain = row.attribution(8)
    np.testing.assert_allclose(fast.integrated[0], plain.integrated[0], atol=1e-5)  # products summed in another order


@pytest.mark.parametrize(
    "case",
    [
        "classification",
        *(pytest.param(one, marks=pytest.mark.long) for one in ("classification-decoder", "regression", "reranker")),
    ],
)
def test_attributions_are_captums(case, loaded):
    captum = pytest.importorskip("captum.attr")
    live = loaded(case)
    task, model = live.setup.task, live.model
    [example] = first_examples(live.setup.held_out_rows(), 1)
    with task.forward.plain(model):
        row = attributions._Row(task, model, example)
        ours = row.attribution(20)
        [call], base = row._calls, base_of(model)
        inputs = {name: one for name, one in row._batch.inputs.items() if name != "input_ids"}

        def number(embedded: torch.Tensor) -> torch.Tensor:
            """[copies] what is explained of each copy of the row's sequences."""
            found = []
            for points in embedded.split(len(call.ids)):
                with attributions.embeddings.changed(base, attributions._in_turn([points])):
                    found.append(task.explained(model, row._batch))
            return torch.stack(found)

        assert set(inputs) >= {"attention_mask"}
        if len(call.ids) == 1:
            theirs, error = captum.IntegratedGradients(number).attribute(
                call.given, call.empty, n_steps=20, method="gausslegendre", return_convergence_delta=True
            )
            np.testing.assert_allclose(ours.integrated[0], theirs.sum(-1)[0].detach().numpy(), atol=1e-5)
            assert ours.error == pytest.approx(float(error), abs=1e-5)
        theirs = captum.InputXGradient(lambda points: number(points)).attribute(call.given.clone().requires_grad_())
        for own, row_of_theirs in zip(ours.gradient_input, theirs.sum(-1), strict=True):
            np.testing.assert_allclose(own, row_of_theirs.detach().numpy()[: len(own)], atol=1e-5)


@pytest.mark.long
def test_the_integral_takes_more_steps_where_it_needs_them(loaded, monkeypatch):
    live = loaded("classification-decoder")
    [example] = first_examples(live.setup.held_out_rows(), 1)
    monkeypatch.setattr(attributions, "STEPS", (1, 2, 4, 8, 16, 32, 64))
    found = attributions.explain(live, example)
    assert 1 < found.steps <= 64
    assert found.steps == 64 or found.relative_error <= attributions.ENOUGH


# -- layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        "causal_lm",
        pytest.param("classification", marks=pytest.mark.long),
        pytest.param("seq2seq", marks=pytest.mark.long),
        pytest.param("token_classification", marks=pytest.mark.long),
    ],
)
def test_layers_are_switched_off_together_as_one_by_one(case, loaded):
    live = loaded(case)
    examples = first_examples(live.setup.held_out_rows(), 4)
    parts = variants.parts(live.model)
    without = [(), *parts.values(), [name for names in parts.values() for name in names]]
    before = [name for name, _ in live.model.named_parameters()]
    shared, reason = ablation.losses(live, examples, without)
    assert reason == ""
    turns = ablation.in_turns(live, examples, without)
    # float32, products summed in another order
    np.testing.assert_allclose(shared, turns, rtol=1e-5, atol=1e-5)
    assert [name for name, _ in live.model.named_parameters()] == before
    part, names = next(iter(parts.items()))
    with torch.no_grad():
        for name, parameter in trainable(live.model).items():
            if "lora_B" in name and any(f".{one}." in name for one in names):
                parameter.zero_()
    zeroed = live.setup.task.losses_of(live.model, examples)
    np.testing.assert_allclose(turns[1], zeroed, rtol=1e-5, atol=1e-5)
    assert np.abs(turns[1] - turns[0]).max() > 1e-4, f"{part} does something"
    rises = ablation.rises(shared, examples)
    assert rises[0] == (0.0, 0.0)
    assert rises[1][0] == pytest.approx(
        zeroed[:, 0].sum() / zeroed[:, 1].sum() - turns[0, :, 0].sum() / turns[0, :, 1].sum(), abs=1e-5
    )


def test_layers_are_switched_off_in_turns_where_rows_cannot_be_told_apart(loaded):
    live = loaded("classification", "adapter=ia3")
    parts = variants.parts(live.model)
    _, reason = ablation.losses(live, first_examples(live.setup.held_out_rows(), 2), [(), *parts.values()])
    assert reason == "IA3 cannot be told apart by row"


def test_sizes_of_updates_are_those_of_the_products(loaded, tmp_path):
    live = loaded("causal_lm")
    layers = {}
    for name, module in variants.adapted(live.model).items():
        up, down = module.lora_B["default"].weight, module.lora_A["default"].weight
        layers[name] = deltas.Delta(down.detach(), (up * module.scaling["default"]).detach())
    found = anatomy.updates(live.model, deltas.Deltas(layers, {}))
    assert len(found) == len(layers)
    assert sum(one.energy for one in found) == pytest.approx(1)
    for one in found[:5]:
        module, delta = variants.adapted(live.model)[one.module], layers[one.module]
        product, weight = delta.up @ delta.down, module.get_base_layer().weight
        assert one.size == pytest.approx(float(product.norm() / weight.norm()), rel=1e-5)
        values = torch.linalg.svdvals(product)
        shares = values / values.sum()
        assert one.effective_rank == pytest.approx(float((-(shares * (shares + 1e-20).log()).sum()).exp()), rel=1e-3)
        assert one.top_energy == pytest.approx(float(values[0] ** 2 / values.square().sum()), rel=1e-4)
        scaled = dataclasses.replace(delta, magnitude=torch.linalg.norm(delta.added_to(weight), dim=1))
        [dora] = anatomy.updates(live.model, deltas.Deltas({one.module: scaled}, {}))
        assert dora.norm == pytest.approx(one.norm, rel=1e-4)  # magnitudes that change nothing
    assert anatomy.updates(live.model, deltas.Deltas({}, {})) == []


# -- training rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["classification", *(pytest.param(one, marks=pytest.mark.long) for one in ("causal_lm", "masked_lm"))]
)
def test_gradients_of_rows_together_are_those_of_each_alone(case, loaded):
    live = loaded(case)
    examples = first_examples(live.setup.training_rows(), 6)
    assert influence._gap_of_sharing(live, examples[:2]) == ""
    found = []
    for gradients in (influence.together, influence.in_turns):
        rows = {place: row for places, own in gradients(live, examples) for place, row in zip(places, own, strict=True)}
        found.append(torch.stack([rows[place] for place in range(6)]))
    together, alone = found
    assert torch.linalg.norm(together - alone) <= 1e-5 * torch.linalg.norm(alone)  # products summed in another order
    task, model = live.setup.task, live.model
    model.zero_grad()
    [batch] = task.step(model, [examples[:1]], np.random.default_rng(0)).batches
    task.loss(model, batch).loss.backward()
    own = {name: one for name, one in trainable(model).items() if "modules_to_save" not in name}  # not of a new head
    flat = torch.cat([one.grad.flatten() for one in own.values()])
    assert torch.linalg.norm(alone[0] - flat) <= 1e-5 * torch.linalg.norm(flat)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_shares_are_the_weights_of_a_ridge_regression():
    from sklearn.linear_model import Ridge

    draw = np.random.default_rng(0)
    rows, questions = (
        unit(draw.normal(size=(30, 50)).astype(np.float32)),
        unit(draw.normal(size=(3, 50)).astype(np.float32)),
    )
    theirs = Ridge(alpha=1.0, fit_intercept=False).fit(rows.T, questions.T).coef_
    np.testing.assert_allclose(influence.shares_of(questions, rows), theirs, atol=1e-5)
    same = influence.shares_of(
        rows[:1], np.concatenate([rows[:1]] * 4 + [rows[1:2]])
    )  # what four rows teach is shared out
    np.testing.assert_allclose(same[0, :4], same[0, 0], atol=1e-6)
    assert same[0, 0] < influence.shares_of(rows[:1], rows[:2])[0, 0] < 1


def test_a_sketch_keeps_dot_products():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 100_000, generator=draw)
    rows[1:] += rows[:1]
    sketch = influence.Sketch(100_000, torch.device("cpu"))
    exact = torch.nn.functional.normalize(rows, dim=1)
    found = sketch(rows)
    assert found.shape == (6, 4096)
    # a standard deviation of 1 / sqrt(4096)
    torch.testing.assert_close(found @ found.T, exact @ exact.T, atol=4 / 64, rtol=0)
    torch.testing.assert_close(
        influence.Sketch(7, torch.device("cpu"))(rows[:, :7]), torch.nn.functional.normalize(rows[:, :7])
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "told", ["quant=nf4", "adapter.use_dora=true", "adapter=bottleneck", "adapter=prefix_tuning", "adapter=ia3"]
)
def test_every_kind_of_adapter_and_base_can_be_explained(told, loaded):
    live = loaded("causal_lm", told)
    examples = first_examples(live.setup.training_rows(), 3)
    found = attributions.explain(live, examples[0])
    assert found.relative_error < 0.5  # of random weights; what matters is that there are numbers
    assert any(one.any() for one in found.integrated)
    parts = variants.parts(live.model)
    assert bool(parts) == (told != "adapter=prefix_tuning")
    if parts:
        without = [(), *parts.values()]
        losses, reason = ablation.losses(live, examples, without)
        assert (reason == "") == (told == "quant=nf4")
        np.testing.assert_allclose(losses, ablation.in_turns(live, examples, without), rtol=1e-5, atol=1e-5)
    rows = torch.cat([own for _, own in influence.in_turns(live, examples)])
    assert rows.shape[0] == 3
    assert rows.norm(dim=1).min() > 0
