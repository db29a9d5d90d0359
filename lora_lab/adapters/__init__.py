"""Adapter methods: one file each, a section of the configuration that answers for itself (see `base.py`). Nothing here imports torch."""

from lora_lab.adapters.base import AdapterSection
from lora_lab.adapters.methods.bottleneck import BottleneckAdapter
from lora_lab.adapters.methods.lora import LoraAdapter
from lora_lab.adapters.methods.p_tuning import PTuningAdapter
from lora_lab.adapters.methods.prefix_tuning import PrefixTuningAdapter
from lora_lab.adapters.methods.prompt_tuning import PromptTuningAdapter
from lora_lab.adapters.methods.vera import VeraAdapter

ADAPTERS: dict[str, type[AdapterSection]] = {
    "lora": LoraAdapter,
    "vera": VeraAdapter,
    "bottleneck": BottleneckAdapter,
    "prompt_tuning": PromptTuningAdapter,
    "prefix_tuning": PrefixTuningAdapter,
    "p_tuning": PTuningAdapter,
}

# peft's types that are not trained here: a clause why not, and the nearest that is.
NOT_TRAINED: dict[str, str] = {
    "XLORA": "it trains how adapters that exist already are mixed at each token, and no adapter of its own (nearest: merge.adapters)",
    "POLY": "it needs the number of a task beside each row, which rows have not got (nearest: adapter=lora)",
    "MULTITASK_PROMPT_TUNING": "it needs the number of a task beside each row, which rows have not got (nearest: adapter=prompt_tuning)",
    "CPT": "it learns by a loss of its own over the tokens of examples in its prompt, each marked by its kind (nearest: adapter=prompt_tuning)",
    "ADAPTION_PROMPT": "peft puts it into the attention of Llama, Mistral and GPT-2 alone (nearest: adapter=prefix_tuning)",
    "SHADOW": "it trains a second network beside the base, whose own loss is part of the model's (nearest: adapter=parallel)",
    "CARTRIDGE": "it is a prefix that stands for one long text and learns what the base says of that text (nearest: adapter=prefix_tuning)",
}


def reason_against(name: object) -> str:
    """Why a type of peft's is not trained here; empty if nothing is known of it."""
    return NOT_TRAINED.get(str(name).upper(), "")
