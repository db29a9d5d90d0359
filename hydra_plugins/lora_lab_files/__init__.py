"""Hydra's way to the user's own groups and recipes: a search path of lora_lab://FOLDER."""
