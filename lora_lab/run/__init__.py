"""A run: its folder, everything that is checked before it starts, and its stages from top to bottom."""
