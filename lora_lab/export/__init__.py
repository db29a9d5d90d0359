"""What is made of a trained adapter for others to load, each proved in the loader that it is for."""
