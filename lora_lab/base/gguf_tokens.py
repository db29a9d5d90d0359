"""The tokenizer that a GGUF file describes: its vocabulary, how it splits, what it adds, its special tokens and chat template.

transformers' own reader builds one of its classes from the vocabulary and leaves most of `tokenizer.ggml.pre` aside, so that text
becomes other tokens than the model was trained with. Key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lab.base.pretokenizers import PRE_TOKENIZERS, Split, pre_tokenizer
from lora_lab.errors import BaseModelError, nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of tokens that are found whole in a text
_SPACE = "\u2581"  # how sentencepiece writes a blank
_KINDS = {"gpt2": "byte-level BPE", "llama": "sentencepiece BPE", "gemma4": "BPE over letters"}
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding", "mask_token": "mask"}
# Files made by older conversions give these an ordinary type; llama.cpp takes them as control tokens nevertheless.
_ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>", "[EOT]",
    "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|eom_id|>",
)  # fmt: skip
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")
_WAY_OUT = "Give the folder that the model was published in as model.path: its tokenizer.json says how it splits."


def build(file: Path, told: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer of a GGUF file, with its chat templates by name, and the ids of the tokens that end an answer.

    Args:
        file: for messages.
        told: what the file's head says, see `gguf.read_head`.

    Raises:
        BaseModelError: a vocabulary of a kind, or a way to split, that is not known here; or one that does not fit together.
    """
    from transformers import PreTrainedTokenizerFast

    told = {key.removeprefix("tokenizer."): value for key, value in told.items()}
    tokens = told.get("ggml.tokens")
    if not tokens:
        raise BaseModelError(f"model.path={file}: this GGUF file has no vocabulary (tokenizer.ggml.tokens). {_WAY_OUT}")
    backend = _backend(file, told)
    named = {name: _token(file, told, key) for name, key in _NAMED.items()}
    special = _whole(told, tokens, special=True, named=[one for one in named.values() if one])
    backend.add_special_tokens(special)
    backend.add_tokens(_whole(told, tokens, special=False))
    if backend.get_vocab_size() != len(tokens):
        raise BaseModelError(
            f"model.path={file}: {len(tokens):,} tokens are listed and {backend.get_vocab_size():,} are different ones. {_WAY_OUT}"
        )
    begins = named["bos_token"] is not None and _begins(file, told)
    ends = named["eos_token"] is not None and _flag(told, "ggml.add_eos_token")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: token for name, token in named.items() if token is not None},
        extra_special_tokens=[token for token in special if token.content not in named.values()],
        add_bos_token=begins,
        add_eos_token=ends,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _templates(told)
    stops = [told.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return tokenizer, list(dict.fromkeys(one for one in stops if one is not None and one < len(tokens)))


def _backend(file: Path, told: dict[str, Any]) -> Tokenizer:
    kind = told.get("ggml.model")
    if kind not in _KINDS:
        known = ", ".join(f"{name} ({what})" for name, what in _KINDS.items())
        raise BaseModelError(
            f"model.path={file}: tokenizer.ggml.model={kind!r} is a kind of vocabulary that is not read from GGUF files; known: {known}. "
            f"{_WAY_OUT}"
        )
    if kind == "gpt2":
        return _byte_level(told, _split(file, told.get("ggml.pre")))
    if kind == "gemma4":
        return _letters(told["ggml.tokens"], _merges(told), prefix=False)
    if _flag(told, "ggml.remove_extra_whitespaces"):
        raise BaseModelError(
            f"model.path={file}: tokenizer.ggml.remove_extra_whitespaces=true: blanks would be dropped from texts, and programs differ in how. "
            f"{_WAY_OUT}"
        )
    tokens = _respelled(told["ggml.tokens"], told["general.architecture"])
    return _letters(tokens, _merges_by_score(tokens, told), prefix=_flag(told, "ggml.add_space_prefix", default=True))


def _split(file: Path, name: str | None) -> Split:
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    said = (
        "says nothing of how it splits a text (tokenizer.ggml.pre)"
        if name is None
        else f"tokenizer.ggml.pre={name!r}: a way to split a text that is not known here.{nearest(str(name), list(PRE_TOKENIZERS), cutoff=0.8)}"
    )
    raise BaseModelError(
        f"model.path={file}: {said} Guessing would train on other tokens than the model knows. {_WAY_OUT} Known: "
        f"{', '.join(sorted(PRE_TOKENIZERS))}."
    )


def _begins(file: Path, told: dict[str, Any]) -> bool:
    """Whether the BOS token is put before every text."""
    kind = told["ggml.model"]
    if kind == "gemma4":
        return False  # its chat template writes it, and the published tokenizer adds none; llama.cpp does, whatever the file says
    default = _split(file, told.get("ggml.pre")).begins if kind == "gpt2" else True
    return _flag(told, "ggml.add_bos_token", default)


def _byte_level(told: dict[str, Any], split: Split) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {token: number for number, token in enumerate(told["ggml.tokens"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges(told), ignore_merges=split.whole_words))
    backend.pre_tokenizer = pre_tokenizer(split)
    backend.decoder = decoders.ByteLevel()
    return backend


def _letters(tokens: list[str], merges: list[tuple[str, str]], prefix: bool) -> Tokenizer:
    """BPE over a whole text, blanks written as U+2581, with bytes for what has no token.

    Args:
        prefix: whether a blank is put before a text, and after each token that is found whole in it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = next((one for one in ("<unk>", "<UNK>") if one in tokens), None)
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blanks = [normalizers.Replace(" ", _SPACE)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *blanks]) if prefix else blanks[0]
    stripped = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return backend


def _merges(told: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs in the order of the file; the first of two parts is never empty, and may itself begin with a blank."""
    pairs = []
    for merge in told.get("ggml.merges", ()):
        at = merge.find(" ", 1)
        pairs.append((merge[:at], merge[at + 1 :]))
    return pairs


def _respelled(tokens: list[str], architecture: str) -> list[str]:
    """Gemma's tokens of several blanks stand in the file as blanks, and in its published vocabulary as U+2581."""
    if not architecture.startswith("gemma"):
        return tokens
    return [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]


def _merges_by_score(tokens: list[str], told: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary stands for: of all pairs that make a token, the best scored first.

    Gemma's scores do not follow its merges; the order of its tokens does.
    """
    from transformers.tokenization_utils_base import generate_merges

    scores = told["ggml.scores"]
    if told["general.architecture"].startswith("gemma"):
        scores = [-number for number in range(len(tokens))]
    kinds = told.get("ggml.token_type") or [1] * len(tokens)
    merged = {
        token: score for token, score, kind in zip(tokens, scores, kinds, strict=False) if kind in (1, _USER_DEFINED)
    }
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return generate_merges(vocabulary, merged)


def _whole(told: dict[str, Any], tokens: list[str], special: bool, named: list[str] | None = None) -> list[Any]:
    """Tokens that are found whole in a text before it is split: control tokens (special), or those that a user defined."""
    from tokenizers import AddedToken

    kinds = told.get("ggml.token_type") or [1] * len(tokens)
    found = [
        number
        for number, kind in enumerate(kinds[: len(tokens)])
        if kind in ((_UNKNOWN, _CONTROL) if special else (_USER_DEFINED,))
    ]
    texts = [tokens[number] for number in found]
    if special:
        known = set(tokens)
        texts += [*(named or ()), *(end for end in _ENDS if end in known)]
    texts = list(dict.fromkeys(texts))
    if told["ggml.model"] == "llama":
        texts = _respelled(texts, told["general.architecture"])
    swallows = "phi-3" in str(told.get("general.name")).lower().replace(
        "phi3", "phi-3"
    )  # published so; no key of GGUF says it
    return [
        AddedToken(text, special=special, normalized=False, rstrip=swallows and text not in _PHI3_KEEPS)
        for text in texts
        if text
    ]


def _token(file: Path, told: dict[str, Any], key: str) -> str | None:
    number = told.get(f"ggml.{key}_token_id")
    if number is None:
        return None
    if number >= len(told["ggml.tokens"]):
        raise BaseModelError(
            f"model.path={file}: tokenizer.ggml.{key}_token_id={number}, and there are {len(told['ggml.tokens']):,} tokens. {_WAY_OUT}"
        )
    return told["ggml.tokens"][number]


def _flag(told: dict[str, Any], key: str, default: bool = False) -> bool:
    return bool(told.get(key, default))


def _templates(told: dict[str, Any]) -> Any:
    """The chat template; several by name, where the file has several."""
    own, prefix = told.get("chat_template"), "chat_template."
    others = {key.removeprefix(prefix): text for key, text in told.items() if key.startswith(prefix)}
    if not others:
        return own
    return ({} if own is None else {"default": own}) | others
