"""Fold an adapter back into its base, and prove that the result is the model that was trained."""
