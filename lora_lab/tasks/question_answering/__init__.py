"""Answers that are found in a context."""
