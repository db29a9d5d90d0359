"""A target text for a source text, by encoder and decoder."""
