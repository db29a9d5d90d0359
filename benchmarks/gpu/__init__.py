"""What a card is measured with: `python -m benchmarks.gpu`, see `__main__.py`."""
