"""lora_lab: fine-tune a frozen, quantized base model with small adapters, and merge them back with proof."""

__version__ = "0.1.0"
