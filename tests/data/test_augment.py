"""Augmentation: copies that depend on text, seed and number alone, change words only, and refusals that say the way out."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter

import pytest
from pydantic import TypeAdapter

from lora_lab.data import augment as module
from lora_lab.data.augment import METHODS, AugmentConfig, Augmenter, require
from lora_lab.errors import BaseModelError, ConfigError, DataError
from lora_lab.schema import sections
from tests.conftest import make_rows, make_tokenizer, write_jsonl

needs_rjieba = pytest.mark.skipif(
    importlib.util.find_spec("rjieba") is None, reason='needs pip install "lora-lab[text]"'
)
TEXT = "The quick (brown) fox, isn't it?\n\n  “Go   on”, he said: see https://a.org/b, or 3.5 times.\n"
CHINESE = "我们的GPT和BERT模型，在训练中学习语言。"

# What the small models of these tests have learned: sentence, its German, and how that comes back.
PHRASES = [
    ("red cat", "rote Katze", "a crimson cat"),
    ("blue dog", "Hund", "the dog"),
    ("two birds fly", "Vögel", "birds"),
]
PREFIX = "to German: "
UNPREFIXED = "Was?"


def words(text: str) -> list[str]:
    return re.findall(r"\w+(?:[^\s\w]+\w+)*", text)


def punctuation(text: str) -> str:
    return re.sub(r"\w+(?:[^\s\w]+\w+)*|\s", "", text)


def copies(text: str, *methods: str, seed: int = 0, **config) -> list[str]:
    [found] = Augmenter(AugmentConfig(methods=list(methods), **config)).copies([text], [seed])
    return found


def table(tmp_path, content: str | bytes) -> str:
    file = tmp_path / "synonyms.tsv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def save_model(folder, pairs: list[tuple[str, str]]):
    """A small T5 with its tokenizer, trained until it gives each pair's answer; a random one without pairs."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = make_tokenizer(folder, None, corpus=" ".join(part for pair in pairs for part in pair) or "a b")
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(
            d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0, vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    if pairs:
        inputs = tokenizer([source for source, _ in pairs], padding=True, return_tensors="pt")
        labels = tokenizer([f"{target}<|im_end|>" for _, target in pairs], padding=True, return_tensors="pt")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(120):
            loss = model(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                labels=labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100),
            ).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.05, "the model has not learned its phrases, so the tests that use it say nothing"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("translation")
    there = [(PREFIX + source, german) for source, german, _ in PHRASES] + [
        (source, UNPREFIXED) for source, _, _ in PHRASES
    ]
    back = [(german, returned) for _, german, returned in PHRASES] + [(UNPREFIXED, "what?")]
    return [save_model(folder / "there", there), save_model(folder / "back", back)]


@pytest.fixture(scope="module")
def translating(models) -> AugmentConfig:
    return AugmentConfig(methods=["back_translation"], back_translation=models, prefixes=[PREFIX, ""])


@pytest.fixture(scope="module")
def translator(translating) -> Augmenter:
    return Augmenter(translating)


def test_no_method_makes_no_copies():
    require(AugmentConfig())
    assert Augmenter(AugmentConfig()).copies([TEXT, "a"], [0, 1]) == [[], []]


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("the cat sat.", {"cat sat.", "the sat.", "the cat."}),
        ("(the cat)  and", {"(cat)  and", "(the)  and", "(the cat)"}),
        ("“Go”, he", {"“”, he", "“Go”,"}),
        ("a\n  b c", {"\n  b c", "a\n  c", "a\n  b"}),
        ("one two", {"one", "two"}),
        ("one!", set()),
        (" ?! ", set()),
        ("", set()),
    ],
)
def test_delete_one_word(text, results):
    assert {copy for seed in range(60) for copy in copies(text, "delete", seed=seed)} == results


@pytest.mark.parametrize(("rate", "left"), [(0.01, 14), (0.25, 11), (0.5, 7), (0.99, 1)])
def test_delete_takes_a_share_and_keeps_the_order(rate, left):
    [copy] = copies(TEXT, "delete", rate=rate)
    assert len(words(TEXT)) == 15
    assert len(words(copy)) == left
    rest = iter(words(TEXT))
    assert all(word in rest for word in words(copy))  # a subsequence: `in` moves the iterator on
    assert punctuation(copy) == punctuation(TEXT)


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_swap_moves_words_only(rate):
    for seed in range(20):
        for copy in copies(TEXT, "swap", rate=rate, seed=seed):
            assert Counter(words(copy)) == Counter(words(TEXT))
            assert module._split(copy, "en")[1] == module._split(TEXT, "en")[1]
            moved = sum(a != b for a, b in zip(words(copy), words(TEXT), strict=True))
            assert moved <= 2 * max(1, round(15 * rate))


def test_swap_two_words():
    assert copies("(a)  b!", "swap") == ["(b)  a!"]
    assert copies("same same", "swap") == copies("alone.", "swap") == copies("", "swap") == []


@pytest.mark.parametrize(
    ("text", "content", "results"),
    [
        ("A cat, a CAT.", "cat\tpet\n", {"A pet, a CAT.", "A cat, a Pet."}),
        ("A cat.", "\ufeffCat\tpet\tbig tom\r\n\r\n", {"A pet.", "A big tom."}),
        ("Cat: cats, concat", "cat\tpet\n", {"Pet: cats, concat"}),
        ("It isn't", "isn't\tain't\n", {"It ain't"}),
        ("a dog", "cat\tpet\n", set()),
        ("", "cat\tpet\n", set()),
    ],
)
def test_synonyms(tmp_path, text, content, results):
    settings = {"synonyms": table(tmp_path, content)}
    require(AugmentConfig(methods=["synonyms"], **settings))
    assert {copy for seed in range(40) for copy in copies(text, "synonyms", seed=seed, **settings)} == results


def test_synonyms_take_a_share(tmp_path):
    settings = {"synonyms": table(tmp_path, "cat\tpet\n")}
    [copy] = copies("cat " * 10 + "dog " * 10, "synonyms", rate=0.2, **settings)
    assert Counter(copy.split()) == {"cat": 6, "pet": 4, "dog": 10}  # 0.2 of all words
    [copy] = copies("cat dog dog", "synonyms", rate=0.99, **settings)
    assert copy == "pet dog dog"


@needs_rjieba
def test_chinese(tmp_path):
    settings = {"language": "zh", "synonyms": table(tmp_path, "学习\t掌握\n模型\t系统\n")}
    require(AugmentConfig(methods=["synonyms"], **settings))
    replaced = {copy for seed in range(40) for copy in copies(CHINESE, "synonyms", seed=seed, **settings)}
    assert replaced == {CHINESE.replace("学习", "掌握"), CHINESE.replace("模型", "系统")}
    deleted = {copy for seed in range(200) for copy in copies(CHINESE, "delete", seed=seed, language="zh")}
    assert CHINESE.replace("学习", "") in deleted
    assert CHINESE.replace("和", " ") in deleted  # GPTBERT would be a word of its own
    assert len(deleted) == 11  # one for each word
    for seed in range(100):
        [copy] = copies(CHINESE, "swap", seed=seed, language="zh")
        assert Counter(copy.replace(" ", "")) == Counter(CHINESE)
        assert re.sub(r"[^，。]", "", copy) == "，。"
        assert "GPTBERT" not in copy
        assert "BERTGPT" not in copy


@needs_rjieba
@pytest.mark.parametrize("text", [TEXT, CHINESE, "我的3T恤AAA制，　3.5% 的 a_b don't", "___ --", ""])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_splitting_loses_nothing(text, language):
    found, gaps = module._split(text, language)
    assert len(gaps) == len(found) + 1
    assert module._joined(found, gaps) == text


def test_copies_take_the_methods_in_turn(tmp_path):
    text = "cat one two three four"
    config = AugmentConfig(
        methods=["synonyms", "delete", "swap"], copies=6, synonyms=table(tmp_path, "cat\tpet\ttom\tpuss\n")
    )
    require(config)
    [found] = Augmenter(config).copies([text], [1])
    kinds = [
        "delete" if len(copy.split()) == 4 else "swap" if "cat" in copy else "synonyms" for copy in found
    ]  # no other method gives as many words, or loses the cat
    assert kinds[:3] == ["synonyms", "delete", "swap"]
    assert len(found) == len(set(found))


def test_equal_copies_are_left_out():
    assert sorted(copies("a b", "delete", copies=50)) == ["a", "b"]
    assert copies("a b", "swap", copies=5) == ["b a"]


def test_a_copy_depends_on_text_seed_and_number_alone():
    texts = [" ".join(row["prompt"] for row in make_rows(3, seed)) for seed in range(12)]
    augmenter = Augmenter(AugmentConfig(methods=["delete", "swap"], copies=4, rate=0.2))
    together = augmenter.copies(texts, range(12))
    assert together == augmenter.copies(texts, range(12))
    assert together == [augmenter.copies([text], [seed])[0] for seed, text in enumerate(texts)]
    assert together[::-1] == augmenter.copies(texts[::-1], range(12)[::-1])
    more = Augmenter(AugmentConfig(methods=["delete", "swap"], copies=6, rate=0.2)).copies(texts, range(12))
    assert all(longer[: len(shorter)] == shorter for longer, shorter in zip(more, together, strict=True))
    assert augmenter.copies([texts[0]], [1]) != augmenter.copies([texts[0]], [0])


def test_known_copies():
    # What a seed gives is part of a run's result: it must not change unnoticed.
    assert copies("one two three four five six", "delete", "swap", copies=4, rate=0.3, seed=7) == [
        "one three four six",
        "four two one three five six",
        "one three five six",
        "three two six four five one",
    ]


def test_back_translation(translating, translator):
    require(translating)
    assert translator.copies([source for source, _, _ in PHRASES], [0, 1, 2]) == [[back] for _, _, back in PHRASES]


def test_back_translation_goes_line_by_line(translator):
    text = "\n  red cat\n---\n\ntwo birds fly\t\nred cat"
    assert translator.copies([text, " 12 "], [0, 0]) == [["\n  a crimson cat\n---\n\nbirds\t\na crimson cat"], []]


def test_back_translation_uses_the_prefixes(translating, models):
    without = AugmentConfig(methods=["back_translation"], back_translation=models)
    assert Augmenter(without).copies(["red cat"], [0]) == [["what?"]]
    assert Augmenter(translating).copies(["red cat"], [0]) == [["a crimson cat"]]


def test_translation_models_lie_where_they_are_told(translating, monkeypatch):
    """A card that is there and that the run does not take stays as it is."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    augmenter = Augmenter(translating)
    assert augmenter.copies(["red cat"], [0]) == [["a crimson cat"]]
    augmenter.let_go()
    augmenter.device = torch.device("meta")
    assert {one.model.device.type for one in augmenter._translators} == {"meta"}


def test_translation_models_go_before_the_base_comes(translating, overrides, tmp_path, monkeypatch):
    """They take the run's device, until its rows are encoded."""
    import torch

    from lora_lab.config import compose
    from lora_lab.data import build
    from lora_lab.run import prepared

    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "red cat", "completion": "two birds fly"}])
    there, back = translating.back_translation
    config = compose.compose(
        [
            *overrides, f"data.train={rows}", "data.augment.methods=[back_translation]",
            f"data.augment.back_translation=['{there}','{back}']", f"data.augment.prefixes=['{PREFIX}','']",
        ]
    )  # fmt: skip
    encoder = prepared.find_base(config).encoder
    assert encoder.augmenter.device == torch.device("cpu")
    assert len(build.build(config.data, encoder).train) == 2
    assert "_translators" not in vars(encoder.augmenter)
    monkeypatch.setattr(prepared.load, "torch_device", lambda _: torch.device("cuda:0"))
    assert prepared.find_base(config).encoder.augmenter.device == torch.device("cuda:0")


def test_back_translation_does_not_depend_on_the_batch(translator, translating, monkeypatch):
    texts = [f"{first[0]}\n{second[0]}" for first in PHRASES for second in PHRASES] + ["bird", "a blue cat in Oslo"]
    together = translator.copies(texts, range(len(texts)))
    assert sum(map(len, together)) >= 9
    assert together == [translator.copies([text], [5])[0] for text in texts]
    monkeypatch.setattr("lora_lab.data.translate._BATCH", 2)
    assert together == Augmenter(translating).copies(texts, [0] * len(texts))


def test_a_translation_without_an_end_is_no_copy(tmp_path, models):
    endless = save_model(tmp_path / "random", [])
    for pair in ([endless, models[1]], [models[0], endless]):
        config = AugmentConfig(methods=["back_translation"], back_translation=pair, prefixes=[PREFIX, ""])
        assert Augmenter(config).copies(["red cat"], [0]) == [[]]


def test_an_end_that_is_forced_at_the_limit_is_none(tmp_path):
    endless = save_model(tmp_path / "random", [])
    file = tmp_path / "random" / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "forced_eos_token_id": 2}))
    config = AugmentConfig(methods=["back_translation"], back_translation=[endless, endless])
    assert Augmenter(config).copies(["red cat", "a longer text than that"], [0, 0]) == [[], []]


def test_a_line_that_is_too_long_is_no_copy(translating, monkeypatch):
    augmenter = Augmenter(translating)
    monkeypatch.setattr(augmenter._translators[0].tokenizer, "model_max_length", 12)
    assert augmenter.copies(["red cat\n" + "two birds fly " * 5, "red cat"], [0, 0])[0] == []


def test_back_translation_beside_other_methods(models):
    config = AugmentConfig(
        methods=["swap", "back_translation"], copies=4, back_translation=models, prefixes=[PREFIX, ""]
    )
    assert Augmenter(config).copies(["red cat"], [0]) == [["cat red", "a crimson cat"]]


def test_the_digest_knows_the_table(tmp_path):
    config = AugmentConfig(methods=["synonyms"], synonyms=table(tmp_path, "cat\tpet\n"))
    before = Augmenter(config).digest()
    assert Augmenter(config).digest() == before
    assert re.fullmatch("[0-9a-f]{64}", before)
    table(tmp_path, "cat\ttom\n")
    assert Augmenter(config).digest() != before
    assert Augmenter(AugmentConfig(methods=["swap"])).digest() != before


def test_the_digest_knows_the_models(tmp_path):
    folder = save_model(tmp_path / "model", [])
    config = AugmentConfig(methods=["back_translation"], back_translation=[folder, folder])
    digests = [Augmenter(config).digest()]
    for name, old, new in (
        ("config.json", '"d_ff": 64', '"d_ff": 32'),
        ("tokenizer_config.json", "<|endoftext|>", "<|im_start|>"),
    ):
        file = tmp_path / "model" / name
        changed = file.read_text().replace(old, new)
        assert changed != file.read_text()
        file.write_text(changed)
        digests.append(Augmenter(config).digest())
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    digests.append(Augmenter(config).digest())
    assert len(set(digests)) == 4


def test_a_good_configuration_is_accepted(tmp_path):
    files = {"synonyms": "table.tsv", "back_translation": ["a", "b"], "prefixes": ["", ""]}  # are looked up later
    for config in (
        AugmentConfig(methods=["delete"], rate=0.5),
        AugmentConfig(methods=list(METHODS), copies=4, **files),
    ):
        assert require(config) is None


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"methods": ["swap", "swap"], "copies": 2}, ["data.augment.methods: swap: named twice", "Name it once."]),
        ({"methods": ["delete", "swap"]}, ["data.augment.methods: swap: no effect with data.augment.copies=1", "Set data.augment.copies=2,"]),
        ({"copies": 3}, ["data.augment.copies=3: no effect with data.augment.methods=[].", "or name delete or swap or"]),
        ({"language": "zh"}, ["data.augment.language=zh: no effect with data.augment.methods=[]."]),
        ({"methods": ["swap"], "synonyms": "t.tsv"}, ['data.augment.synonyms=t.tsv: no effect with data.augment.methods=["swap"].', "Leave it out, or name synonyms."]),
        ({"methods": ["swap"], "back_translation": ["a", "b"]}, ['data.augment.back_translation=["a", "b"]: no effect', "name back_translation."]),
        ({"methods": ["swap"], "prefixes": ["a", "b"]}, ['data.augment.prefixes=["a", "b"]: no effect']),
        ({"methods": ["back_translation"], "back_translation": ["a", "b"], "rate": 0.2}, ["data.augment.rate=0.2: no effect", "or name delete or swap or synonyms."]),
        ({"methods": ["back_translation"], "back_translation": ["a", "b"], "copies": 2}, ["data.augment.copies=2: no effect with back_translation alone", "Set data.augment.copies=1"]),
        ({"methods": ["synonyms"]}, ["data.augment.synonyms: must be set with the method synonyms.", "word<TAB>synonym", "leave the method out."]),
        ({"methods": ["back_translation"]}, ["data.augment.back_translation: must be set", "two models, there and back", "leave the method out."]),
        ({"methods": ["back_translation"], "back_translation": ["a"]}, ['data.augment.back_translation=["a"]: must be exactly two models, there and back; this is 1.']),
        ({"methods": ["back_translation"], "back_translation": ["a", "b"], "prefixes": ["a", "b", "c"]}, ["data.augment.prefixes=", "must be exactly two texts, one a model; this is 3."]),
        ({"methods": ["synonyms"], "prefixes": ["a"]}, ["3 problems", "data.augment.prefixes=", "data.augment.synonyms:"]),
    ],
)  # fmt: skip
def test_refusals(settings, messages):
    with pytest.raises(ConfigError) as refused:
        require(AugmentConfig(**settings))
    for message in messages:
        assert message in str(refused.value)


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    require(AugmentConfig(methods=["swap"]))
    with pytest.raises(ConfigError, match=r"data.augment.language=zh: needs the package rjieba.*lora-lab\[text\]"):
        require(AugmentConfig(methods=["swap"], language="zh"))


@pytest.mark.parametrize(
    "settings", [{"copies": 0}, {"rate": 0.0}, {"rate": 1.0}, {"rate": "0.1"}, {"methods": ["drop"]}, {"shuffle": True}]
)
def test_the_schema_is_strict(settings):
    config, errors = sections.validate(TypeAdapter(AugmentConfig), settings)
    assert config is None
    assert errors


def test_every_field_is_described():
    fields = sections.keys(AugmentConfig)
    assert set(module._USERS) == set(fields) - {"methods"}
    assert all(info.description for info in fields.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\tpet\ndog\n", "line 2: 'dog' has no synonym. Write word<TAB>synonym<TAB>synonym..."),
        ("cat pet\n", "line 1: 'cat pet' has no synonym."),
        ("cat\t\tpet\n", "line 1: an empty cell."),
        ("\tpet\n", "line 1: an empty cell."),
        ("cat\tpet\tCat\n", "line 1: 'cat' is given as a synonym of itself."),
        ("cat\tpet\n\nCat\ttom\n", "line 3: 'Cat' has a line already."),
        (b"cat\tpet\ncaf\xe9\tbar\n", "line 2: not UTF-8"),
        ("\n", "the table is empty."),
    ],
)
def test_tables_that_are_refused(tmp_path, content, message):
    config = AugmentConfig(methods=["synonyms"], synonyms=table(tmp_path, content))
    with pytest.raises(DataError) as refused:
        Augmenter(config)
    assert str(refused.value).startswith("data.augment.synonyms")
    assert config.synonyms in str(refused.value)
    assert message in str(refused.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"data.augment.synonyms=.*none.tsv: no such file"):
        Augmenter(AugmentConfig(methods=["synonyms"], synonyms=str(tmp_path / "none.tsv")))
    with pytest.raises(DataError, match=r"data.augment.synonyms=.*: cannot be read"):
        Augmenter(AugmentConfig(methods=["synonyms"], synonyms=str(tmp_path)))


def refused_models(*names: str) -> str:
    """What `digest` and the first copy say of these models: the same."""
    augmenter = Augmenter(AugmentConfig(methods=["back_translation"], back_translation=list(names)))
    with pytest.raises(BaseModelError) as by_digest:
        augmenter.digest()
    with pytest.raises(BaseModelError) as by_copies:
        augmenter.copies(["red cat"], [0])
    assert str(by_digest.value) == str(by_copies.value)
    return str(by_digest.value)


def test_models_that_are_not_there(tmp_path, models):
    assert "data.augment.back_translation[1]=/no/such: no such file or folder" in refused_models(models[0], "/no/such")
    assert "data.augment.back_translation[0]=nobody/nothing: no such folder here, and the hub request failed" in (
        refused_models("nobody/nothing", models[1])
    )
    file = table(tmp_path, "a")
    assert f"data.augment.back_translation[0]={file}: is a file. Name the folder" in refused_models(file, models[1])
    assert "no config.json" in refused_models(models[0], str(tmp_path))


@pytest.mark.parametrize("key", ["auto_map", "custom_pipelines"])
def test_models_that_name_code_are_refused(tmp_path, models, key):
    folder = tmp_path / "model"
    save_model(folder, [])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: {"AutoModelForSeq2SeqLM": "code.Model"}}))
    assert f"'{key}' names code to run" in refused_models(models[0], str(folder))


def test_pickles_are_refused(tmp_path, models):
    folder = tmp_path / "model"
    save_model(folder, [])
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle" in refused_models(str(folder), models[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "cannot be loaded"),
        ({"num_layers": 2}, "no weights for encoder.block.1."),
    ],
)
def test_models_that_cannot_be_loaded(tmp_path, change, message):
    folder = tmp_path / "model"
    save_model(folder, [])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    augmenter = Augmenter(AugmentConfig(methods=["back_translation"], back_translation=[str(folder)] * 2))
    with pytest.raises(BaseModelError) as refused:
        augmenter.copies(["red cat"], [0])
    assert f"data.augment.back_translation[0]={folder}: {message}" in str(refused.value)
