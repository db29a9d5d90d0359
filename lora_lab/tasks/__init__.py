"""Objectives: one file each with the loss, the metrics and what a row becomes."""

from lora_lab.tasks.causal_lm import CausalLM

TASKS = {"causal_lm": CausalLM}
