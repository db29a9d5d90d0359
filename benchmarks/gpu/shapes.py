"""Bases of true shape with random weights, made on the spot, and rows of exact length: nothing is downloaded.

Shapes are those of the models' published `config.json`. A base in 4 bits is written as bitsandbytes publishes one, a layer at a time, so
that a model of 8 billion weights needs neither 32 GB of memory nor 16 GB of disk.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

_LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_QWEN_3 = {
    "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip


def _qwen_3(hidden: int, wide: int, layers: int, heads: int, tied: bool = False) -> tuple[str, dict[str, Any]]:
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers}
    return "Qwen3Config", {**_QWEN_3, **sizes, "num_attention_heads": heads, "tie_word_embeddings": tied}


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "LlamaConfig",
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
            "rope_parameters": _LLAMA_3_ROPE,
        },
    ),
    "qwen3-4b": _qwen_3(2560, 9728, 36, 32, tied=True),
    "qwen3-14b": _qwen_3(5120, 17408, 40, 40),
    "qwen3-32b": _qwen_3(5120, 25600, 64, 64),
    "tiny": (
        "LlamaConfig",
        {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
_SHARD = 2 * 10**9  # bytes of a file, at most, beside its last tensor
_LIBRARIES = 2**30  # bytes that torch and the others take in main memory
_SPREAD = 0.02  # standard deviation of the weights, the default of transformers' initializer
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def config_of(shape: str, quant: str) -> PretrainedConfig:
    """transformers' configuration of a shape, as it is published.

    Args:
        quant: none or nf4.
    """
    import torch
    import transformers

    kind, settings = SHAPES[shape]
    config = getattr(transformers, kind)(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    config.architectures = [kind.replace("Config", "ForCausalLM")]
    config.dtype = torch.bfloat16
    if quant == "nf4":
        config.quantization_config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )  # fmt: skip
    return config


def write_base(shape: str, folder: Path, quant: str, device: str = "cpu", weights: bool = True) -> int:
    """Write a base with its tokenizer; the bytes of its weights.

    Args:
        quant: none or nf4.
        device: where its weights are drawn and quantized.
        weights: False: all but the weights, which is what a plan needs.
    """
    folder.mkdir(parents=True)
    config_of(shape, quant).save_pretrained(folder)
    _tokenizer(folder)
    return _write_weights(shape, folder, quant, device) if weights else 0


def _write_weights(shape: str, folder: Path, quant: str, device: str) -> int:
    from safetensors.torch import save_file

    shards: list[dict[str, torch.Tensor]] = [{}]
    index, total, held = {}, 0, 0
    for name, tensor in _tensors(shape, quant, device):
        if held > _SHARD:
            save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors", {"format": "pt"})
            shards[-1].clear()
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        index[name] = f"model-{len(shards):05}.safetensors"
        total, held = total + tensor.nbytes, held + tensor.nbytes
    save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors", {"format": "pt"})
    described = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(described))
    return total


def _tensors(shape: str, quant: str, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the checkpoint, one weight at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config_of(shape, "none"))
    head = model.get_output_embeddings()  # type: ignore[operator]
    draw = torch.Generator(device).manual_seed(0)
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            if module is head and model.config.tie_word_embeddings:  # type: ignore[union-attr]
                continue
            if parameter.dim() == 1:  # of a norm
                yield f"{path}.{own}", torch.ones(parameter.shape, dtype=torch.bfloat16)
                continue
            weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(
                std=_SPREAD, generator=draw
            )
            if quant == "nf4" and isinstance(module, torch.nn.Linear) and module is not head:
                yield from _in_4_bits(f"{path}.{own}", weight)
            else:
                yield f"{path}.{own}", weight.cpu()


def _in_4_bits(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """What bitsandbytes' layers are loaded from."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    yield name, packed.cpu()
    for part, tensor in state.as_dict(packed=True).items():
        yield f"{name}.{part}", tensor.cpu()


# -- tokens and rows ----------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """One token for each byte, so that a text of N letters has N tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: place for place, token in enumerate((*_SPECIAL, *letters))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(_SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=_SPECIAL[1], eos_token=_SPECIAL[2], pad_token=_SPECIAL[0], unk_token=_SPECIAL[0]
    )  # fmt: skip
    tokenizer.chat_template = _CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer


_BESIDE = len("<user\n<\n<assistant\n<\n".replace("<", "."))  # tokens of the template, each special one a letter here


def write_rows(file: Path, tokens: int, count: int, seed: int = 0) -> Path:
    """Rows of exactly so many tokens, half of them the prompt's; no two are alike.

    Raises:
        ValueError: the template alone has as many.
    """
    letters = tokens - _BESIDE
    if letters < 2:
        raise ValueError(f"rows of {tokens} tokens: the chat template has {_BESIDE} of its own")
    draw, rows = random.Random(seed), []
    for _ in range(count):
        text = "".join(draw.choices(_LETTERS, k=letters))
        rows.append({"prompt": text[: letters // 2], "completion": text[letters // 2 :]})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def weights_of(shape: str, quant: str) -> int:
    """Bytes of a base on disk, roughly: 0.52 or 2 for a weight of its layers, 2 for one of embeddings and head."""
    _, own = SHAPES[shape]
    hidden, heads = own["hidden_size"], own["num_attention_heads"]
    attention = 2 * hidden * own.get("head_dim", hidden // heads) * (heads + own["num_key_value_heads"])
    linear = own["num_hidden_layers"] * (attention + 3 * hidden * own["intermediate_size"])
    embedded = own["vocab_size"] * hidden * (1 if own["tie_word_embeddings"] else 2)
    return round((0.52 if quant == "nf4" else 2) * linear) + 2 * embedded


def written_in(shape: str) -> int:
    """Bytes of main memory in which a base is written in 4 bits, roughly: libraries, a file, and the largest tensor beside it."""
    _, own = SHAPES[shape]
    return _LIBRARIES + min(weights_of(shape, "nf4"), _SHARD) + 2 * own["vocab_size"] * own["hidden_size"]
