"""Language modelling of conversations: the answers are learned."""
