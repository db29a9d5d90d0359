"""What a run can be told: the sections, how Hydra composes them, where a value came from, what a recipe may not say."""
