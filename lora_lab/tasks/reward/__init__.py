"""A score for a conversation, from pairs of answers."""
