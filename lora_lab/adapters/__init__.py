"""Adapter methods: one file each, a section of the configuration with peft's field names that answers what the method can do."""

from lora_lab.adapters.lora import LoraAdapter

ADAPTERS = {"lora": LoraAdapter}
