"""Many runs at once: which of them can share a base, how they train on it together, and which of them is best."""
