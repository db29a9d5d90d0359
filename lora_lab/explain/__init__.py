"""Why a trained model says what it says: tokens, layers, and training rows. See `run/inspection.py`."""
