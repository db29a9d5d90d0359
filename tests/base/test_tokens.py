"""How texts begin and end, how many tokens a model has room for, and whether a base can read the rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_lab import cli
from lora_lab.base.positions import usable_positions
from lora_lab.base.tokenizer import PLAIN_TEMPLATE, load_tokenizer
from lora_lab.config.data import DataConfig
from lora_lab.data import readable
from lora_lab.data.chat import ChatEncoder
from lora_lab.data.marks import marks_of
from lora_lab.data.sources import Row
from lora_lab.run import prepared
from lora_lab.tasks import TASKS
from lora_lab.tasks.classification.task import ClassEncoder
from lora_lab.tasks.completion.task import DocumentEncoder
from lora_lab.tasks.masked_lm.config import MaskedLMConfig
from lora_lab.tasks.masked_lm.task import MaskedEncoder
from lora_lab.tasks.preference.task import PreferenceEncoder
from lora_lab.tasks.question_answering.task import SpanEncoder
from lora_lab.tasks.reward.task import RewardEncoder
from lora_lab.tasks.token_classification.task import TagEncoder
from tests.conftest import CHATML, WORDS, make_base, make_rows, write_jsonl

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")
WITH_BOS = "{{ bos_token }}" + CHATML
MODELS = os.environ.get("LORA_LAB_MODELS")
SETS = Path(__file__).parents[3] / "shared/data"


def make(folder: Path, around: str = "<s> $A", chat_template: str | None = None, bos: str = "<s>", **added) -> Path:
    """A byte-level tokenizer whose own call puts marks around texts, saved in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    if around != "$A":
        marks = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(
            single=around, pair=f"{around} {around.replace('$A', '$B')}", special_tokens=marks
        )
    special = {
        "bos_token": bos,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{**special, **added})
    tokenizer.chat_template = chat_template
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # of the base that this tokenizer is made for
    tokenizer.save_pretrained(folder)
    return folder


def encode(encoder, values: dict, name: str):
    [outcome] = encoder.encode([Row(1, values)], "row", name)
    assert outcome.problem is None, outcome.sentence
    return outcome.examples


def encoder_of(kind: type, folder: Path, task: str = "causal_lm", **config):
    tokenizer = load_tokenizer(folder, chat=kind.chat)
    return kind(DataConfig(train="-", **config), TASKS[task](), tokenizer), tokenizer


# -- beginnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("around", "before", "after", "unlearned"),
    [
        ("$A", (), (), ()),
        ("<s> $A", (1,), (), (1,)),
        ("<s> $A </s>", (1,), (2,), (1,)),
        ("$A </s>", (), (2,), ()),
        ("</s> $A", (2,), (), ()),  # OPT: what begins a text ends it too, and that must be learned
    ],
)
def test_marks_are_what_the_tokenizers_own_call_shows(around, before, after, unlearned, tmp_path):
    bos = "</s>" if before == (2,) else "<s>"
    marks = marks_of(load_tokenizer(make(tmp_path, around, bos=bos)))
    assert (marks.before, marks.after, marks.unlearned) == (before, after, unlearned)
    text = "<s>red cat</s>"
    assert marks.without(text) == text.removeprefix(marks.opening).removesuffix(marks.closing)


CONVERSATION = {"messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "cat"}]}


@pytest.mark.parametrize("template", [None, CHATML, WITH_BOS], ids=["none", "without", "with"])
@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>", "</s> $A"])
@pytest.mark.parametrize("supervise", ["answers", "all"])
def test_a_conversation_begins_as_the_tokenizer_begins_texts(template, around, supervise, tmp_path):
    bos = 2 if around.startswith("</s>") else 1
    folder = make(tmp_path, around, template, bos=SPECIAL[bos])
    encoder, tokenizer = encoder_of(ChatEncoder, folder, supervise=supervise)
    [example] = encode(encoder, CONVERSATION, "messages")
    ids = example.input_ids.tolist()
    begins = not around.startswith("$A") or template == WITH_BOS
    assert (ids[0] == bos) is begins
    assert ids[1] != bos
    assert not example.weights[0]
    assert bos == 2 or not example.weights[example.input_ids == bos].any()
    # what the model is asked with later, and what plain transformers makes of the saved tokenizer
    prompt = encoder.prompt(CONVERSATION["messages"][:1])
    assert ids[: len(asked := tokenizer(prompt, add_special_tokens=False)["input_ids"])] == asked
    whole = tokenizer.apply_chat_template(CONVERSATION["messages"], tokenize=True, return_dict=False)
    assert ids[: len(whole)] == whole[: len(ids)]
    tokenizer.save_pretrained(tmp_path / "again")
    again, loaded = encoder_of(ChatEncoder, tmp_path / "again", supervise=supervise)
    assert loaded.chat_template == tokenizer.chat_template  # a merged model is not given a second one
    assert encode(again, CONVERSATION, "messages")[0].input_ids.tolist() == ids


def test_a_template_that_writes_it_for_some_conversations_is_left_alone(tmp_path):
    template = "{% if messages[0]['role'] == 'system' %}{{ bos_token }}{% endif %}" + CHATML
    encoder, tokenizer = encoder_of(ChatEncoder, make(tmp_path, chat_template=template))
    assert tokenizer.chat_template == template
    assert not encoder.template.put_before


@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("kind", [ChatEncoder, DocumentEncoder, MaskedEncoder, ClassEncoder])
def test_a_text_with_its_own_marks_has_them_once(kind, around, tmp_path):
    task = {MaskedEncoder: "masked_lm", ClassEncoder: "classification"}.get(kind, "causal_lm")
    encoder, tokenizer = encoder_of(kind, make(tmp_path, around), task)
    name, more = ("text_label", {"label": "a"}) if kind is ClassEncoder else ("text", {})
    [bare] = encode(encoder, {"text": "red cat", **more}, name)
    own = marks_of(tokenizer)
    [marked] = encode(encoder, {"text": f"{own.opening}red cat{own.closing}", **more}, name)
    assert marked.input_ids.tolist() == bare.input_ids.tolist()
    called = tokenizer("red cat")["input_ids"]
    assert bare.input_ids.tolist()[: len(called)] == called
    [inside] = encode(encoder, {"text": "red <s> cat", **more}, name)
    assert 1 in inside.input_ids[1:]
    assert inside.weights[inside.input_ids == 1].any() == (not own.before and kind not in (ClassEncoder,))


def test_a_text_of_nothing_but_marks_is_refused(tmp_path):
    encoder, _ = encoder_of(DocumentEncoder, make(tmp_path, "<s> $A </s>"))
    [outcome] = encoder.encode([Row(1, {"text": "<s></s>"})], "row", "text")
    assert outcome.problem == "empty"


@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_words_with_the_tokenizers_marks_have_them_once_and_no_tag_for_them(around, tmp_path):
    encoder, tokenizer = encoder_of(TagEncoder, make(tmp_path, around), "token_classification")
    own = marks_of(tokenizer)
    words, tags = ["red", "cat", "Graz"], ["O", "O", "B-LOC"]
    bare = {"tokens": words, "tags": tags}
    before, after = ([mark] if mark else [] for mark in (own.opening, own.closing))
    apart = {
        "tokens": [*before, *words, *after],
        "tags": [*(["X"] * len(before)), *tags, *(["X"] * len(after))],
    }
    joined = {"tokens": [f"{own.opening}red", "cat", f"Graz{own.closing}"], "tags": tags}
    expected, *others = encoder.encode([Row(1, row) for row in (bare, apart, joined)], "row", "token_labels")
    for found in others:
        assert found.problem is None
        assert (found.label, found.digest) == (tags, expected.digest)
        [example], [same] = found.examples, expected.examples
        assert example.input_ids.tolist() == same.input_ids.tolist()
        assert example.weights.tolist() == same.weights.tolist()
        assert [example[name] for name in ("words", "tags", "labels")] == [words, tags, tags]
        assert example["kept"].tolist() == same["kept"].tolist()
    if before or after:
        nothing = {"tokens": [*before, *after], "tags": ["X"] * len(before + after)}
        [outcome] = encoder.encode([Row(1, nothing)], "row", "token_labels")
        assert outcome.problem == "empty"


@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("starts", [True, False])
def test_a_question_and_its_context_have_the_tokenizers_marks_once(around, starts, tmp_path):
    encoder, tokenizer = encoder_of(SpanEncoder, make(tmp_path, around), "question_answering", max_tokens=200)
    own = marks_of(tokenizer)
    bare, marked = (
        {
            "question": f"{before}where{after}",
            "context": f"{before}red cat of Graz{after}",
            "answers": {"text": ["Graz"]} | ({"answer_start": [len(before) + 11]} if starts else {}),
        }
        for before, after in (("", ""), (own.opening, own.closing))
    )
    [expected], [found] = (encode(encoder, row, "question_answering") for row in (bare, marked))
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    for name, value in expected.own.items():
        np.testing.assert_array_equal(found[name], value)
    first, last = found["start"], found["end"]
    assert tokenizer.decode(found.input_ids[first : last + 1]).strip() == "Graz"
    if own.opening and starts:
        wrong = {**marked, "answers": {"text": [own.opening], "answer_start": [0]}}
        [outcome] = encoder.encode([Row(1, wrong)], "row", "question_answering")
        assert "is inside the tokenizer's own marks" in outcome.sentence


def test_judged_answers_begin_as_conversations_do(tmp_path):
    row = {"prompt": "red", "chosen": "cat", "rejected": "dog"}
    preference, tokenizer = encoder_of(PreferenceEncoder, make(tmp_path / "a"), "preference")
    [example] = encode(preference, row, "preference")
    for ids, weights in ((example.input_ids, example.weights), (example["second_ids"], example["second_weights"])):
        assert ids.tolist().count(1) == 1
        assert ids[0] == 1
        assert not weights[0]
    assert tokenizer.decode(example.input_ids).startswith("<s>### user:\nred")
    reward, _ = encoder_of(RewardEncoder, make(tmp_path / "b", chat_template=CHATML), "reward")
    [example] = encode(reward, row, "preference")
    assert example.input_ids[0] == example["second_ids"][0] == 1


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory) -> Path:
    """A base without a chat template whose tokenizer begins every text."""
    folder = make_base(tmp_path_factory.mktemp("models") / "plain", vocab_size=330)
    return make(folder)


def test_training_asking_and_the_merged_model_see_the_same_beginning(
    plain_base, overrides, tmp_path, reload_here, capsys
):
    from transformers import AutoTokenizer

    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(12))
    given = [*overrides, f"model.path={plain_base}", f"data.train={rows}", "data.eval_ratio=0.3"]
    given += [
        "task.generate_rows=1",
        "task.max_new_tokens=2",
        "train.max_steps=2",
        "export=merged",
        "export.dtype=float32",
    ]
    assert cli.main(["train", *given]) == 0
    assert "'### role:' headings after '<s>'" in capsys.readouterr().out
    merged = AutoTokenizer.from_pretrained(tmp_path / "run" / "merged")
    assert merged.chat_template == "{{ bos_token }}" + PLAIN_TEMPLATE
    ids = merged.apply_chat_template(CONVERSATION["messages"], tokenize=True, return_dict=False)
    assert ids[0] == 1
    assert ids.count(1) == 1


def test_ollamas_template_leaves_the_beginning_to_llama_cpp(plain_base, config_of):
    from lora_lab.export import ollama

    encoder = prepared.find_base(config_of(f"model.path={plain_base}")).encoder
    found = ollama.turns(encoder)
    assert "<s>" not in found.template()
    assert found.rendered(CONVERSATION["messages"][:1]) == encoder.prompt(CONVERSATION["messages"][:1])[len("<s>") :]


# -- positions, padding, vocabulary ---------------------------------------------------------------------------------------

SIZE = {"vocab_size": 330, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LAST = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
TABLES = {  # class of the configuration, its settings, tokens that the model takes
    "Roberta": ({**SIZE, **LAST, "max_position_embeddings": 20, "pad_token_id": 3}, 16),
    "XLMRoberta": ({**SIZE, **LAST, "max_position_embeddings": 20}, 18),
    "Camembert": ({**SIZE, **LAST, "max_position_embeddings": 20}, 18),
    "MPNet": ({**SIZE, **LAST, "max_position_embeddings": 20}, 18),
    "Longformer": ({**SIZE, **LAST, "max_position_embeddings": 20, "attention_window": [4]}, 18),
    "Data2VecText": ({**SIZE, **LAST, "max_position_embeddings": 20}, 18),
    "RobertaPreLayerNorm": ({**SIZE, **LAST, "max_position_embeddings": 20}, 18),
    "Xmod": ({**SIZE, **LAST, "max_position_embeddings": 20, "languages": ["a"], "default_language": "a"}, 18),
    "Bert": ({**SIZE, "max_position_embeddings": 20}, 20),
    "Electra": ({**SIZE, "embedding_size": 16, "max_position_embeddings": 20}, 20),
    "BigBird": ({**SIZE, "max_position_embeddings": 20, "attention_type": "original_full"}, 20),
    "Nystromformer": ({**SIZE, "max_position_embeddings": 20, "num_landmarks": 20, "segment_means_seq_len": 20}, 20),
    "GPT2": ({"vocab_size": 330, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}, 20),
    "OPT": (
        {**SIZE, **LAST, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 20},
        20,
    ),
    "Bart": (
        {"vocab_size": 330, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 20},
        20,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_positions_are_those_that_rows_can_use(name):
    """As many tokens as it says pass through the model, and where a table ends, one more does not."""
    import transformers

    settings, expected = TABLES[name]
    config = getattr(transformers, f"{name}Config")(**settings)
    with torch.device("meta"):
        assert usable_positions(transformers.AutoModel.from_config(config)) == expected
    model = transformers.AutoModel.from_config(config).eval()
    ids = torch.full((1, expected + 1), 10)
    with torch.no_grad():
        model(input_ids=ids[:, :expected])
        if name not in ("Longformer",):  # it pads to its window by itself
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids)


def test_a_table_of_another_tower_is_not_the_texts(base):
    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.position_embedding = torch.nn.Embedding(4, 2, padding_idx=1)

    import transformers

    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(base))
        stated = model.config.max_position_embeddings
        model.vision = Tower()
    assert usable_positions(model) == stated


def with_added(folder: Path, **added) -> tuple[Path, int]:
    """A base whose tokenizer got tokens that the embedding has no row for, and how many rows that has."""
    size = len(load_tokenizer(make(folder, "$A")))
    make_base(folder, vocab_size=size, bos_token_id=1)
    return make(folder, "$A", **added), size


def test_padding_outside_the_embedding_is_replaced(overrides, tmp_path, capsys):
    folder, size = with_added(tmp_path / "base", pad_token="[PAD]")
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": " ".join(WORDS[: 2 + i % 3]), "label": "ab"[i % 2]} for i in range(12)]
    )
    given = [*overrides, f"model.path={folder}", f"data.train={rows}", "task=classification"]
    assert cli.main(["train", *given, "train.max_steps=2", "export=adapter"]) == 0
    assert f"'</s>' pads, because '[PAD]' has id {size}" in capsys.readouterr().out


def test_a_tokenizer_without_any_padding_inside_is_refused(overrides, tmp_path, capsys):
    folder, _ = with_added(tmp_path / "base", pad_token="[PAD]", eos_token="<end>", unk_token="<none>")
    assert cli.main(["data", *overrides, f"model.path={folder}"]) != 0
    assert "padding token '[PAD]' has id" in capsys.readouterr().err


def test_an_added_token_outside_the_embedding_names_its_row(overrides, tmp_path, capsys):
    folder, size = with_added(tmp_path / "base", additional_special_tokens=["<new>"])
    rows = write_jsonl(
        tmp_path / "rows.jsonl", [*make_rows(3), {"prompt": "a <new> cat", "completion": "b"}, *make_rows(3, seed=1)]
    )
    assert cli.main(["train", *overrides, f"model.path={folder}", f"data.train={rows}"]) == 2
    assert f"rows.jsonl row 4: token '<new>' has id {size}" in capsys.readouterr().err


def test_masking_draws_no_token_that_the_model_lacks(tmp_path):
    from lora_lab.tasks.masked_lm.task import MaskedLM

    task = MaskedLM.__new__(MaskedLM)
    encoder, tokenizer = encoder_of(MaskedEncoder, make(tmp_path), "masked_lm")
    encoder.vocab_size = 40
    task.encoder, task.tokenizer, task.config = encoder, tokenizer, MaskedLMConfig(mask_probability=0.5)
    ids, places = np.full(2000, 20), np.arange(2000)
    assert task._corrupt(ids, places, np.random.default_rng(0)).max() < 40


# -- whether the base can read the rows -----------------------------------------------------------------------------------

ENGLISH = [
    "The café in Zürich was closed 😀, said José Nuñez-O'Brien.",
    'def f(x):\n\treturn {"a": [x ** 2, ~x]}  # 1 <= 2 && !done',
    "naïve coöperation — “quotes”, 3 € and 5 µm",
]
CHINESE = ["太慢了！差三分钟就半价了，刚送到", "味道不错，送餐也很快，下次还会再来"]


@pytest.fixture(scope="module")
def word_pieces():
    """BERT's kind of tokenizer, that knows the letters of English and two Chinese characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,!?'\"-—“”#{}[]()<>=&*~:;€µμ/", "了", "不"]
    tokens = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    core = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]"
    )  # fmt: skip


def test_unknown_and_lost_characters_are_counted(word_pieces):
    english, chinese = readable.measure(ENGLISH, word_pieces), readable.measure(CHINESE, word_pieces)
    assert english.share(english.lost) < 0.02
    assert english.unknown == 1  # the smile
    assert chinese.share(chinese.lost) > 0.5
    assert chinese.unknown / chinese.tokens > 0.5
    assert chinese.script == "Chinese"


def test_characters_that_are_normalized_away_are_lost(tmp_path):
    from tokenizers import normalizers

    tokenizer = load_tokenizer(make(tmp_path, "$A"))
    assert readable.measure(CHINESE, tokenizer).lost == 0
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("，", "")
    found = readable.measure(CHINESE, tokenizer)
    assert found.lost == "".join(CHINESE).count("，")
    assert found.unknown == 0


def test_bytes_are_readable_though_spelled(tmp_path):
    tokenizer = load_tokenizer(make(tmp_path, "$A"))
    english, chinese = readable.measure(ENGLISH, tokenizer), readable.measure(CHINESE, tokenizer)
    assert english.share(english.spelled) < 0.2
    assert chinese.share(chinese.spelled) > 0.8
    assert chinese.lost == 0


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory, word_pieces) -> tuple[Path, Path, Path]:
    """An English encoder, reviews in Chinese, and reviews in English."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("unreadable")
    size = {**SIZE, "vocab_size": len(word_pieces), "pad_token_id": 3}
    BertForMaskedLM(BertConfig(**size)).save_pretrained(folder / "base")
    word_pieces.save_pretrained(folder / "base")

    def rows(name, texts):
        return write_jsonl(
            folder / name, [{"text": f"{texts[i % len(texts)]} {i}", "label": "ab"[i % 2]} for i in range(8)]
        )

    return folder / "base", rows("zh.jsonl", CHINESE), rows("en.jsonl", ENGLISH)


def test_a_base_that_cannot_read_the_rows_is_refused(unreadable, overrides, tmp_path, capsys):
    base, chinese, english = unreadable
    given = [*overrides, f"model.path={base}", "task=classification"]
    assert cli.main(["data", *given, f"data.train={chinese}", "--html", str(tmp_path / "page.html")]) != 0
    told = capsys.readouterr().out
    assert "error: data.train: this base cannot read" in told
    assert "tokens are [UNK]. model=bert_tiny_zh reads it" in " ".join(told.split())
    assert '<span class="unknown">[UNK]</span>' in (tmp_path / "page.html").read_text()
    assert cli.main(["train", *given, f"data.train={chinese}"]) == 2
    assert "this base cannot read" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(["data", *given, f"data.train={english}"]) == 0
    assert "cannot read" not in capsys.readouterr().out


def test_a_base_that_spells_the_rows_is_only_warned_of(overrides, base, tmp_path, capsys):
    rows = write_jsonl(tmp_path / "zh.jsonl", [{"prompt": text, "completion": text[::-1]} for text in CHINESE])
    assert cli.main(["data", *overrides, f"data.train={rows}"]) == 0
    assert "in bytes, several tokens each" in " ".join(capsys.readouterr().out.split())


# -- real weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    MODELS is None or not (Path(MODELS or "") / "gemma-3-270m-hf").exists(),
    reason="needs LORA_LAB_MODELS with Gemma 3 270M",
)
@pytest.mark.skipif(not (SETS / "alpaca_en_1k").exists(), reason="the real data sets are not beside this checkout")
def test_gemmas_loss_on_instructions_is_plain_transformers(config_of, tmp_path):
    """The base's loss on 64 instructions, against transformers with its own tokenizer and texts that are written by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = (SETS / "alpaca_en_1k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if len(row["instruction"] + row["input"] + row["output"]) < 400][:64]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = Path(MODELS) / "gemma-3-270m-hf"
    config = config_of(
        f"model.path={folder}", f"data.train={file}", f"data.eval={file}", "data.shared=keep", "task.generate_rows=0"
    )  # fmt: skip
    ready = prepared.prepare(config, need_train=False)
    ours = ready.loaded().measure_base().metrics["loss"]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, bare, count = 0.0, 0.0, 0
    for row in rows:
        asked = "\n\n".join(filter(None, [row["instruction"], row["input"]]))
        prompt = (
            f"### user:\n{asked}\n### assistant:\n"  # Jinja, as transformers sets it up, drops a newline after a block
        )
        start = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([[*start, *tokenizer(f"{row['output']}<eos>", add_special_tokens=False)["input_ids"]]])
        labels = ids.clone()
        labels[:, : len(start)] = -100
        targets = ids.shape[1] - len(start)
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * targets
            bare += model(input_ids=ids[:, 1:], labels=labels[:, 1:]).loss.item() * targets
        count += targets
    print(f"\nGemma 3 270M: {ours:.4f}, plain transformers {total / count:.4f}, without BOS {bare / count:.4f}")
    assert ours == pytest.approx(total / count, abs=2e-3)
    assert bare / count > ours + 0.3
