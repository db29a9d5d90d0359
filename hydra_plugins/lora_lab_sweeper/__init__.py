"""Hydra's way to lora_lab's search: hydra/sweeper=optuna_cohort."""
