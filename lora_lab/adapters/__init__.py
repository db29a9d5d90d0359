"""Adapter families: one file each, a dataclass with peft's field names and a `peft_config()`."""
