"""A base's architecture in small: true in shape, with few layers, few tokens and random weights.

What llama.cpp makes of an architecture is seen from such a model in seconds, before anything is trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_lab.base import load
from lora_lab.base.load import ModelKind

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 320
LARGE, TOO_LARGE = 2**28, 2**29  # parameters above which feed-forward parts are narrowed, and above which none is made
_WIDTH = 256  # of a feed-forward part that is narrowed
_MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # others, such as pictures', are no token of `ids`
_SPREAD = 3.0  # standard deviation of the logits: a trained model's are spread about so, and equal ones tell nothing
_PER_LAYER = re.compile(r"layer|types|pattern|intermediate_size")
_FEED_FORWARD = re.compile(r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|block_ff_dim)")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def model(base: Path) -> tuple[PreTrainedModel | None, bool]:
    """A small model in float32 of the base's architecture; None where its shape leaves none that is small.

    Returns:
        The model, and whether its feed-forward parts are narrower than the base's, which some families do not allow.

    Raises:
        BaseModelError: transformers builds none from the base's configuration.
        Exception: whatever transformers raises where it builds none that is small.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    whole = load.skeleton(base, ModelKind())
    config = _cut(load.model_config(base, ModelKind()), whole)
    narrowed = _parameters(config) > LARGE
    if narrowed:
        _narrow(config)
    if _parameters(config) > TOO_LARGE:
        return None, narrowed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
        for one in made.parameters():  # experts would be chosen among equals, and parts that give nothing hide faults
            if one.dim() > 1 and not one.any():
                torch.nn.init.normal_(one, std=0.1)
    _spread(made)
    return made, narrowed


def ids(count: int = 24) -> torch.Tensor:
    """Some tokens [1, count]."""
    return torch.randint(3, 256, (1, count), generator=torch.Generator().manual_seed(0))


def _parameters(config: PretrainedConfig) -> int:
    import transformers

    with torch.device("meta"):
        return sum(one.numel() for one in transformers.AutoModelForCausalLM.from_config(config).parameters())


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)


def _cut(config: PretrainedConfig, whole: PreTrainedModel) -> PretrainedConfig:
    """Few tokens, and as few layers as there are kinds of them: two at least, and each with the first that are like it."""
    text = config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    lists = {
        name: value for name, value in vars(text).items() if isinstance(value, list) and _per_layer(name, value, layers)
    }
    kinds = [
        repr(
            (
                [(name, tuple(one.shape)) for name, one in module.named_parameters()],
                [value[number] for value in lists.values()],
            )
        )
        for number, module in enumerate(_layers(whole, layers))
    ]
    fewest = next((count for count in range(2, layers) if set(kinds[:count]) == set(kinds)), layers)
    for part in _parts(config):
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, VOCABULARY)
        for name, value in list(vars(part).items()):
            if name.endswith("token_id") and name != "decoder_start_token_id" and isinstance(value, (int, list)):
                setattr(part, name, _MARKS.get(name, VOCABULARY - 1))
    for name, value in lists.items():
        setattr(text, name, value[:fewest])
    text.num_hidden_layers = fewest
    if isinstance(getattr(text, "initializer_range", None), float):  # else attention would see all positions alike
        text.initializer_range = max(text.initializer_range, text.hidden_size**-0.5)
    return config


def _per_layer(name: str, value: list[Any], layers: int) -> bool:
    return len(value) == layers and bool(_PER_LAYER.search(name))


def _layers(whole: PreTrainedModel, count: int) -> torch.nn.ModuleList:
    """The list of as many modules that holds the most parameters."""
    found = [one for one in whole.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == count]
    return max(found, key=lambda one: sum(parameter.numel() for parameter in one.parameters()))


def _narrow(config: PretrainedConfig) -> None:
    """Feed-forward parts, whose width nothing else depends on, and fewer experts."""
    for part in _parts(config):
        if hasattr(part, "num_attention_heads"):  # else it may be the width of a state
            for name, value in list(vars(part).items()):
                if not _FEED_FORWARD.fullmatch(name):
                    continue
                if isinstance(value, int):
                    setattr(part, name, min(value, _WIDTH))
                elif isinstance(value, list):  # of each layer
                    setattr(part, name, [min(one, _WIDTH) for one in value])
        groups = getattr(part, "n_group", None) or 1
        chosen = max((getattr(part, name, None) or 1 for name in _CHOSEN), default=1)
        for name in _EXPERTS:
            if isinstance(value := getattr(part, name, None), int) and value > 0:
                setattr(part, name, min(value, groups * max(2, -(-2 * chosen // groups))))


@torch.no_grad()
def _spread(made: PreTrainedModel) -> None:
    """Give the logits the spread of a trained model's, by the output weights."""
    for _ in range(2):
        logits = made(input_ids=ids()).logits
        made.get_output_embeddings().weight.mul_(_SPREAD / logits.std().clamp_min(1e-6))
