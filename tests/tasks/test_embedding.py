"""Vectors: the whole step's negatives in whatever micro-batches, equal texts, losses and metrics against other libraries, merged folders."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch

from lora_lab import cli
from lora_lab.base.pooling import Pooling, pooled
from lora_lab.config import compose
from lora_lab.errors import LoraLabError
from lora_lab.run import prepared
from lora_lab.tasks import bm25, metrics
from lora_lab.tasks.embedding import losses
from tests.conftest import write_jsonl
from tests.tasks.test_tasks import found_row, models, start  # noqa: F401

ROWS = 64


def made_ready(start, *more, rows=ROWS, case="embedding"):  # noqa: F811
    """A run's setup and its model, with an adapter that is not fresh."""
    ready = prepared.prepare(compose.compose(start(case, "adapter.lora_dropout=0.2", *more, rows=rows)))
    model = ready.loaded().model
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return ready, model


def learned(task, model, parts) -> tuple[float, torch.Tensor]:
    """Mean loss and gradient of a step, as the loop takes it."""
    model.zero_grad()
    torch.manual_seed(5)
    step, loss = task.step(model, parts, np.random.default_rng(5)), 0.0
    for batch in step.batches:
        part = task.loss(model, batch).loss / step.weight
        part.backward()
        loss += part.item()
    return loss, torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("case", ["embedding", "embedding-cosent"])
@pytest.mark.parametrize(("rows", "sizes"), [(ROWS, (8, 1)), (256, (32,))])
def test_negatives_are_of_the_whole_step(case, rows, sizes, start):  # noqa: F811
    """64 rows at once, in 8 micro-batches, and one by one; 256 rows at once and in 8 micro-batches of 32: the same loss and gradient,
    to the rounding of float32 sums in another order (1e-5 of the loss, and of the largest gradient)."""
    ready, model = made_ready(start, case=case, rows=rows)
    model.eval()
    examples = list(ready.train)
    assert len(examples) == rows
    whole = learned(ready.task, model, [examples])
    for size in sizes:
        parts = [examples[place : place + size] for place in range(0, len(examples), size)]
        loss, gradient = learned(ready.task, model, parts)
        assert loss == pytest.approx(whole[0], rel=1e-5)
        assert (gradient - whole[1]).abs().max() <= 1e-5 * whole[1].abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_looks_at_a_step_drop_the_same(checkpointing, start):  # noqa: F811
    """With dropout, against one graph over all micro-batches with the same masks."""
    ready, model = made_ready(start)
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    task, examples = ready.task, list(ready.train)
    parts = [examples[place : place + 16] for place in range(0, len(examples), 16)]
    loss, gradient = learned(task, model, parts)
    model.zero_grad()
    torch.manual_seed(5)
    batches = [task.collate(part, np.random.default_rng(0)) for part in parts]
    each, _ = task._losses([task.logits(model, batch) for batch in batches], batches)
    each.mean().backward()
    plain = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    assert loss == pytest.approx(each.mean().item(), rel=1e-5)
    assert (gradient - plain).abs().max() <= 1e-5 * plain.abs().max()
    torch.manual_seed(6)
    other, _ = task._losses([task.logits(model, batch) for batch in batches], batches)
    assert other.mean().item() != pytest.approx(each.mean().item(), rel=1e-3)  # something is dropped


def test_equal_texts_are_no_negatives(start, tmp_path):  # noqa: F811
    queries = [("q1", b"1"), ("q2", b"2"), ("q1", b"1"), ("d3", b"3")]
    documents = [("d1", b"a"), ("d1", b"a"), ("d2", b"b"), ("d3", b"c"), ("D2", b"b"), ("n", b"n")]
    assert losses.equal_texts(queries, documents).tolist() == [
        [
            False,
            True,
            True,
            False,
            True,
            False,
        ],  # q1: d1 again, and d2, the positive of the same query, D2 has its tokens
        [True, False, False, False, False, False],
        [True, True, False, False, True, False],
        [False, False, False, False, False, False],
    ]
    ready, model = made_ready(start, "train.max_steps=1", rows=8)
    batch = ready.task.collate(list(ready.train), np.random.default_rng(0))
    found = ready.task.loss(model.eval(), batch)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    right = {row["query"]: {other["positive"] for other in rows if other["query"] == row["query"]} for row in rows}
    documents = [row["positive"] for row in rows] + [text for row in rows for text in row.get("negatives", [])]
    expected = sum(
        document in right[row["query"]]
        for row in rows
        for place, document in enumerate(documents)
        if place != rows.index(row)
    )
    assert found.figures["equal_texts"] == expected > 0


def test_a_masked_document_changes_nothing():
    """The loss is that of a step without it."""
    torch.manual_seed(0)
    queries, documents = torch.randn(3, 8), torch.randn(5, 8)
    masked = torch.zeros(3, 5, dtype=torch.bool)
    masked[:, 4] = True
    kept = losses.infonce(queries, documents[:4], masked[:, :4], 0.1, False)
    assert torch.allclose(losses.infonce(queries, documents, masked, 0.1, False), kept)


def test_losses_are_sentence_transformers():
    """In-batch negatives in both directions, CoSENT and AnglE."""
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers import util
    from sentence_transformers.sentence_transformer import losses as theirs

    assert st
    torch.manual_seed(0)
    one, other, scores = torch.randn(6, 8), torch.randn(6, 8), torch.tensor([0.1, 0.9, 0.9, 0.3, 0.5, 0.2])
    assert torch.allclose(losses.angles(one, other), util.pairwise_angle_sim(one, other), rtol=1e-5)
    assert torch.allclose(losses.cosines(one, other), util.pairwise_cos_sim(one, other), rtol=1e-5)

    class Known(torch.nn.Module):
        def forward(self, features):
            return features

    batch = [{"sentence_embedding": side} for side in (one, other)]
    found = theirs.CoSENTLoss(Known()).forward(batch, scores)
    assert losses.ordered(losses.cosines(one, other), scores, 0.05).item() == pytest.approx(found.item(), rel=1e-5)
    found = theirs.AnglELoss(Known()).forward(batch, scores)
    assert losses.ordered(losses.angles(one, other), scores, 0.05).item() == pytest.approx(found.item(), rel=1e-5)
    masked = torch.zeros(6, 6, dtype=torch.bool)
    found = theirs.MultipleNegativesRankingLoss(Known()).forward(batch, scores)
    assert losses.infonce(one, other, masked, 0.05, False).mean().item() == pytest.approx(found.item(), rel=1e-5)
    found = theirs.MultipleNegativesRankingLoss(
        Known(), directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    ).forward(batch, scores)
    assert losses.infonce(one, other, masked, 0.05, True).mean().item() == pytest.approx(found.item(), rel=1e-5)


# -- metrics --------------------------------------------------------------------------------------------------------------


def _drawn(queries=40, documents=60):
    """Scores, right documents of each query, and the places where these stand."""
    draw = np.random.default_rng(0)
    scores = draw.standard_normal((queries, documents))
    right = [draw.choice(documents, size=draw.integers(1, 5), replace=False) for _ in range(queries)]
    places = [(-own).argsort().argsort() + 1 for own in scores]
    return scores, right, [[int(place[d]) for d in own] for place, own in zip(places, right, strict=True)]


def test_retrieval_metrics_are_scikit_learns():
    from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, top_k_accuracy_score

    scores, right, ranks = _drawn()
    truth = np.zeros_like(scores)
    for row, own in enumerate(right):
        truth[row, own] = 1
    found = metrics.retrieval(ranks)
    assert found["ndcg@10"] == pytest.approx(ndcg_score(truth, scores, k=10))
    one = [own[:1] for own in ranks]
    alone = np.array([own[0] for own in right])
    found = metrics.retrieval(one)
    for count in metrics.FOUND_WITHIN:
        expected = top_k_accuracy_score(alone, scores, k=count, labels=np.arange(scores.shape[1]))
        assert found[f"recall@{count}"] == pytest.approx(expected)
    near = [own for own in one if own[0] <= 10]
    rows = [row for row, own in enumerate(one) if own[0] <= 10]
    truth = np.eye(scores.shape[1])[alone[rows]]
    expected = label_ranking_average_precision_score(truth, scores[rows]) * len(near) / len(one)
    assert found["mrr@10"] == pytest.approx(expected)


def test_retrieval_metrics_are_trec_evals():
    measures = pytest.importorskip("ir_measures")
    scores, right, ranks = _drawn()
    qrels = {str(q): {str(d): 1 for d in own} for q, own in enumerate(right)}
    run = {str(q): {str(d): float(score) for d, score in enumerate(own)} for q, own in enumerate(scores)}
    wanted = [measures.nDCG @ 10, measures.RR @ 10, *(measures.R @ count for count in metrics.FOUND_WITHIN)]
    expected = measures.calc_aggregate(wanted, qrels, run)
    found = metrics.retrieval(ranks)
    names = ["ndcg@10", "mrr@10", *(f"recall@{count}" for count in metrics.FOUND_WITHIN)]
    assert [found[name] for name in names] == pytest.approx([expected[one] for one in wanted])


def test_retrieval_needs_something_to_find():
    for ranks in ([], [[1], []]):
        with pytest.raises(ValueError, match="retrieval needs queries"):
            metrics.retrieval(ranks)


def _bm25(documents, query):
    """Each document's score, by the formula as Robertson and Zaragoza write it, with Lucene's idf."""
    mean = sum(map(len, documents)) / len(documents)
    found = []
    for document in documents:
        score = 0.0
        for word in query:
            seen, often = sum(word in other for other in documents), document.count(word)
            idf = math.log(1 + (len(documents) - seen + 0.5) / (seen + 0.5))
            score += idf * often / (often + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        found.append(score)
    return found


def test_bm25_is_the_formula_and_bm25s():
    draw = random.Random(0)
    documents = [draw.choices("abcdefghij", k=draw.randint(3, 20)) for _ in range(30)]
    query = ["a", "c", "c", "z"]
    found = bm25.BM25(documents).scores(query)
    assert found == pytest.approx(_bm25(documents, query))
    library = pytest.importorskip("bm25s")
    index = library.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(documents, show_progress=False)
    assert found == pytest.approx(index.get_scores(["a", "c", "c"]), rel=1e-5)


def test_words_of_scripts_without_blanks_are_characters_and_pairs():
    assert bm25.words("Red lamp, 红灯笼 2") == ["red", "lamp", "红", "灯", "笼", "红灯", "灯笼", "2"]


# -- evaluation -----------------------------------------------------------------------------------------------------------


def test_held_out_figures_do_not_depend_on_passes(start):  # noqa: F811
    ready, model = made_ready(start)
    model.eval()
    whole = ready.task.measure(model, ready.held_out).metrics
    for tokens in (1, 40):
        ready.task.eval_tokens = tokens
        assert ready.task.measure(model, ready.held_out).metrics == pytest.approx(whole, rel=1e-5)


def test_a_corpus_makes_finding_harder(start, tmp_path, capsys):  # noqa: F811
    """Documents that are there already change nothing; copies of the queries do. Told to a trained run, too."""
    draw = random.Random(7)
    write_jsonl(tmp_path / "more.jsonl", [{"document": found_row(draw)["positive"]} for _ in range(60)])
    assert cli.main(["train", *start("embedding", "train.max_steps=2", f"run_dir={tmp_path}/run")]) == 0
    assert "bm25" in capsys.readouterr().out
    result = json.loads((tmp_path / "run/result.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "same.jsonl", [{"text": row["positive"]} for row in rows])
    for name, harder in (("same", False), ("more", True)):
        assert cli.main(["evaluate", f"run={tmp_path}/run", f"task.corpus={tmp_path}/{name}.jsonl"]) == 0
        found = json.loads((tmp_path / "run/evaluation.json").read_text())
        one, other = found["tuned"]["ndcg@10"], result["tuned"]["ndcg@10"]
        assert (one < other) if harder else one == pytest.approx(other, abs=1e-6)
        one, other = found["baselines"]["bm25"]["recall@1"], result["baselines"]["bm25"]["recall@1"]
        assert (one < other) if harder else one == other
    write_jsonl(tmp_path / "odd.jsonl", [{"body": "red"}])
    capsys.readouterr()
    assert cli.main(["evaluate", f"run={tmp_path}/run", f"task.corpus={tmp_path}/odd.jsonl"]) == 2
    assert (
        "odd.jsonl row 1: has the columns body; each row needs a text in document, positive or text"
        in capsys.readouterr().err
    )


def test_rows_with_one_document_are_held_out_together(start):  # noqa: F811
    more = [text for text in start("embedding", rows=ROWS) if not text.startswith("data.eval=")]
    ready = prepared.prepare(compose.compose([*more, "data.eval_ratio=0.3"]))
    there, held = ({example["document"] for example in part} for part in (ready.train, ready.held_out))
    assert there
    assert held
    assert not there & held


# -- pooling --------------------------------------------------------------------------------------------------------------


def test_poolings():
    hidden = torch.arange(24, dtype=torch.float32).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = {
        "mean": [hidden[0].mean(0), hidden[1, :2].mean(0)],
        "cls": [hidden[0, 0], hidden[1, 0]],
        "last": [hidden[0, 3], hidden[1, 1]],
        "max": [hidden[0].max(0).values, hidden[1, :2].max(0).values],
    }
    for way, vectors in expected.items():
        assert torch.equal(pooled(hidden, mask, way), torch.stack(vectors))


def test_a_description_is_read_as_it_was_written(tmp_path):
    for number, way in enumerate(("mean", "cls", "last", "max")):
        one = Pooling(way, bool(number % 2), 128 if number else None, "query: ", "")
        folder = tmp_path / way
        folder.mkdir()
        one.write(folder, 64)
        assert Pooling.read(folder) == one


def test_a_base_says_how_it_pools_and_options_overrule_it(start, models, tmp_path):  # noqa: F811
    import shutil

    folder = shutil.copytree(models["bert"], tmp_path / "described")
    Pooling("cls", False, 64, "ask: ", "find: ").write(folder, 64)
    ready = prepared.prepare(compose.compose(start("embedding-decoder", f"model.path={folder}", rows=4)))
    assert ready.task.pooling == Pooling("cls", False, 64, "ask: ", "find: ")
    tokenizer, example = ready.encoder.tokenizer, ready.train[0][0]
    query, positive, *_ = example["texts"]
    ids, other, *_ = ready.encoder.sequences(example)
    assert ids.tolist() == tokenizer(f"ask: {query}")["input_ids"]
    assert other.tolist() == tokenizer(f"find: {positive}")["input_ids"]
    told = ["task.pooling=max", "task.normalize=true", "task.query_prompt=''"]
    ready = prepared.prepare(compose.compose(start("embedding", f"model.path={folder}", *told, rows=4)))
    assert ready.task.pooling == Pooling("max", True, 64, "", "find: ")


def test_a_merged_folder_is_sentence_transformers(start, tmp_path, reload_here):  # noqa: F811
    """With prompts, by its own loader where it is installed; the folder is a base that says how it pools."""
    more = ["train.max_steps=3", "export=merged", "export.dtype=float32", "merge.max_loss_increase=9"]
    assert cli.main(["train", *start("embedding", *more)]) == 0
    assert Pooling.read(tmp_path / "run/merged").query_prompt == "lamp"
    report = json.loads((tmp_path / "run/merge_report.json").read_text())
    pytest.importorskip("sentence_transformers")
    assert report["sentence_transformers"]["texts"] >= 24
    assert report["sentence_transformers"]["largest_1_minus_cosine"] <= 1e-5


def test_sizes_are_checked_before_weights(start, monkeypatch):  # noqa: F811
    monkeypatch.setattr("lora_lab.base.load.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(LoraLabError, match="task.dimensions: 64 of the 64 numbers"):
        prepared.prepare(compose.compose(start("embedding", "task.dimensions=[64]")))


# -- rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "negatives"),
    [
        ({"negative": "cat"}, ["cat"]),
        ({"negatives": ["cat", "dog", "cat"]}, ["cat", "dog"]),
        ({"negatives": '["cat", "dog"]'}, ["cat", "dog"]),  # CSV has nothing else
        ({"negative": "[1] cat", "negatives": None}, ["[1] cat"]),
        ({"negatives": []}, []),
    ],
)
def test_any_number_of_negatives(row, negatives):
    from lora_lab.data import formats

    row = {"query": "lamp", "positive": "red", **row}
    assert formats.detect("rows", list(row), "auto") == "retrieval"
    record = formats.read(row, "retrieval")
    assert (record.text, record.pair, record.label) == ("lamp", "red", negatives)


@pytest.mark.parametrize("row", [{"negatives": [3]}, {"negatives": [" "]}, {"negatives": {"a": 1}}, {"positive": 3}])
def test_negatives_that_are_no_texts_are_refused(row):
    from lora_lab.data import formats
    from lora_lab.data.formats import RowError

    with pytest.raises(RowError):
        formats.read({"query": "lamp", "positive": "red", **row}, "retrieval")


def test_what_data_says_of_texts_that_contradict(start, tmp_path, capsys):  # noqa: F811
    overrides = start("embedding", rows=4)
    write_jsonl(
        tmp_path / "train.jsonl",
        [
            {"query": "lamp", "positive": "red cat"},
            {"query": "Lamp", "positive": "blue dog", "negatives": ["Red  cat"]},
            {"query": "Oslo", "positive": "blue dog"},
            {"query": "Graz", "positive": "green bird"},
        ],
    )
    write_jsonl(
        tmp_path / "eval.jsonl", [{"query": "table", "positive": "green bird"}, {"query": "Oslo", "positive": "a"}]
    )
    cli.main(["data", *overrides])
    printed = " ".join(capsys.readouterr().out.split())
    for sentence in (
        "1 negatives are what an equal query should find: train.jsonl row 2 (positive in train.jsonl row 1)",
        "1 of 4 rows have the query of an earlier row",
        "1 of 4 rows have the document of an earlier row",
        "1 of 2 held-out rows ask for a document that training rows have too (eval.jsonl row 1)",
        "1 held-out queries are training queries too (eval.jsonl row 2)",
    ):
        assert sentence in printed


@pytest.mark.long
def test_members_of_a_sweep_train_as_alone(start, tmp_path):  # noqa: F811
    """In turns, to the same bytes, with dropout and micro-batches."""
    more = ["adapter.lora_dropout=0.2", "train.micro_batch_size=3", "train.max_steps=4", "export=adapter"]
    told = [text for text in start("embedding", *more) if not text.startswith("run_dir=")]
    folder = tmp_path / "sweep"
    assert cli.main(["train", "-m", *told, "optim.lr=0.001,0.01", f"hydra.sweep.dir={folder}"]) == 0
    weights = {}
    for path in sorted(folder.rglob("adapter_model.safetensors")):
        if path.parent.name == "adapter":
            lr = compose.load(path.parent.parent / "config.yaml").optim.lr
            weights[lr] = path.read_bytes()
    assert sorted(weights) == [0.001, 0.01]
    for lr, expected in weights.items():
        alone = tmp_path / f"alone{lr}"
        assert cli.main(["train", *told, f"optim.lr={lr}", f"run_dir={alone}"]) == 0
        assert (alone / "adapter/adapter_model.safetensors").read_bytes() == expected


# -- hard negatives -------------------------------------------------------------------------------------------------------


def test_mined_negatives_are_near_and_not_right(start, tmp_path, capsys):  # noqa: F811
    import lora_lab

    assert cli.main(["train", *start("embedding", "train.max_steps=2", rows=24)]) == 0
    told = ["mine", f"run={tmp_path}/run", f"data={tmp_path}/train.jsonl", f"out={tmp_path}/harder.jsonl"]
    assert cli.main([*told, "negatives=3", "margin=0.01"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    mined = [json.loads(line) for line in (tmp_path / "harder.jsonl").read_text().splitlines()]
    documents = list(dict.fromkeys(row["positive"] for row in rows))
    run = lora_lab.open_run(f"{tmp_path}/run")
    vectors = [np.array([one["vector"] for one in run.predict([{name: text} for text in texts])])
               for name, texts in (("query", [row["query"] for row in rows]), ("document", documents))]  # fmt: skip
    run.unload()
    total = 0
    for row, one, scores in zip(rows, mined, vectors[0] @ vectors[1].T, strict=True):
        right = {other["positive"] for other in rows if other["query"] == row["query"]}
        own = row.get("negatives", [])
        most = scores[documents.index(row["positive"])] - 0.01
        fitting = [d for d in documents if d not in right and d not in own and scores[documents.index(d)] <= most]
        expected = sorted(fitting, key=lambda text: -scores[documents.index(text)])[:3]
        assert one["negatives"][: len(own)] == own
        assert [scores[documents.index(text)] for text in one["negatives"][len(own) :]] == pytest.approx(
            [scores[documents.index(text)] for text in expected], abs=1e-6
        )
        total += len(expected)
    assert total
    capsys.readouterr()
    for wrong, says in (
        ([], "exists"),
        ([f"out={tmp_path}/a.csv"], "must end in .jsonl"),
        ([f"out={tmp_path}/b.jsonl", "negatives=0"], "negatives=0: must be a number from 1"),
        ([f"out={tmp_path}/b.jsonl", "margin=wide"], "margin=wide: must be a number"),
    ):
        assert cli.main([*told, *wrong]) == 2
        assert says in capsys.readouterr().err


def test_only_a_retriever_mines(start, tmp_path, capsys):  # noqa: F811
    assert cli.main(["train", *start("embedding-cosent", "train.max_steps=1", rows=8)]) == 0
    capsys.readouterr()
    told = ["mine", f"run={tmp_path}/run", f"data={tmp_path}/train.jsonl", f"out={tmp_path}/harder.jsonl"]
    assert cli.main(told) == 2
    assert "finds no documents. Name a run of task=embedding" in capsys.readouterr().err
