"""Published benchmarks on a model as it was trained."""
