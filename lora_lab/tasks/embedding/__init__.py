"""A vector for a text, so that texts that belong together lie close."""
