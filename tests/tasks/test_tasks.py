"""Every task end to end on tiny models of the right kind: trained on a quantized base, resumed, merged, loaded by plain
transformers, measured."""

from __future__ import annotations

import importlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import lora_lab
from lora_lab import cli
from lora_lab.base import load
from lora_lab.config import compose
from lora_lab.data import build, sources, store
from lora_lab.errors import LoraLabError
from lora_lab.run import answering, pipeline, prepared, run_dir
from lora_lab.tasks import TASKS, metrics
from lora_lab.tasks.base import StepBatches
from lora_lab.training import regularize
from lora_lab.training.cohort import Member, Share, learn
from tests.conftest import WORDS, make_tokenizer, write_jsonl
from tests.tasks.examples import assert_same

# -- tiny models ----------------------------------------------------------------------------------------------------------


def make_encoder_tokenizer(folder: Path):
    """A WordPiece tokenizer in BERT's manner, of whole words and letters: a trained one would number equals anew in each process."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(" ".join(WORDS)))]
    letters = sorted(set("".join(words)))
    tokens = dict.fromkeys([*marks, *letters, *(f"##{letter}" for letter in letters), *words])
    core = Tokenizer(models.WordPiece(vocab={token: number for number, token in enumerate(tokens)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer, core.decoder = normalizer, splitter, decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_bert(folder: Path, with_head: bool = True) -> Path:
    """A random BERT of 2 layers; without its head, only what sentence encoders publish."""
    from transformers import BertConfig, BertForMaskedLM, BertModel

    folder.mkdir(parents=True)
    size = len(make_encoder_tokenizer(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    (BertForMaskedLM if with_head else BertModel)(config).save_pretrained(folder)
    return folder


def make_t5(folder: Path) -> Path:
    """A random T5 of 2 + 2 layers whose texts end with an end token."""
    from tokenizers import processors
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    folder.mkdir(parents=True)
    make_tokenizer(folder, chat_template=None, special=("<pad>", "</s>"), bos_token=None, eos_token="</s>")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory, base) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kinds")
    return {
        "llama": base,
        "bert": make_bert(folder / "bert"),
        "bert_without_head": make_bert(folder / "bare", with_head=False),
        "t5": make_t5(folder / "t5"),
    }


# -- rows that can be learned -----------------------------------------------------------------------------------------------

NUMBERS = {"one": 1.0, "two": 2.0, "three": 3.0}
COLOURS, ANIMALS = ["red", "green", "blue"], ["cat", "dog", "bird"]


def _text(draw: random.Random, count: int = 4) -> list[str]:
    return draw.choices(["table", "lamp", "Oslo", "Graz"], k=draw.randint(2, count))


def class_row(draw):
    colour = draw.choice(COLOURS)
    return {"text": " ".join([*_text(draw), colour, *_text(draw)]), "label": colour}


def several_row(draw):
    colours = draw.sample(COLOURS, k=draw.randint(0, 2))
    return {"text": " ".join([*_text(draw), *colours]), "label": colours}


def number_row(draw):
    number = draw.choice(list(NUMBERS))
    return {"text": " ".join([number, *_text(draw)]), "text_pair": " ".join(_text(draw)), "label": NUMBERS[number]}


def tag_row(draw):
    words = [*_text(draw), draw.choice(COLOURS), draw.choice(ANIMALS), *_text(draw)]
    tags = ["B-colour" if w in COLOURS else "B-animal" if w in ANIMALS else "O" for w in words]
    return {"tokens": words, "tags": tags}


def span_row(draw):
    before, colour = " ".join(_text(draw, 12)), draw.choice(COLOURS)
    context = f"{before} {colour} {' '.join(_text(draw, 12))}"
    answers = {"text": [colour], "answer_start": [len(before) + 1]}
    return {"question": "table", "context": context, "answers": answers}


def pair_row(draw):
    words = _text(draw)
    return {"source": " ".join(words), "target": " ".join(reversed(words))}


def judged_row(draw):
    return {
        "prompt": " ".join(_text(draw)),
        "chosen": " ".join(_text(draw)) + " cat",
        "rejected": "dog " + " ".join(_text(draw)),
    }


def feedback_row(draw):
    good = draw.random() < 0.5
    return {"prompt": " ".join(_text(draw)), "completion": "cat lamp" if good else "dog table", "label": good}


def text_row(draw):
    return {
        "text": " ".join(" ".join(draw.choice([["red", "cat"], ["blue", "dog"]])) for _ in range(draw.randint(2, 9)))
    }


def found_row(draw):
    """A document with a colour and an animal, and a query with the same two."""
    colour, animal = draw.choice(COLOURS), draw.choice(ANIMALS)
    row = {
        "query": f"lamp Oslo table {animal} {colour}",
        "positive": " ".join([*_text(draw), colour, animal, *_text(draw, 9)]),
    }
    if draw.random() < 0.5:
        row["negatives"] = [" ".join([*_text(draw), draw.choice([c for c in COLOURS if c != colour]), animal])]
    return row


def candidates_row(draw):
    """A query that is answered by a document with its colour, and not by others."""
    colour, *others = draw.sample(COLOURS, k=draw.randint(2, 3))
    texts = [" ".join([one, *_text(draw, 3)]) for one in (colour, *others)]
    return {"query": f"lamp Oslo table {colour}", "positive": texts[0], "negatives": texts[1:]}


def alike_row(draw):
    one, other = draw.choice(COLOURS), draw.choice(COLOURS)
    texts = (" ".join([*_text(draw), colour]) for colour in (one, other))
    return {**dict(zip(("text_a", "text_b"), texts, strict=True)), "score": float(one == other)}


# (task and its options, model, rows, metric that must improve, whether lower is better)
CASES = {
    "causal_lm": (["task=causal_lm", "task.generate_rows=2", "task.max_new_tokens=4"], "llama", pair_row, "perplexity", True),
    "distillation": (["task=distillation", "task.teacher=base", "task.top_k=8"], "llama", pair_row, "perplexity", True),
    "completion": (["task=completion", "data.max_tokens=16"], "llama", text_row, "perplexity", True),
    "masked_lm": (["task=masked_lm", "task.pseudo_perplexity_rows=2"], "bert", text_row, "pseudo_perplexity", True),
    "masked_lm-words": (["task=masked_lm", "task.whole_words=true"], "bert_without_head", text_row, "masked_accuracy", False),
    "classification": (["task=classification"], "bert", class_row, "accuracy", False),
    "classification-weights": (
        ["task=classification", "task.class_weights=balanced", "task.label_smoothing=0.1"], "bert_without_head", class_row, "f1", False
    ),
    "classification-several": (["task=classification", "task.multi_label=true"], "bert", several_row, "loss", True),
    "classification-decoder": (["task=classification"], "llama", class_row, "loss", True),
    "regression": (["task=regression"], "bert", number_row, "mse", True),
    "regression-decoder": (["task=regression"], "llama", number_row, "mse", True),
    "token_classification": (["task=token_classification"], "bert", tag_row, "f1", False),
    "token_classification-decoder": (["task=token_classification"], "llama", tag_row, "loss", True),
    "question_answering": (
        ["task=question_answering", "data.max_tokens=24", "task.stride=6"], "bert", span_row, "loss", True
    ),
    "seq2seq": (["task=seq2seq", "task.generate_rows=2", "task.max_new_tokens=6", "task.num_beams=2"], "t5", pair_row, "loss", True),
    "preference-dpo": (["task=preference"], "llama", judged_row, "reward_accuracy", False),
    "preference-ipo": (["task=preference", "task.loss=ipo"], "llama", judged_row, "loss", True),
    "preference-simpo": (["task=preference", "task.loss=simpo", "task.beta=2"], "llama", judged_row, "reward_margin", False),
    "preference-orpo": (["task=preference", "task.loss=orpo"], "llama", judged_row, "loss", True),
    "preference-kto": (["task=preference", "task.loss=kto"], "llama", feedback_row, "reward_margin", False),
    "reward": (["task=reward"], "bert", judged_row, "accuracy", False),
    "reward-decoder": (["task=reward"], "llama", judged_row, "loss", True),
    "embedding": (["task=embedding", "task.dimensions=[16]", "task.query_prompt=lamp"], "bert_without_head", found_row, "ndcg@10", False),
    "embedding-decoder": (["task=embedding", "task.symmetric=false"], "llama", found_row, "loss", True),
    "reranker": (["task=reranker"], "bert", candidates_row, "mrr@10", False),
    "reranker-decoder": (["task=reranker", "task.loss=binary"], "llama", candidates_row, "loss", True),
    "reranker-yes_no": (
        ["task=reranker", "task.score=yes_no", "task.yes_word=y", "task.no_word=n", "task.instruction=a"], "llama", candidates_row, "loss", True
    ),
    "embedding-cosent": (["task=embedding", "task.loss=cosent"], "bert", alike_row, "loss", True),
    "embedding-angle": (["task=embedding", "task.loss=angle", "task.temperature=1"], "bert", alike_row, "loss", True),
}  # fmt: skip
# Others of the same make run by default; their losses have tests of their own.
_LONG_CASES = (
    "masked_lm-words", "regression-decoder", "token_classification-decoder", "preference-ipo", "preference-simpo", "preference-orpo",
    "reward-decoder", "classification-weights", "classification-decoder", "classification-several", "preference-kto", "completion",
    "embedding-decoder", "embedding-angle", "embedding-cosent", "reranker-decoder", "reranker-yes_no", "distillation",
)  # fmt: skip
STEPS = 30


@pytest.fixture
def start(models, overrides, tmp_path):
    """Overrides of a run of a case: `start('classification', 'quant=nf4')`."""

    def make(case: str, *more: str, rows: int = 48) -> list[str]:
        options, model, make_row, _, _ = CASES[case]
        for name, seed, count in (("train", 0, rows), ("eval", 1, 12)):
            draw = random.Random(seed)
            write_jsonl(tmp_path / f"{name}.jsonl", [make_row(draw) for _ in range(count)])
        return [
            *overrides, f"model.path={models[model]}", f"data.train={tmp_path}/train.jsonl", f"data.eval={tmp_path}/eval.jsonl",
            "data.check=warn", "optim.lr=0.005", "optim.warmup_steps=0", "optim.schedule=constant", "train.batch_size=8", "train.epochs=9",
            f"train.max_steps={STEPS}", "train.save_steps=15", "train.eval_steps=30", "train.keep_best=false", *options, *more,
        ]  # fmt: skip

    return make


LOOSE = (
    "merge.max_loss_increase=9",
    "merge.max_logit_diff=1e-3",
)  # random weights feel quantization far more than trained ones


IN_A_PROCESS_OF_ITS_OWN = ("classification",)  # the others reload in this one, to be quick


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long) if case in _LONG_CASES else case for case in CASES]
)
def test_task_end_to_end(case, start, tmp_path, models, capsys, request):
    """Trained on an NF4 base, better than before; resumed to the same bytes; merged at float32 and equal in plain transformers;
    evaluated again from the run folder alone."""
    folder = tmp_path / "run"
    if case not in IN_A_PROCESS_OF_ITS_OWN:
        request.getfixturevalue("reload_here")
    assert cli.main(["train", *start(case, "quant=nf4", "export=merged", "export.dtype=float32", *LOOSE)]) == 0
    capsys.readouterr()
    result = json.loads((folder / "result.json").read_text())
    metric, lower = CASES[case][3:]
    before, after = result["base"][metric], result["tuned"][metric]
    assert (after < before) if lower else (after > before), f"{metric}: {before} -> {after}"
    assert all(np.isfinite(list(result["tuned"].values())))
    config = compose.load(folder / "config.yaml")
    task = config.task.load()
    assert set(result["tuned"]) <= set(task.reported(config.task))
    assert metrics.lower_is_better(metric) is lower

    merge = result["merge"]
    assert merge["refused"] == []
    assert merge["merged_vs_base_and_adapter"]["max_logit_diff"] <= 2e-4
    kind = task.auto_class
    import transformers

    _, loaded = getattr(transformers, kind).from_pretrained(folder / "merged", output_loading_info=True)
    assert not any(loaded.values())

    again = shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(again / "adapter")
    shutil.rmtree(again / "merged")
    shutil.rmtree(again / f"checkpoints/step-{STEPS}")
    (again / "result.json").unlink()
    saved = yaml.safe_load((again / "config.yaml").read_text())
    saved |= {"run_dir": str(again), "export": {**saved["export"], "targets": []}}
    (again / "config.yaml").write_text(yaml.safe_dump(saved))
    manifest = json.loads((again / "manifest.json").read_text())
    manifest["config"]["export"]["targets"] = []  # as if it had been begun without
    (again / "manifest.json").write_text(json.dumps(manifest))
    pipeline.resume(str(again), [])
    weights = [path / "adapter/adapter_model.safetensors" for path in (folder, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    (tmp_path / "train.jsonl").unlink()  # what was learned of the training rows lies beside the adapter
    capsys.readouterr()
    evaluation = pipeline.evaluate(str(folder), [])
    assert "its scores on these rows were measured before" in capsys.readouterr().out
    assert evaluation["base"] == result["base"]
    for name, value in result["tuned"].items():
        assert evaluation["tuned"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


# -- exactness --------------------------------------------------------------------------------------------------------------


def gradients(task, model, parts) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of a step and its gradients, without dropout."""
    model.zero_grad()
    model.eval()
    step, loss = task.step(model, parts, np.random.default_rng(3)), 0.0
    for batch in step.batches:
        part = task.loss(model, batch).loss / step.weight
        part.backward()
        loss += part.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long) if case in _LONG_CASES else case for case in CASES]
)
def test_accelerations_are_tried_on_the_end_of_a_row(case, start, monkeypatch, capsys):
    """Of rows that are longer than what is tried, a batch that its task can make and its model can read."""
    from lora_lab.config import compose

    for module in ("base", "reward.task", "seq2seq.task", "embedding.task", "reranker.task"):
        monkeypatch.setattr(importlib.import_module(f"lora_lab.tasks.{module}"), "TRIED_TOKENS", 5)
    ready = prepared.prepare(compose.compose(start(case, rows=6)))
    task, examples = ready.task, [example for i in range(len(ready.train)) for example in ready.train[i]]
    short = [task.shortened(example) for example in examples]
    assert any(len(one.input_ids) < len(example.input_ids) for one, example in zip(short, examples, strict=True))
    for one in short:
        batch = task.collate([one], np.random.default_rng(0))
        assert max(batch.lengths) <= (5 if "seq2seq" not in case else 10)
        places = getattr(batch, "places", None)
        assert places is None or len(places[0]) == len(batch.targets) > 0
    ready.loaded()
    assert "none: " not in capsys.readouterr().out  # they were proved, all of them


@pytest.mark.parametrize("case", CASES)
def test_any_split_of_a_step_is_the_same_step(case, start):
    """One batch, rows of like length in two, and each row alone: equal to float32 rounding (1e-6 of the loss; 2e-5 of the
    largest gradient, which sums over all rows in another order)."""
    from lora_lab.config import compose

    live = prepared.prepare(compose.compose(start(case, rows=6))).loaded()
    ready, model = live.setup, live.model
    for parameter in model.parameters():  # away from the fresh adapter, whose gradients are half zero
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    examples = [example for i in range(len(ready.train)) for example in ready.train[i]]
    whole = gradients(ready.task, model, [examples])
    assert whole[1]
    for parts in ([examples[:2], examples[2:]], [[example] for example in examples]):
        loss, grads = gradients(ready.task, model, parts)
        assert loss == pytest.approx(whole[0], rel=1e-6)
        scale = max(g.abs().max().item() for g in whole[1].values())
        for name, gradient in grads.items():
            assert (gradient - whole[1][name]).abs().max().item() <= 2e-5 * scale, name


@pytest.mark.parametrize("case", ["masked_lm", "masked_lm-words", "seq2seq"])
def test_a_head_that_reads_some_places_only_says_the_same(case, start):
    """Against the plain model, which computes logits everywhere: loss and gradients to float32 rounding."""
    from torch.nn.functional import cross_entropy

    from lora_lab.config import compose

    ready = prepared.prepare(compose.compose(start(case, rows=6)))
    model = ready.loaded().model.eval()
    batch = ready.task.collate([ready.train[i][0] for i in range(6)], np.random.default_rng(0))
    found = []
    for logits in (ready.task.logits(model, batch), model(**batch.inputs).logits[batch.places]):
        model.zero_grad()
        loss = cross_entropy(logits, batch.targets)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert (found[0][1] - found[1][1]).abs().max() <= 1e-6 * found[1][1].abs().max()


def test_losses_of_classes_are_torchs_own(start):
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    from lora_lab.config import compose

    weights = [0.5, 2.0, 3.0]
    ready = prepared.prepare(
        compose.compose(start("classification", f"task.class_weights={weights}", "task.label_smoothing=0.1"))
    )
    model = ready.loaded().model
    batch = ready.task.collate([ready.train[i][0] for i in range(9)], np.random.default_rng(0))
    logits = ready.task.logits(model, batch)
    found = ready.task.loss(model.eval(), batch)  # measured without smoothing
    expected = cross_entropy(logits, batch.targets, weight=torch.tensor(weights))
    assert found.loss.item() / found.weight == pytest.approx(expected.item(), rel=1e-6)
    smoothed = ready.task.item_losses(logits, batch, 0.1)
    assert torch.allclose(smoothed, cross_entropy(logits, batch.targets, label_smoothing=0.1, reduction="none"))

    several = prepared.prepare(compose.compose(start("classification-several")))
    model = several.loaded().model
    batch = several.task.collate([several.train[i][0] for i in range(9)], np.random.default_rng(0))
    raw = model(**batch.inputs).logits
    found = several.task.loss(model.eval(), batch)
    expected = binary_cross_entropy_with_logits(raw, batch.targets.reshape(9, 3).float())
    assert found.loss.item() / found.weight == pytest.approx(expected.item(), rel=1e-6)


def test_balanced_weights_are_scikit_learns(start, tmp_path):
    from collections import Counter

    from lora_lab.config import compose

    config = compose.compose(start("classification-weights"))
    counts = Counter(json.loads(line)["label"] for line in (tmp_path / "train.jsonl").read_text().splitlines())
    learned = prepared.prepare(config).task.learned
    assert learned["labels"] == sorted(counts)
    assert learned["class_weights"] == pytest.approx([48 / (3 * counts[label]) for label in sorted(counts)])


def test_documents_are_predicted_once_and_only_once(start, tmp_path):
    from lora_lab.config import compose

    ready = prepared.prepare(compose.compose(start("completion")))
    texts = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    tokenizer = ready.encoder.tokenizer
    predicted = [
        token
        for i in range(len(ready.train))
        for example in ready.train[i]
        for token in example.input_ids[example.supervised]
    ]
    expected = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][1:]]
    assert predicted == expected
    assert max(ready.train.lengths) <= 16
    assert len(ready.train) < sum(len(ready.train[i]) for i in range(len(ready.train)))  # some blocks hold several


def test_masks_are_drawn_as_bert_draws_them(start):
    from lora_lab.config import compose

    ready = prepared.prepare(compose.compose(start("masked_lm", "task.mask_probability=0.3")))
    examples = [ready.train[i][0] for i in range(40)] * 40
    batch = ready.task.collate(examples, np.random.default_rng(0))
    rows, columns = batch.places
    seen, mask = batch.inputs["input_ids"][rows, columns], ready.encoder.tokenizer.mask_token_id
    shares = [(seen == mask).float().mean().item(), (seen == batch.targets).float().mean().item()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.03)
    counts = np.bincount(rows.numpy())
    longest = max(example.supervised.sum() for example in examples)
    of_longest = [count for count, e in zip(counts, examples, strict=True) if e.supervised.sum() == longest]
    assert np.mean(of_longest) == pytest.approx(0.3 * longest, rel=0.15)
    assert np.var(of_longest) == pytest.approx(0.3 * 0.7 * longest, rel=0.5)  # each token by itself, not a fixed share
    assert counts.min() == 1
    special = set(ready.encoder.tokenizer.all_special_ids)
    assert not special & set(batch.targets.tolist())
    again = ready.task.collate(examples, np.random.default_rng(1))
    assert not torch.equal(again.inputs["input_ids"], batch.inputs["input_ids"])


def test_whole_words_are_masked_together(start, tmp_path):
    from lora_lab.config import compose

    overrides = start("masked_lm-words", "task.mask_probability=0.5")
    write_jsonl(tmp_path / "train.jsonl", [{"text": "purple lamp purple Oslo zebras"}] * 2)
    ready = prepared.prepare(compose.compose(overrides))
    example = ready.train[0][0]
    words = example["words"]
    assert len(words) > len(set(words.tolist())) + 1  # words of several tokens
    for seed in range(20):
        chosen = ready.task._choose(example, np.random.default_rng(seed))
        assert set(np.flatnonzero(np.isin(words, words[chosen]))) == set(chosen)
        assert len(chosen) >= 1


def test_a_long_context_is_read_in_windows(start, tmp_path):
    from lora_lab.config import compose

    context = " ".join(["table"] * 30 + ["red"] + ["lamp"] * 30)
    row = {
        "question": "table",
        "context": context,
        "answers": {"text": ["red"], "answer_start": [context.index("red")]},
    }
    overrides = start("question_answering")
    write_jsonl(tmp_path / "train.jsonl", [row, span_row(random.Random(5))])
    ready = prepared.prepare(compose.compose(overrides))
    windows = [example for example in ready.train if example.origin.endswith("row 1")]
    assert len(windows) > 3
    seen = set()
    for window in windows:
        begins, ends, first = window["begins"], window["ends"], window["pair_start"]
        seen |= set(zip(begins.tolist(), ends.tolist(), strict=True))
        if window["start"]:
            start_char, end_char = begins[window["start"] - first], ends[window["end"] - first]
            assert context[start_char:end_char] == "red"
    assert len(seen) == 61  # every word of the context is in some window
    assert 1 <= sum(window["start"] > 0 for window in windows) < len(windows)


def test_a_base_with_three_classes_answers_with_two(start, models, tmp_path):
    """Published classifiers carry the number of their classes; the head for answers has a start and an end."""
    base = tmp_path / "base"
    shutil.copytree(models["bert"], base)
    config = json.loads((base / "config.json").read_text())
    config |= {"id2label": {"0": "no", "1": "maybe", "2": "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
    (base / "config.json").write_text(json.dumps(config))
    made = pipeline.train(compose.compose(start("question_answering", f"model.path={base}", "train.max_steps=2")))
    assert json.loads((made.path / "result.json").read_text())["tuned"]["loss"] > 0


def test_the_best_span_of_all_windows_is_the_answer(start, tmp_path):
    from lora_lab.config import compose
    from lora_lab.tasks.base import Predictions

    ready = prepared.prepare(compose.compose(start("question_answering")))
    seen = []
    for example in ready.held_out:
        logits = torch.full((2, len(example.input_ids)), -5.0)
        logits[0, example["start"]], logits[1, example["end"]] = 5.0, 5.0
        seen.append(Predictions([example], logits, np.zeros(2), np.zeros(2)))
    found = ready.task.metrics(0.0, seen).metrics
    assert found["exact_match"] == found["f1"] == 1.0


# -- against overfitting ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(start):
    """A case made ready on an adapter that is not fresh, and one batch of it."""
    from lora_lab.config import compose

    def make(case: str, *more: str):
        ready = prepared.prepare(compose.compose(start(case, *more, rows=8)))
        model = ready.loaded().model
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        member = Member(
            "default", ready.config, run_dir.create(ready.config), ready.base, model, ready.train, ready.task
        )
        examples = [e for i in range(6) for e in ready.train[i]]
        [batch] = ready.task.step(model, [examples], np.random.default_rng(0)).batches
        model.train()
        return ready, member, batch

    return make


def learned(member, prepared_run, batch, seed: int = 0) -> Share:
    """A pass over the batch as the loop makes it."""
    share = Share(member, [], StepBatches([batch], batch.weight), batch.weight, None, seed=seed)
    learn([share], 0, prepared_run.accelerator)
    return share


def grads_of(member) -> torch.Tensor:
    found = torch.cat([p.grad.reshape(-1) for p in member.parameters.values() if p.grad is not None])
    member.model.zero_grad()
    return found


@pytest.mark.parametrize("case", ["causal_lm", "classification", "seq2seq", "preference-dpo", "question_answering"])
def test_neftune_adds_noise_of_the_papers_size_in_training_only(case, ready):
    prepared_run, member, batch = ready(case, "train.neftune_alpha=5")
    embeddings = [m for m in member.model.modules() if isinstance(m, torch.nn.Embedding)]
    shared = member.model.get_base_model().get_input_embeddings().weight
    seen, clean = [], []
    for module in embeddings:
        if module.weight is shared:
            module.register_forward_hook(lambda _, __, out: clean.append(out.detach().clone()))
    original = regularize._noise

    def spy(alpha, given):
        change = original(alpha, given)
        return lambda embedded: seen.append((embedded, change(embedded))) or seen[-1][1]

    regularize._noise, loss = spy, None
    try:
        for _ in range(2):
            torch.manual_seed(0)
            loss = learned(member, prepared_run, batch).loss
            grads = grads_of(member)
    finally:
        regularize._noise = original
    embedded, noisy = seen[0]
    noise = noisy - embedded
    shortest = min(batch.lengths) if embedded.shape[0] == 1 else int(batch.inputs["attention_mask"].sum(1).min())
    bound = 5 / (shortest * embedded.shape[-1]) ** 0.5
    assert 0.5 * bound < noise.abs().max().item() <= bound * 1.0001
    member.model.eval()
    plain = prepared_run.task.loss(member.model, batch).loss.item()
    assert plain != pytest.approx(loss, rel=1e-6)
    assert grads.isfinite().all()
    count = len(seen)
    prepared_run.task.measure(member.model, prepared_run.held_out)
    assert len(seen) == count


@pytest.mark.parametrize("case", ["causal_lm", "classification", "seq2seq"])
def test_fgm_is_the_gradient_here_and_at_the_worst_point_near(case, ready):
    """Against a plain computation with the embeddings as explicit inputs."""
    epsilon = 0.5
    prepared_run, member, batch = ready(case, f"train.fgm_epsilon={epsilon}")
    task, model = prepared_run.task, member.model
    plain = task.loss(model, batch).loss / batch.weight
    plain.backward()
    clean = grads_of(member)
    learned(member, prepared_run, batch)
    both = grads_of(member)
    moved = both - clean  # the adversarial part alone
    assert moved.norm() > 0.1 * clean.norm()
    assert (moved - clean).norm() > 1e-3 * clean.norm()

    kept: list[torch.Tensor] = []
    with regularize._changed(model, regularize._keep(kept)):
        (task.loss(model, batch).loss / batch.weight).backward()
    member.model.zero_grad()
    steps = [regularize._adversarial(embedded.grad, epsilon, batch) for embedded in kept]
    for step in steps:
        rows = step[0].split(batch.lengths) if step.shape[0] == 1 else step
        assert torch.stack([row.norm() for row in rows]) == pytest.approx(torch.full((len(rows),), epsilon), rel=1e-5)
    waiting = iter(steps)
    with torch.enable_grad(), regularize._changed(model, lambda embedded: embedded + next(waiting)):
        worse = task.loss(model, batch).loss / batch.weight
    assert worse.item() > plain.item()  # it raises the loss
    worse.backward()
    assert torch.allclose(grads_of(member), moved, atol=1e-6 * moved.abs().max().item() + 1e-9, rtol=1e-4)


@pytest.mark.parametrize(
    "case", ["causal_lm", "classification", "token_classification", "seq2seq", "question_answering"]
)
def test_rdrop_is_two_passes_and_their_divergence(case, ready):
    from torch.nn.functional import cross_entropy

    prepared_run, member, batch = ready(case, "train.rdrop_alpha=2.0", "adapter.lora_dropout=0.3")
    task, model = prepared_run.task, member.model
    found = learned(member, prepared_run, batch, seed=7)
    torch.manual_seed(7)
    p, q = task.logits(model, batch), task.logits(model, batch)
    assert not torch.equal(p, q)
    kl = torch.distributions.kl_divergence
    one, two = (torch.distributions.Categorical(logits=x) for x in (p, q))
    expected = (
        (cross_entropy(p, batch.targets, reduction="none") + cross_entropy(q, batch.targets, reduction="none")) / 2
        + 2.0 * (kl(one, two) + kl(two, one)) / 2
    ).sum()
    assert found.loss == pytest.approx(expected.item(), rel=1e-5)


def test_dropout_is_for_training_only(ready):
    prepared_run, member, batch = ready("causal_lm", "adapter.lora_dropout=0.5")
    losses = [prepared_run.task.loss(member.model, batch).loss.item() for _ in range(2)]
    assert losses[0] != losses[1]
    member.model.eval()
    losses = [prepared_run.task.loss(member.model, batch).loss.item() for _ in range(2)]
    assert losses[0] == losses[1]


def test_weight_decay_pulls_weights_towards_zero(start, tmp_path):
    from safetensors.torch import load_file

    norms = []
    for decay in (0.0, 1.0):
        folder = tmp_path / f"decay{decay}"
        options = [f"optim.weight_decay={decay}", "optim.lr=0.02", f"run_dir={folder}"]
        assert cli.main(["train", *start("completion", *options)]) == 0
        weights = load_file(folder / "adapter/adapter_model.safetensors")
        norms.append(sum(tensor.square().sum().item() for name, tensor in weights.items() if "lora_A" in name))
    assert norms[1] < 0.8 * norms[0]


def test_the_reference_model_has_no_adapter_no_dropout_and_no_gradient(ready):
    prepared_run, member, batch = ready("preference-dpo", "adapter.lora_dropout=0.5")
    reference = [prepared_run.task._reference(member.model, batch) for _ in range(2)]
    assert torch.equal(*reference)
    assert not reference[0].requires_grad
    assert member.model.training
    with member.model.disable_adapter():
        base = prepared_run.task._log_probabilities(member.model.eval(), batch)[0]
        assert torch.equal(prepared_run.task._reference(member.model, batch), base)
        assert torch.equal(prepared_run.task._log_probabilities(member.model, batch)[0], base)  # still switched off
    assert not torch.equal(prepared_run.task._log_probabilities(member.model, batch)[0], base)


def test_augmented_rows_are_trained_on_and_never_held_out(start, tmp_path, capsys):
    from lora_lab.config import compose

    (tmp_path / "table.tsv").write_text("table\tdesk\nlamp\tlight\n")
    options = [
        "data.augment.methods=[delete,synonyms]",
        "data.augment.copies=2",
        f"data.augment.synonyms={tmp_path}/table.tsv",
    ]
    overrides = [text for text in start("classification", *options) if not text.startswith("data.eval=")]
    for ready in (
        prepared.prepare(compose.compose([*overrides, "data.eval_ratio=0.25"])),
        prepared.prepare(compose.compose([*overrides, f"data.eval={tmp_path}/eval.jsonl"])),
    ):
        copies = [example.copy for example in ready.train]
        assert 0.5 < sum(copy > 0 for copy in copies) / copies.count(0) <= 2
        assert {example.copy for example in ready.held_out} == {0}
        originals = {example.origin: example for example in ready.train if not example.copy}
        changed = [example for example in ready.train if example.copy]
        assert all(example["labels"] == originals[example.origin]["labels"] for example in changed)
        assert any(not np.array_equal(example.input_ids, originals[example.origin].input_ids) for example in changed)
        assert not {example.origin for example in ready.train} & {
            example.origin for example in ready.held_out if "train" in example.origin
        }
    assert "changed copies added" in capsys.readouterr().out


# -- mistakes -----------------------------------------------------------------------------------------------------------------

WRONG = {
    "unknown class": ("classification", {"text": "red", "label": "purple"}, "eval", "eval.jsonl row 13: label 'purple' is in no training row"),
    "class of the list": ("classification", {"text": "red", "label": "gren"}, "train", "train.jsonl row 49: label 'gren' is not in data.label_names (red, green, blue). Did you mean 'green'?"),
    "number for a class": ("classification", {"text": "red", "label": 0.5}, "train", "train.jsonl row 49: label 0.5 is"),
    "several": ("classification", {"text": "red", "label": ["red", "blue"]}, "train", "train.jsonl row 49: 2 labels"),
    "no text": ("classification", {"text": " ", "label": "red"}, "train", "train.jsonl row 49"),
    "no number": ("regression", {"text": "one", "text_pair": "lamp", "label": "high"}, "train", "train.jsonl row 49: label 'high' is not a number"),
    "infinite": ("regression", {"text": "one", "text_pair": "lamp", "label": "inf"}, "train", "train.jsonl row 49: label 'inf' is not a number"),
    "unknown tag": ("token_classification", {"tokens": ["red"], "tags": ["B-color"]}, "eval", "eval.jsonl row 13: label 'B-color' is in no training row"),
    "odd tag": ("token_classification", {"tokens": ["red"], "tags": ["colour"]}, "train", "train.jsonl row 49: tag 'colour' is neither O nor begins with"),
    "too few tags": ("token_classification", {"tokens": ["red", "cat"], "tags": ["O"]}, "train", "train.jsonl row 49: 2 tokens and 1 tags"),
    "span": ("question_answering", {"question": "table", "context": "a red lamp", "answers": {"text": ["red"], "answer_start": [3]}}, "train", "train.jsonl row 49: answer 'red' is not at character 3"),
    "absent span": ("question_answering", {"question": "table", "context": "a lamp", "answers": {"text": ["red"], "answer_start": []}}, "train", "train.jsonl row 49: answer 'red' is not in the context"),
    "no start": ("question_answering", {"question": "table", "context": "a red lamp", "answers": {"text": ["red", "lamp"], "answer_start": [2]}}, "train", "train.jsonl row 49: 'answers' has 2 texts and the starts [2]"),
    "equal answers": ("preference-dpo", {"prompt": "lamp", "chosen": "red", "rejected": "red"}, "train", "train.jsonl row 49: chosen and rejected are the same"),
    "judgement": ("preference-kto", {"prompt": "lamp", "completion": "red", "label": "yes"}, "train", "train.jsonl row 49: label 'yes' is neither true"),
    "positive as negative": ("embedding", {"query": "lamp", "positive": "red", "negatives": ["cat", "red"]}, "train", "train.jsonl row 49: the positive 'red' is a negative of the row too"),
    "empty query": ("embedding", {"query": " ", "positive": "red"}, "train", "train.jsonl row 49: 'query' is empty"),
    "no negatives": ("reranker", {"query": "lamp", "positive": "red"}, "train", "train.jsonl row 49: the row has no negatives"),
    "no score": ("embedding-cosent", {"text_a": "lamp", "text_b": "red", "score": "high"}, "train", "train.jsonl row 49: score 'high' is not a number"),
    "empty target": ("seq2seq", {"source": "lamp", "target": ""}, "train", "train.jsonl row 49"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_label_names_file_and_row(name, start, tmp_path, monkeypatch, capsys):
    case, row, file, says = WRONG[name]
    monkeypatch.setattr("lora_lab.base.load.load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    more = ["data.label_names=[red,green,blue]"] if name == "class of the list" else []
    overrides = start(case, *more)
    with open(tmp_path / f"{file}.jsonl", "a") as stream:
        stream.write(json.dumps(row) + "\n")
    assert cli.main(["train", *overrides]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


REFUSED = {
    "multi": (["task.multi_label=true"], "llama", "task.multi_label=true: no effect with task=causal_lm; it is for classification"),
    "packing": (["task=classification", "train.packing=true"], "bert", "train.packing=true: rows of task=classification are padded"),
    "template": (["task=classification", "data.supervise=all"], "bert", "data.supervise: no effect with task=classification"),
    "gamma": (["task=preference", "task.gamma=1"], "llama", "task.gamma: no effect with task.loss=dpo"),
    "rdrop": (["task=preference", "train.rdrop_alpha=1"], "llama", "train.rdrop_alpha: compares distributions"),
    "kto": (["task=preference", "task.loss=kto", "train.batch_size=1"], "llama", "so a step needs two"),
    "augment": (["task=token_classification", "data.augment.methods=[swap]"], "bert", "would invalidate the label positions"),
    "cut": (["task=question_answering", "data.too_long=truncate_prompt"], "bert", "are never cut"),
    "pieces": (["task=completion", "data.too_long=drop"], "llama", "cuts long texts into pieces"),
    "shots": (["task.few_shot=2"], "llama", "generated answers are compared, so set task.generate_rows"),
    "encoder": ([], "bert", "sees the tokens that it would have to predict. Use a decoder, or task=masked_lm"),
    "no mask": (["task=masked_lm"], "llama", "cannot build a masked language model"),
    "no decoder": (["task=seq2seq"], "llama", "llama has no encoder for texts, so task=seq2seq cannot train it"),
    "no dropout": (["train.rdrop_alpha=1"], "llama", "train.rdrop_alpha=1: nothing is dropped"),
    "one row": (["task=embedding", "train.batch_size=1"], "bert", "so it needs two"),
    "read twice": (["task=embedding", "train.neftune_alpha=5"], "bert", "train.neftune_alpha: task=embedding reads the rows of a step twice"),
    "no queries": (["task=embedding", "task.loss=cosent", "task.symmetric=false"], "bert", "task.symmetric: no effect with task.loss=cosent"),
    "no question": (["task=reranker", "task.yes_word=right"], "bert", "task.yes_word: no effect with task.score=head; it is for yes_no"),
    "long answer": (["task=reranker", "task.score=yes_no", "task.yes_word=qqqq"], "llama", "task.yes_word=qqqq: becomes 4 tokens"),
    "one answer": (["task=reranker", "task.score=yes_no", "task.yes_word=n", "task.no_word=n"], "llama", "is the same token as task.yes_word=n"),
    "no answers": (["task=reranker", "task.score=yes_no"], "bert", "task.score=yes_no: bert is no decoder"),
    "corpus alone": (["task=embedding", "task.corpus=x.jsonl"], "bert", "task.corpus: needs held-out rows"),
    "two parts": (["task=embedding"], "t5", "it has an encoder and a decoder"),
    "format": (["task=classification", "data.format=messages"], "bert", "data.format=messages is not for this task"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_a_task_is_refused(name, overrides, models, tmp_path, capsys):
    more, model, says = REFUSED[name]
    file = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"text": "red cat", "label": label, "tokens": ["a"], "tags": ["O"]} for label in (0, 1)],
    )
    assert cli.main(["train", *overrides, f"model.path={models[model]}", f"data.train={file}", *more]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_must_be_known_before_a_stream(start, capsys):
    assert cli.main(["train", *start("classification", "data.max_tokens=64", "data.streaming=true")]) == 2
    assert "Name them: data.label_names=[...]" in capsys.readouterr().err
    assert (
        cli.main(
            [
                "train",
                *start(
                    "classification", "data.max_tokens=64", "data.streaming=true", "data.label_names=[red,green,blue]"
                ),
            ]
        )
        == 0
    )


# -- verbs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["causal_lm", "seq2seq"])
def test_base_few_shot_and_tuned_side_by_side(case, start, tmp_path, capsys):
    assert cli.main(["train", *start(case)]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", f"run={tmp_path}/run", "task.few_shot=3"]) == 0
    printed = capsys.readouterr().out
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert all(name in printed for name in ("base", "3-shot", "tuned"))
    assert {"exact_match", "rougeL", "bleu", "chrf"} <= evaluation["3-shot"].keys() <= evaluation["tuned"].keys()


# every task, in the variants that make other batches
PLANNED = [
    case if case in ("causal_lm", "classification") else pytest.param(case, marks=pytest.mark.long)
    for case in CASES
    if case.partition("-")[2] in ("", "dpo", "kto", "several")
]


@pytest.mark.parametrize("case", PLANNED)
def test_data_and_plan_of_every_task(case, start, tmp_path, capsys):
    """The rows can be looked at, and what training needs is foreseen without loading a weight."""
    assert cli.main(["data", *start(case), f"--html={tmp_path}/data.html"]) in (0, 1)
    assert "train.jsonl row" in capsys.readouterr().out
    assert cli.main(["plan", *start(case)]) == 0
    assert "peak of each phase" in capsys.readouterr().out


def test_chat_is_for_models_that_answer(start, tmp_path, capsys):
    assert cli.main(["train", *start("classification", "train.max_steps=1")]) == 0
    assert cli.main(["chat", f"run={tmp_path}/run", "prompt=red"]) == 2
    assert "trained for task=classification" in capsys.readouterr().err


def test_a_head_that_the_base_has_is_trained_on(models, start, tmp_path):
    """A classifier of other classes is replaced; one of as many goes on from where it was."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    for count in (3, 5):
        folder = tmp_path / f"classifier{count}"
        model = AutoModelForSequenceClassification.from_pretrained(models["bert"], num_labels=count)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(models["bert"]).save_pretrained(folder)
        from lora_lab.config import compose

        ready = prepared.prepare(compose.compose(start("classification", f"model.path={folder}")))
        loaded = ready.loaded().model.get_base_model().classifier.original_module.weight
        assert loaded.shape == (3, 64)
        assert torch.equal(loaded, model.classifier.weight) is (count == 3)


def test_half_a_base_is_refused(models, tmp_path, start, capsys):
    """Missing weights that belong to no head are never filled with random numbers."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models["bert"], tmp_path / "half")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "layer.1" in name and name.endswith("key.weight"))
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert cli.main(["train", *start("classification", f"model.path={folder}")]) == 2
    assert "no weights for" in capsys.readouterr().err
    with pytest.raises(LoraLabError):
        load.load_model(load.find(load.ModelConfig(path=str(folder))), load.ModelKind("AutoModelForMaskedLM", None, "missing"), "float32", load.QuantConfig(), torch.device("cpu"), 0)  # fmt: skip


def test_what_decides_an_example_decides_the_cache_entry(start):
    """Another task, stride or prefix is another entry; an option that changes no example is not."""
    from lora_lab.config import compose
    from lora_lab.data import sources

    def key(case: str, *more: str) -> str:
        config = compose.compose(start(case, *more))
        encoder = prepared.find_base(config).encoder
        [file] = sources.find("data.train", config.data.train)
        name = store.format_of(file, encoder)
        return store._key(file, file.digest(), name, encoder, None)

    assert key("seq2seq") != key("seq2seq", "task.prefix=x")
    assert key("seq2seq") == key("seq2seq", "task.max_new_tokens=9")
    assert key("question_answering") != key("question_answering", "task.stride=7")
    assert key("preference-dpo") != key("preference-kto")


@pytest.mark.parametrize("case", CASES)
def test_examples_come_back_from_the_cache_as_they_were_encoded(case, start, monkeypatch):
    """Types included; and neither `collate` nor the comparison of models parses anything."""
    from transformers import AutoConfig

    assert {name.partition("-")[0] for name in CASES} == set(TASKS)
    config = compose.compose(start(case, rows=6))
    encoder = prepared.find_base(config).encoder
    file = sources.find("data.train", config.data.train)[0]
    outcomes = encoder.encode(list(file.rows()), file.name, store.format_of(file, encoder))
    expected = [example for outcome in outcomes for example in outcome.examples]
    data = build.build(config.data, encoder).train
    found = list(data)
    assert len(found) == len(expected) >= 6
    for example, other in zip(found, expected, strict=True):
        assert_same(example, other)
    assert list(expected[0].own) == list(encoder.columns)
    assert data.lengths.sum() == sum(example.num_tokens for example in expected)
    assert data.supervised.sum() == sum(example.num_items for example in expected)
    assert data.longest == max(len(ids) for example in expected for ids in encoder.sequences(example))

    kind = config.task.load()
    task = kind(config, encoder, kind.learn(config, data), AutoConfig.from_pretrained(config.model.path))
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("parsed"))
    one, other = (task.collate(part, np.random.default_rng(0)) for part in (found, expected))
    assert torch.equal(one.targets, other.targets)
    assert [one.inputs.keys() for one in task.passes(found[0])] == [
        one.inputs.keys() for one in task.passes(expected[0])
    ]


def test_padded_rows_are_put_together_by_length():
    from lora_lab.data.collate import of_like_length

    lengths = [100, 10, 12, 11, 90, 40, 13, 41]

    def found(most: int, enough: int) -> list[list[int]]:
        return [[lengths[row] for row in part] for part in of_like_length(lengths, most, enough)]

    assert found(8, 30) == [[10, 11, 12, 13], [40, 41], [90, 100]]
    assert found(8, 10_000) == [sorted(lengths)]
    assert found(3, 10_000) == [[10, 11, 12], [13, 40, 41], [90, 100]]


# -- rows without a label ---------------------------------------------------------------------------------------------------

_LABELS = ("label", "tags", "answers")
PREDICTED = [case for case in CASES if TASKS[case.partition("-")[0]].predicts]


def _scored(case: str, rows: list[dict], run: lora_lab.Run) -> tuple[str, float]:
    """A metric of `evaluate`, of what is predicted for rows that have no label."""
    if case.startswith("reward"):
        better, worse = ([one["reward"] for one in run.predict(
            [{"prompt": row["prompt"], "completion": row[side]} for row in rows])] for side in ("chosen", "rejected"))  # fmt: skip
        return "accuracy", float(np.mean(np.array(better) > np.array(worse)))
    if case.startswith("reranker"):
        pairs = [[row["positive"], *row["negatives"]] for row in rows]
        said = [
            [one["score"] for one in run.predict([{"query": row["query"], "document": text} for text in texts])]
            for row, texts in zip(rows, pairs, strict=True)
        ]
        return "mrr@10", metrics.retrieval([[1 + sum(one >= own[0] for one in own[1:])] for own in said])["mrr@10"]
    if case.startswith("embedding"):
        return _scored_vectors(case, rows, run)
    found = run.predict([{key: value for key, value in row.items() if key not in _LABELS} for row in rows])
    if case == "classification-several":
        missed = [len({*one["labels"]} ^ {*row["label"]}) / 3 for one, row in zip(found, rows, strict=True)]
        return "hamming_loss", float(np.mean(missed))
    if case.startswith("classification"):
        assert all(1 / 3 <= one["score"] <= 1 for one in found)
        return "accuracy", float(np.mean([one["label"] == row["label"] for one, row in zip(found, rows, strict=True)]))
    if case.startswith("regression"):
        return "mse", float(np.mean([(one["value"] - row["label"]) ** 2 for one, row in zip(found, rows, strict=True)]))
    if case.startswith("token_classification"):
        assert [one["words"] for one in found] == [row["tokens"] for row in rows]
        texts = [" ".join(row["tokens"]) for row in rows]
        for text, one, other in zip(texts, run.predict([{"text": text} for text in texts]), found, strict=True):
            assert one["tags"] == other["tags"]
            assert [{**entity, "text": text[entity["start"] : entity["end"]]} for entity in one["entities"]] == one[
                "entities"
            ]
            words = [" ".join(one["words"][entity["first"] : entity["last"] + 1]) for entity in one["entities"]]
            assert words == [entity["text"] for entity in one["entities"]]
        scores, _ = metrics.entities([row["tags"] for row in rows], [one["tags"] for one in found])
        return "f1", scores["f1"]
    scores = metrics.squad([one["answer"] for one in found], [row["answers"]["text"] for row in rows], "en")
    return "f1", scores["f1"]


def _scored_vectors(case: str, rows: list[dict], run: lora_lab.Run) -> tuple[str, float]:
    """Of texts that are asked one by one, and together with what belongs to them."""
    if "text_a" in rows[0]:
        pairs = run.predict([{"text_a": row["text_a"], "text_b": row["text_b"]} for row in rows])
        alone = [run.predict([{"text": row[side]} for row in rows]) for side in ("text_a", "text_b")]
        for one, first, second in zip(pairs, *alone, strict=True):
            assert one["vector"] == pytest.approx(first["vector"], abs=1e-6)
            assert one["other_vector"] == pytest.approx(second["vector"], abs=1e-6)
            assert np.dot(first["vector"], second["vector"]) == pytest.approx(one["similarity"], abs=1e-6)
        scores = metrics.regression([row["score"] for row in rows], [one["similarity"] for one in pairs])
        return "spearman", scores["spearman"]
    documents = list(dict.fromkeys(text for row in rows for text in [row["positive"], *row.get("negatives", [])]))
    queries = list(dict.fromkeys(row["query"] for row in rows))
    right = {query: {row["positive"] for row in rows if row["query"] == query} for query in queries}
    asked = np.array([one["vector"] for one in run.predict([{"query": query} for query in queries])])
    there = np.array([one["vector"] for one in run.predict([{"document": text} for text in documents])])
    ranks = []
    for query, scores in zip(queries, asked @ there.T, strict=True):
        order = [documents[place] for place in np.argsort(-scores)]
        ranks.append([order.index(text) + 1 for text in right[query]])
    return "ndcg@10", metrics.retrieval(ranks)["ndcg@10"]


@pytest.mark.parametrize(
    "case", [case if case == "question_answering" else pytest.param(case, marks=pytest.mark.long) for case in PREDICTED]
)
def test_what_is_predicted_without_labels_is_what_evaluation_counts(case, start, tmp_path):
    run = lora_lab.train(lora_lab.load_config(*start(case, "train.max_steps=15", f"run_dir={tmp_path}/run")))
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    name, score = _scored(case, rows, run)
    assert score == pytest.approx(run.result["tuned"][name], abs=1e-5)
    good = {
        key: value
        for key, value in {**rows[0], "completion": "cat"}.items()
        if key not in (*_LABELS, "chosen", "rejected")
    }
    with pytest.raises(LoraLabError, match="row 2"):
        run.predict([good, {"text": 3}])
    run.unload()


def test_a_reward_is_of_one_answer_that_may_fill_the_limit(start):
    """Nothing else is read beside it, and no room is left for anything."""
    live = prepared.prepare(compose.compose(start("reward", "data.max_tokens=32", rows=6))).loaded()
    task, model, seen = live.setup.task, live.model.eval(), []
    row = {"prompt": "red cat", "completion": " ".join(["dog"] * 27)}  # and five tokens of the prompt and its marks
    [example] = answering.unlabelled(live.setup, row, 1)
    assert example.num_tokens == 32
    handle = model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    [(_, said)] = task.predict(model, [example])
    handle.remove()
    expected = task.tokenizer(row["prompt"], row["completion"], return_tensors="pt")
    assert [{name: one.tolist() for name, one in given.items()} for given in seen] == [
        {name: one.tolist() for name, one in expected.items()}
    ]
    assert said["reward"] == pytest.approx(model(**expected).logits.item(), rel=1e-6)
    with pytest.raises(LoraLabError, match="33 tokens, more than data.max_tokens=32"):
        answering.unlabelled(live.setup, {**row, "completion": f"{row['completion']} dog"}, 1)


@pytest.mark.long
def test_what_predicts_nothing_says_what_to_use(start, tmp_path):
    run = lora_lab.train(lora_lab.load_config(*start("completion", "train.max_steps=1", f"run_dir={tmp_path}/run")))
    with pytest.raises(LoraLabError, match="task=completion predicts nothing of a row by itself. Use run.evaluate"):
        run.predict([{"text": "red"}])
    with pytest.raises(LoraLabError, match="which does not answer. Use run.evaluate"):
        run.generate(["red"])


# -- a task that is added ---------------------------------------------------------------------------------------------------

_ADDED = """
import dataclasses, sys
from typing import Annotated, ClassVar, Literal
from pydantic import Field
from lora_lab.schema.sections import section
from lora_lab.tasks import TASKS
from lora_lab.tasks.section import TaskSection

@section
class LengthConfig(TaskSection):
    name: Annotated[Literal["length"], Field(description="objective")] = "length"
    unit: Annotated[int, Field(ge=1, description="characters that count as one")] = 10
    formats: ClassVar = ("text",)
    numbers: ClassVar = True

    @classmethod
    def load(cls):
        from lora_lab.data.encode import Encoded, Example
        from lora_lab.tasks.regression.task import NumberEncoder, Regression

        class LengthEncoder(NumberEncoder):
            task_options = ("unit",)

            def example(self, record, origin):
                return super().example(dataclasses.replace(record, label=len(record.text) / self.task.unit), origin)

        class Length(Regression):
            encoder_class = LengthEncoder

        return Length

TASKS["length"] = LengthConfig  # the dict line; a folder of the project would hold the rest
from lora_lab import cli
codes = [cli.main(words.split("|")) for words in sys.argv[1:]]
print("CODES", codes)
"""


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_task_is_a_section_a_class_and_a_line(models, tmp_path, whole):
    """Composed, trained, evaluated, merged, and refused what is another's: nothing else knows its name."""
    (tmp_path / "mine/task").mkdir(parents=True)
    (tmp_path / "mine/task/length.yaml").write_text("name: length\n")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": " ".join(WORDS[: n % 7 + 2])} for n in range(24)])
    told = [
        "--config-dir", f"{tmp_path}/mine", "task=length", "model=hub", f"model.path={models['bert']}",
        f"data.train={rows}", f"data.eval={rows}", "model.dtype=float32", "train.max_steps=2", "export.dtype=float32",
        "hardware=cpu", "tracker=none", f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    script = tmp_path / "length.py"
    script.write_text(_ADDED)
    lines = [
        ["config", *told, "task.unit=5"],
        ["train", *told, "task.unit=5"],
        *([["evaluate", f"run={tmp_path}/run"], ["merge", f"run={tmp_path}/run"]] if whole else []),
        ["train", *told, "task.stride=3"],
        ["train", *told[:-1], f"run_dir={tmp_path}/other", "task=classification", "task.unit=2"],
        ["config", "--keys"],
    ]
    done = subprocess.run([sys.executable, script, *map("|".join, lines)], capture_output=True, text=True, cwd=tmp_path)
    assert f"CODES {[0, 0, *([0, 0] if whole else []), 2, 2, 0]}" in done.stdout, (
        done.stdout[-3000:] + done.stderr[-3000:]
    )
    assert "task.stride=3: no effect with task=length; it is for question_answering." in done.stderr
    assert "task.unit=2: no effect with task=classification; it is for length." in done.stderr
    assert "length: characters that count as one" in done.stdout
