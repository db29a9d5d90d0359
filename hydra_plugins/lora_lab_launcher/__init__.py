"""Hydra's way to lora_lab's cohorts: hydra/launcher=cohort."""
