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
