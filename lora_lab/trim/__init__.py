"""A smaller base: tokens and layers that are not needed go, and what is left says what it said."""
