"""A class, or any number of them, for a text or a pair."""
