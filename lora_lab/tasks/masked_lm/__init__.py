"""Masked tokens are guessed."""
