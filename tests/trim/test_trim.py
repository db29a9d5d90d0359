"""`lora-lab trim`: what stays is read and said as before, what goes is told, and nothing half is left."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_lab import cli
from lora_lab.base.hard_texts import HARD_TEXTS
from lora_lab.errors import BaseModelError, Interrupted, TrimError
from lora_lab.run.prepared import prepare
from lora_lab.runtime import storage
from lora_lab.trim import checkpoint, layers, vocabulary
from lora_lab.trim.vocabulary import Vocabulary
from tests.conftest import CHATML, WORDS, fails, write_jsonl

OTHERS = "quick brown foxes jump over lazy dogs while seven wizards brew potent mixtures 东西 南北".split()
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
TEMPLATE = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
TEXTS = [" ".join(WORDS[place:] + WORDS[:place]) for place in range(len(WORDS))]


def tokenizer_of(kind: str, corpus: list[str], size: int = 600) -> PreTrainedTokenizerFast:
    """A tokenizer trained on a corpus, whose special tokens come last where its kind allows that."""
    if kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        core.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    elif kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(corpus * 5, trainer)
    core.add_special_tokens(SPECIAL)
    ids = {name: core.token_to_id(name) for name in SPECIAL}
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B", special_tokens=[(name, ids[name]) for name in ("<s>", "</s>")]
    )
    names = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def ids_of(tokenizer) -> dict[str, int]:
    return {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }  # fmt: skip


@pytest.fixture(scope="module")
def other_words(tmp_path_factory) -> Path:
    """A Llama whose tokenizer knows more words than the rows have, and whose special tokens come last."""
    folder = tmp_path_factory.mktemp("other_words") / "base"
    tokenizer = tokenizer_of("bpe", [*TEXTS, " ".join(OTHERS)])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(tokenizer) + 3, initializer_range=0.3, tie_word_embeddings=True, **ids_of(tokenizer),
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    model.generation_config.suppress_tokens = [tokenizer.mask_token_id]
    model.generation_config.bad_words_ids = [tokenizer(" wizards", add_special_tokens=False)["input_ids"]]
    model.save_pretrained(folder)
    (folder / "LICENSE").write_text("free\n")
    return folder


@pytest.fixture
def told(other_words, rows_file, eval_file, tmp_path) -> list[str]:
    return [
        "trim", "model=hub", f"model.path={other_words}", "model.dtype=float32", "hardware=cpu",
        f"trim.vocabulary={rows_file}", f"data.eval={eval_file}", f"out={tmp_path}/small",
    ]  # fmt: skip


def report_of(folder: Path) -> dict:
    return json.loads((folder / "trim_report.json").read_text())


# -- tokens -----------------------------------------------------------------------------------------------------------------


def cut(tokenizer, folder: Path, texts: list[str]) -> tuple[Vocabulary, PreTrainedTokenizerFast]:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    kept = vocabulary.choose(tokenizer, folder, len(tokenizer), texts, 1, None)
    return kept, kept.write(tokenizer, folder)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_a_text_whose_tokens_stay_is_read_as_before(kind, tmp_path):
    tokenizer = tokenizer_of(kind, [*TEXTS, *HARD_TEXTS, " ".join(OTHERS)], 1200)
    kept, smaller = cut(tokenizer, tmp_path / "small", [*TEXTS, *HARD_TEXTS[::3]])
    assert len(kept.ids) < 0.9 * len(tokenizer)
    texts = [*TEXTS, *HARD_TEXTS, *(text[::-1] for text in TEXTS), *OTHERS]
    read = kept.prove(tokenizer, smaller, texts, "texts")  # raises if one is not
    stays = sum(bool((kept.new[tokenizer(text, add_special_tokens=False)["input_ids"]] >= 0).all()) for text in texts)
    assert len(TEXTS) < stays == read.identical < read.texts
    around = [[int(kept.new[one]) for one in tokenizer("red")["input_ids"]], smaller("red")["input_ids"]]
    assert around[0] == around[1]
    assert around[1][0] == smaller.bos_token_id  # what is put around texts has its new id
    assert [smaller.convert_ids_to_tokens(int(kept.new[one])) for one in kept.ids] == tokenizer.convert_ids_to_tokens(
        kept.ids.tolist()
    )
    if kind == "bpe":
        kept.prove_lossless(tokenizer, smaller)


def test_without_what_a_token_is_made_of_the_proof_fails(tmp_path, monkeypatch):
    tokenizer = tokenizer_of("bpe", [*TEXTS, " ".join(OTHERS)])
    monkeypatch.setitem(vocabulary._KINDS, "BPE", vocabulary._alone)
    kept, smaller = cut(tokenizer, tmp_path / "small", TEXTS)
    with pytest.raises(TrimError, match="other tokens of"):
        kept.prove(tokenizer, smaller, TEXTS, "texts")


def test_rarely_used_tokens_go(tmp_path):
    tokenizer = tokenizer_of("bpe", [*TEXTS, " ".join(OTHERS)])
    (tmp_path / "config.json").write_text("{}")
    once, twice = (vocabulary.choose(tokenizer, tmp_path, 0, [*TEXTS, " wizards"], n, None) for n in (1, 2))
    word = tokenizer(" wizards", add_special_tokens=False)["input_ids"]
    assert (once.new[word] >= 0).all()
    assert (twice.new[word] < 0).any()
    assert (twice.new[tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]] >= 0).all()


def test_ids_in_configurations():
    kept = Vocabulary.of([1, 3, 5], 6, 3)
    tree = {
        "eos_token_id": [3, 5],
        "pad_token_id": -1,
        "vocab_size": 6,
        "text": {"bos_token_id": 1, "n": 3},
        "bos_token_id": None,
    }
    assert vocabulary.named_ids(tree) == {1, 3, 5}
    assert kept.renumbered(tree, Path("config.json")) == {
        "eos_token_id": [1, 2], "pad_token_id": -1, "vocab_size": 6, "text": {"bos_token_id": 0, "n": 3}, "bos_token_id": None,
    }  # fmt: skip
    with pytest.raises(BaseModelError, match=r"config.json: pad_token_id is 9"):
        kept.renumbered({"pad_token_id": 9}, Path("config.json"))


# -- layers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_shared_beginnings_are_the_same_numbers_as_whole_passes(together, config_of, monkeypatch):
    """Of rows one by one the same bits; of rows that lie end to end equal to float32 rounding."""
    setup = prepare(config_of())
    setup.task.forward.part_rows()
    model = AutoModelForCausalLM.from_pretrained(setup.base.folder, dtype=torch.float32).eval()
    examples = list(setup.training_rows())[:3]
    if not together:
        monkeypatch.setattr(layers.isolation, "reason_against", lambda _: "no")
    parts = layers.passes(model, setup.task, examples)
    assert sorted(map(len, parts)) == ([3] if together else [1, 1, 1])
    examples = [example for part in parts for example in part]  # sums are added in this order
    found, losses = layers.without_each(model, layers.Stack(model.model.layers), setup.task, parts, [1])
    setup.task.forward.part_rows()

    def plain(gone: set[int]) -> float:
        """The loss of a model that has no such layers at all."""
        other = AutoModelForCausalLM.from_pretrained(setup.base.folder, dtype=torch.float32).eval()
        other.model.layers = torch.nn.ModuleList(one for n, one in enumerate(other.model.layers) if n not in gone)
        other.config.num_hidden_layers = len(other.model.layers)
        sums = setup.task.losses_of(other, examples).sum(0)
        return sums[0] / sums[1]

    expected = {number: plain({1, number}) for number in (0, 2, 3)}
    assert (found, losses) == (plain({1}), expected) or together
    assert [found, *losses.values()] == pytest.approx([plain({1}), *expected.values()], rel=1e-6)


def test_layers_go_until_the_limit(config_of):
    setup = prepare(config_of())
    model = AutoModelForCausalLM.from_pretrained(setup.base.folder, dtype=torch.float32).eval()
    stack = layers.Stack(model.model.layers)
    examples = layers.passes(model, setup.task, list(setup.training_rows())[:2])
    two = layers.choose(model, stack, setup.task, examples, 2, 0.0)
    assert [one.loss <= min(one.others.values()) for one in two.dropped] == [True, True]
    first, second = (one.loss - two.whole for one in two.dropped)
    most = max(first, second)
    assert layers.choose(model, stack, setup.task, examples, None, most + 1e-6).dropped[:2] == two.dropped
    assert layers.choose(model, stack, setup.task, examples, None, first - 1e-6).dropped == ()


# -- the whole ----------------------------------------------------------------------------------------------------------------


def test_a_trimmed_base_says_the_same(told, other_words, tmp_path, reload_here, capsys):
    assert cli.main([*told, "trim.layers=1"]) == 0
    small, report = tmp_path / "small", report_of(tmp_path / "small")
    assert storage.verify(small)["base"] == report["base"]["fingerprint"]
    assert report["outputs"]["largest_difference"] < 1e-5
    assert report["tokens"]["texts"]["vocabulary"]["share_identical"] == 1
    assert report["size"]["after"]["parameters"] < report["size"]["before"]["parameters"]
    assert {"loss", "bits_per_byte"} == set(report["layers"]["dropped"][0]["held_out"])
    assert "bits per byte (data.eval)" in capsys.readouterr().out
    # it has the base's rows and layers
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (other_words, small))
    before, after = (load_file(folder / "model.safetensors") for folder in (other_words, small))
    rows = [old.get_vocab()[token] for token in sorted(new.get_vocab(), key=new.get_vocab().get)]
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"][rows])
    gone = report["layers"]["dropped"][0]["layer"]
    last = "mlp.up_proj.weight"
    assert torch.equal(after[f"model.layers.2.{last}"], before[f"model.layers.{3 if gone < 3 else 2}.{last}"])
    assert "model.layers.3.mlp.up_proj.weight" not in after
    # what names tokens names the same ones
    config, generation = (json.loads((small / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert config["vocab_size"] == len(new) < len(old)
    assert (config["num_hidden_layers"], config["eos_token_id"]) == (3, new.eos_token_id)
    assert generation["eos_token_id"] == [new.eos_token_id, new.bos_token_id]
    assert generation["suppress_tokens"] == [new.mask_token_id]
    assert new.decode(generation["bad_words_ids"][0]) == " wizards"
    assert new.chat_template == TEMPLATE
    assert (small / "LICENSE").read_text() == "free\n"


ONE_STEP = ["quant=none", "model.dtype=float32", "tracker=none", "hardware=cpu", "train.max_steps=1"]


def test_adapters_of_the_base_are_refused(told, other_words, rows_file, eval_file, tmp_path, reload_here, capsys):
    run = ["train", "model=hub", f"model.path={other_words}", *ONE_STEP, "export.targets=[]", f"run_dir={tmp_path}/run"]
    assert cli.main([*run, f"data.train={rows_file}"]) == 0
    assert cli.main(told) == 0
    said = fails(["evaluate", f"run={tmp_path}/run", f"model.path={tmp_path}/small", f"data.eval={eval_file}"], capsys)
    assert "has other weights" in said


@pytest.mark.long
def test_it_is_trained_merged_and_exported_as_any_other(told, rows_file, eval_file, tmp_path, reload_here):
    assert cli.main([*told, "trim.layers=1"]) == 0
    run = [
        "train",
        "model=hub",
        f"model.path={tmp_path}/small",
        *ONE_STEP,
        f"data.train={rows_file}",
        f"data.eval={eval_file}",
    ]
    assert cli.main([*run, "export.targets=[hf,gguf]", "export.dtype=float32", f"run_dir={tmp_path}/run"]) == 0
    assert (tmp_path / "run/merged/model.safetensors").is_file()
    assert list((tmp_path / "run/export/gguf").glob("*.gguf"))  # compared in llama.cpp, texts and answers too


def test_before_and_after_are_of_the_same_rows(told, tmp_path, reload_here):
    """Also where rows are left out for their length, and a share of what is left is held out."""
    own = [one for one in told if not one.startswith("data.eval")]
    assert cli.main([*own, "data.eval_ratio=0.4", "data.max_tokens=34", "data.too_long=drop"]) == 0
    measured = report_of(tmp_path / "small")["measured"]
    before, after = measured["before"], measured["after"]
    assert 1 < before["texts"] == after["texts"] < 8
    assert before["bytes"] == after["bytes"]


def test_what_is_written_wrongly_is_never_kept(told, tmp_path, reload_here, monkeypatch, capsys):
    """Rows of the embedding in another order: every shape fits."""
    real = Vocabulary.rows
    monkeypatch.setattr(checkpoint.Vocabulary, "rows", lambda self, count: real(self, count)[::-1].copy())
    assert "says something else than the base" in fails(told, capsys, code=4)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_trim_leaves_nothing(told, tmp_path, reload_here, monkeypatch):
    def stopped(*_: object) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "write_tensors", stopped)
    assert cli.main(told) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["trim.layers=4"], "the base has 4 layers, and one must stay"),
        (["trim.vocabulary=null", "data.train=rows.jsonl"], "nothing to trim"),
        (["trim.max_loss_increase=1"], "trim.max_loss_increase=1: no effect without trim.layers=auto"),
        (["trim.layers=1", "task=preference"], "which task=preference has not"),
        (["task=classification", "data.format=auto"], "puts a head on the base"),
        (["adapter.r=4"], "adapter.r=4: no effect on trim. Drop it."),
        (["out=."], "exists; nothing in it was touched"),
        (["trim.min_count=100000"], "no row of data.train has only tokens that stay"),
    ],
)
def test_what_is_refused(told, more, said, tmp_path, capsys):
    if "task=classification" in more:
        file = write_jsonl(tmp_path / "labels.jsonl", [{"text": text, "label": text[0]} for text in TEXTS])
        told = [*told, f"data.train={file}", f"data.eval={file}", "data.check=off"]
    if "task=preference" in more:
        told = [one for one in told if not one.startswith("data.eval")]
    assert said in fails([*told, *more], capsys)
    assert not (tmp_path / "small").exists()


def test_training_takes_no_such_option(rows_file, capsys):
    said = fails(["train", f"data.train={rows_file}", "trim.layers=2"], capsys)
    assert "trim.layers=2: no effect on train. It is for lora-lab trim; drop it." in said


# -- families -------------------------------------------------------------------------------------------------------------------


def family(name: str, tokenizer):
    size = len(tokenizer)
    torch.manual_seed(0)
    if name == "gpt2":  # stores weights transposed, and calls its layers otherwise
        return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=32, n_layer=4, n_head=2, **ids_of(tokenizer)))
    if name == "gemma3":  # layers of two kinds; a token behind the end of the embedding
        return Gemma3ForCausalLM(
            Gemma3TextConfig(
                vocab_size=size - 1, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16, sliding_window=8, initializer_range=0.3,
                layer_types=["sliding_attention", "full_attention"] * 2, **ids_of(tokenizer),
            )
        )  # fmt: skip
    if name == "bert":
        return BertForMaskedLM(
            BertConfig(
                vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
            )
        )
    return T5ForConditionalGeneration(
        T5Config(vocab_size=size, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=tokenizer.pad_token_id)
    )  # fmt: skip


FAMILIES = [
    ("gemma3", "bpe", "completion", 1),
    pytest.param("gpt2", "bpe", "completion", 1, marks=pytest.mark.long),
    pytest.param("bert", "wordpiece", "masked_lm", 0, marks=pytest.mark.long),
    pytest.param("t5", "unigram", "seq2seq", 0, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("name", "kind", "task", "dropped"), FAMILIES)
def test_families(name, kind, task, dropped, tmp_path, reload_here):
    tokenizer = tokenizer_of(kind, [*TEXTS, " ".join(OTHERS)])
    tokenizer.save_pretrained(tmp_path / "base")
    family(name, tokenizer).save_pretrained(tmp_path / "base")
    rows = [{"source": text, "target": text} if task == "seq2seq" else {"text": text} for text in TEXTS]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    line = ["trim", "model=hub", f"model.path={tmp_path}/base", "model.dtype=float32", "hardware=cpu", f"task={task}"]
    line += [f"trim.vocabulary={file}", f"trim.layers={dropped}", f"out={tmp_path}/small"]
    assert cli.main(line) == 0
    report = report_of(tmp_path / "small")
    assert report["outputs"]["largest_difference"] < 1e-5
    assert report["tokens"]["after"] < report["tokens"]["before"]
    config = json.loads((tmp_path / "small/config.json").read_text())
    if name == "gemma3":
        gone = report["layers"]["dropped"][0]["layer"]
        kinds = ["sliding_attention", "full_attention"] * 2
        assert config["layer_types"] == kinds[:gone] + kinds[gone + 1 :]
