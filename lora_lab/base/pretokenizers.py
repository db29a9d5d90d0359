"""How byte-level vocabularies split a text before anything is merged, by the name that a GGUF file gives in `tokenizer.ggml.pre`.

The names are llama.cpp's (`src/llama-vocab.cpp`); the rules are those of the `tokenizer.json` that each family was published with.
Where llama.cpp only comes near a published rule, the published one stands here, because the model was trained with it
(`docs/tokens.md` lists where the two differ).
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from lora_lab.base.hard_texts import HARD_TEXTS

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer


@dataclasses.dataclass(frozen=True)
class Split:
    """One way to split.

    `patterns` are applied one after the other: what a pattern matches becomes a piece, and so does what lies between two matches.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is in the vocabulary is a token, whatever the merges say (`ignore_merges`)
    begins: bool = False  # whether the BOS token is put before a text where the file does not say so


_DIGIT, _DIGITS_3 = r"\p{N}", r"\p{N}{1,3}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|{_SPACES}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*")
_SIGNS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_CAMEL[0]}|{_CAMEL[1]}|\p{{N}}|{_SIGNS_SLASH}|{_SPACES}"
_GPT4O = rf"{_CAMEL[0]}{_SHORT}?|{_CAMEL[1]}{_SHORT}?|\p{{N}}{{1,3}}|{_SIGNS_SLASH}|{_SPACES}"
_PUNCTUATION = r"[\p{P}$+<=>^~|`]+"
_THREE = "[0-9][0-9][0-9]"
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_SIGN_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_DEEPSEEK3 = rf"{_SIGN_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
_BLOOM = " ?[^(\\s|.,!?…。，、।۔،)]+"
_IDEOGRAPHS = "[一-龥\u0800-一가-\ud7ff]+"
# Letters with an upper and a lower case, as DeepSeek's tokenizer.json lists them.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴ"
    "ῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_JAIS2_SPACES = "|".join(rf"\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))

_PLAIN, _SINGLE_DIGITS = Split((_GPT2,)), Split((_DIGIT, _GPT2))

PRE_TOKENIZERS: dict[str, Split] = {
    **dict.fromkeys(
        (
            "gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling",
        ),
        _PLAIN,
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), _SINGLE_DIGITS
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        Split((_LLAMA3,), whole_words=True, begins=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Split((_LLAMA3,))),
    **dict.fromkeys(("glm4", "glm5"), Split((_LLAMA3,), whole_words=True)),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"), Split((_QWEN2,))
    ),
    "qwen35": Split(
        (rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",)
    ),
    "tekken": Split((_TEKKEN,), whole_words=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), Split((_GPT4O,))),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), Split((_DIGITS_3, _CJK, _DEEPSEEK3))),
    "deepseek-llm": Split(
        ("[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _IDEOGRAPHS, r"\p{N}+")
    ),
    "deepseek-coder": Split(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, _DIGIT)),
    "falcon": Split((_PUNCTUATION, _GPT2, _THREE)),
    "default": Split((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", _THREE)),  # llama.cpp's own, for vocabularies it did not know
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), Split((_BLOOM,))),
    "viking": Split((_BLOOM, _DIGIT)),
    **dict.fromkeys(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        Split(
            (
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
    ),
    "seed-coder": Split((rf"{_SHORT}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",)),
    "minicpm5": Split((_DIGITS_3, rf"{_SHORT}|{_WORD}|\p{{N}}+|{_SIGNS}|{_SPACES}"), whole_words=True),
    "jais-2": Split((rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}|\s*[\r\n]+|{_JAIS2_SPACES}|\s{{1}}",)),
    "ufakzeka": Split((rf"{_WORD}|\p{{N}}|{_SIGNS}|{_SPACES}",)),
    "laguna": Split((r"[^\n]+|[\n]+", _QWEN2)),
}  # fmt: skip


def pre_tokenizer(split: Split) -> PreTokenizer:
    """The same for the package `tokenizers`, over bytes written as letters."""
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def name_of(tokenizer: Tokenizer) -> str:
    """The first name of a rule by which a byte-level tokenizer splits texts, whatever its vocabulary; empty: none that is known.

    It is found by what becomes of hard texts; whoever writes the name into a file compares what the file's reader does.
    """
    if tokenizer.normalizer is not None or tokenizer.pre_tokenizer is None:
        return ""
    model = json.loads(tokenizer.to_str())["model"]
    own = _pieces(tokenizer.pre_tokenizer)
    alike = (name for name, split in PRE_TOKENIZERS.items() if split.whole_words == bool(model.get("ignore_merges")))
    return next((name for name in alike if _pieces(pre_tokenizer(PRE_TOKENIZERS[name])) == own), "")


def _pieces(splitter: PreTokenizer) -> list[Any]:
    return [splitter.pre_tokenize_str(text) for text in HARD_TEXTS]
